"""Code in colours: the text stays what it is, and the colours are bounded, cached and survive elsewhere.

Cases: every language; text of every kind in every language; unknown languages and spellings; blocks and
lines that are too long; a lexer that fails, that is slow, that changes the text; the same block again, a
block that grows among blocks that do not, a cache that is full; what sanitizers and themes need.
"""

from __future__ import annotations

import html
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shimmy_jupyter.notebook import highlight
from shimmy_jupyter.notebook.display import Answer
from shimmy_jupyter.notebook.highlight import LONGEST, STYLES, highlighted, known

SPAN = re.compile(r'<span style="([^"]*)">([^<]*)</span>')
PIECES = [
    "def f(x):\n", "return 'a'\n", "# <script>alert(1)</script>\n", '"""', "'", "`", "<b>", "&amp;", "{", "}",
    "(", ")", "\\", "$x", "/*", "*/", "<!--", "-->", "é漢🎉", "\t", "\n", " ", "123", "0x1f", "@d\n", "--", "%",
]  # fmt: skip


def text_of(page: str) -> str:
    for style in SPAN.findall(page):
        assert style[0] in STYLES
    bare = SPAN.sub(lambda span: span[2], page)
    assert "<" not in bare
    assert ">" not in bare
    return html.unescape(bare)


@pytest.mark.parametrize("language", sorted(highlight._LANGUAGES))
def test_every_language_is_known_to_pygments(language: str) -> None:
    code = 'if x == "a<b>&amp;": # 1\n  y = 2\n'
    assert text_of(highlighted(code, language)) == code


@given(
    st.sampled_from(sorted(set(highlight._LANGUAGES.values()))),
    st.lists(st.sampled_from(PIECES), max_size=30),
)
@settings(max_examples=300, deadline=None)
def test_the_text_stays_what_it_is(language: str, parts: list[str]) -> None:
    code = "".join(parts)
    assert text_of(highlighted(code, language)) == code


def test_colours() -> None:
    page = highlighted("def f():\n    return 'x'  # why\n", "python")
    spans = {html.unescape(text): style for style, text in SPAN.findall(page)}
    assert "keyword-color" in spans["def "]
    assert "def-color" in spans["f"]
    assert "string-color" in spans["'x'  "]
    assert "comment-color" in spans["# why\n"]


def test_spellings() -> None:
    assert highlighted("if x", " PY ") == highlighted("if x", "python") != "if x"
    assert known("Python3")
    assert not known("")
    assert not known("klingon")
    assert highlighted("<def>", "klingon") == "&lt;def&gt;"
    assert highlighted("if x", "") == "if x"
    # Names of pygments' own that are not offered, and what would look among plug-ins.
    assert not known("matlab")
    assert not known("../x")


