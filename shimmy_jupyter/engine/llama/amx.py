"""Whether this build of llama.cpp may use the processor's matrix instructions (Intel's AMX).

GCC 12 takes what these read for dead, and the first matrix multiplication then ends the process: with such
a build the Jupyter server would die of its first answer. So before a model is
loaded on a processor that has them, a child tries them (`amx_trial.py`), which takes a third of a
second, once in a process. Where they fail, llama.cpp is told to keep the weights as they are in
the file; there is no switch for these instructions alone. `amx_tiles.h` is for a build that may.
"""

from __future__ import annotations

import functools
import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..isolated import child_environment

log = logging.getLogger("shimmy_jupyter.engine")

_TRIAL = (sys.executable, "-P", "-m", "shimmy_jupyter.engine.llama.amx_trial")
_SECONDS = 60.0
_ROW_BLOCK = 32


@functools.cache
def usable() -> bool:
    """Whether llama.cpp may keep weights in layouts of its own. Says so, loudly, where it may not."""
    found = fault() if present() else None
    if found is not None:
        log.warning(
            "llama.cpp is kept from this processor's AMX, as its build cannot use it: %s; prompts and "
            "many answers at once are slower than they could be; `shimmy doctor` says how to build it",
            found,
        )
    return found is None


def row_block(build: bytes) -> int:
    """Rows of a batch that llama.cpp's kernels for AMX compute at a time (`TILE_M` twice, in ggml-cpu's
    amx/mmq.cpp): 33 take as long as 64. `build` is what llama.cpp says of how it was compiled.
    """
    return _ROW_BLOCK if b"AMX_INT8 = 1" in build and present() and usable() else 1


def present(root: Path = Path("/")) -> bool:
    """Whether the processor has them. Other systems than Linux do not offer them unasked."""
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any("amx_int8" in line.split() for line in text.splitlines() if line.startswith("flags"))


def fault(command: Sequence[str] = _TRIAL, seconds: float = _SECONDS) -> str | None:
    """How a trial in a process of its own failed; None where it did not."""
    # A GPU would compute it instead, and its driver's memory is the models'.
    environment = {**child_environment(), "CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1"}
    try:
        done = subprocess.run(  # noqa: S603  our own module
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"a trial took longer than {seconds:g} seconds"
    except OSError as error:
        return f"a trial does not start: {error.strerror}"
    if done.returncode < 0:
        return f"it crashes ({signal.Signals(-done.returncode).name})"
    if done.returncode:
        said = done.stdout.decode("utf-8", "replace").strip().splitlines()
        return said[-1][:300] if said else "a trial fails, and does not say why"
    return None
