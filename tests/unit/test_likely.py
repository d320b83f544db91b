"""How likely each token was, in colours, in titles, in a table and in a terminal.

Cases: every step of the scale and its edges; characters split over tokens, anywhere, whole at last or never;
spaces, line breaks, tabs and what is not seen; hostile tokens and names; no tokens, one, too many, too large;
log-probabilities of nothing, of minus infinity, above zero, not a number; what is no token; contrast in both themes.
"""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shimmy_jupyter.errors import InvalidValue
from shimmy_jupyter.notebook.likely import (
    LARGEST,
    MOST_ROWS,
    MOST_TOKENS,
    STYLES,
    Likely,
    Token,
    scores,
)

from .test_display import ATTACKS, TURNS
from .test_highlight import contrast

ATTRIBUTES = {
    "div": {"class", "style"}, "p": set(), "small": {"style"}, "span": {"style", "title"}, "details": set(),
    "summary": set(), "table": set(), "thead": set(), "tbody": set(), "tr": set(), "th": {"scope"}, "td": set(),
}  # fmt: skip


class Inspector(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.spans: list[tuple[str, str, str]] = []
        """Style, title, text."""
        self.cells: list[str] = []
        self.text = ""
        self._open = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: said or "" for name, said in attrs}
        assert set(found) <= ATTRIBUTES[tag], (tag, found)
        style = found.get("style", "")
        if tag == "span":
            assert style in STYLES | {""}
            if "title" in found:
                self.spans.append((style, found["title"], ""))
        else:
            assert style in {"", "opacity:0.7", "white-space:pre-wrap;line-height:1.8"}
        assert found.get("class", "shimmy-likely tex2jax_ignore mathjax_ignore") == (
            "shimmy-likely tex2jax_ignore mathjax_ignore"
        )
        self._open = tag
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open == "span" and self.spans:
            style, title, text = self.spans[-1]
            self.spans[-1] = (style, title, text + data)
        if self._open == "td":
            self.cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._open = ""


def entry(
    piece: bytes | str, logprob: float = -0.1, *top: tuple[bytes | str, float]
) -> dict[str, Any]:
    raw = piece.encode() if isinstance(piece, str) else piece
    others = [{k: v for k, v in entry(p, of).items() if k != "top_logprobs"} for p, of in top]
    return {
        "token": raw.decode("utf-8", "replace"),
        "bytes": list(raw),
        "logprob": logprob,
        "top_logprobs": others,
    }


def look(*pieces: bytes | str, logprob: float = -0.1) -> Inspector:
    return Inspector(Likely.of([entry(piece, logprob) for piece in pieces]).to_html())


class TestScale:
    @pytest.mark.parametrize(
        ("probability", "said"),
        [
            (1.0, ""), (0.9001, ""), (0.8999, "0.16"), (0.5001, "0.16"), (0.4999, "0.32"), (0.1001, "0.32"),
            (0.0999, "0.48"), (0.0101, "0.48"), (0.0099, "0.62"), (1e-9, "0.62"), (0.0, "0.62"),
        ],
    )  # fmt: skip
    def test_steps(self, probability: float, said: str) -> None:
        logprob = math.log(probability) if probability else -9999.0
        ((style, _, _),) = look("a", logprob=logprob).spans
        assert said in style
        assert bool(style) == bool(said)
        assert ("border-bottom" in style) == (probability < 0.1), "not by colour alone"

    def test_styles_survive_jupyterlabs_sanitizer(self) -> None:
        for style in STYLES:
            colour, *border = style.split(";")
            assert re.fullmatch(r"background-color:rgba\(\d{1,3},\d{1,3},\d{1,3},0?\.\d+\)", colour)
            assert not border or re.fullmatch(r"border-bottom:\dpx (solid|double) #888", border[0])

    @pytest.mark.parametrize(
        ("page", "text"), [(255, (0x21,) * 3), (0x11, (255,) * 3), (0x1E, (0xD4,) * 3)]
    )
    def test_text_reads_on_every_step_in_both_themes(
        self, page: int, text: tuple[int, ...]
    ) -> None:
        before = 0.0
        for style in sorted(STYLES):
            *colour, alpha = map(float, re.findall(r"[\d.]+", style)[:4])
            mixed = tuple(round(alpha * one + (1 - alpha) * page) for one in colour)
            assert contrast(mixed, text) >= 4.5
            assert contrast(mixed, (page,) * 3) > before, "lightness alone tells the steps apart"
            before = contrast(mixed, (page,) * 3)

    def test_a_legend_names_every_step(self) -> None:
        text = look("a").text
        for name in ("90% and more", "50 to 90%", "10 to 50%", "1 to 10%", "below 1%"):
            assert name in text


