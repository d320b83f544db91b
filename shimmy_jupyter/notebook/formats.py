"""The formats that an answer can be asked for in: what each demands of the request, and how it is shown.

Code is never run. A page of HTML goes into a frame in which nothing runs and nothing is fetched; an
image is one SVG, looked through, in an `<img>`. What cannot be shown as it was meant is shown as text,
and the note says why: once the tokens are spent, nothing here raises.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..errors import InvalidValue
from .display import (
    DATA_IMAGE,
    DEEPEST,
    clean,
    fences,
    framed,
    inert,
    inert_svg,
    inert_tex,
    one_line,
    plain,
    tame,
    to_html,
    to_inert_markdown,
)
from .highlight import highlighted, known

_PARAM = "--format"
_LARGEST_JSON = _LARGEST_PAGE = 256_000


@dataclass(frozen=True, slots=True)
class Demand:
    """What a format asks of the model: words before the user's own, and a constraint on the answer as the
    HTTP API's `response_format`; None where there is none.
    """

    system: str | None = None
    response_format: Mapping[str, Any] | None = None
    language: str = ""
    """What the answer is written in, for its colours while it comes."""


@dataclass(frozen=True, slots=True)
class Shown:
    """An answer as IPython's display wants it. `value` is the thing itself: code without its fence, JSON
    as Python's objects, the page, the SVG, the formula; the text where it is none. `trouble` says why
    it is not shown as it was meant, "" where it is; the bundle says so too.
    """

    bundle: dict[str, Any]
    metadata: dict[str, Any]
    value: Any
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class _Made:
    """The parts of a `Shown` that formats differ in. `body` is inert HTML, None where the format has none."""

    text: str
    body: str | None = None
    parts: dict[str, Any] = field(default_factory=dict)
    value: Any = None
    trouble: str = ""
    tree: bool = False
    """Whether JupyterLab shows the JSON before any HTML, so that the note must be in its metadata."""


_MARKDOWN = Demand()
_DEMANDS: Mapping[str, Demand] = MappingProxyType(
    {
        "code": Demand(
            "Answer with code and nothing else: no words before or after it, in one fenced block. "
            "Write Python unless another language is asked for.",
            language="python",
        ),
        "html": Demand(
            "Answer with one HTML page and nothing else. It is shown without scripts and without "
            "anything from the network: put styles into the page.",
            language="html",
        ),
        "image": Demand(
            "Answer with one SVG image and nothing else: an <svg> with a viewBox and a <title>. No "
            "scripts, no links, and no fonts or images from elsewhere.",
            language="xml",
        ),
        "json": Demand(
            "Answer with one JSON object and nothing else.",
            MappingProxyType({"type": "json_object"}),
            language="json",
        ),
        "markdown": _MARKDOWN,
        "md": _MARKDOWN,
        "math": Demand(
            "Answer with one formula in LaTeX and nothing else: no words around it and no dollar "
            "signs.",
            language="tex",
        ),
        "text": Demand("Answer in plain text, without Markdown."),
    }
)
FORMATS = tuple(_DEMANDS)


def demands(format: str) -> Demand:
    """Raises `InvalidValue` for a format that there is not."""
    demand = _DEMANDS.get(format)
    if demand is None:
        raise InvalidValue(
            f"there is no format {one_line(format)[:40]!r}; there are {', '.join(FORMATS)}",
            param=_PARAM,
        )
    return demand


def shown(
    format: str,
    text: str,
    *,
    note: str = "",
    reasoning: str = "",
    receipt: str = "",
    done: bool = True,
) -> Shown:
    """The answer in every representation, what stands around it as in `Answer`. While it is not `done`,
    what is made of its text later (a page, an image, JSON, a formula) is shown as that text.

    Raises `InvalidValue` for a format that there is not, and never for a text.
    """
    demand = demands(format)
    if done:
        made = _made(format, text)
    elif format in {"markdown", "md", "text"}:
        made = _MAKERS[format](text)
    else:
        made = _Made(text, _block(_inside(text), demand.language), value=text)
    note = " · ".join(filter(None, [note, made.trouble]))
    bundle = dict(made.parts) | {"text/plain": plain(made.text, note)}
    if made.body is not None:
        bundle["text/html"] = framed(made.body, note, reasoning, receipt)
    if "text/latex" in bundle and note:
        # What is below a formula is TeX as well.
        bundle["text/latex"] += "\n" + re.sub(r"[\\$<]", "", one_line(note))
    metadata = {}
    if made.tree:
        metadata["application/json"] = {"expanded": True, "root": one_line(note) or "root"}
    return Shown(bundle, metadata, made.value, made.trouble)


def value(format: str, text: str) -> Any:
    """The thing itself, as `Shown.value`."""
    demands(format)
    return _made(format, text).value


def _made(format: str, text: str) -> _Made:
    try:
        return _MAKERS[format](text)
    except InvalidValue as why:
        body = f'<pre style="white-space:pre-wrap"><code>{html.escape(clean(text))}</code></pre>'
        return _Made(text, body, value=text, trouble=why.message)


def _markdown(text: str) -> _Made:
    markdown = {"text/markdown": to_inert_markdown(text)}
    return _Made(text, to_html(text, colours=True), markdown, text)


def _text(text: str) -> _Made:
    return _Made(text, value=text)


def _code(text: str) -> _Made:
    found = fences(text)
    if len(found) > 1:
        made = _markdown(text)
        return _Made(text, made.body, made.parts, text, "more than one piece of code: shown whole")
    trouble, language, code = "", "python", text.strip("\n")
    if found:
        (fence,) = found
        language, code = fence.language or language, fence.content
        if not fence.alone:
            trouble = "the words around the code are left out"
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    fenced = f"{ticks}{language if known(language) else ''}\n{code}\n{ticks}"
    return _Made(
        code,
        _block(code, language),
        {"text/markdown": to_inert_markdown(fenced)},
        code,
        trouble,
    )


def _page(text: str) -> _Made:
    source = _inside(text)
    whole = re.search(r"<!doctype\s+html|<html[\s>]", source, re.IGNORECASE)
    source = source[whole.start() :] if whole else source
    if len(source) > _LARGEST_PAGE or "<" not in source:
        raise _unfit("as a page", "it is too large" if "<" in source else "there is no HTML in it")
    frame = (
        f'<iframe sandbox="" srcdoc="{html.escape(_inert_page(source))}" title="A page made by the model"'
        ' referrerpolicy="no-referrer" style="width:100%;height:400px;'
        'border:1px solid #888;background-color:#fff">'
        "This page is shown where the notebook is trusted; its source is below.</iframe>"
    )
    folded = f"<details><summary>Source</summary>{_block(source, 'html')}</details>"
    return _Made(source, frame + folded, value=source)


def _image(text: str) -> _Made:
    try:
        source, title = inert_svg(_inside(text))
    except InvalidValue as why:
        raise _unfit("as an image", why.message) from None
    data = base64.b64encode(source.encode()).decode()
    alt = one_line(title)[:200] or "An image made by the model"
    body = (
        f'<img src="data:image/svg+xml;base64,{data}" alt="{inert(alt)}"'
        ' style="max-width:100%;max-height:480px;background-color:#fff">'
    )
    return _Made(source, body, value=source)


def _json(text: str) -> _Made:
    source = _inside(text)
    try:
        found = json.loads(source, parse_constant=_no_constant)
        tamed = tame(found)
    except RecursionError:
        raise _unfit("as JSON", f"it is nested deeper than {DEEPEST}") from None
    except ValueError as error:
        raise _unfit("as JSON", one_line(str(error))[:200]) from None
    body = _block(json.dumps(tamed, indent=2, ensure_ascii=False), "json")
    # A tree of so many lines would take the page's time.
    tree = len(source) <= _LARGEST_JSON
    return _Made(source, body, {"application/json": tamed} if tree else {}, found, tree=tree)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_AROUND = (("$$", "$$"), (r"\[", r"\]"), (r"\(", r"\)"), ("$", "$"))
_DELIMITER = re.compile(r"(?<!\\)(?:\\\\)*(?:\$|\\[\[\]()])")


def _math(text: str) -> _Made:
    source = clean(_inside(text)).strip()
    for before, after in _AROUND:
        around = source.startswith(before) and source.endswith(after)
        if around and len(source) > len(before + after):
            source = source[len(before) : -len(after)].strip()
            break
    if not source:
        raise _unfit("as a formula", "there is none")
    if _DELIMITER.search(source):
        made = _markdown(text)
        return _Made(text, made.body, made.parts, text, "not one formula: shown as Markdown")
    # A `<` before a letter could begin a tag where a page takes this as it stands.
    tex = re.sub(r"<(?=[A-Za-z!/?])", "<{}", inert_tex(source))
    # No Markdown: JupyterLab would show that first, and without the note.
    return _Made(source, parts={"text/latex": f"$$\n{tex}\n$$"}, value=source)


_MAKERS: Mapping[str, Callable[[str], _Made]] = MappingProxyType(
    {
        "code": _code,
        "html": _page,
        "image": _image,
        "json": _json,
        "markdown": _markdown,
        "md": _markdown,
        "math": _math,
        "text": _text,
    }
)


def _unfit(what: str, why: str) -> InvalidValue:
    return InvalidValue(f"not shown {what}: {why}", param=_PARAM)


def _block(code: str, language: str) -> str:
    shape = f' class="language-{language}"' if known(language) else ""
    return f"<pre><code{shape}>{highlighted(clean(code), language)}</code></pre>"


def _inside(text: str) -> str:
    """What is in the only fence, where there is only one; else the text."""
    found = fences(text)
    return found[0].content if len(found) == 1 else text


_PAGE_TAGS = frozenset(
    "a abbr address article aside b bdi bdo big blockquote body br button caption center cite code col"
    " colgroup data dd del details dfn div dl dt em fieldset figcaption figure font footer form h1 h2"
    " h3 h4 h5 h6 head header hgroup hr html i img input ins kbd label legend li main mark menu meter"
    " nav ol optgroup option output p pre progress q rp rt ruby s samp section select small span"
    " strike strong style sub summary sup table tbody td textarea tfoot th thead time tr tt u ul var"
    " wbr svg g defs path rect circle ellipse line polyline polygon text tspan lineargradient"
    " radialgradient stop clippath mask pattern marker".split()
)
_DROPPED = frozenset("script template title iframe object noscript".split())
"""Tags that go with what is in them; others that are not shown leave theirs."""
_ADDRESSES = frozenset(
    "action archive autofocus background cite classid code codebase content data dynsrc formaction"
    " href http-equiv is longdesc lowsrc manifest nonce ping poster profile slot src srcdoc srcset"
    " usemap".split()
)
_TAG = re.compile(
    r"""(/?)([a-z][a-z0-9-]*)((?:"[^"]*"|'[^']*'|[^<>"']++)*+)>""", re.IGNORECASE | re.DOTALL
)
_ATTRIBUTE = re.compile(r"""([^\s"'<>/=]+)(?:\s*=\s*("[^"]*"|'[^']*'|[^\s"'>]+))?""")
_LONGEST_TAG = 4_000
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'; base-uri 'none'"


