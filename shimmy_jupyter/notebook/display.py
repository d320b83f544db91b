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

_SAFE_LINK = re.compile(r"^(https?://|mailto:)", re.IGNORECASE)
# Everything that moves a terminal's cursor or turns the direction of text, so that what is read is
# not what is there: C0 and C1 controls but tab and newline, bidirectional marks and isolates, line
# and paragraph separators.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f]")
# Some renderers put what follows a code fence into an attribute as it stands.
_FENCE_LINE = re.compile(r"^.*(?:`{3}|~{3}).*$", re.MULTILINE)
# TeX commands by which a formula could link somewhere or style the page.
_TEX = re.compile(
    r"\\(?=(?:href|url|html[A-Za-z]*|class|style|cssId|data|require|bbox|unicode|mmlToken|csname|"
    r"def|let|newcommand|renewcommand|newenvironment|renewenvironment|includegraphics|texttip|"
    r"mathtip|action|toggle)(?![A-Za-z]))"
)


def clean(text: str) -> str:
    """The text without characters that act instead of being shown."""
    return _CONTROL.sub("", text)


def _shown(text: str) -> str:
    return html.escape(_inert_tex(text))


def one_line(text: str) -> str:
    """The text in one line, for a place that others' lines stand around."""
    return " ".join(clean(text).split())


def inert(text: str) -> str:
    """For HTML: as it stands, and without effect."""
    return _shown(clean(text))


def _inert_tex(text: str) -> str:
    return _TEX.sub("\\\\\u200b", text)


@lru_cache(maxsize=1)
def _markdown() -> MarkdownIt:
    md = MarkdownIt("commonmark", {"html": False, "linkify": False})
    md.enable(["table", "strikethrough"])
    md.validateLink = lambda url: bool(_SAFE_LINK.match(url))  # type: ignore[method-assign]
    md.add_render_rule("image", _image)
    md.add_render_rule("link_open", _link_open)
    md.add_render_rule("text", _text)
    return md


def _image(self: RendererHTML, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    alt = self.renderInlineAsText(tokens[at].children or [], options, env)
    return _shown(f"[image: {alt}]")


def _link_open(self: RendererHTML, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    tokens[at].attrSet("rel", "noopener noreferrer nofollow")
    tokens[at].attrSet("target", "_blank")
    return self.renderToken(tokens, at, options, env)


def _text(self: RendererHTML, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    return _shown(tokens[at].content)


def to_html(markdown: str) -> str:
    """Markdown from a model as inert HTML."""
    # Once more: an entity such as `&#x202e;` becomes its character on the way.
    return clean(str(_markdown().render(clean(markdown))))


def to_inert_markdown(markdown: str) -> str:
    """For front ends that show Markdown and no HTML: no tag, no image and no link with a text of
    its own can begin in it, whichever dialect reads it (a bare address may be made a link of).
    Code keeps its text, at the cost of `&lt;` for `<`.
    """
    text = _inert_tex(clean(markdown)).replace("&", "&amp;").replace("<", "&lt;")
    text = _FENCE_LINE.sub(lambda line: line[0].replace('"', "\u201d").replace("'", "\u2019"), text)
    return re.sub(r"\]\s*(?=[(\[:])", "]\\\\", text)


@dataclass(frozen=True, slots=True)
class Answer:
    """What is known of an answer so far. `note` is a short line of figures or of what happened,
    `reasoning` what came before the answer: folded up once that has begun.
    """

    text: str
    note: str = ""
    reasoning: str = ""

    def bundle(self) -> dict[str, str]:
        """Every representation, as IPython's display wants them."""
        body = to_html(self.text)
        note, plain = clean(self.note), clean(self.text)
        small = note and f'<p><small style="opacity:0.7">{_shown(note)}</small></p>'
        if self.reasoning:
            unfolded = "" if self.text else " open"
            thought = to_html(self.reasoning)
            body = f"<details{unfolded}><summary>Reasoning</summary>{thought}</details>{body}"
        return {
            "text/html": f'<div class="shimmy-answer">{body}{small}</div>',
            "text/markdown": to_inert_markdown(self.text),
            "text/plain": f"{plain}\n[{note}]" if note else plain,
        }


class Pace:
    """When to show an answer again: at most ten times a second, and less often once it is long,
    so that showing it whole stays under a quarter of what a kernel's output channel may carry.
    """

    INTERVAL = 0.1
    BYTES_PER_SECOND = 250_000

    def __init__(self) -> None:
        self._next = 0.0

    def due(self, now: float) -> bool:
        """`now` is seconds on any steady clock."""
        return now >= self._next

    def shown(self, now: float, size: int) -> None:
        self._next = now + max(self.INTERVAL, size / self.BYTES_PER_SECOND)