class TestPieces:
    def test_a_character_over_tokens_is_one(self) -> None:
        page = look("a", b"\xf0\x9f", b"\x8e", b"\x89", "b", logprob=math.log(0.5))
        assert [text for _, _, text in page.spans] == ["a", "🎉", "b"]
        _, title, _ = page.spans[1]
        assert title.split("\n") == [
            "12.5% “🎉”, of 3 tokens:",
            "2. 50% bytes f0 9f",
            "3. 50% bytes 8e",
            "4. 50% bytes 89",
        ]
        assert "0.32" in page.spans[1][0]

    @given(st.text(alphabet="aé漢🎉", min_size=2), st.data())
    @settings(max_examples=200)
    def test_wherever_it_is_cut(self, text: str, data: st.DataObject) -> None:
        raw = text.encode()
        cuts = sorted(data.draw(st.sets(st.integers(1, len(raw) - 1))))
        parts = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
        page = look(*parts)
        assert "".join(said for _, _, said in page.spans) == text
        assert "\ufffd" not in page.text

    def test_what_never_is_a_character(self) -> None:
        assert [said for _, _, said in look("a", b"\xf0\x9f").spans] == ["a", "\ufffd"]
        assert [said for _, _, said in look(b"\xff", "b").spans] == ["\ufffd", "b"]
        page = look(*[b"\xe2"] * 100)
        assert len(page.spans) == 13, "no more than eight tokens are taken for one character"
        assert len(look(b"\xe2", *[b""] * 20, "a").spans) < 20

    def test_without_bytes(self) -> None:
        one = {"token": "é", "logprob": -1.0, "bytes": None, "top_logprobs": []}
        found = Likely.of([one, {"token": "x", "logprob": 0}])
        assert [token.piece for token in found.tokens] == ["é".encode(), b"x"]

    def test_white_space_is_seen(self) -> None:
        page = look(" the", "\n", "\n\n", " ", "\t", "", "\u200b", "\u00a0", "a\u202eb", " \n ")
        said = [text for _, _, text in page.spans]
        assert said == [
            " the",
            "↵\n",
            "↵\n↵\n",
            "␣",
            "⇥",
            "∅",
            "⟨U+200B⟩",
            "⟨U+00A0⟩",
            "a⟨U+202E⟩b",
            "␣↵\n␣",
        ]
        assert "“␣the”" in page.spans[0][1]
        assert "“↵”" in page.spans[1][1]

    def test_titles_have_what_else_was_likely(self) -> None:
        tops = [(" dog", math.log(0.2)), (" cat", math.log(0.6)), (b"\xe2\x82", math.log(0.0001))]
        (span,) = Inspector(Likely.of([entry(" cat", math.log(0.6), *tops)]).to_html()).spans
        assert span[1].split("\n") == [
            "1. 60% “␣cat”",
            "    60% “␣cat”",
            "    20% “␣dog”",
            "    <0.1% bytes e2 82",
        ]
        many = Likely.of([entry("a", -1, *[(str(n), -n - 1.0) for n in range(20)])])
        assert Inspector(many.to_html()).spans[0][1].count("\n") == 10

    def test_a_table_has_it_too(self) -> None:
        found = Likely.of(
            [
                entry("a", math.log(0.6), ("a", math.log(0.6)), ("\nb", math.log(0.2))),
                entry(b"\xe2"),
            ]
        )
        assert Inspector(found.to_html()).cells == [
            "1",
            "“a”",
            "60%",
            "“↵b” 20%",
            "2",
            "bytes e2",
            "90.5%",
            "",
        ]