def test_too_long_is_plain() -> None:
    line = "def f(): return 1\n"
    code = line * (LONGEST // len(line) + 1)
    assert "<span" in highlighted(code[:LONGEST], "python")
    assert highlighted(code[: LONGEST + 1], "python") == code[: LONGEST + 1]
    wide = "x = 1;" * 400
    assert highlighted(wide, "python") == wide


class Lexer:
    def __init__(self, tokens: Any) -> None:
        self.tokens = tokens

    def get_tokens_unprocessed(self, code: str) -> Any:
        from pygments.token import Keyword

        at = 0
        for text in self.tokens:
            if isinstance(text, Exception):
                raise text
            yield at, Keyword, text
            at += len(text)


@pytest.mark.parametrize("tokens", [["a", RuntimeError()], ["a"], ["<b", ">"], [], ["a<b>", "c"]])
def test_a_lexer_that_fails_or_changes_the_text_costs_the_colours(
    tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(highlight, "_lexer", lambda name: Lexer(tokens))
    monkeypatch.setattr(highlight, "_CACHE", highlight._Cache(1000))
    assert highlighted("a<b>", "python") == "a&lt;b&gt;"


def test_a_slow_lexer_colours_what_it_has_come_to(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.1, 0.2, 0.3])
    monkeypatch.setattr(highlight.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(highlight, "_lexer", lambda name: Lexer(["ab", "cd", "e<", "f"]))
    monkeypatch.setattr(highlight, "_CACHE", highlight._Cache(1000))
    page = highlighted("abcde<f", "python")
    assert [text for _, text in SPAN.findall(page)] == ["abcd"]
    assert page.endswith("</span>e&lt;f")


@pytest.fixture
def lexed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    blocks: list[str] = []
    whole = highlight._coloured

    def counted(code: str, lexer: str) -> str:
        blocks.append(code)
        return whole(code, lexer)

    monkeypatch.setattr(highlight, "_CACHE", highlight._Cache(20_000))
    monkeypatch.setattr(highlight, "_coloured", counted)
    return blocks


def test_only_the_block_that_changed_is_read_again(lexed: list[str]) -> None:
    done = "".join(f"```python\nx = {n}\n```\n" for n in range(5))
    for last in ("y", "y =", "y = 1"):
        Answer(f"{done}```python\n{last}").bundle()
    assert lexed[:5] == [f"x = {n}\n" for n in range(5)]
    assert lexed[5:] == ["y", "y =", "y = 1"]


def test_the_same_text_in_another_language_is_another_block(lexed: list[str]) -> None:
    assert highlighted("def x", "python") != highlighted("def x", "sql")
    assert highlighted("def x", "py") == highlighted("def x", "python")
    assert len(lexed) == 2


def test_the_cache_is_bounded_by_what_it_holds(lexed: list[str]) -> None:
    for n in range(500):
        highlighted(f"x = {n}  # " + "c" * (n % 97) * 10, "python")
        assert 0 < highlight._CACHE.held <= 20_000
    before = len(lexed)
    highlighted(f"x = {499}  # " + "c" * (499 % 97) * 10, "python")
    assert len(lexed) == before
    highlighted("x = 0  # ", "python")
    assert len(lexed) == before + 1, "the first was forgotten"
    highlighted("# " + "d " * 7990, "python")
    assert highlight._CACHE.held <= 20_000, "one that does not fit is not kept"


def test_what_is_shown_again_is_kept(lexed: list[str]) -> None:
    for n in range(200):
        highlighted("def kept(): return 1", "python")
        highlighted(f"x = {n}  # " + "c" * 500, "python")
    assert lexed.count("def kept(): return 1") == 1


def luminance(colour: tuple[int, ...]) -> float:
    def linear(value: int) -> float:
        share = value / 255
        return share / 12.92 if share <= 0.03928 else ((share + 0.055) / 1.055) ** 2.4

    red, green, blue = map(linear, colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("style", sorted(STYLES))
def test_a_style_survives_and_reads(style: str) -> None:
    first, second = style.split(";")
    # What JupyterLab 4's sanitizer takes as a `color`: the first always, the second by the rgb() in it.
    assert re.fullmatch(r"color:#[0-9a-f]{3}", first)
    rgb = re.search(r"rgb\(\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*\)", second)
    assert rgb is not None
    assert re.fullmatch(r"color:var\(--jp-mirror-editor-[a-z]+-color,rgb\([\d,]+\)\)", second)
    colour = tuple(map(int, rgb.groups()))
    assert colour == tuple(int(digit * 2, 16) for digit in first[-3:])
    for page in ((255, 255, 255), (0x1E, 0x1E, 0x1E)):
        assert contrast(colour, page) >= 3.5


def test_answers_have_colours_and_languages() -> None:
    page = Answer("```py\nif x:\n```\n```\nif x:\n```\n```klingon\nif x:\n```").bundle()[
        "text/html"
    ]
    assert '<code class="language-py"><span style="' in page
    assert "<code>if x:\n</code>" in page
    assert '<code class="language-klingon">if x:\n</code>' in page
    thought = Answer("a", "", "```py\nif x:\n```").bundle()["text/html"]
    assert "<span" not in thought, "reasoning has none: it is long, and folded up"
