"""Model output on the page: shown as what it says, and never as anything that acts.

Cases: HTML in every place Markdown has; images; links by every scheme; references; terminal and
bidirectional control characters, also as entities; TeX that links, and TeX that reads files; the fallback
Markdown; code in colours; fences in fences, without an end; lines of a megabyte; what unfolds; pacing; the same in
the figures beside an answer, in reasoning, in tables of models and suggestions, in progress, and in errors.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.errors import InvalidValue, ModelLoadFailed, ShimmyError
from shimmy_jupyter.notebook.board import follow
from shimmy_jupyter.notebook.display import (
    Answer,
    Pace,
    clean,
    inert,
    one_line,
    to_html,
    to_inert_markdown,
)
from shimmy_jupyter.notebook.highlight import STYLES

from ..notebooks import run

SAFE_TAGS = set(
    "a blockquote br code del details div em h1 h2 h3 h4 h5 h6 hr li ol p pre s small strong summary table caption tbody td"
    " span th thead tr ul".split()
)
SAFE_ATTRIBUTES = {"href", "rel", "target", "title", "class", "style", "start", "open", "scope"}


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
                assert value in ("opacity:0.7", "overflow-wrap:anywhere", "text-align:left",
                                 "text-align:right", "text-align:center", *STYLES)  # fmt: skip


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
    '<div data-commandlinker-command="terminal:create-new" data-commandlinker-args="{}">x</div>',
    '[x](https://e.example "data-commandlinker-command=x")',
    "[x](https://e.example){data-commandlinker-command=terminal:create-new}",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;img src=x onerror=alert(1)&#62;",
    "<img srcset=//evil.example/p.png> <video poster=//evil.example/p>",
    "![x](//evil.example/p.png) ![](data:image/svg+xml,<svg onload=alert(1)>)",
    "[![x](https://evil.example/p.png)](javascript:alert(1))",
    "[click](&#x6A;avascript:alert(1)) [click](java\nscript:alert(1)) [click](\x01javascript:x)",
    "[click](//evil.example) [click](/lab?reset) [click](#x) [click](\\\\evil.example)",
    "<link rel=stylesheet href=//evil.example> <meta http-equiv=refresh content=0;//evil.example>",
    "a&#x202e;b &rlm;c &#8238;d [t&#x2066;](https://e.example '&#x202e;') ![&lrm;](x)",
    "```x&#x202e;\ny&#x202e;\n```",
    "````md\n```html\n<script>alert(1)</script>\n```\n````",
    "```js\n</code></pre><script>alert(1)</script>\n~~~\n",
    "~~~html\n<img src=x onerror=alert(1)>\n```\n</span></code></pre><b onclick=x>",
    "```svg\n<svg onload=alert(1)><image href='https://evil.example/p.png'/></svg>\n```",
    "```css\n*{background:url(https://evil.example/p.png)}</style><script>x</script>\n```",
    "```python\n'\u202e' # \x1b[2J &#x202e; &lt;script&gt;\n```",
    "</iframe></srcdoc><script>alert(1)</script>",
]
TURNS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f]")


@pytest.mark.parametrize("text", ATTACKS)
def test_attacks_come_out_inert(text: str) -> None:
    bundle = Answer(text, text, text).bundle()
    for link in Inspector(bundle["text/html"]).links:
        assert re.match(r"https?://|mailto:", link)
    for shown in bundle.values():
        assert not TURNS.search(shown)


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
        noted = Answer("", formula, formula).bundle()["text/html"]
        for shown in (to_html(formula), to_inert_markdown(formula), noted, inert(formula)):
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


@pytest.mark.parametrize(
    "tex",
    [r"\input{/etc/passwd}", r"\include{x}", r"\openin0=x", r"\immediate\write18{id}", r"\catcode`\@=0",
     r"\lstinputlisting{/etc/passwd}", r"\begin{filecontents}{x}", r"\begin {filecontents}{x}", r"\gdef\x{y}",
     r"\expandafter\x", r"^^5cinput{/etc/passwd}", r"\directlua{os.execute('id')}"],
)  # fmt: skip
def test_formulas_cannot_read_files_where_a_pdf_is_made(tex: str) -> None:
    for shown in (to_inert_markdown(f"${tex}$"), to_inert_markdown(tex), inert(tex)):
        assert tex.replace("<", "&lt;") not in shown
        assert shown.replace("\u200b", "").count("\\") == tex.count("\\"), "nothing else is lost"
    ordinary = r"\inputs \includes \frac{1}{2} x^{2^3} \begin{align} \loops"
    assert to_inert_markdown(ordinary) == ordinary


def test_half_of_a_pair_is_left_out() -> None:
    for shown in Answer("a\ud83db", "c\udc00", "\ud83d", "\udfff").bundle().values():
        assert shown.encode()


def test_what_stands_around_an_answer() -> None:
    page = Answer("a", "3 tokens", "hm", "receipt 1 <b>").bundle()["text/html"]
    assert page == (
        '<div class="shimmy-answer" style="overflow-wrap:anywhere"><details><summary>Reasoning</summary><p>hm</p>\n</details><p>a</p>\n'
        '<details><summary><small style="opacity:0.7">3 tokens</small></summary>'
        '<small style="opacity:0.7">receipt 1 &lt;b&gt;</small></details></div>'
    )
    assert "<details open>" in Answer("", "", "hm").bundle()["text/html"]
    bare = Answer("a", "3 tokens").bundle()["text/html"]
    assert bare.endswith('<p><small style="opacity:0.7">3 tokens</small></p></div>')
    assert Answer("a", "", "", "receipt 1").bundle()["text/html"] == (
        '<div class="shimmy-answer" style="overflow-wrap:anywhere"><p>a</p>\n</div>'
    )


@pytest.mark.parametrize(
    "line", ["a", "<", "<a ", "`", "*a ", "[", "![](", "&#x202e;", "| ", "$", "\\", "- "]
)
def test_lines_of_a_megabyte(line: str) -> None:
    text = line * (1_000_000 // len(line))
    bundle = Answer(f"```python\n{text}\n```\n{text[:20_000]}").bundle()
    Inspector(bundle["text/html"])
    assert "<" not in bundle["text/markdown"]


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


def test_pace_leaves_four_fifths_of_the_time() -> None:
    pace = Pace()
    pace.shown(5.0, 100, took=0.5)
    assert not pace.due(6.9)
    assert pace.due(7.1)
    pace.shown(8.0, 100, took=0.001)
    assert pace.due(8.11)


class Said:
    """A server that answers with hostile texts, wherever it says one."""

    def __init__(self, text: str) -> None:
        self.text = text

    def get(self, path: str) -> dict[str, Any]:
        text = self.text
        if path == "shimmy/api/models":
            model = {"id": text, "size_bytes": 1, "quantization": text, "kind": "model",
                     "context": 5, "fit": None, "state": text, "error": None}  # fmt: skip
            return {
                "models": [model, model | {"error": text, "quantization": None}],
                "default": text,
            }
        if path.startswith("shimmy/api/suggestions"):
            one = {"id": text, "tasks": [text], "size_bytes": 1, "memory_bytes": 1, "licence": text,
                   "note": text, "here": True}  # fmt: skip
            return {"suggestions": [one], "first": text}
        result = {"new": True, "ids": [text], "files": [], "size_bytes": 1, "notes": [text]}
        return {"state": "done", "message": text, "done": 1, "total": 2, "error": None,
                "result": result}  # fmt: skip

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return {"job": "x"}

    def delete(self, path: str) -> dict[str, Any]:
        raise AssertionError


@pytest.mark.parametrize("text", [*ATTACKS, "two\nlines\r\x1b[2J", r"$\href{javascript:x}{y}$"])
@pytest.mark.parametrize("line", ["models", "models --suggest", "pull a/x"])
def test_tables_and_progress(line: str, text: str, capsys: Any) -> None:
    shown = run(line, Said(text))
    assert shown
    for plain, page in shown:
        assert not TURNS.search(plain + page)
        assert not Inspector(page).links
        assert "href{" not in page or "\u200b" in page
        assert plain.count("\n") == {"models": 2, "models --suggest": 1, "pull a/x": 0}[line]
    assert not TURNS.search(capsys.readouterr().out)


@pytest.mark.parametrize("text", [*ATTACKS, "\x1b]8;;https://evil.example\x07here\x1b[2J"])
def test_errors_move_nothing(text: str) -> None:
    for error in (InvalidValue(text, param=text), ModelLoadFailed(text)):
        (shown,) = error._render_traceback_()
        assert not TURNS.search(shown)
        assert shown.startswith(type(error).__name__)
    look = {
        "state": "failed",
        "error": {"code": "model_load_failed", "message": text, "param": None},
    }
    server = Said("")
    server.get = lambda path: look  # type: ignore[method-assign]
    with pytest.raises(ShimmyError) as caught:
        follow(server, "x", lambda look: None)  # type: ignore[arg-type]
    assert not TURNS.search(caught.value.message)
    assert "\n" not in caught.value.message


def test_one_line() -> None:
    assert one_line(" a\n b\t\x1bc\u2028d ") == "a b cd"
    assert not one_line("\u202e")
