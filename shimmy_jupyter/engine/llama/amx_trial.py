"""The process that computes with llama.cpp's own layouts of weights and without, and ends with 0 where
both come to the same.

The bundled model's weights are Q8_0; a copy in Q4_0 is unpacked on the way to the processor's tiles, and
so reads what was written just before.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import tempfile
from pathlib import Path

from .binding import initialise, native

_MODEL = Path(__file__).parents[2] / "bundled" / "self-test.gguf"
_TOKENS = 48
"""More than a tile has rows, and no multiple of them."""
_FTYPE_Q4_0 = 2
_LIKE = 0.05
"""Of the logits' range: how much sums in another order, of 8 bits each, may differ."""


def logits(path: Path, *, repacked: bool) -> list[float]:
    """After a prompt, and after one more token, which is computed in another way."""
    params = native.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = repacked
    model = native.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise RuntimeError("llama.cpp cannot load its model")
    vocabulary = native.llama_vocab_n_tokens(native.llama_model_get_vocab(model))
    sizes = native.llama_context_default_params()
    sizes.n_ctx, sizes.n_batch, sizes.n_ubatch = 256, 64, 64
    sizes.n_threads = sizes.n_threads_batch = 1
    context = native.llama_init_from_model(model, sizes)
    if not context:
        raise RuntimeError("llama.cpp cannot make a context")
    found: list[float] = []
    for tokens in ([5 + 7 * i for i in range(_TOKENS)], [11]):
        array = (ctypes.c_int32 * len(tokens))(*tokens)  # the batch only points at it
        if native.llama_decode(context, native.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama.cpp cannot decode")
        found += native.llama_get_logits_ith(context, -1)[:vocabulary]
    native.llama_free(context)
    native.llama_model_free(model)
    return found


def difference(path: Path) -> float:
    """The largest of two logits, by the range that they have."""
    plain, repacked = logits(path, repacked=False), logits(path, repacked=True)
    apart = [abs(a - b) for a, b in zip(plain, repacked, strict=True)]
    largest = max(apart) if all(map(math.isfinite, apart)) else math.inf
    return largest / (max(plain) - min(plain))


def main() -> int:
    initialise()
    with tempfile.TemporaryDirectory() as folder:
        smaller = Path(folder, "q4_0.gguf")
        params = native.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.nthread = _FTYPE_Q4_0, True, 1
        if native.llama_model_quantize(
            os.fsencode(_MODEL), os.fsencode(smaller), ctypes.byref(params)
        ):
            raise RuntimeError("llama.cpp cannot quantise a model")
        for path in (_MODEL, smaller):
            found = difference(path)
            if not found <= _LIKE:  # so is what is not a number
                print(f"it computes something else: logits differ by {found:.2f} of their range")  # noqa: T201
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
