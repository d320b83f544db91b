"""Text assembly: any split of any text comes out whole, and no stop string ever does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.core.text import TextAssembler


def assemble(data: bytes, cuts: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    assembler = TextAssembler(stop)
    edges = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    texts = [assembler.push(data[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    return [*texts, assembler.finish()], assembler.stopped


@given(st.text(), st.lists(st.integers(0, 1000)))
def test_any_split_of_bytes_comes_out_whole(text: str, cuts: list[int]) -> None:
    texts, stopped = assemble(text.encode(), cuts)
    assert "".join(texts) == text
    assert not stopped


stops = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


@given(st.text("abcd"), st.lists(st.integers(0, 1000)), stops)
def test_stop_ends_where_the_first_one_begins(
    text: str, cuts: list[int], stop: tuple[str, ...]
) -> None:
    texts, stopped = assemble(text.encode(), cuts, stop)
    shown = "".join(texts)
    assert text.startswith(shown)
    assert not any(s in shown for s in stop)
    assert stopped == any(s in text for s in stop)
    if not stopped:
        assert shown == text


@given(st.binary())
def test_any_bytes_are_survived(data: bytes) -> None:
    shown = "".join(assemble(data, [])[0])
    assert data.decode(errors="replace").startswith(shown)


def test_held_back_until_it_is_clear() -> None:
    assembler = TextAssembler(("END",))
    assert [assembler.push(p) for p in (b"x E", b"N", b"d")] == ["x ", "", "ENd"]
    assert [assembler.push(p) for p in (b" EN", b"D", b"more")] == [" ", "", ""]
    assert assembler.stopped
    assert assembler.finish() == ""


def test_half_a_character_at_the_end_is_not_text() -> None:
    assembler = TextAssembler()
    assert assembler.push("é".encode()[:1]) == ""
    assert assembler.finish() == ""


def test_held_text_is_given_at_the_end() -> None:
    assembler = TextAssembler(("END",))
    assert assembler.push(b"the EN") == "the "
    assert assembler.finish() == "EN"
