"""`shimmy bench` on the bundled model: that everything is there and makes sense, never how fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("isolation", ["none", "process"])
def test_bench(tmp_path: Path, isolation: str) -> None:
    def bench(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "shimmy_jupyter.cli", "bench", *args],
            capture_output=True, text=True, check=False,
            env={**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path)},
        )  # fmt: skip

    file = tmp_path / "found.json"
    done = bench(
        "self-test", "--clients", "1,3", "--tokens", "8", "--prompt-tokens", "40", "--repeats",
        "2", "--isolation", isolation, "--json", str(file),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "round 2 of 2: clients 3" in done.stderr
    found: dict[str, Any] = json.loads(file.read_text())
    assert [row["clients"] for row in found["throughput"]] == [1, 3]
    for row in found["throughput"]:
        assert row["answers"] == 2 * row["clients"]
        assert row["tokens"] == 8 * row["answers"]
        assert row["ended_early"] == 0
        assert row["tokens_per_second"] > 0
        assert row["first_token_ms"]["p50"] > 0
        assert row["first_token_ms"]["p95"] is None
    for run in found["runs"]["throughput"]:
        for answer in run["answers"]:
            counts = [answer[f"{of}_tokens"] for of in ("prompt", "completion", "cached")]
            assert counts == [40, 8, 0]
            assert answer["times"] == sorted(answer["times"])
            assert answer["sent"] < answer["times"][0]
    assert found["prefill"]["prompt_tokens"] == 160
    assert found["prefill"]["tokens_per_second"] > 0
    assert found["warm_prefix"]["cached_tokens"] == 159
    assert found["memory"]["loaded_bytes"] > (found["memory"]["before_bytes"] or 0)
    assert found["memory"]["isolated"] == (isolation == "process")
    # It is too small for memory to be what limits it, and the report says so.
    assert found["limit"] is None
    assert "left out     physical limit" in done.stdout

    too_long = bench("self-test", "--isolation", isolation, "--prompt-tokens", "1000000")
    assert too_long.returncode == 2
    assert "--prompt-tokens" in too_long.stderr.splitlines()[-1]
