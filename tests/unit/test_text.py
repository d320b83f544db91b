"""Text assembly: any split of any text comes out whole, and no stop string ever does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.core.reasoning import THINK
from shimmy_jupyter.core.text import TextAssembler
from shimmy_jupyter.types import Reasoning


def text_of(parts: list[tuple[bool, str]]) -> str:
    assert not any(reasoning for reasoning, _ in parts)
    return "".join(text for _, text in parts)


def assemble(data: bytes, cuts: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    assembler = TextAssembler(stop)
    edges = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    texts = [text_of(assembler.push(data[a:b])) for a, b in zip(edges, edges[1:], strict=False)]
    return [*texts, text_of(assembler.finish())], assembler.stopped


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
    assert [text_of(assembler.push(p)) for p in (b"x E", b"N", b"d")] == ["x ", "", "ENd"]
    assert [text_of(assembler.push(p)) for p in (b" EN", b"D", b"more")] == [" ", "", ""]
    assert assembler.stopped
    assert assembler.finish() == []


def test_half_a_character_at_the_end_is_not_text() -> None:
    assembler = TextAssembler()
    assert assembler.push("é".encode()[:1]) == []
    assert assembler.finish() == []


def test_held_text_is_given_at_the_end() -> None:
    assembler = TextAssembler(("END",))
    assert assembler.push(b"the EN") == [(False, "the ")]
    assert assembler.finish() == [(False, "EN")]


def test_reasoning_is_apart_and_no_stop_string_ends_it() -> None:
    assembler = TextAssembler(("END",), Reasoning(THINK))
    pushed = [assembler.push(p) for p in (b"<think>", b"a END", b"</think>", b"b E", b"ND c")]
    assert pushed == [[], [(True, "a END")], [(True, "")], [(False, "b ")], []]
    assert assembler.stopped
    assert assembler.finish() == []


def test_where_reasoning_ends_in_one_piece_with_the_answer() -> None:
    assembler = TextAssembler((), Reasoning(THINK, inside=True))
    assert assembler.thinking
    assert assembler.push("é</think>x".encode()) == [(True, "é"), (False, "x")]
    assert not assembler.thinking


def test_what_is_held_back_comes_at_the_end() -> None:
    assembler = TextAssembler(("END",), Reasoning(THINK))
    assert assembler.push(b"<thin") == []
    assert assembler.finish() == [(False, "<thin")]
    assembler = TextAssembler(("END",), Reasoning(THINK, inside=True))
    assert assembler.push(b"a</th") == [(True, "a")]
    assert assembler.finish() == [(True, "</th")]
    assembler = TextAssembler(("END",), Reasoning(THINK))
    assert assembler.push(b"aEN") == [(False, "a")]
    assert assembler.finish() == [(False, "EN")]


def test_what_a_constraint_holds_is_shown_as_it_is() -> None:
    assembler = TextAssembler((), Reasoning(THINK, inside=True))
    pushed = [assembler.push(b"why</think>"), assembler.push(b"\n")]
    pushed += [assembler.push(piece, as_is=True) for piece in (b" yes", b"<think>", b"</think> ")]
    assert pushed == [
        [(True, "why"), (True, "")],
        [],
        [(False, " yes")],
        [(False, "<think>")],
        [(False, "</think> ")],
    ]
    assembler = TextAssembler((), Reasoning(THINK))
    assert assembler.push(b"<think>x</think>", as_is=True) == [(False, "<think>x</think>")]
    assert not assembler.thinking
