"""Code in colours, by pygments, as HTML that stands for itself.

Colours are inline styles: JupyterLab has no rule for pygments' classes, and takes `<style>` out of a
notebook that is not trusted. Each is said twice: a colour that reads on white and on black, for a
page that has no theme or a sanitizer that lets no variable through, then the theme's own colour.
"""

from __future__ import annotations

import html
import threading
import time
from collections import OrderedDict
from functools import cache, lru_cache
from typing import Any

LONGEST = 16_000
"""Characters of a block that is coloured; a longer one is shown as it is."""
_LONGEST_LINE = 2_000
_PATIENCE = 0.25
"""Seconds for a block; what comes after has no colours. Code takes a fifth of that: but some lexers
take the square of the length for what is no code, such as thousands of empty lines.
"""
_KEPT = 4_000_000
"""Characters of blocks kept in colours, so that only one that has changed is read again."""

_LANGUAGES: dict[str, str] = {
    alias: lexer
    for lexer, aliases in {
        "python": "py python3 ipython ipython3 sage",
        "pycon": "python-console",
        "bash": "sh shell zsh ksh",
        "console": "shell-session terminal",
        "r": "rlang",
        "julia": "jl",
        "sql": "postgres postgresql mysql sqlite duckdb",
        "json": "json5 jsonc ndjson jsonl",
        "yaml": "yml",
        "toml": "",
        "ini": "cfg conf properties",
        "html": "htm xhtml",
        "xml": "svg",
        "css": "",
        "javascript": "js jsx mjs",
        "typescript": "ts tsx",
        "c": "h",
        "cpp": "c++ cc cxx hpp",
        "csharp": "c# cs",
        "java": "",
        "kotlin": "kt",
        "scala": "",
        "swift": "",
        "go": "golang",
        "rust": "rs",
        "ruby": "rb",
        "php": "",
        "perl": "pl",
        "lua": "",
        "haskell": "hs",
        "ocaml": "ml",
        "clojure": "clj",
        "elixir": "ex",
        "fortran": "f90",
        "powershell": "ps1 pwsh",
        "docker": "dockerfile",
        "make": "makefile mk",
        "cmake": "",
        "diff": "patch",
        "tex": "latex",
    }.items()
    for alias in (lexer, *aliases.split())
}
"""What a fence may call a language, and pygments' name for it. Others are not looked up: pygments has
hundreds, some of them slow on text that is not theirs, and would look among plug-ins.
"""

_COLOURS: tuple[tuple[str, str, str, str], ...] = (
    ("Comment", "588", "85,136,136", "comment"),
    ("String", "c44", "204,68,68", "string"),
    ("Keyword", "283", "34,136,51", "keyword"),
    ("Operator.Word", "283", "34,136,51", "keyword"),
    ("Number", "384", "51,136,68", "number"),
    ("Name.Function", "27d", "34,119,221", "def"),
    ("Name.Class", "27d", "34,119,221", "def"),
    ("Name.Decorator", "95d", "153,85,221", "meta"),
    ("Name.Builtin", "084", "0,136,68", "builtin"),
    ("Name.Tag", "385", "51,136,85", "tag"),
    ("Name.Attribute", "37c", "51,119,204", "attribute"),
    ("Generic.Deleted", "c44", "204,68,68", "string"),
    ("Generic.Inserted", "283", "34,136,51", "keyword"),
    ("Generic.Heading", "27d", "34,119,221", "header"),
    ("Generic.Subheading", "27d", "34,119,221", "header"),
    ("Generic.Prompt", "588", "85,136,136", "comment"),
)
"""pygments' token, the colour, and the name of JupyterLab's variable for it. The second spelling of the
colour is one that its sanitizer takes beside a variable.
"""
STYLES = frozenset(
    f"color:#{short};color:var(--jp-mirror-editor-{variable}-color,rgb({rgb}))"
    for _, short, rgb, variable in _COLOURS
)
"""Every style that a span may have."""


def known(language: str) -> bool:
    """Whether code in this language, as a fence names it, gets colours."""
    return language.strip().lower() in _LANGUAGES


def highlighted(code: str, language: str) -> str:
    """The code as HTML for a `<code>`, its text unchanged: in colours where the language is known and
    the code not too long, else only escaped.
    """
    lexer = _LANGUAGES.get(language.strip().lower())
    if lexer is None or len(code) > LONGEST or _longest_line(code) > _LONGEST_LINE:
        return html.escape(code)
    found = _CACHE.get(lexer, code)
    if found is None:
        found = _coloured(code, lexer)
        _CACHE.put(lexer, code, found)
    return found


def _longest_line(code: str) -> int:
    return max(map(len, code.split("\n")))


def _coloured(code: str, lexer: str) -> str:
    try:
        runs = _runs(code, lexer)
    except Exception:  # noqa: BLE001  a lexer's defect may cost the colours, not the answer
        return html.escape(code)
    if "".join(text for _, text in runs) != code:
        return html.escape(code)
    return "".join(
        f'<span style="{style}">{html.escape(text)}</span>' if style else html.escape(text)
        for style, text in runs
    )


def _runs(code: str, lexer: str) -> list[tuple[str, str]]:
    """Stretches of one style; space between two of the same belongs to them."""
    runs: list[tuple[str, str]] = []
    end = time.monotonic() + _PATIENCE
    for at, token, text in _lexer(lexer).get_tokens_unprocessed(code):
        if time.monotonic() > end:
            return [*runs, ("", code[at:])]
        style = _style(token)
        if runs and (style == runs[-1][0] or not text.strip()):
            runs[-1] = (runs[-1][0], runs[-1][1] + text)
        else:
            runs.append((style, text))
    return runs


@cache
def _lexer(name: str) -> Any:
    from pygments.lexers import get_lexer_by_name  # type: ignore[import-untyped]

    return get_lexer_by_name(name, **({"startinline": True} if name == "php" else {}))


@lru_cache(maxsize=1000)
def _style(token: Any) -> str:
    from pygments.token import string_to_tokentype  # type: ignore[import-untyped]

    for name, short, rgb, variable in _COLOURS:
        if token in string_to_tokentype(name if "." in name else _WHOLE.get(name, name)):
            return f"color:#{short};color:var(--jp-mirror-editor-{variable}-color,rgb({rgb}))"
    return ""


_WHOLE = {"String": "Literal.String", "Number": "Literal.Number"}


class _Cache:
    """Blocks in colours, the least recently shown forgotten first. Bounded by what it holds."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._found: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, lexer: str, code: str) -> str | None:
        with self._lock:
            found = self._found.get((lexer, code))
            if found is not None:
                self._found.move_to_end((lexer, code))
            return found

    def put(self, lexer: str, code: str, page: str) -> None:
        with self._lock:
            if (lexer, code) in self._found:
                return
            self._found[lexer, code] = page
            self._held += len(code) + len(page)
            while self._held > self._most:
                (_, old), gone = self._found.popitem(last=False)
                self._held -= len(old) + len(gone)

    @property
    def held(self) -> int:
        return self._held


_CACHE = _Cache(_KEPT)
