"""From a request that may be answered to the sequences that will."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from .engine.model import Encoded, LoadedModel
from .engine.stream import TokenStream
from .types import CompletionRequest, Sampling


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request that has become numbers. `adapter` is a path."""

    prompt: Encoded
    max_tokens: int
    adapter: str
    max_seconds: float | None


def submitted(
    model: LoadedModel, request: CompletionRequest, wanted: Wanted
) -> tuple[tuple[TokenStream, ...], asyncio.Event]:
    """A sequence for each choice, all or none of them. Raises `QueueFull`."""
    bell = asyncio.Event()
    streams: list[TokenStream] = []
    try:
        for choice in range(request.n):
            stream = model.submit(
                request.principal.name,
                wanted.prompt.tokens,
                wanted.max_tokens,
                _of_choice(request, choice, wanted.prompt),
                request.stop,
                reproducible=request.reproducible,
                adapter=wanted.adapter,
                max_seconds=wanted.max_seconds,
            )
            stream.bell = bell
            streams.append(stream)
    except BaseException:
        for stream in streams:
            stream.close()
        raise
    return tuple(streams), bell


def _of_choice(request: CompletionRequest, choice: int, prompt: Encoded) -> Sampling:
    """Choices with a seed have different ones, or they would all be the same."""
    seed = request.sampling.seed
    seed = None if seed is None else seed + choice
    return replace(request.sampling, seed=seed, reasoning=prompt.reasoning)
