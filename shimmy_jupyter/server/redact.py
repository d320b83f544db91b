"""Secrets do not reach the log: what looks like one is left out of every record of ours."""

from __future__ import annotations

import logging
import re

LOGGERS = (
    "shimmy_jupyter",
    "shimmy_jupyter.audit",
    "shimmy_jupyter.engine",
    "shimmy_jupyter.engine.child",
    "shimmy_jupyter.engine.vet",
    "shimmy_jupyter.events",
    "shimmy_jupyter.guard",
    "shimmy_jupyter.llama",
    "shimmy_jupyter.metrics",
    "shimmy_jupyter.models",
    "shimmy_jupyter.probe",
)
"""Each by name: a logger's filter does not see what those below it say."""
_GONE = "[secret]"
_QUOTED = r"""["']?"""
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), put)
    for pattern, put in (
        # Header, assignment, or JSON, with the kind of credentials before the credentials.
        (
            rf"\b((?:proxy-)?authorization{_QUOTED}\s*[:=]\s*{_QUOTED}"
            r"(?:(?:bearer|token|basic)\s+)?)[^\s\"',;]+",
            rf"\1{_GONE}",
        ),
        (rf"\b((?:set-)?cookie{_QUOTED}\s*[:=]\s*{_QUOTED})[^\r\n\"']+", rf"\1{_GONE}"),
        (r"\b((?:bearer|basic|token)\s+)(?=[^\s\"',;]*\d)[\w.~+/=-]{16,}", rf"\1{_GONE}"),
        # A parameter of an address, or a field: `token`, `hub_token`, `X-Api-Key`; not `max_tokens`.
        (
            rf"((?:token|secret|password|passwd|api[_-]?key|xsrf){_QUOTED}\s*[:=]\s*{_QUOTED})"
            rf"(?!\[secret\]|(?:none|null|true|false)\b)[^\s\"'&#,;{{}}()\[\]]+",
            rf"\1{_GONE}",
        ),
        (r"\b(https?://)[^\s/@\"']+@", rf"\1{_GONE}@"),
        (r"\bhf_[a-z0-9]{16,}", _GONE),
        (r"\beyJ[\w-]{8,}\.[\w-]{4,}\.[\w-]*", _GONE),
    )
)


def redacted(text: str) -> str:
    """The text without what looks like a token, a password, a cookie or a JWT."""
    for pattern, put in _PATTERNS:
        text = pattern.sub(put, text)
    return text


class _Redact(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        clean = redacted(said)
        if clean != said:
            record.msg, record.args = clean, ()
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            clean = redacted(record.exc_text)
            if clean != record.exc_text:
                # Or another formatter writes the exception once more, as it is.
                record.exc_text, record.exc_info = clean, None
        if record.stack_info:
            record.stack_info = redacted(record.stack_info)
        return True


_redact = _Redact()


def keep_secrets(*more: str) -> None:
    """From now on, out of what our loggers say, and those named `more`. A second time changes nothing."""
    for name in (*LOGGERS, *more):
        logging.getLogger(name).addFilter(_redact)
