"""Model output on the page: shown as what it says, and never as anything that acts.

Cases: HTML in every place Markdown has; images; links by every scheme; references; terminal and
bidirectional control characters; TeX that links; the fallback Markdown; pacing.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.notebook.display import Answer, Pace, clean, to_html, to_inert_markdown

SAFE_TAGS = set(
    "a blockquote br code del div em h1 h2 h3 h4 h5 h6 hr li ol p pre s small strong table tbody td"
    " th thead tr ul".split()
)
SAFE_ATTRIBUTES = {"href", "rel", "target", "title", "class", "style", "start"}


class Inspector(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SAFE_TAGS, tag
        for name, value in attrs:
            assert name in SAFE_ATTRIBUTES, name
            if name == "href":
                self.links.append(value or "")
            if name == "class":
                assert re.fullmatch(r"shimmy-answer|language-.*", value or "")
            if name == "style":
                assert value in ("opacity:0.7", "text-align:left", "text-align:right",
                                 "text-align:center")  # fmt: skip


ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "text <b onmouseover='x()'>bold</b>",
    "<button data-commandlinker-command='terminal:create-new'>go</button>",
    "<iframe src='https://evil.example'></iframe>",
    "<style>*{display:none}</style>",
    "<!-- comment --><![CDATA[x]]><?php ?>",
    "![pixel](https://evil.example/p.png)",
    "![ref][r]\n\n[r]: https://evil.example/p.png",
    "[click](javascript:alert(1))",
    "[click](JaVaScRiPt:alert(1))",
    "[click](java&#115;cript:alert(1))",
    "[click](data:text/html;base64,PHNjcmlwdD4=)",
    "[click](vbscript:x)",
    "[click](file:///etc/passwd)",
    "[r]\n\n[r]: javascript:alert(1)",
    "<javascript:alert(1)>",
    "`<script>alert(1)</script>`",
    "```html\n<script>alert(1)</script>\n```",
    '```x" onload="alert(1)\ny\n```',
    "    <script>alert(1)</script>",
    "| <script> | <img src=x onerror=y> |\n|--|--|\n| <b> | ![x](http://e/x) |",
    "# <svg onload=alert(1)>",
    '[a](https://e.example "title\\" onclick=\\"x")',
    "```\n</code></pre><script>alert(1)</script>",
]


@pytest.mark.parametrize("text", ATTACKS)
def test_attacks_come_out_inert(text: str) -> None:
    for link in Inspector(Answer(text, text).bundle()["text/html"]).links:
        assert re.match(r"https?://|mailto:", link)


@given(st.lists(st.sampled_from([*ATTACKS, "\n", "\n\n", "> ", "- ", "`", "```", "*", "_", "a "])))
def test_no_combination_gets_through(parts: list[str]) -> None:
    Inspector(to_html("".join(parts)))


@given(st.text(alphabet="<>&\"'`[]()!:/\\ab \n#|*_~$"))
def test_no_text_gets_through(text: str) -> None:
    Inspector(to_html(text))


def test_what_it_says_is_shown() -> None:
    assert "&lt;script&gt;" in to_html("<script>")
    assert "[image: a cat]" in to_html("![a cat](https://e.example/cat.png)")
    shown = to_html("[site](https://e.example) and **bold**\n\n```python\nif a < b:\n    x\n```")
    assert (
        '<a href="https://e.example" rel="noopener noreferrer nofollow" target="_blank">' in shown
    )
    assert "<strong>bold</strong>" in shown
    assert '<code class="language-python">if a &lt; b:\n    x\n</code>' in shown


def test_characters_that_act_are_left_out() -> None:
    hostile = "a\x1b[2Jb\x07\x9bc\u202edrow\u2066x\u200fy\x00"
    assert clean(hostile) == "a[2Jbcdrowxy"
    assert clean("tab\tnew\nline é 漢 🎉") == "tab\tnew\nline é 漢 🎉"
    for value in Answer(hostile, hostile).bundle().values():
        assert "\x1b" not in value
        assert "\u202e" not in value


def test_formulas_cannot_link() -> None:
    for formula in (
        r"$\href{javascript:alert(1)}{x}$",
        r"$\href1{click}$",
        r"![$\href{file:///etc/passwd}{x}$](http://a/b)",
        r'$\mmlToken{mtext}[href="javascript:alert(1)"]{click}$',
        r"$\csname href\endcsname{javascript:alert(1)}{x}$",
    ):
        for shown in (to_html(formula), to_inert_markdown(formula)):
            assert not re.search(r"\\(href|mmlToken|csname)", shown)
    assert r"\frac{1}{2}" in to_html(r"$\frac{1}{2}$")
    assert r"\href" in to_html("`\\href`")


@pytest.mark.parametrize("text", ATTACKS)
def test_fallback_markdown_begins_no_tag_and_no_link(text: str) -> None:
    inert = to_inert_markdown(text)
    assert "<" not in inert
    assert not re.search(r"\]\s*[(\[:]", inert)
    assert not re.search(r"&(?!amp;|lt;)", inert)
    for line in inert.splitlines():
        assert not ("```" in line and re.search(r"[\"']", line)), "an attribute could end here"


def test_plain_text_is_the_answer() -> None:
    assert Answer("if a < b: **x**").bundle()["text/plain"] == "if a < b: **x**"
    assert Answer("x", "3 tokens").bundle()["text/plain"] == "x\n[3 tokens]"


def test_pace_is_ten_a_second_and_slower_when_long() -> None:
    pace = Pace()
    assert pace.due(5.0)
    pace.shown(5.0, 100)
    assert not pace.due(5.09)
    assert pace.due(5.11)
    pace.shown(6.0, 1_000_000)
    assert not pace.due(9.9)
    assert pace.due(10.1)
