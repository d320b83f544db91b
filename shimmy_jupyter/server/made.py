"""What an answer says of how it was made: enough to ask for the same again, and to see what has changed."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..completion import Completion
from ..types import MadeBy

_MADE_BY = tuple(each.name for each in fields(MadeBy))
_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repeat_penalty",
    "repeat_last_n",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "min_tokens",
    "ignore_eos",
)


def made(completion: Completion) -> dict[str, Any]:
    """`parameters` as they had effect, those of the server's where the request did not say; of what has no
    default, such as stop strings, the request alone knows. A seed is null where chance has chosen.
    """
    request, by = completion.request, completion.made
    return {
        "made_by": {name: getattr(by, name) for name in _MADE_BY} if by else None,
        "parameters": {
            **{name: getattr(request.sampling, name) for name in _SAMPLING},
            "max_tokens": request.max_tokens,
            "reproducible": request.reproducible,
        },
    }
