"""A quarter of a minute of `benchmarks/soak.py`: every request ends once, and nothing is left."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import random_gguf

sys.path.append(str(Path(__file__).parent.parent.parent / "benchmarks"))

import soak

SHAPE = random_gguf.Shape(layers=4, width=256, heads=8, head_width=32, hidden=1024, vocabulary=2048)
SECONDS = 15.0


@pytest.mark.parametrize("isolation", ["none", "process"])
async def test_everybody_is_accounted_for(isolation: str, tmp_path: Path) -> None:
    path = random_gguf.write(tmp_path / "words.gguf", SHAPE, words=True, quantized=True)
    report = await soak.soak(path, SECONDS, seed=1, isolation=isolation)
    soak.show(report)
    assert report.problems == []
    assert report.outcomes.total() == report.started > 50
    assert set(report.outcomes) <= set(soak.OUTCOMES)
    assert {"ok", "cancelled", "deadline"} <= set(report.outcomes)
    # Whether a kill meets somebody is up to chance.
    assert isolation == "process" or not report.outcomes["crashed"]
