"""A model's file, or its files, opened by llama.cpp."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from ..backend import LoadSpec
from .binding import native


def opened(spec: LoadSpec, params: Any) -> Any:
    """The model's pointer, null where llama.cpp refuses it."""
    paths = [os.fsencode(path) for path in (spec.path, *spec.parts)]
    if len(paths) == 1:
        return native.llama_model_load_from_file(paths[0], params)
    # In a cache of downloads the parts' names say nothing.
    return native.llama_model_load_from_splits(
        (ctypes.c_char_p * len(paths))(*paths), len(paths), params
    )
