"""What stands between a file and the engine: its place, its header, its bytes' digest, a try in a
process of its own, and whether it fits into memory.

Blocking, for a thread of the caller's. `Vetting.look` can be done for many models at once;
`try_out` and what follows take memory, one model at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelLoadFailed
from ..types import PinnedModel
from .catalog import HeaderFacts, stamp_of
from .drift import Drift, drift
from .drift import Found as Here
from .gguf import GgufFacts
from .hashes import Hashes, key_of
from .jobs import Progress, Report, Stopped, unheard
from .lockschema import Adapter, Pin
from .memory import DEFAULT_CONTEXT, Fit, fit
from .probe import Prober, Verdict
from .sources import Found

log = logging.getLogger("shimmy_jupyter.models")

_WORDS = {
    "adapter": "a LoRA adapter: name it as the `adapter` of a request to the model it was made for",
    "projector": "a projector, which goes with a model that sees images",
    "unknown": "no model that is known here",
}
_ADAPTER = "adapter"
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

    @property
    def sha256(self) -> str | None:
        """Of the first file, which is the only one unless the model is split."""
        return self.digests[0] if self.digests else None


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
        facts = self.facts(found)
        if found.kind != "model":
            raise ModelLoadFailed(f"it is {_WORDS[found.kind]}")
        stamp = stamp_of(found)
        # Before its bytes are read, which may take minutes.
        could = self.fit(facts, self._memory() + held)
        if self._needs.check and not could.ok:
            raise ModelLoadFailed(f"it {could.message}")
        wanted = self.prober is not None or found.expected_sha256 is not None
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
        for part in found.parts:
            if (known := self.hashes.known(part)) is not None:
                digests.append(known)
                before += part.stat().st_size
                continue

            def progress(done: int, total: int, before: int = before) -> None:
                report(Progress("hashing", before + done, found.size_bytes, "bytes"))

            digests.append(self.hashes.sha256(part, progress, stopped))
            before += part.stat().st_size
        if found.expected_sha256 not in {None, digests[0]}:
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

    @property
    def room(self) -> int:
        """Bytes for models on a quiet machine."""
        return max(0, self.capacity - self._needs.reserve)

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
        return self.prober.probe(
            key or key_of(vetted.digests),
            vetted.found.parts,
            vetted.needed,
            adapter=adapter,
            cancelled=stopped,
            stage=stage,
        )

    def differences(
        self, found: Found, adapter: Found | None, pin: PinnedModel, stopped: Stopped
    ) -> list[Drift]:
        """What of a model is not as it is pinned. Reads its bytes where they are not known. Raises
        `ModelLoadFailed` and `Cancelled`.
        """
        facts, digests = self.facts(found), self.digests(found, unheard, stopped)
        names = [_ADAPTER] if pin.adapter is not None else []
        here = {}
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
        context = self._needs.context_size or min(facts.context_size, DEFAULT_CONTEXT)
        return drift(
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

    def adapter(self, base: Vetted, found: Found, report: Report, stopped: Stopped) -> Path:
        """An adapter's file, once it has been tried out with its model. Raises `ModelLoadFailed`, and
        `Cancelled`.
        """
        facts = self.facts(found)
        if found.kind != "adapter":
            raise ModelLoadFailed(f"{found.id} is no LoRA adapter")
        if facts.architecture != base.facts.architecture:
            raise ModelLoadFailed(
                f"{found.id} was made for {facts.architecture}, and this model is "
                f"{base.facts.architecture}"
            )
        if self.prober is not None:
            own = self.digests(found, report, stopped)
            key = key_of((*base.digests, *own))
            verdict = self.prober.known(key) or self.probe(base, report, stopped, found.path, key)
            if not verdict.ok:
                raise ModelLoadFailed(f"the probe: {verdict.reason}")
        return found.path


def unchanged(vetted: Vetted) -> bool:
    """Whether its files are those that were looked at."""
    return stamp_of(vetted.found) == vetted.stamp


def _check_place(found: Found) -> None:
    """Again, as links may have been changed since they were looked for."""
    for part in found.parts:
        try:
            inside = part.resolve(strict=True).is_relative_to(found.root)
        except (OSError, RuntimeError):
            raise ModelLoadFailed(f"{part.name} is not there any more") from None
        if not inside or part.is_symlink():
            raise ModelLoadFailed(f"{part.name} leads out of the folder it was found in")
