"""The eight formats: what each asks for, how each is shown, and that none of them acts.

Cases: every format with every attack, whole and while it comes; a page that would leave its frame, run, fetch,
follow or send; images that are not whole, have scripts, refer elsewhere, are too large or too much to draw; JSON
that is cut off, deep, not JSON or not Unicode; formulas with words, delimiters and commands; code with and
without fences, in fences of fences, in several; empty answers, lines of a megabyte; a format that there is not.
"""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from typing import Any

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shimmy_jupyter.errors import InvalidValue
from shimmy_jupyter.notebook.formats import FORMATS, demands, shown, value
from shimmy_jupyter.notebook.highlight import STYLES

from .test_display import ATTACKS, SAFE_ATTRIBUTES, SAFE_TAGS, TURNS

ALWAYS = {
    "white-space:pre-wrap",
    "overflow-wrap:anywhere",
    "opacity:0.7",
    "text-align:left",
    "text-align:right",
    "text-align:center",
}
FRAME = "width:100%;height:400px;border:1px solid #888;background-color:#fff"
PICTURE = "max-width:100%;max-height:480px;background-color:#fff"
HEAD = (
    '<!DOCTYPE html><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="default-src \'none\';'
    " style-src 'unsafe-inline'; img-src data:; form-action 'none'; base-uri 'none'\">"
    '<meta http-equiv="x-dns-prefetch-control" content="off">'
)


