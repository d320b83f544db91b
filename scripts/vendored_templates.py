"""The chat templates that llama.cpp's source brings along, of 70 models. Nothing here depends on them.

They are read from an unpacked source distribution of llama-cpp-python that an environment variable
names; nobody copies them. Without it there are none.
"""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "LLAMA_CPP_PYTHON_SOURCE"


def find() -> dict[str, Path]:
    """Their files, by name. A variable that names a folder without any is a mistake."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return {}
    found = sorted(Path(folder).glob("**/models/templates/*.jinja"))
    if not found:
        raise FileNotFoundError(f"{VARIABLE}: no models/templates/*.jinja in {folder}")
    return {path.stem: path for path in found}


if __name__ == "__main__":
    print(*find().values(), sep="\n")
