"""How much memory there is for a model, and whether it fits.

What there is: the least of what the machine has free, of what each cgroup around this process leaves
(on Linux only), and of what the limit of its address space leaves.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import cgroups
from ..errors import InvalidValue
from .gguf import GgufFacts, memory_needed

DEFAULT_CONTEXT = 8192
_CELLS = 256
"""A KV cache has a multiple of so many tokens."""
_KV_BYTES = {"f16": 64, "q8_0": 34, "q4_0": 18}
"""For 32 numbers."""

_NO_LIMIT = 1 << 60
_V1 = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")
_V2 = (("memory.max", "memory.high"), "memory.current", "")
"""Files with limits and with what is used, and what precedes the names in `memory.stat` when they are
for all cgroups below as well.
"""


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a model fits. `needed` and `available` are bytes, the latter without the reserve.

    `max_context` is in tokens: the longest context, up to the model's own, that fits when the cache
    holds no more than one, whatever was asked for. 0: not even the shortest does, or it is an
    adapter or a projector. `kv_tokens` is what was asked for; 0 where the engine chooses.
    """

    needed: int
    available: int
    ok: bool
    max_context: int
    kv_tokens: int = 0

    @property
    def message(self) -> str:
        """For users: what it needs, what there is, and what would fit."""
        # Where rounding hides a small difference, it must not say the opposite of `ok`.
        needed, available = _amount(self.needed, up=True), _amount(self.available, up=self.ok)
        text = f"needs {needed}, {available} are available"
        if self.ok or not self.max_context:
            return text
        most = self.max_context
        way = f"kv_tokens of {most}" if self.kv_tokens else f"a context of {most} tokens"
        return f"{text}; with {way} it would fit"

    def to_json(self) -> dict[str, int | bool]:
        return {
            "needed": self.needed,
            "available": self.available,
            "ok": self.ok,
            "max_context": self.max_context,
        }


def fit(
    facts: GgufFacts,
    *,
    context_size: int,
    kv_tokens: int,
    kv_type: str,
    available: int,
    reserve: int,
) -> Fit:
    """Whether there is memory for a model while `reserve` of the `available` bytes stay free.

    Counts the weights, the KV cache, and what is computed; of an adapter or a projector its size.
    `context_size` 0 is the model's own, up to 8,192. `kv_tokens` 0 is chosen by the engine, which
    takes what there is, but never less than one context. Raises `InvalidValue` for a `kv_type` that is
    none, and for sizes below 0.
    """
    if kv_type not in _KV_BYTES:
        raise InvalidValue(f"{kv_type!r} is none of {', '.join(_KV_BYTES)}", param="kv_type")
    for name, value in (("context_size", context_size), ("kv_tokens", kv_tokens)):
        if value < 0:
            raise InvalidValue(f"{value} is less than 0", param=name)
    usable = max(0, available - reserve)
    if facts.kind in {"adapter", "projector"}:
        return Fit(facts.size_bytes, usable, facts.size_bytes <= usable, 0)
    base = memory_needed(facts, 0)
    trained = facts.context_size or DEFAULT_CONTEXT
    per_token = 0 if facts.kind == "embedding" else facts.kv_bytes_per_token

    def cache(tokens: int) -> int:
        cells = -(-tokens // _CELLS) * _CELLS
        return cells * per_token * _KV_BYTES[kv_type] // _KV_BYTES["f16"]

    needed = base + cache(kv_tokens or context_size or min(trained, DEFAULT_CONTEXT))
    if base + cache(trained) <= usable:
        longest = trained
    elif base > usable:
        longest = 0
    else:  # the cache of the whole context does not fit, and so has a size
        blocks = (usable - base) * _KV_BYTES["f16"] // (_CELLS * per_token * _KV_BYTES[kv_type])
        longest = blocks * _CELLS
    return Fit(needed, usable, needed <= usable, longest, kv_tokens)


def usable_context(trained: int, *, context_size: int, kv_tokens: int) -> int:
    """Tokens that one sequence gets, prompt and answer together, of a model that was trained on so many: as the
    engine chooses it when it loads one with these settings, 0 for those that are not set.
    """
    context = context_size or min(trained, DEFAULT_CONTEXT)
    pool = -(-kv_tokens // _CELLS) * _CELLS
    return min(context, pool) if pool else context


def default_reserve(total: int) -> int:
    """Bytes that stay free for notebooks' kernels when nothing is configured, of `total` bytes.

    A tenth, as those who have more memory use more of it. At least 512 MiB, which is a kernel that
    has imported the usual libraries and holds a small table, beside the server itself. At most
    4 GiB, so that a large machine's memory does not lie idle on behalf of kernels nobody runs.
    """
    return min(max(total // 10, 512 << 20), 4 << 30)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process could still take without swapping or being ended for it; at least 0.

    `root` is where `/proc` and `/sys` are looked for. What the kernel keeps of files counts as
    available, also the weights of models in use, which are mapped: it could take them back, but they
    would be read again at each token. Whoever loads a second model must add up what the first needs.
    """
    import psutil

    left = [left for _, left in _limits(root)]
    return max(0, min([int(psutil.virtual_memory().available), *left]))


def total_memory(root: Path = Path("/")) -> int:
    """Bytes that this process could take if nothing else did: the machine's, or its smallest limit."""
    import psutil

    limits = [limit for limit, _ in _limits(root)]
    return min([int(psutil.virtual_memory().total), *limits])


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limits on this process, and what each of them leaves, in bytes."""
    yield from _address_space()
    for version, folder in cgroups.levels("memory", root):
        yield from _of_cgroup(folder, version)


def _address_space() -> Iterator[tuple[int, int]]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if 0 <= limit < _NO_LIMIT:
        yield limit, limit - _taken()


def _taken() -> int:
    """Bytes of this process's address space."""
    import psutil

    return int(psutil.Process().memory_info().vms)


def _of_cgroup(folder: Path, version: int) -> Iterator[tuple[int, int]]:
    limits, usage, prefix = _V2 if version == 2 else _V1
    found = [_number(" ".join(cgroups.lines(folder / name))) for name in limits]
    limit = min((one for one in found if one is not None), default=None)
    if limit is None:
        return
    used = _number(" ".join(cgroups.lines(folder / usage))) or 0
    # What is used includes the cache of files, which the kernel drops before a limit ends anybody.
    # It says how much by its lists for reclaim: `file` would count tmpfs and shared memory as well,
    # which are on the anonymous lists as only swap could free them, and locked pages are on neither.
    # Both lists count, as in MemAvailable: active is what was read twice, not what is needed.
    cached = (f"{prefix}inactive_file", f"{prefix}active_file")
    pairs = [line.split() for line in cgroups.lines(folder / "memory.stat")]
    droppable = sum(_number(pair[1]) or 0 for pair in pairs if len(pair) == 2 and pair[0] in cached)
    yield limit, limit - max(0, used - droppable)


def _number(text: str) -> int | None:
    """Bytes; None for `max`, for what stands for no limit, and for what is no number."""
    try:
        value = int(text)
    except ValueError:
        return None
    return value if 0 <= value < _NO_LIMIT else None


def _amount(size: int, *, up: bool) -> str:
    """In GB, or in MB where that is less than one."""

    def units(unit: int) -> int:
        return -(-size // unit) if up else size // unit

    whole = units(10**6)
    return f"{whole} MB" if whole < 1000 else f"{units(10**8) / 10:.1f} GB"
