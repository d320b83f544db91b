"""What stands between a file and the engine: its place, its header, its bytes' digest, a try in a
process of its own, and whether it fits into memory.

Blocking, for a thread of the caller's. `Vetting.look` can be done for many models at once;
`try_out` and what follows take memory, one model at a time.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import GgufError, ModelLoadFailed, NotEnoughMemory, UnsupportedParameter
from ..types import PinnedModel
from .catalog import HeaderFacts, stamp_of
from .drift import Drift, Severity, drift
from .drift import Found as Here
from .gguf import GgufFacts
from .hashes import Hashes, key_of
from .jobs import Progress, Report, Stopped, unheard
from .lockschema import Adapter, Pin
from .memory import Fit, fit, usable_context
from .probe import Prober, Verdict
from .sources import Found

log = logging.getLogger("shimmy_jupyter.models")

_WORDS = {
    "adapter": "a LoRA adapter: name it as the `adapter` of a request to the model it was made for",
    "projector": "a projector, which goes with a model that sees images",
    "unknown": "no model that is known here",
}
_ADAPTER = "adapter"
_CHANGED = "its file was changed meanwhile; try again"
_BLOB = re.compile(r"(?:sha256-)?([0-9a-f]{64})")
_ABOUT_BYTES = {"refused", "crashed", "illegal_instruction", "hung"}


@dataclass(frozen=True, slots=True)
class Needs:
    """What models are loaded with: context and KV cache in tokens, the KV cache's type, and the bytes
    that stay free for others. Without `check` a model is loaded whether it seems to fit or not.
    """

    context_size: int = 0
    kv_tokens: int = 0
    kv_type: str = "f16"
    reserve: int = 0
    check: bool = True


@dataclass(frozen=True, slots=True)
class Vetted:
    """A model whose header is right. `digests` are of its files, in order; none where nobody wants
    to know. `needed` is the least memory that it takes, in bytes.
    """

    found: Found
    facts: GgufFacts
    digests: tuple[str, ...]
    needed: int
    stamp: object


class Vetting:
    """`prober` None: no model is tried out. `memory` says how many bytes are available now,
    and `capacity` is how many there would be on a quiet machine.
    """

    def __init__(
        self,
        headers: HeaderFacts,
        hashes: Hashes,
        prober: Prober | None,
        memory: Callable[[], int],
        needs: Needs,
        *,
        capacity: int = 0,
    ) -> None:
        self.capacity = capacity
        self.headers, self.hashes, self.prober = headers, hashes, prober
        self._memory, self._needs = memory, needs

    def look(self, found: Found, report: Report, stopped: Stopped, held: int = 0) -> Vetted:
        """`held` are bytes that could be freed for it. Raises `ModelLoadFailed` with the reason, and
        `Cancelled`.
        """
        stamp = stamp_of(found)  # first: what changes from now on will be seen
        facts = self.facts(found)
        if found.kind != "model":
            raise UnsupportedParameter(f"it is {_WORDS[found.kind]}", param="model")
        # Before its bytes are read, which may take minutes.
        could = self.fit(facts, self._memory() + held)
        if self._needs.check and not could.ok:
            raise NotEnoughMemory(f"it {could.message}")
        told = found.expected_sha256 is not None
        wanted = self.prober is not None or self.hashes.always or told
        digests = self.digests(found, report, stopped) if wanted else ()
        return Vetted(found, facts, digests, could.needed, stamp)

    def facts(self, found: Found) -> GgufFacts:
        """What its header says. Raises `ModelLoadFailed`."""
        if found.problem is not None:
            raise ModelLoadFailed(found.problem)
        _check_place(found)
        return self.headers.of(found)

    def digests(self, found: Found, report: Report, stopped: Stopped) -> tuple[str, ...]:
        """SHA-256 of its files, in order. Raises `ModelLoadFailed` where its place says that they have
        another, and `Cancelled`.
        """
        digests: list[str] = []
        before = 0
        sizes = [stamp[2] for stamp in stamp_of(found)]
        for part, size in zip(found.parts, sizes, strict=True):
            if (known := self.hashes.known(part)) is not None:
                digests.append(known)
                before += size
                continue

            def progress(done: int, total: int, before: int = before) -> None:
                report(Progress("hashing", before + done, found.size_bytes, "bytes"))

            digests.append(self.hashes.sha256(part, progress, stopped))
            before += size
        wanted = zip(expected(found), digests, strict=True)
        if any(said not in {None, digest} for said, digest in wanted):
            raise ModelLoadFailed(
                "its bytes are not those that it was downloaded as; pull it again"
            )
        return tuple(digests)

    def known(self, found: Found) -> tuple[str, ...] | None:
        """Digests of its files, where they are known without reading them."""
        digests = [self.hashes.known(part) for part in found.parts]
        return None if None in digests else tuple(d for d in digests if d is not None)

    def fit(self, facts: GgufFacts, available: int | None = None) -> Fit:
        """Whether it fits into the memory that is available now, or into so many bytes."""
        needs = self._needs
        return fit(
            facts,
            context_size=needs.context_size,
            kv_tokens=needs.kv_tokens,
            kv_type=needs.kv_type,
            available=self._memory() if available is None else available,
            reserve=needs.reserve,
        )

    def usable_context(self, facts: GgufFacts) -> int | None:
        """Tokens that a request would have, prompt and answer together; None where its header does not tell,
        and where it would not be loaded.
        """
        trained, needs = facts.context_size, self._needs
        if facts.kind != "model" or not trained or needs.context_size > trained:
            return None
        return usable_context(trained, context_size=needs.context_size, kv_tokens=needs.kv_tokens)

    @property
    def room(self) -> int:
        """Bytes for models on a quiet machine."""
        return max(0, self.capacity - self._needs.reserve)

    def could_fit(self, facts: GgufFacts) -> bool:
        """Into this machine, with nothing else in it."""
        return not self._needs.check or self.fit(facts, self.capacity).ok

    def available(self) -> int:
        """Bytes of memory that a process could take now."""
        return self._memory()

    def shortfall(self, vetted: Vetted, mapped: int) -> int:
        """Bytes that are missing for it to be loaded now. `mapped` are those of other models' files
        in memory: the system calls them available, and would read them again at every token.
        """
        if not self._needs.check:
            return 0
        return max(0, vetted.needed + self._needs.reserve + mapped - self._memory())

    def try_out(self, vetted: Vetted, report: Report, stopped: Stopped) -> None:
        """In a process of its own, the first time that these bytes are seen. Raises
        `ModelLoadFailed` with what happened to it, and `Cancelled`.
        """
        if self.prober is None or vetted.found.bundled:
            return
        key = key_of(vetted.digests)
        verdict = self.prober.known(key)
        again = verdict is not None
        if verdict is None:
            verdict = self.probe(vetted, report, stopped)
        if not verdict.ok:
            about = again and verdict.outcome in _ABOUT_BYTES
            hint = f"; `shimmy probe {vetted.found.id}` tries again" if about else ""
            raise ModelLoadFailed(f"the probe: {verdict.reason}{hint}")

    def probe(
        self,
        vetted: Vetted,
        report: Report,
        stopped: Stopped,
        adapter: Path | None = None,
        key: str | None = None,
    ) -> Verdict:
        """Try it out now, whatever is known. Raises `Cancelled`, and `ModelLoadFailed` where no
        model is tried out.
        """
        if self.prober is None:
            raise ModelLoadFailed("ShimmyModels.probe is off: no model is tried out here")

        def stage(name: str) -> None:
            report(Progress(f"probing: {name}"))

        report(Progress("probing"))
        key = key or key_of(vetted.digests)
        if not unchanged(vetted):
            raise ModelLoadFailed(_CHANGED)
        verdict = self.prober.probe(
            key,
            vetted.found.parts,
            vetted.needed,
            adapter=adapter,
            cancelled=stopped,
            stage=stage,
        )
        if not unchanged(vetted):
            # It may be other bytes that were tried out than those that the key stands for.
            self.prober.forget(key)
            raise ModelLoadFailed(_CHANGED)
        return verdict

    def differences(
        self, found: Found, adapter: Found | None, pin: PinnedModel, stopped: Stopped
    ) -> list[Drift]:
        """What of a model is not as it is pinned. Reads its bytes where they are not known. Raises
        `ModelLoadFailed` and `Cancelled`.
        """
        facts, digests = self.facts(found), self.digests(found, unheard, stopped)
        names = [_ADAPTER] if pin.adapter is not None else []
        here: dict[str, str] = {}
        unasked: list[Drift] = []
        if adapter is not None:
            self.facts(adapter)
            here[_ADAPTER] = self.digests(adapter, unheard, stopped)[0]
        wanted = Pin(
            file=found.path.name,
            size=pin.size,
            sha256=pin.sha256,
            parts=pin.parts,
            chat_template=pin.chat_template,
            context_size=pin.context_size,
            adapters=tuple(Adapter(name, pin.adapter or "") for name in names),
        )
        if adapter is not None and pin.adapter is None:
            unasked = [
                Drift(_ADAPTER, "it has an adapter", "none", here[_ADAPTER], Severity.REFUSE)
            ]
        needs = self._needs
        context = usable_context(
            facts.context_size, context_size=needs.context_size, kv_tokens=needs.kv_tokens
        )
        return unasked + drift(
            wanted,
            Here(
                size=found.size_bytes,
                sha256=digests[0],
                parts=digests[1:],
                context_size=context,
                engine="",
                chat_template=facts.chat_template_sha256,
                adapters=here,
            ),
        )

    def adapter(self, base: Vetted, found: Found, report: Report, stopped: Stopped) -> str:
        """An adapter's SHA-256, once it has been tried out with its model. Raises `ModelLoadFailed`,
        and `Cancelled`.
        """
        stamp = stamp_of(found)
        facts = self.facts(found)
        if found.kind != "adapter":
            raise ModelLoadFailed(f"{found.id} is no LoRA adapter")
        if facts.architecture != base.facts.architecture:
            raise ModelLoadFailed(
                f"{found.id} was made for {facts.architecture}, and this model is "
                f"{base.facts.architecture}"
            )
        if self._needs.check and found.size_bytes + self._needs.reserve > self._memory():
            raise NotEnoughMemory(f"there is no memory for {found.id} at the moment")
        (own,) = self.digests(found, report, stopped)
        if self.prober is not None:
            key = key_of((*base.digests, own))
            verdict = self.prober.known(key) or self.probe(base, report, stopped, found.path, key)
            if stamp_of(found) != stamp:
                self.prober.forget(key)
                raise ModelLoadFailed(_CHANGED)
            if not verdict.ok:
                raise ModelLoadFailed(f"the probe: {verdict.reason}")
        return own


def unchanged(vetted: Vetted) -> bool:
    """Whether its files are those that were looked at."""
    try:
        return stamp_of(vetted.found) == vetted.stamp
    except GgufError:  # gone
        return False


def expected(found: Found) -> list[str | None]:
    """The SHA-256 that each of its files must have by the cache that it is in, which names it so."""
    if found.source not in {"huggingface", "ollama"}:
        return [None] * len(found.parts)
    named = [_BLOB.fullmatch(part.name) for part in found.parts]
    said = [match[1] if match else None for match in named]
    return [said[0] or found.expected_sha256, *said[1:]]


def own_adapter(found: Found) -> Found | None:
    """The adapter that came with a model, as Ollama's can. Raises `ModelLoadFailed` for several."""
    if not found.adapters:
        return None
    if len(found.adapters) > 1:
        raise ModelLoadFailed(f"{found.id} has {len(found.adapters)} adapters; one can be used")
    (path,) = found.adapters
    return replace(
        found,
        id=f"{found.id}'s adapter",
        path=path,
        parts=(path,),
        kind="adapter",
        size_bytes=0,
        expected_sha256=None,
        problem=None,
        adapters=(),
    )


def _check_place(found: Found) -> None:
    """Again, as links may have been changed since they were looked for."""
    for part in found.parts:
        try:
            inside = part.resolve(strict=True).is_relative_to(found.root)
        except (OSError, RuntimeError):
            raise ModelLoadFailed(f"{part.name} is not there any more") from None
        if not inside or part.is_symlink():
            raise ModelLoadFailed(f"{part.name} leads out of the folder it was found in")
