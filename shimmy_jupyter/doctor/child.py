"""The process that imports the engine, so that only it dies of a build that does not suit the machine.

It prints a line of JSON as soon as the engine has told about itself, and one about the kernel, whose
answer a strict sandbox may take for an attack.
"""

from __future__ import annotations

import ctypes
import json
import sys

_CREATE_RULESET = 444
_SECONDS = 10.0
_VERSION = 1  # flag: create nothing, say which version of Landlock there is


def engine() -> dict[str, object]:
    from ..engine.llama import amx, offload
    from ..engine.llama.binding import quick

    return {
        "version": str(sys.modules["llama_cpp"].__version__),
        "system": quick.llama_print_system_info().decode("utf-8", "replace"),
        "offload": bool(quick.llama_supports_gpu_offload()),
        "gpu": offload.present(),
        "amx": amx.fault(seconds=_SECONDS) if amx.present() else None,
    }


def landlock() -> int:
    """The version of the kernel's Landlock interface; 0 where there is none."""
    if sys.platform != "linux":
        return 0
    found = ctypes.CDLL(None, use_errno=True).syscall(_CREATE_RULESET, None, 0, _VERSION)
    return max(0, int(found))


if __name__ == "__main__":
    print(json.dumps(engine()), flush=True)  # noqa: T201  what it is for
    print(json.dumps({"landlock": landlock()}), flush=True)  # noqa: T201
