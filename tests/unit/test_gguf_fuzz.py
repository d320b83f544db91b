"""Mutants of valid headers, and mutants of these: nothing but `GgufError` comes out, whose message can be
shown, and memory stays within its bound. For GGUF_FUZZ_SECONDS; longer, and by coverage:
`python scripts/fuzz_gguf.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import fuzz_gguf

SECONDS = float(os.environ.get("GGUF_FUZZ_SECONDS", "3"))


def test_nothing_but_its_own_error(tmp_path: Path) -> None:
    report = fuzz_gguf.fuzz(SECONDS, int(os.environ.get("GGUF_FUZZ_SEED", "0")), tmp_path)
    assert report.inputs > 50
    assert 0 < report.accepted < report.inputs