class TestFigures:
    def test_perplexity_and_mean(self) -> None:
        found = Likely.of([entry("a", math.log(0.5)), entry("b", math.log(0.125))], model="m")
        assert found.perplexity == pytest.approx(4.0)
        assert found.mean_probability == pytest.approx(0.3125)
        assert found.caption == "m · 2 tokens · perplexity 4 · mean probability 31.2%"

    @given(st.lists(st.floats(-1e4, 0), min_size=1, max_size=50))
    def test_in_their_ranges(self, logprobs: list[float]) -> None:
        found = Likely.of([entry("a", one) for one in logprobs])
        assert 1 <= found.perplexity <= math.inf
        assert 0 <= found.mean_probability <= 1 + 1e-12
        Inspector(found.to_html())

    def test_no_tokens(self) -> None:
        found = Likely.of([])
        assert math.isnan(found.perplexity)
        assert math.isnan(found.mean_probability)
        assert found.to_text() == "[0 tokens]"
        assert Inspector(found.to_html()).spans == []

    def test_edges(self) -> None:
        assert Likely.of([entry("a", 1e-9)]).perplexity == 1.0
        assert Likely.of([entry("a", -math.inf)]).perplexity == math.inf
        assert Likely.of([entry("a", -9999.0)]).mean_probability == 0.0

    @pytest.mark.parametrize(
        "wrong",
        [{}, {"token": "a"}, {"token": "a", "logprob": None}, {"token": "a", "logprob": math.nan}, "x",
         {"token": "a", "logprob": -1, "bytes": [300]}, {"token": "a", "logprob": -1, "top_logprobs": [{}]}],
    )  # fmt: skip
    def test_what_is_no_token(self, wrong: Any) -> None:
        with pytest.raises(InvalidValue, match="a token with its log-probability") as caught:
            Likely.of([entry("a"), wrong])
        assert caught.value.param == "logprobs[1]"


class TestBounds:
    def test_too_many_tokens(self) -> None:
        found = Likely.of([entry("a")] * (MOST_TOKENS + 1))
        page = Inspector(found.to_html())
        assert len(page.spans) == MOST_TOKENS
        assert f"the first {MOST_TOKENS} of {MOST_TOKENS + 1} are shown" in page.text
        assert len(page.cells) == 4 * MOST_ROWS
        assert f"the first {MOST_ROWS} of {MOST_TOKENS + 1} are shown" in page.text
        assert found.to_text().endswith(f"[the first {MOST_ROWS} of {MOST_TOKENS + 1} tokens]")
        assert len(found.to_text().splitlines()) == MOST_ROWS + 2
        assert "are shown" not in look(*["a"] * MOST_ROWS).text

    def test_too_large(self) -> None:
        wide = [entry("<" * 300, -1.0, *[("&" * 300, -float(n)) for n in range(1, 21)])] * 2000
        found = Likely.of(wide)
        assert len(found.to_html()) <= LARGEST + 5_000
        page = Inspector(found.to_html())
        told = re.search(r"the first (\d+) of 2000 are shown", page.text)
        assert told is not None
        assert int(told[1]) == len(page.spans) > 10
        assert page.spans[0][2] == "<" * 200 + "…"

    def test_a_token_of_a_megabyte(self) -> None:
        found = Likely.of([entry("x" * 1_000_000, -1.0, ("y" * 1_000_000, -2.0))])
        assert len(found.to_html()) < 10_000
        assert len(found.to_text()) < 1_000


@pytest.mark.parametrize(
    "text", [*ATTACKS, "\x1b[2J", "' onmouseover='x", '" onmouseover="x', "&#10;</span>"]
)
def test_hostile(text: str) -> None:
    raw = text.encode("utf-8", "replace")
    pieces = [raw[at : at + 3] for at in range(0, len(raw), 3)]
    found = Likely.of([entry(text, -1.0, (text, -2.0)), *map(entry, pieces)], model=text)
    bundle = found._repr_mimebundle_()
    Inspector(bundle["text/html"])
    for said in bundle.values():
        assert not TURNS.search(said)


def test_in_a_terminal() -> None:
    found = Likely.of(
        [entry("Hi", math.log(0.6), ("Hi", math.log(0.6)), (" a", math.log(0.2))), entry("\n")],
        model="m",
    )
    assert found.to_text().splitlines()[1:] == [
        "    1     60%  “Hi”  “␣a” 20%",
        "    2   90.5%  “↵”",
    ]


def test_scores_of_both_shapes() -> None:
    assert scores(None) is None
    assert scores({"content": None}) == ()
    assert scores({"content": [entry("a")]}) == (entry("a"),)
    text = {"tokens": ["a", "b"], "token_logprobs": [None, -1.0], "top_logprobs": None}
    assert [Token(b"b", -1.0)] == list(Likely.of(scores(text) or ()).tokens)
