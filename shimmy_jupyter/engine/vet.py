"""The probe's child: confines itself, then loads one model, reads a text and computes one token.

`MESSAGES_FD` is its argument, one JSON request its standard input. What it has to say are lines of
JSON on that descriptor: `{"stage": …}` in the order of `STAGES`, then one `{"outcome": …}`. See
`models/probe.py`, which reads them and believes nothing that it cannot check.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..core.messages import CloseSlot, OpenSlot, Row, Step
from ..errors import GenerationFailed, ModelLoadFailed, ShimmyError
from ..types import ModelFacts, Sampling
from . import processors
from .backend import Backend, LoadSpec
from .confine import confine, die_with_parent

log = logging.getLogger("shimmy_jupyter.engine.vet")

STAGES = ("confined", "loading", "loaded", "decoding")
TEXT = "The quick brown fox, 1 + 1 = 2.\n"
MOST_THREADS = 2
_BATCH = 32
_MOST_EXPENDABLE = "1000"
_STATUS = Path("/proc/self/status")
_SHORT = re.compile(
    r"bad_alloc|allocat|insufficient memory|out of memory|no memory|GB are free|thread creation"
    r"|mem_buffer",
    re.IGNORECASE,
)
"""What llama.cpp, the C++ library and our backend say where memory runs out."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to try. `files` are all that may be read: the model's first part, which names it, then the
    others, then the adapter, if there is one. `context_tokens` is the size of the KV cache.
    """

    files: tuple[Path, ...]
    adapter: Path | None
    context_tokens: int
    threads: int
    memory_bytes: int
    cpu_seconds: int
    parent: int

    @staticmethod
    def read(text: bytes) -> Request:
        fields = json.loads(text)
        adapter = fields.pop("adapter")
        paths = [fields.pop("model"), *fields.pop("parts"), *([adapter] if adapter else [])]
        return Request(
            files=tuple(map(Path, paths)), adapter=Path(adapter) if adapter else None, **fields
        )


class _Complaints(logging.Handler):
    """Remembers what llama.cpp last complained of, and whether memory was ever the matter."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.last = ""
        self.short = False

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage().strip() or self.last
        self.short = self.short or _SHORT.search(self.last) is not None


