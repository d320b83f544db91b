"""How many layers go to a GPU, and what to say where there is one that this build cannot use."""

from __future__ import annotations

import ctypes
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from ..backend import LoadSpec
from . import facts, files
from .binding import native, quick

log = logging.getLogger("shimmy_jupyter.engine")

_GPU_TYPES = (1, 2)  # ggml_backend_dev_type: discrete and integrated
_RESERVE = 512 << 20
"""Bytes of a device that are left for what llama.cpp computes in and for its display."""


@dataclass(frozen=True, slots=True)
class Device:
    name: str
    free: int
    total: int


def devices() -> list[Device]:
    """GPUs that llama.cpp was built for and can see, with their memory in bytes."""
    library = quick.library
    library.ggml_backend_dev_count.restype = ctypes.c_size_t
    library.ggml_backend_dev_get.restype = ctypes.c_void_p
    library.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    library.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    library.ggml_backend_dev_name.argtypes = [ctypes.c_void_p]
    library.ggml_backend_dev_name.restype = ctypes.c_char_p
    size = ctypes.POINTER(ctypes.c_size_t)
    library.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, size, size]
    found = []
    for i in range(library.ggml_backend_dev_count()):
        device = library.ggml_backend_dev_get(i)
        if library.ggml_backend_dev_type(device) in _GPU_TYPES:
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            library.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            name = library.ggml_backend_dev_name(device).decode("utf-8", "replace")
            found.append(Device(name, free.value, total.value))
    return found


def present(root: Path = Path("/")) -> str | None:
    """A GPU that the machine has, whether or not this build can use it."""
    if (root / "proc/driver/nvidia/version").exists() or (root / "dev/nvidia0").exists():
        return "an NVIDIA GPU"
    if (root / "dev/kfd").exists():
        return "an AMD GPU"
    return "Apple's GPU" if sys.platform == "darwin" else None


def unused(root: Path = Path("/")) -> str | None:
    """What to say, loudly, where a GPU stands idle for want of a build that can use it."""
    found = present(root)
    if found is None or quick.llama_supports_gpu_offload():
        return None
    return (
        f"this machine has {found}, but llama-cpp-python was built without support for it and "
        "computes on the processor; reinstall it with CMAKE_ARGS set for your GPU"
    )


def fitting_layers(layers: int, weights: int, kv: int, free: int) -> int:
    """How many of the model's `layers`, and its output as one more, fit into `free` bytes.

    `weights` and `kv` are the bytes of all layers together, taken to be spread evenly.
    """
    share = (weights + kv) / (layers + 1)
    return max(0, min(layers + 1, int((free - _RESERVE) / share))) if share else layers + 1


def layers(spec: LoadSpec, kv_tokens: int) -> int:
    """Layers to offload: as many as were asked for, else as many as fit beside a KV cache of
    `kv_tokens`, where the specification does not say how large it is.
    """
    if spec.gpu_layers >= 0:
        return spec.gpu_layers
    found = devices()
    if not found:
        return 0
    params = native.llama_model_default_params()
    params.vocab_only = True
    model = files.opened(spec, params)
    if not model:
        return 0  # it will be refused with a reason
    count = quick.llama_model_n_layer(model)
    per_token = facts.kv_bytes_per_token(model, facts.KV_TYPES[spec.kv_type])
    kv = per_token * (spec.kv_tokens or kv_tokens)
    native.llama_model_free(model)
    weights = sum(Path(path).stat().st_size for path in (spec.path, *spec.parts))
    fitting = fitting_layers(count, weights, kv, sum(device.free for device in found))
    log.info("offloading %d of %d layers to %s", fitting, count + 1, found)
    return fitting
