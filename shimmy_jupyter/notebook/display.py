"""An answer as something to look at. Model output is untrusted text: it is rendered by our own
Markdown renderer, which lets no HTML, no image and no link but http, https and mailto through.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

from ..errors import InvalidValue
from .highlight import highlighted

_SAFE_LINK = re.compile(r"^(https?://|mailto:)", re.IGNORECASE)
# Everything that moves a terminal's cursor or turns the direction of text, so that what is read is
# not what is there: C0 and C1 controls but tab and newline, bidirectional marks and isolates, line
# and paragraph separators. Half of a surrogate pair is no character, and no message can carry it.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]"
)
# Some renderers put what follows a code fence into an attribute as it stands.
_FENCE_LINE = re.compile(r"^.*(?:`{3}|~{3}).*$", re.MULTILINE)
# TeX commands by which a formula could link somewhere or style the page; then those by which it could
# read or write files, where a notebook is made a PDF of; and TeX's other spelling of a character.
_TEX = re.compile(
    r"\\(?=(?:href|url|html[A-Za-z]*|class|style|cssId|data|require|bbox|unicode|mmlToken|csname|"
    r"def|let|newcommand|renewcommand|newenvironment|renewenvironment|includegraphics|texttip|"
    r"mathtip|action|toggle|"
    r"[gex]def|futurelet|global|providecommand|DeclareMathOperator|catcode|expandafter|input|include|"
    r"InputIfFileExists|subfile|import|openin|openout|read|readline|write|immediate|special|"
    r"directlua|latelua|luaexec|verbatiminput|VerbatimInput|lstinputlisting|inputminted|includepdf|"
    r"usepackage|documentclass|loop|repeat)(?![A-Za-z])|begin\s*\{\s*(?:filecontents|verbatimwrite))"
    r"|\^(?=\^)"
)


def clean(text: str) -> str:
    """The text without characters that act instead of being shown."""
    return _CONTROL.sub("", text)


def _shown(text: str) -> str:
    return html.escape(inert_tex(text))


def one_line(text: str) -> str:
    """The text in one line, for a place that others' lines stand around."""
    return " ".join(clean(text).split())


def inert(text: str) -> str:
    """For HTML: as it stands, and without effect."""
    return _shown(clean(text))


def inert_tex(text: str) -> str:
    """Whatever TeX is in the text, without the commands that do more than typeset."""
    return _TEX.sub("\\g<0>\u200b", text)


DEEPEST = 100
"""Levels of JSON that is shown."""


def tame(found: Any, depth: int = 0) -> Any:
    """JSON as it is, its texts without characters that act. Raises `RecursionError` where it is too deep."""
    if depth > DEEPEST:
        raise RecursionError
    if isinstance(found, str):
        return clean(found)
    if isinstance(found, list):
        return [tame(one, depth + 1) for one in found]
    if isinstance(found, dict):
        return {clean(name): tame(one, depth + 1) for name, one in found.items()}
    return found


@lru_cache(maxsize=2)
def _markdown(*, colours: bool) -> MarkdownIt:
    md = MarkdownIt("commonmark", {"html": False, "linkify": False})
    if colours:
        md.options["highlight"] = _in_colours
    md.enable(["table", "strikethrough"])
    md.validateLink = lambda url: bool(_SAFE_LINK.match(url))  # type: ignore[method-assign]
    md.add_render_rule("image", _image)
    md.add_render_rule("link_open", _link_open)
    md.add_render_rule("text", _text)
    return md


def _in_colours(code: str, language: str, attributes: str) -> str:
    return highlighted(code, language)


