"""From `Sampling` to a native sampler chain."""

from __future__ import annotations

import secrets
from typing import Any

from ...types import Sampling
from .binding import native, quick

_SEED_SPACE = 2**32 - 1  # llama.cpp reads 2**32 - 1 itself as "random"


def sampler_chain(sampling: Sampling, vocabulary: int) -> Any:
    """A native sampler chain in llama.cpp's usual order, without the stages that are off."""
    params = native.llama_sampler_chain_default_params()
    params.no_perf = True
    chain = quick.llama_sampler_chain_init(params)

    def add(sampler: Any) -> None:
        quick.llama_sampler_chain_add(chain, sampler)

    if sampling.logit_bias:
        entries = [native.llama_logit_bias(*entry) for entry in sampling.logit_bias]
        biases = (native.llama_logit_bias * len(entries))(*entries)
        add(quick.llama_sampler_init_logit_bias(vocabulary, len(biases), biases))
    if _has_penalties(sampling):
        add(
            quick.llama_sampler_init_penalties(
                vocabulary,
                sampling.repeat_last_n,
                sampling.repeat_penalty,
                sampling.frequency_penalty,
                sampling.presence_penalty,
            )
        )
    if sampling.greedy:
        add(quick.llama_sampler_init_greedy())
        return chain
    if sampling.top_k:
        add(quick.llama_sampler_init_top_k(sampling.top_k))
    if sampling.top_p < 1:
        add(quick.llama_sampler_init_top_p(sampling.top_p, 1))
    if sampling.min_p > 0:
        add(quick.llama_sampler_init_min_p(sampling.min_p, 1))
    add(quick.llama_sampler_init_temp(sampling.temperature))
    seed = secrets.randbelow(_SEED_SPACE) if sampling.seed is None else sampling.seed % _SEED_SPACE
    add(quick.llama_sampler_init_dist(seed))
    return chain


def changes_logits(sampling: Sampling) -> bool:
    """Whether the chain has stages before it narrows down the choice."""
    return bool(sampling.logit_bias) or _has_penalties(sampling)


def _has_penalties(sampling: Sampling) -> bool:
    penalties = sampling.repeat_penalty != 1, sampling.frequency_penalty, sampling.presence_penalty
    return bool(sampling.repeat_last_n) and any(penalties)