class _Vet:
    def __init__(self, request: Request, messages: int) -> None:
        self._request = request
        self._messages = messages
        self._reading = False
        self._complaints = _Complaints()

    def run(self) -> None:
        """Says how it went; only the end of the process is left unsaid."""
        try:
            self._tell(outcome="ok", facts=self._facts())
        except ShimmyError as error:
            self._end(error, "refused", self._reason(error))
        except MemoryError as error:
            self._end(error, "out_of_memory", "memory ran out in Python")
        except OSError as error:
            outcome = "out_of_memory" if error.errno == errno.ENOMEM else "failed"
            self._end(error, outcome, f"the system refused it: {error.strerror}")
        except Exception as error:
            log.exception("it failed in a way that nobody foresaw")
            self._end(error, "refused", f"the engine failed ({type(error).__name__})")

    def _facts(self) -> dict[str, object]:
        request, backend = self._request, self._started()
        threads = max(1, min(request.threads, MOST_THREADS, processors.available()))
        # Opened before the confinement, which leaves it alone.
        status = os.open(_STATUS, os.O_RDONLY) if _STATUS.exists() else None
        by = confine(
            request.files, memory_bytes=request.memory_bytes, cpu_seconds=request.cpu_seconds
        )
        self._tell(stage="confined", by=by)
        self._tell(stage="loading")
        self._reading = True
        began = time.perf_counter()
        facts = backend.load(self._spec(threads))
        if request.adapter is not None:
            backend.load_adapter(str(request.adapter))
        loaded = time.perf_counter()
        self._tell(stage="loaded")
        trained = backend.trained
        self._tell(stage="decoding")
        decoding = time.perf_counter()
        self._compute(backend, facts, threads)
        decoded = time.perf_counter()
        backend.unload()
        template = facts.chat_template
        return {
            "load_seconds": loaded - began,
            "decode_seconds": decoded - decoding,
            "memory_bytes": _peak(status),
            "architecture": facts.architecture,
            "description": facts.description,
            "parameters": facts.parameters,
            "context_size": trained,
            "vocabulary": facts.vocabulary,
            "can_generate": facts.can_generate,
            "chat_template_sha256": None if template is None else _digest(template),
        }

    def _started(self) -> Any:
        """The backend, all its libraries loaded, before anything of the model is read."""
        # Threads of libraries would not be restricted; and no GPU's driver is wanted.
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.putenv(name, "1")
        os.putenv("OMP_WAIT_POLICY", "passive")  # others have something better to compute
        for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
            os.putenv(name, "-1")
        os.putenv("GGML_VK_VISIBLE_DEVICES", "")
        import psutil  # noqa: F401  the backend asks it how much memory is free

        from .llama import amx
        from .llama.backend import LlamaBackend
        from .llama.binding import initialise, quick

        class Vetted(LlamaBackend):
            @property
            def trained(self) -> int:
                return int(quick.llama_model_n_ctx_train(self._model))

        said = logging.getLogger("shimmy_jupyter.llama")
        said.setLevel(logging.WARNING)
        said.addHandler(self._complaints)
        said.propagate = False
        initialise()
        amx.usable()  # later no child could be started to find out
        return Vetted()

    def _spec(self, threads: int) -> LoadSpec:
        # No `context_size`, which may be no larger than the model's own, and that is not known yet.
        first, *parts = self._request.files[: -1 if self._request.adapter else None]
        return LoadSpec(
            str(first),
            parts=tuple(map(str, parts)),
            kv_tokens=self._request.context_tokens,
            sequences=1,
            batch_tokens=_BATCH,
            threads=threads,
            gpu_layers=0,
            prompt_lookup=False,
        )

    def _compute(self, backend: Backend, facts: ModelFacts, threads: int) -> None:
        """A token of the text's continuation; of a model that cannot, the text's vector."""
        if not facts.can_generate:
            assert facts.embedding is not None
            (tokens,) = backend.tokenize_inputs(((TEXT,),))
            most = min(facts.embedding.tokens, facts.embedding.batch_tokens)
            backend.embed((Row(0, 0, tokens[:most], sample=True),), threads)
            return
        tokens = backend.tokenize(TEXT)[: min(_BATCH, facts.context_size - 1)]
        if not tokens:
            raise ModelLoadFailed("its vocabulary has no tokens for an ordinary text")
        adapter = "" if self._request.adapter is None else str(self._request.adapter)
        backend.apply(OpenSlot(0, Sampling(temperature=0), tokens))
        (one,) = backend.step(Step((Row(0, 0, tokens, sample=True),), adapter), threads).sampled
        if one.failure is not None:
            raise GenerationFailed(one.failure.message)
        backend.detokenize((*tokens, one.token))
        backend.apply(CloseSlot(0))

    def _reason(self, error: ShimmyError) -> str:
        said, last = error.message, self._complaints.last
        if "could not make a context" in said:  # what it advises is not for a probe
            return f"llama.cpp could not make a context for it: {last}"
        return said

    def _end(self, error: BaseException, outcome: str, reason: str) -> None:
        short = self._complaints.short or _SHORT.search(reason) is not None
        if not self._reading:
            detail = " ".join(str(error).split())
            outcome, reason = "failed", f"the engine does not start here: {detail or reason}"
        elif outcome == "refused" and short:
            outcome = "out_of_memory"
        self._tell(outcome=outcome, reason=reason[:2000])

    def _tell(self, **message: object) -> None:
        os.write(self._messages, json.dumps(message).encode() + b"\n")


def _peak(status: int | None) -> int:
    """Bytes of memory at most, with what was mapped of files."""
    import resource

    # What getrusage says begins with what the parent had when it forked.
    told = os.pread(status, 1 << 16, 0) if status is not None else b""
    found = re.search(rb"VmHWM:\s+(\d+) kB", told)
    if found is not None:
        return int(found[1]) << 10
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> NoReturn:
    code = 1
    try:
        messages = int(sys.argv[1])
        os.set_inheritable(messages, False)
        request = Request.read(sys.stdin.buffer.read())
        die_with_parent(request.parent)
        # Nothing that could be written to stays open but the messages and the complaints.
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        sys.dont_write_bytecode = True
        logging.basicConfig(level=logging.ERROR, format="%(message)s")
        with contextlib.suppress(OSError):
            # When memory runs out, this can be asked again.
            Path("/proc/self/oom_score_adj").write_text(_MOST_EXPENDABLE)
        _Vet(request, messages).run()
        code = 0
    except BaseException:
        log.exception("the probe failed")
    finally:
        # Without destructors: a native library that is torn down twice crashes.
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