def _image(self: RendererHTML, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    alt = self.renderInlineAsText(tokens[at].children or [], options, env)
    return _shown(f"[image: {alt}]")


def _link_open(self: RendererHTML, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    tokens[at].attrSet("rel", "noopener noreferrer nofollow")
    tokens[at].attrSet("target", "_blank")
    return self.renderToken(tokens, at, options, env)


def _text(self: RendererHTML, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    return _shown(tokens[at].content)


def to_html(markdown: str, *, colours: bool = False) -> str:
    """Markdown from a model as inert HTML, with the colours of code in fences where they are wanted."""
    # Once more: an entity such as `&#x202e;` becomes its character on the way.
    return clean(str(_markdown(colours=colours).render(clean(markdown))))


def to_inert_markdown(markdown: str) -> str:
    """For front ends that show Markdown and no HTML: no tag, no image and no link with a text of
    its own can begin in it, whichever dialect reads it (a bare address may be made a link of).
    Code keeps its text, at the cost of `&lt;` for `<`.
    """
    text = inert_tex(clean(markdown)).replace("&", "&amp;").replace("<", "&lt;")
    text = _FENCE_LINE.sub(lambda line: line[0].replace('"', "\u201d").replace("'", "\u2019"), text)
    return re.sub(r"\]\s*(?=[(\[:])", "]\\\\", text)


@dataclass(frozen=True, slots=True)
class Fence:
    language: str
    content: str
    alone: bool
    """Whether there is nothing around it."""


_OPENING = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^`]*")


def fences(text: str) -> list[Fence]:
    """The fenced blocks of a Markdown text, outside lists and quotes; the last may lack its end."""
    lines = text.split("\n")
    around = re.sub(r"\s", "", text)
    found, at = [], 0
    while at < len(lines):
        match = _OPENING.fullmatch(lines[at])
        at += 1
        if match is None:
            continue
        closing = re.compile(f" {{0,3}}{match[1][0]}{{{len(match[1])},}}[ \t]*")
        first = at
        while at < len(lines) and not closing.fullmatch(lines[at]):
            at += 1
        alone = re.sub(r"\s", "", "".join(lines[first - 1 : at + 1])) == around
        found.append(Fence(match[2], "\n".join(lines[first:at]), alone))
        at += 1
    return found


_SVG = "http://www.w3.org/2000/svg"
_SVG_TAGS = frozenset(
    "svg g defs symbol use path rect circle ellipse line polyline polygon text tspan textPath title"
    " desc metadata style linearGradient radialGradient stop clipPath mask pattern marker switch image"
    " animate animateTransform animateMotion mpath set filter feGaussianBlur feOffset feMerge"
    " feMergeNode feFlood feComposite feBlend feColorMatrix feDropShadow".split()
)
_LARGEST_SVG, _MOST_TAGS, _MOST_DRAWN, _DEEPEST = 256_000, 5_000, 20_000, 50
DATA_IMAGE = re.compile(r"data:image/(?:png|jpeg|gif|webp);base64,[A-Za-z0-9+/=\s]*$")
_FETCHES = re.compile(
    r"\\|@import|image-set|javascript:|\bsrc\s*\(|url\(\s*['\"]?\s*[^\s'\"#]", re.IGNORECASE
)
_NAMED = re.compile(r"url\(\s*['\"]?\s*#([^\s'\")]*)", re.IGNORECASE)


def inert_svg(text: str) -> tuple[str, str]:
    """The first SVG in a text, for an `<img>`, and its title or "". Raises `InvalidValue` for one that is
    not whole, has scripts, refers to anything outside of it, or is too much to draw.
    """
    begin = re.search(r"<svg(?=[\s>/])", text)
    if begin is None:
        raise InvalidValue("there is no <svg> in it")
    source = clean(text[begin.start() :])
    for name, space in (("xlink", "http://www.w3.org/1999/xlink"), ("", _SVG)):
        declared = f"xmlns:{name}" if name else "xmlns"
        used = f"{name}:" in source if name else True
        if used and not re.match(rf"<svg[^>]*\s{declared}\s*=", source):
            source = f'<svg {declared}="{space}"' + source.removeprefix("<svg")
    look = _Look()
    end = look.through(source.encode())
    return source.encode()[:end].decode(), look.title


class _Look:
    """Reads one SVG. Of every element with an id it keeps the tag, how many elements there are in it, and
    what these refer to: a few lines can be drawn a billion times.
    """

    def __init__(self) -> None:
        self.title = ""
        self._text = ""
        self._end = self._count = 0
        self._open: list[tuple[str, str, list[int], list[str]]] = []
        self._named: dict[str, tuple[str, int, list[str]]] = {}
        self._styled: list[str] = []
        self._costs: dict[str, int] = {}

    def through(self, source: bytes) -> int:
        """Where it ends, in bytes."""
        from xml.parsers import expat

        self._parser = parser = expat.ParserCreate(namespace_separator=" ")
        parser.StartElementHandler, parser.EndElementHandler = self._begins, self._ends
        parser.CharacterDataHandler = self._says
        parser.ProcessingInstructionHandler = self._instructs
        try:
            parser.Parse(source[:_LARGEST_SVG], True)
        except expat.ExpatError as error:
            if not self._end:
                large = len(source) > _LARGEST_SVG
                raise InvalidValue(
                    f"it is {'too large' if large else f'not whole: {error}'}"
                ) from None
        return source.index(b">", self._end) + 1

    def _begins(self, name: str, attributes: dict[str, str]) -> None:
        space, _, tag = name.rpartition(" ")
        in_text = self._open and self._open[-1][0] in {"style", "title"}
        if space != _SVG or tag not in _SVG_TAGS or in_text:
            raise InvalidValue(f"it has <{one_line(tag)[:40]}> in it")
        self._count += 1
        if self._count > _MOST_TAGS or len(self._open) >= _DEEPEST:
            raise InvalidValue("it has too many elements, or too deep")
        self._text = ""
        refers = [
            one
            for name, value in attributes.items()
            for one in _refers(name.rpartition(" ")[2], value)
        ]
        self._open.append((tag, attributes.get("id", ""), [1], refers))

    def _says(self, text: str) -> None:
        self._text += text

    def _instructs(self, target: str, data: str) -> None:
        raise InvalidValue(f"it has <?{one_line(target)[:40]}?> in it")

    def _ends(self, name: str) -> None:
        tag, id, (count,), refers = self._open.pop()
        if tag == "style":
            self._styled += _refers("style", self._text)
        if tag == "title" and len(self._open) == 1:
            self.title = self.title or self._text
        if id and self._named.setdefault(id, (tag, count, refers))[2] is not refers:
            raise InvalidValue("two of its elements have the same id")
        if self._open:
            _, _, counts, all_refers = self._open[-1]
            counts[0] += count
            all_refers += refers
            return
        self._end = self._parser.CurrentByteIndex
        if count == 1:
            raise InvalidValue("there is nothing in it")
        # Whom a style is for is not looked into: what it names may only be a colour.
        kinds = {self._named[name][0] for name in self._styled if name in self._named}
        if kinds - {"linearGradient", "radialGradient"}:
            raise InvalidValue("its styles refer to more than colours")
        self._drawn(count, refers, 0)

    def _drawn(self, count: int, refers: list[str], depth: int) -> int:
        """How many elements are drawn for these."""
        if depth > _DEEPEST:
            raise InvalidValue("it refers to itself")
        for name in refers:
            if name in self._named and name not in self._costs:
                self._costs[name] = self._drawn(*self._named[name][1:], depth + 1)
            count += self._costs.get(name, 0)
            if count > _MOST_DRAWN:
                raise InvalidValue("it is too much to draw")
        return count


def _refers(name: str, value: str) -> list[str]:
    """The ids that an attribute of an SVG, or a style sheet in it, names."""
    if name.lower().startswith("on"):
        raise InvalidValue(f"it has a script in it: {one_line(name)[:40]}")
    if name == "href" and not DATA_IMAGE.match(value):
        if not value.startswith("#"):
            raise InvalidValue("it refers to something outside of it")
        return [value[1:]]
    if name == "base" or (name == "attributeName" and "href" in value) or _FETCHES.search(value):
        raise InvalidValue("it refers to something outside of it")
    return _NAMED.findall(value)


def framed(body: str, note: str = "", reasoning: str = "", receipt: str = "") -> str:
    """HTML that is inert already, with what stands around an answer: the reasoning before it, folded up
    once there is a body; below it the note, which unfolds to the receipt.
    """
    if reasoning:
        unfolded = "" if body else " open"
        thought = to_html(reasoning)
        body = f"<details{unfolded}><summary>Reasoning</summary>{thought}</details>{body}"
    small = _small(inert(note))
    if small and receipt:
        body += f"<details><summary>{small}</summary>{_small(inert(receipt))}</details>"
    elif small:
        body += f"<p>{small}</p>"
    # A long word, such as a path or a hash, would be cut off at the cell's edge.
    return f'<div class="shimmy-answer" style="overflow-wrap:anywhere">{body}</div>'


def _small(text: str) -> str:
    return text and f'<small style="opacity:0.7">{text}</small>'


@dataclass(frozen=True, slots=True)
class Answer:
    """What is known of an answer so far. `note` is a short line of figures or of what happened,
    `reasoning` what came before the answer: folded up once that has begun. `receipt` is a line on
    what is recorded of it, shown when the note is unfolded.
    """

    text: str
    note: str = ""
    reasoning: str = ""
    receipt: str = ""

    def bundle(self) -> dict[str, str]:
        """Every representation, as IPython's display wants them."""
        body = to_html(self.text, colours=True)
        return {
            "text/html": framed(body, self.note, self.reasoning, self.receipt),
            "text/markdown": to_inert_markdown(self.text),
            "text/plain": plain(self.text, self.note),
        }


def plain(text: str, note: str = "") -> str:
    """For a terminal: the text, and the note below it."""
    return f"{clean(text)}\n[{clean(note)}]" if note else clean(text)


class Pace:
    """When to show an answer again: at most ten times a second, and less often once it is long, so that
    showing it whole stays under a quarter of what a kernel's output channel may carry, and making
    what is shown under a fifth of the time.
    """

    INTERVAL = 0.1
    BYTES_PER_SECOND = 250_000
    SHARE = 0.2

    def __init__(self) -> None:
        self._next = 0.0

    def due(self, now: float) -> bool:
        """`now` is seconds on any steady clock."""
        return now >= self._next

    def shown(self, now: float, size: int, took: float = 0.0) -> None:
        """`size` is in bytes; `took` how many seconds it was to make."""
        wait = max(self.INTERVAL, size / self.BYTES_PER_SECOND, took / self.SHARE - took)
        self._next = now + wait