class Outside(HTMLParser):
    """The HTML that stands in the notebook's page; what is in its frames and images is kept apart."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.frames: list[str] = []
        self.images: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs)
        if tag == "iframe":
            assert set(found) == {"sandbox", "srcdoc", "title", "referrerpolicy", "style"}
            assert (found["sandbox"], found["style"]) == ("", FRAME)
            self.frames.append(found["srcdoc"] or "")
        elif tag == "img":
            assert set(found) == {"src", "alt", "style"}
            assert found["style"] == PICTURE
            before, _, data = (found["src"] or "").partition(",")
            assert before == "data:image/svg+xml;base64"
            self.images.append(base64.b64decode(data, validate=True).decode())
        else:
            assert tag in SAFE_TAGS, tag
            assert set(found) <= SAFE_ATTRIBUTES, found
            assert found.get("style") in {None, *ALWAYS, *STYLES}
            assert re.match(r"https?://|mailto:|$", found.get("href") or "")

    def handle_data(self, data: str) -> None:
        self.text += data


class Inside(HTMLParser):
    """A page within a frame, behind what we write at its head."""

    def __init__(self, page: str) -> None:
        super().__init__()
        assert page.startswith(HEAD)
        self.tags: list[str] = []
        self.text = ""
        self.feed(page.removeprefix(HEAD))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert tag not in {"script", "link", "meta", "base", "iframe", "object", "embed", "frame", "use", "image",
                           "video", "audio", "source", "track", "template", "foreignobject", "portal"}  # fmt: skip
        for name, said in attrs:
            assert not name.startswith("on"), name
            assert ":" not in name
            assert name not in {"srcset", "action", "formaction", "ping", "background", "poster", "srcdoc",
                                "http-equiv", "autofocus", "nonce"}  # fmt: skip
            if name == "href":
                assert (said or "").startswith("#")
            if name == "src":
                assert tag == "img"
                assert (said or "").startswith("data:image/")

    def handle_decl(self, decl: str) -> None:
        raise AssertionError(decl)

    handle_comment = handle_pi = unknown_decl = handle_decl

    def handle_data(self, data: str) -> None:
        self.text += data


def check(found: Any) -> Outside:
    """Nothing in any representation acts."""
    bundle = found.bundle
    assert set(bundle) <= {
        "text/plain", "text/html", "text/markdown", "text/latex", "application/json"
    }  # fmt: skip
    for name, said in bundle.items():
        whole = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
        assert not TURNS.search(whole), name
        whole.encode()
    for said in (bundle.get("text/markdown", ""), bundle.get("text/latex", "")):
        assert not re.search(r"<[A-Za-z!/?]", said)
        assert not re.search(r"\]\s*[(\[:]", bundle.get("text/markdown", ""))
        assert not re.search(r"\\(href|html|input|write|def)(?![A-Za-z])", said)
    outside = Outside(bundle.get("text/html", ""))
    for page in outside.frames:
        Inside(page)
    for image in outside.images:
        assert not re.search(
            r"<script|\son\w+\s*=|https?://(?!www\.w3\.org/)|javascript:|@import|<!DOCTYPE|<!ENTITY",
            image,
        )
    return outside


def keep(found: Any) -> None:
    """A notebook can have it. Slow: for those that are each of their kind."""
    output = nbformat.v4.new_output("display_data", data=found.bundle, metadata=found.metadata)
    cell = nbformat.v4.new_code_cell("x", outputs=[output])
    nbformat.validate(nbformat.v4.new_notebook(cells=[cell]))


SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">{}<rect width="9" height="9"/></svg>'
)
HARMS = [
    *ATTACKS,
    "</iframe><script>alert(1)</script>",
    '"></iframe><script>alert(1)</script>',
    "&quot;&gt;&lt;/iframe&gt;&lt;script&gt;alert(1)&lt;/script&gt;",
    "</srcdoc></svg></pre></code></details></div><script>alert(1)</script>",
    "<meta http-equiv=refresh content='0;url=https://evil.example'><base href=https://evil.example>",
    "<link rel=preconnect href=https://evil.example><link rel=dns-prefetch href=//evil.example>",
    "<svg><style><link rel=preconnect href=//evil.example></style></svg>",
    "<math><style><!--</style><img title='--><img src=x onerror=alert(1)>'>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "<textarea><script>alert(1)</textarea></script><title></title><script>alert(1)</script>",
    "<style>@import 'https://evil.example';*{background:url(https://evil.example/p)}</style>x",
    "<p style='background:url(https://evil.example/p)'>x</p><table background=https://evil.example>",
    "<a href=https://evil.example ping=https://evil.example>go</a><a href=java&#115;cript:alert(1)>",
    "<form action=https://evil.example><input name=x autofocus onfocus=alert(1)><button formaction=//e>",
    "<img src=https://evil.example/p.png srcset='//evil.example/q.png 2x' lowsrc=//e>",
    "<img src='data:text/html,<script>alert(1)</script>'><img src=data:image/svg+xml,x>",
    "<video poster=//evil.example/p><source src=//evil.example/v></video><audio src=//e></audio>",
    "<object data=//evil.example></object><embed src=//evil.example><applet code=x>",
    "<!DOCTYPE html [<!ENTITY x 'y'>]><?xml-stylesheet href='//evil.example'?><p>&x;</p>",
    "<p title='&#x202e;'>a&#x202e;b&rlm;&#27;c</p>",
    "<!--><script>alert(1)</script>--><p>x</p><!-- <p>",
    "<p title='a>b' onclick='x'>t</p><P/ONCLICK=alert(1)>u<p\nonclick\n=\nx>",
    "<p " + "a" * 5000 + " onclick=x>",
    SVG.format("<script>alert(1)</script>"),
    SVG.format("<image href='https://evil.example/p.png'/>"),
    SVG.format("<image href='data:image/svg+xml;base64,PHN2Zy8+'/>"),
    SVG.format("<a href='javascript:alert(1)'><text>x</text></a>"),
    SVG.format("<foreignObject><body xmlns='http://www.w3.org/1999/xhtml'/></foreignObject>"),
    SVG.format("<rect onclick='alert(1)'/>"),
    SVG.format("<style>@import url(https://evil.example);</style>"),
    SVG.format(r"<style>rect{fill:u\72l(https://evil.example)}</style>"),
    SVG.format(r"<rect fill='u\72l(https://evil.example)'/>"),
    SVG.format("<style>@import 'x';<title/></style>"),
    SVG.format("<rect style='background:image-set(\"https://evil.example\" 1x)'/>"),
    SVG.format("<rect fill='url( \"https://evil.example#x\")'/>"),
    SVG.format("<set attributeName='href' to='https://evil.example'/>"),
    SVG.format("<g xml:base='https://evil.example'/>"),
    SVG.format("<use href='https://evil.example#x'/><use href='//evil.example'/>"),
    SVG.format("<?xml-stylesheet href='https://evil.example'?>"),
    SVG.format("<title>&#x202e;x</title>"),
    '<!DOCTYPE svg [<!ENTITY x "y">]>' + SVG.format("<text>&x;</text>"),
    '{"<script>": "\\u202e<img src=x onerror=alert(1)>", "\\ud83d": ["\\udc00"]}',
    r"\href{javascript:alert(1)}{x} <script>alert(1)</script> a<b",
    r"\^^69nput{x} ^^5cinput{/etc/passwd} \def\x{y}",
    "$$ </script><img src=x onerror=alert(1)> $$",
]


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "md"])
@pytest.mark.parametrize("text", HARMS)
def test_nothing_acts(text: str, format: str) -> None:
    for done in (True, False):
        for wrapped in (
            text,
            f"```html\n{text}\n```",
            f"````\n{text}",
            f"words\n\n~~~\n{text}\n~~~",
        ):
            found = shown(format, wrapped, note=text, reasoning=text, receipt=text, done=done)
            check(found)
    keep(found)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.lists(st.sampled_from([*HARMS, "\n", "```", "```\n", "<", '"', "'", ">"])),
)
def test_no_combination_acts(format: str, parts: list[str]) -> None:
    found = shown(format, "".join(parts))
    check(found)
    keep(found)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="<>&\"'=/!-?# \nasvgtyle"))
def test_no_page_acts(text: str) -> None:
    for page in check(shown("html", f"<p>{text}")).frames:
        Inside(page)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "line",
    ["a", "<", "<a ", "<a '", '"<', "`", "{", "[", "$", "\\", "&lt;", "<svg><g>", "<!--", "\n"],
)
def test_long_answers_come_to_an_end(line: str, format: str) -> None:
    size = 50_000 if format in {"markdown", "md"} else 200_000  # the renderer's own, and linear
    text = line * (size // len(line))
    check(shown(format, text))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("text", ["", " ", "\n\n", "```", "```\n```", "```python"])
def test_empty_answers(text: str, format: str) -> None:
    check(shown(format, text, note="0 tokens"))
    check(shown(format, text, done=False))


def test_a_format_that_there_is_not() -> None:
    for ask in (demands, lambda name: shown(name, "x"), lambda name: value(name, "x")):
        with pytest.raises(
            InvalidValue, match="code, html, image, json, markdown, md, math, text"
        ) as caught:
            ask("pdf\x1b[2J")  # type: ignore[operator]
        assert caught.value.param == "--format"
        assert "\x1b" not in caught.value.message


def test_demands() -> None:
    assert FORMATS == ("code", "html", "image", "json", "markdown", "md", "math", "text")
    assert demands("json").response_format == {"type": "json_object"}
    assert [name for name in FORMATS if demands(name).response_format] == ["json"]
    assert [name for name in FORMATS if demands(name).system is None] == ["markdown", "md"]
    assert "SVG" in str(demands("image").system)
    assert json.dumps(dict(demands("json").response_format or {}))


class TestMarkdown:
    def test_both_names(self) -> None:
        found = shown("md", "**a**\n```py\nif x:\n```", note="n", receipt="receipt 1")
        assert found == shown("markdown", "**a**\n```py\nif x:\n```", note="n", receipt="receipt 1")
        assert "<strong>a</strong>" in found.bundle["text/html"]
        assert "<span" in found.bundle["text/html"]
        assert "<summary>" in found.bundle["text/html"]
        assert found.bundle["text/markdown"].startswith("**a**")
        assert found.bundle["text/plain"].endswith("\n[n]")
        assert (found.value, found.trouble) == ("**a**\n```py\nif x:\n```", "")

    def test_text_is_no_markdown(self) -> None:
        found = shown("text", "**a** <b>", note="n")
        assert found.bundle == {"text/plain": "**a** <b>\n[n]"}


class TestCode:
    @pytest.mark.parametrize(
        ("text", "code"),
        [
            ("x = 1\n", "x = 1"),
            ("```python\nx = 1\n```", "x = 1"),
            ("\n~~~ r\nx <- 1\n~~~\n", "x <- 1"),
            ("```python\nx = 1", "x = 1"),
            ("````\n```python\nx = 1\n```\n````", "```python\nx = 1\n```"),
            ("```py\n  x = 1\n\n\n  y\n```", "  x = 1\n\n\n  y"),
        ],
    )
    def test_one_fence_is_taken_off(self, text: str, code: str) -> None:
        found = shown("code", text)
        assert (found.value, found.trouble, found.bundle["text/plain"]) == (code, "", code)
        assert value("code", text) == code
        assert "```" in found.bundle["text/markdown"]

    def test_words_around_it_are_left_out_and_it_says_so(self) -> None:
        found = shown("code", "Here:\n```python\nx = 1\n```\nThere.", note="n")
        assert found.value == "x = 1"
        assert found.bundle["text/plain"] == "x = 1\n[n · the words around the code are left out]"

    def test_several_pieces_are_shown_whole(self) -> None:
        text = "```bash\npip install x\n```\n```python\nimport x\n```"
        found = shown("code", text, note="n")
        assert found.value == text
        assert "more than one piece of code" in found.bundle["text/plain"]
        assert "<pre><code" in found.bundle["text/html"]

    def test_colours_by_what_the_fence_says(self) -> None:
        assert 'class="language-python"' in shown("code", "if x: y").bundle["text/html"]
        assert 'class="language-sql"' in shown("code", "```sql\nselect 1\n```").bundle["text/html"]
        assert "<pre><code>if x" in shown("code", "```klingon\nif x\n```").bundle["text/html"]

    def test_a_fence_in_the_code_does_not_end_it(self) -> None:
        found = shown("code", "~~~\n'''\n```\n'''\n~~~")
        assert found.bundle["text/markdown"].startswith("````python\n")


class TestHtml:
    def test_in_a_frame(self) -> None:
        found = shown(
            "html", "```html\n<p class=x style='color:red'>Hi &amp; <b>you</b></p>\n```", note="n"
        )
        outside = check(found)
        (page,) = outside.frames
        assert page == f'{HEAD}<p class="x" style="color:red">Hi &amp; <b>you</b></p>'
        assert "trusted" in outside.text
        assert "<p class=x style='color:red'>" in outside.text, "the source is there to read"
        assert found.bundle["text/plain"].startswith("<p class=x")
        assert found.value == "<p class=x style='color:red'>Hi &amp; <b>you</b></p>"

    def test_words_before_a_whole_page(self) -> None:
        found = shown("html", "Sure!\n<!DOCTYPE html>\n<html lang=en><body>x</body></html>")
        assert found.value.startswith("<!DOCTYPE html>")
        (page,) = check(found).frames
        assert page == f'{HEAD}\n<html lang="en"><body>x</body></html>'

    def test_what_goes(self) -> None:
        def inside(text: str) -> str:
            (page,) = check(shown("html", text)).frames
            return page.removeprefix(HEAD)

        assert inside("<p>a</p><script>b</script><p>c</p>") == "<p>a</p><p>c</p>"
        assert inside("<p>a</p><script>b") == "<p>a</p>"
        assert inside("<p>a <SCRIPT\n>b</sCript >c") == "<p>a c"
        assert inside("<a href='#x'>y</a><a href='https://e'>z</a>") == '<a href="#x">y</a><a>z</a>'
        assert inside("<p>a<!-- <p>b --> c") == "<p>a c"
        assert inside("<p>1 < 2 & 3 &lt; 4") == "<p>1 &lt; 2 &amp; 3 &lt; 4"
        assert inside("<style>a<b{}</style>x") == r"<style>a\3c b{}</style>x"
        assert inside("<unknown>x</unknown>") == "x"
        data = "data:image/png;base64,aGk="
        assert inside(f"<img src={data}>") == f'<img src="{data}">'
        assert inside("<svg viewBox='0 0 1 1'><linearGradient id=a></svg>").startswith(
            '<svg viewbox="0 0 1 1">'
        )

    def test_what_is_no_page(self) -> None:
        for text, why in (
            ("words", "there is no HTML in it"),
            ("<p>" + "x" * 300_000, "it is too large"),
        ):
            found = shown("html", text, note="n")
            assert found.trouble == f"not shown as a page: {why}"
            assert not check(found).frames
            assert found.trouble in found.bundle["text/html"]
            assert found.bundle["text/plain"] == f"{text}\n[n · {found.trouble}]"
            assert found.value == text


def bomb(levels: int) -> str:
    parts = ['<g id="a0"><rect/></g>']
    for n in range(levels):
        uses = f'<use href="#a{n}"/>' * 10
        parts.append(f'<g id="a{n + 1}">{uses}</g>')
    return SVG.format(f"<defs>{''.join(parts)}</defs><use href='#a{levels}'/>")


def fill_bomb(levels: int) -> str:
    parts = ['<pattern id="a0"><rect/></pattern>']
    for n in range(levels):
        uses = f'<rect fill="url(#a{n})"/>' * 10
        parts.append(f'<pattern id="a{n + 1}">{uses}</pattern>')
    return SVG.format("".join(parts) + f'<rect fill="url(#a{levels})"/>')


class TestImage:
    def test_in_an_image(self) -> None:
        text = f"Here:\n```svg\n{SVG.format('<title>A <![CDATA[<cat>]]></title>')}\n```"
        found = shown("image", text, note="n")
        (image,) = check(found).images
        assert image == found.value == SVG.format("<title>A <![CDATA[<cat>]]></title>")
        assert 'alt="A &lt;cat&gt;"' in found.bundle["text/html"]
        assert "image/svg+xml" not in found.bundle, (
            "nbconvert may write that into the page as it is"
        )

    def test_without_a_fence_among_words_after_a_prologue(self) -> None:
        svg = SVG.format(
            "<linearGradient id='g'/><rect fill='url(#g)'/><image href='data:image/png;base64,aGk='/>"
        )
        text = (
            f'<?xml version="1.0"?>\n<!DOCTYPE svg PUBLIC "a" "b">\n<!-- c -->{svg} And more. <svg>'
        )
        assert shown("image", text).value == svg
        assert 'alt="An image made by the model"' in shown("image", svg).bundle["text/html"]

    def test_namespaces_that_are_left_out(self) -> None:
        found = shown("image", '<svg viewBox="0 0 1 1"><g id="a"/><use xlink:href="#a"/></svg>')
        assert found.trouble == ""
        assert 'xmlns="http://www.w3.org/2000/svg"' in found.value
        assert 'xmlns:xlink="http://www.w3.org/1999/xlink"' in found.value

    @pytest.mark.parametrize(
        ("svg", "why"),
        [
            ("no image", "there is no <svg> in it"),
            ("<svg><g>", "it is not whole: "),
            ("<svg><rect></svg>", "it is not whole: mismatched tag"),
            ("<svg/>", "there is nothing in it"),
            ("<svg>&x;<rect/></svg>", "it is not whole: undefined entity"),
            ("<svg><!DOCTYPE x><rect/></svg>", "it is not whole: "),
            (SVG.format("<script/>"), "it has <script> in it"),
            (SVG.format("<foreignObject/>"), "it has <foreignObject> in it"),
            (SVG.format("<g xmlns='x'/>"), "it has <g> in it"),
            (SVG.format("<?x y?>"), "it has <?x?> in it"),
            (SVG.format("<g OnClick='x'/>"), "it has a script in it: OnClick"),
            (SVG.format("<image href='//e/p.png'/>"), "it refers to something outside of it"),
            (SVG.format("<image href='data:image/svg+xml;base64,aGk='/>"), "it refers to something outside of it"),
            (SVG.format("<g style='fill:url(x#y)'/>"), "it refers to something outside of it"),
            (SVG.format("<style>@import 'x';</style>"), "it refers to something outside of it"),
            (SVG.format("<style>@import 'x';<title/></style>"), "it has <title> in it"),
            (SVG.format("<style>*{fill:url(#p)}</style><pattern id='p'><g/></pattern>"), "its styles refer to more than colours"),
            (SVG.format("<set attributeName='xlink:href' to='x'/>"), "it refers to something outside of it"),
            (SVG.format("<g xml:base='x'/>"), "it refers to something outside of it"),
            (SVG.format("<g id='a'/><g id='a'/>"), "two of its elements have the same id"),
            (SVG.format("<g id='a'><use href='#a'/></g>"), "it refers to itself"),
            (SVG.format("<g id='a'><use href='#b'/></g><g id='b'><use href='#a'/></g>"), "it refers to itself"),
            (SVG.format("<g>" * 60 + "</g>" * 60), "it has too many elements, or too deep"),
            (SVG.format("<g/>" * 5001), "it has too many elements, or too deep"),
            (SVG.format("<desc>" + "x" * 300_000 + "</desc>"), "it is too large"),
            (bomb(9), "it is too much to draw"),
            (fill_bomb(9), "it is too much to draw"),
        ],
    )  # fmt: skip
    def test_what_is_refused(self, svg: str, why: str) -> None:
        found = shown("image", svg, note="n")
        assert found.trouble.startswith(f"not shown as an image: {why}")
        assert not check(found).images
        assert found.value == svg
        assert found.bundle["text/plain"] == f"{svg}\n[n · {found.trouble}]"

    @pytest.mark.parametrize(
        "inside",
        [
            "<style>.a{fill:url(#g)}</style><linearGradient id='g'/>",
            "<text>see https://e.example, url(x) and onclick=</text>",
            "<g id='a'/><use href='#a'/><use href='#missing'/>",
            "<style>/* c */ .a &gt; .b{fill:red}</style>",
            "<filter id='f'><feGaussianBlur stdDeviation='2'/></filter><g filter='url(#f)'/>",
            "<animate attributeName='x' to='3'/>",
        ],
    )
    def test_what_is_not(self, inside: str) -> None:
        assert shown("image", SVG.format(inside)).trouble == ""
        assert shown("image", bomb(2)).trouble == ""
        assert shown("image", fill_bomb(2)).trouble == ""


class TestJson:
    def test_as_a_tree_and_as_text(self) -> None:
        found = shown("json", '```json\n{"a": [1, "<b>"]}\n```', note="m · 3 tokens")
        assert found.value == found.bundle["application/json"] == {"a": [1, "<b>"]}
        # JupyterLab shows the tree before any HTML: what is below an answer is its root's name.
        assert found.metadata == {"application/json": {"expanded": True, "root": "m · 3 tokens"}}
        assert check(found).text.startswith('{\n  "a": [\n')
        assert found.bundle["text/plain"] == '{"a": [1, "<b>"]}\n[m · 3 tokens]'
        assert "text/markdown" not in found.bundle
        assert shown("json", "[]").metadata["application/json"]["root"] == "root"

    @pytest.mark.parametrize("text", ["0", "null", '"x"', "[]", "{}", "-1.5e3", "true"])
    def test_any_value(self, text: str) -> None:
        found = shown("json", text)
        assert found.trouble == ""
        assert found.value == json.loads(text)
        check(found)

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ('{"a": [1, ', "Expecting value: line 1 column"),
            ("", "Expecting value: line 1 column 1 (char 0)"),
            ("Sure! {}", "Expecting value"),
            ("{} {}", "Extra data"),
            ('{"a": NaN}', "NaN is no JSON"),
            ("[" * 5000, "it is nested deeper than 100"),
            ("[" * 150 + "]" * 150, "it is nested deeper than 100"),
            ("1" * 5000, "Exceeds the limit"),
        ],
    )
    def test_what_is_none(self, text: str, why: str) -> None:
        found = shown("json", text, note="m · cut off at max_tokens")
        assert found.trouble.startswith(f"not shown as JSON: {why}")
        assert "application/json" not in found.bundle
        assert found.metadata == {}
        assert found.value == text
        assert check(found).text.endswith(f"m · cut off at max_tokens · {found.trouble}")

    def test_halves_of_pairs_and_turns_are_kept_but_not_shown(self) -> None:
        found = shown("json", '{"a\\u202e": "\\ud83d", "b": ["\\u001b[2J"]}')
        assert found.value == {"a\u202e": "\ud83d", "b": ["\x1b[2J"]}
        assert found.bundle["application/json"] == {"a": "", "b": ["[2J"]}
        check(found)

    def test_a_large_one_is_no_tree(self) -> None:
        text = json.dumps(list(range(60_000)))
        found = shown("json", text)
        assert found.value == list(range(60_000))
        assert "application/json" not in found.bundle
        assert found.metadata == {}


class TestMath:
    @pytest.mark.parametrize(
        "text",
        [
            r"\frac{1}{2} \\[2pt] x^{2^3}",
            r"$$\frac{1}{2} \\[2pt] x^{2^3}$$",
            r"\[ \frac{1}{2} \\[2pt] x^{2^3} \]",
            r"\(\frac{1}{2} \\[2pt] x^{2^3}\)",
            r"$\frac{1}{2} \\[2pt] x^{2^3}$",
            "```latex\n$$\\frac{1}{2} \\\\[2pt] x^{2^3}$$\n```",
        ],
    )
    def test_delimiters_are_taken_off(self, text: str) -> None:
        found = shown("math", text)
        assert found.value == r"\frac{1}{2} \\[2pt] x^{2^3}"
        assert found.bundle["text/latex"] == "$$\n\\frac{1}{2} \\\\[2pt] x^{2^3}\n$$"
        assert set(found.bundle) == {"text/latex", "text/plain"}, "others would be shown before it"

    def test_the_note_is_below_it_and_no_formula(self) -> None:
        found = shown("math", "x", note="m$ \\x$ · 1 tokens")
        assert found.bundle["text/latex"] == "$$\nx\n$$\nm x · 1 tokens"
        assert found.bundle["text/plain"] == "x\n[m$ \\x$ · 1 tokens]"

    @pytest.mark.parametrize(
        "text", ["The sum $x$ and $y$", r"a \( b", "$x$ $$y$$", r"x \\\[ y", "a $ b", r"\(x + 1"]
    )
    def test_more_than_one_formula_is_markdown(self, text: str) -> None:
        found = shown("math", text)
        assert found.trouble == "not one formula: shown as Markdown"
        assert "text/latex" not in found.bundle
        assert "text/markdown" in found.bundle
        assert found.value == text

    def test_a_dollar_that_is_a_dollar(self) -> None:
        assert shown("math", r"\$5 + \text{x}").trouble == ""

    def test_none(self) -> None:
        assert shown("math", "$$ $$").trouble in {"not shown as a formula: there is none",
                                                  "not one formula: shown as Markdown"}  # fmt: skip
        assert shown("math", "```\n```").trouble == "not shown as a formula: there is none"

    def test_nothing_in_it_begins_a_tag(self) -> None:
        tex = shown("math", r"a<b, a < b, <script>").bundle["text/latex"]
        assert tex == "$$\na<{}b, a < b, <{}script>\n$$"


@pytest.mark.parametrize(
    ("format", "language"),
    [("html", "html"), ("image", "xml"), ("json", "json"), ("math", "tex"), ("code", "python")],
)
def test_while_it_comes_it_is_its_text(format: str, language: str) -> None:
    found = shown(format, f'```{language}\n<p class="x">', note="", done=False)
    assert set(found.bundle) == {"text/plain", "text/html"}
    assert f'<pre><code class="language-{language}">' in found.bundle["text/html"]
    assert not check(found).frames
    assert found.trouble == ""