def _inert_page(source: str) -> str:
    """A page of HTML from a model, for a frame with the `sandbox` attribute and no permission, which keeps
    scripts from running and forms from being sent. Written anew from the tags that are known, so that
    nothing in it leads anywhere, and nothing asks a browser to connect ahead of a fetch, which is
    none in the eyes of a content policy.
    """
    head = (
        '<!DOCTYPE html><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta http-equiv="x-dns-prefetch-control" content="off">'
    )
    return head + "".join(_pieces(source))


def _pieces(source: str) -> Iterator[str]:
    at = 0
    while at < len(source):
        begin = source.find("<", at)
        begin = len(source) if begin < 0 else begin
        yield _shown_text(source[at:begin])
        if source.startswith(("<!", "<?"), begin):
            end = source.find("-->" if source.startswith("<!--", begin) else ">", begin)
            at = source.find(">", end) + 1 if end >= 0 else len(source)
        elif match := _TAG.match(source, begin + 1, begin + _LONGEST_TAG):
            piece, at = _tag(source, match)
            yield piece
        else:
            yield "&lt;" if begin < len(source) else ""
            at = begin + 1


def _tag(source: str, match: re.Match[str]) -> tuple[str, int]:
    """What is made of a tag, and where the page goes on."""
    name, end = match[2].lower(), match.end()
    if not match[1] and (name == "style" or name in _DROPPED):
        closing = re.compile(f"</{name}(?=[\\s>/])", re.IGNORECASE).search(source, end)
        inside = source[end : closing.start() if closing else len(source)]
        # Within an image, styles are read like any text: nothing in them begins a tag.
        styles = clean(inside).replace("<", r"\3c ")
        return f"<style>{styles}" if name == "style" else "", end + len(inside)
    if name not in _PAGE_TAGS:
        return "", end
    return f"</{name}>" if match[1] else f"<{name}{''.join(_attributes(name, match[3]))}>", end


def _shown_text(text: str) -> str:
    return html.escape(clean(html.unescape(text)))


def _attributes(tag: str, text: str) -> Iterator[str]:
    for match in _ATTRIBUTE.finditer(text):
        name, value = match[1].lower(), html.unescape((match[2] or "").strip("\"'")).strip()
        inside = (name == "href" and value.startswith("#")) or (
            name == "src" and tag == "img" and DATA_IMAGE.match(value)
        )
        known = re.fullmatch(r"[a-z][a-z0-9-]*", name) and not name.startswith("on")
        if inside or (known and name not in _ADDRESSES):
            yield f' {name}="{html.escape(clean(value))}"'
