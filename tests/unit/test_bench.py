"""`shimmy bench` without an engine: figures, what is left out, the table, options.

Cases: percentiles of too few; rates of answers that never came, or came at once; answers that ended
early; a limit that cannot be known; the table; numbers of clients; files that cannot be written; no
matplotlib; ctrl-C.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from shimmy_jupyter import bench
from shimmy_jupyter.cli import main
from shimmy_jupyter.cli.measure import report
from shimmy_jupyter.errors import EngineCrashed, InvalidValue, ModelNotFound


def answer(times: list[float], tokens: int | None = None, **more: Any) -> dict[str, Any]:
    return {
        "sent": 0.0, "times": times, "done": times[-1] if times else 1.0, "reason": "length",
        "prompt_tokens": 8, "completion_tokens": len(times) if tokens is None else tokens,
        "cached_tokens": 0, **more,
    }  # fmt: skip


def raw(**more: Any) -> dict[str, Any]:
    """Measurements as `measure` has them before it concludes."""
    one, long = answer([1.0, 1.5, 2.0]), answer([2.0])
    return {
        "machine": {"processor": "P", "cores": 4, "usable_cores": 2, "os": "O", "python": "3",
                    "llama_cpp_python": "0"},
        "settings": {"clients": (1,), "tokens": 3, "prompt_tokens": 8, "repeats": 1,
                     "isolation": "none", "max_sequences": 32},
        "model": {"id": "m", "description": "d", "architecture": "llama", "size_bytes": 10**9,
                  "offloaded_layers": 0, "threads": 2, "kv_tokens": 4096},
        "load_seconds": 1.0,
        "memory": {"isolated": False, "before_bytes": 10**6, "loaded_bytes": 3 * 10**6,
                   "at_end_bytes": 4 * 10**6},
        "bandwidth_bytes_per_second": 8e9,
        "left_out": {},
        "runs": {
            "throughput": [{"clients": 1, "round": 1, "answers": [one]}],
            "long_prompt": [{"cold": long, "warm": answer([0.5], cached_tokens=7)}],
        },
        **more,
    }  # fmt: skip


def finished(**more: Any) -> dict[str, Any]:
    found = raw(**more)
    return found | bench.conclude(found)


class TestFigures:
    @pytest.mark.parametrize(
        ("count", "percent", "expected"),
        [
            (0, 50, None), (1, 50, 1), (4, 50, 2), (19, 95, None), (20, 95, 19), (99, 99, None),
            (100, 99, 99), (200, 95, 190),
        ],
    )  # fmt: skip
    def test_percentiles(self, count: int, percent: int, expected: float | None) -> None:
        assert bench.percentile(list(range(count, 0, -1)), percent) == expected

    def test_rates(self) -> None:
        both = [answer([1.0, 2.0]), answer([2.0, 3.0, 4.0], sent=1.0)]
        assert bench.total_rate(both) == 5 / 4
        assert [bench.stream_rate(one) for one in both] == [1.0, 1.0]

    def test_what_was_not_measured_is_not_zero(self) -> None:
        nothing = answer([])
        assert bench.total_rate([nothing]) is None
        assert bench.stream_rate(nothing) is None
        assert bench.stream_rate(answer([1.0])) is None
        assert bench.stream_rate(answer([1.0, 1.0])) is None
        assert bench.median([None, None]) is None
        row = bench.summarize(1, [[nothing]])
        assert row["tokens_per_second"] is row["first_token_ms"]["p50"] is None

    def test_a_row(self) -> None:
        rounds = [[answer([1.0, 1.5])], [answer([2.0, 2.5], 3, reason="stop")]]
        row = bench.summarize(1, rounds)
        assert row["first_token_ms"] == {"p50": 1000.0, "p95": None}
        assert row["inter_token_ms"] == {"p50": 500.0, "p95": None, "p99": None}
        assert (row["answers"], row["tokens"], row["pieces"], row["ended_early"]) == (2, 5, 4, 1)

    def test_conclusions(self) -> None:
        found = finished()
        assert found["prefill"]["tokens_per_second"] == 4.0
        assert found["warm_prefix"]["times_sooner"] == 4.0
        assert found["limit"] == {
            "bytes_per_token": 10**9, "tokens_per_second": 8.0, "share_reached": 0.25,
        }  # fmt: skip
        assert found["left_out"] == {}

    @pytest.mark.parametrize(
        ("facts", "bandwidth", "why"),
        [
            ({"offloaded_layers": 3}, 1e9, "GPU"),
            ({}, None, "bandwidth"),
            ({"size_bytes": 1000}, 1e9, "caches"),
            ({"architecture": "qwen3moe"}, 1e9, "experts"),
            ({"description": "llama 8x7B Q4_0"}, 1e9, "experts"),
        ],
    )
    def test_no_limit_without_its_grounds(
        self, facts: dict[str, Any], bandwidth: float | None, why: str
    ) -> None:
        allowed, reason = bench.limit(raw()["model"] | facts, bandwidth, 1.0)
        assert allowed is None
        assert why in reason

    def test_no_warm_prefix_where_nothing_was_reused(self) -> None:
        runs = raw()["runs"]
        runs["long_prompt"][0]["warm"]["cached_tokens"] = 0
        found = finished(runs=runs)
        assert found["warm_prefix"] is None
        assert "left out     warm prefix: nothing" in report(found)


class TestReport:
    def test_columns_are_flush_right(self) -> None:
        assert bench.layout(["a", "bbb"], [["100", "–"]]) == "  a  bbb\n100    –"

    def test_says_what_it_knows_and_assumes(self) -> None:
        text = report(finished())
        assert "2.0 MB loaded, 3.0 MB at the end" in text
        assert "8.0 tokens/s of one stream, of which 25% were reached; assumes" in text
        assert "p95 needs 20" in text
        assert "ended early" not in text
        assert "left out" not in text

    def test_says_what_came_short(self) -> None:
        runs = raw()["runs"]
        runs["throughput"][0]["answers"] = [answer([1.0], 2, reason="stop")]
        chosen = raw()["settings"] | {"clients": (1, 64)}
        runs["throughput"].append({"clients": 64, "round": 1, "answers": [answer([1.0, 2.0])]})
        text = report(finished(runs=runs, settings=chosen))
        assert "1 of 2 answers ended early" in text
        assert "1 of 4 tokens had no text" in text
        assert "At most 32 of these run together" in text


class TestOptions:
    def test_clients(self) -> None:
        assert bench.parse_clients("8, 1,2,2") == (1, 2, 8)
        for bad in ("", "0", "1,,2", "x", "-1", "1.5", "99999", "²"):
            with pytest.raises(ValueError, match="list of numbers"):
                bench.parse_clients(bad)

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("--clients", "none"), ("--tokens", "1"), ("--prompt-tokens", "x"), ("--repeats", "0"),
            ("--isolation", "thread"), ("--json", "/nowhere/x.json"), ("--plot", "x.pdf"),
            ("--plot", "/nowhere/x.png"), ("--what", "1"),
            ("--json", "x" * 300), ("--plot", f"{'x' * 300}.png"),
        ],
    )  # fmt: skip
    def test_a_bad_one_is_named_in_one_line(self, option: str, value: str) -> None:
        said = run(option, value)
        assert said.exit_code == 2
        assert option in said.stderr
        assert len(said.stderr.splitlines()) == 1

    def test_no_matplotlib(self, monkeypatch: Any, tmp_path: Path) -> None:
        monkeypatch.setattr("shimmy_jupyter.cli.measure.find_spec", lambda name: None)
        said = run("--plot", str(tmp_path / "x.svg"))
        assert said.exit_code == 2
        assert "pip install matplotlib" in said.stderr

    @pytest.mark.parametrize(
        ("error", "code", "said"),
        [
            (KeyboardInterrupt(), 130, "interrupted"),
            (InvalidValue("too long", param="--prompt-tokens"), 2, "--prompt-tokens"),
            (ModelNotFound("there is no ghost"), 2, "MODEL"),
            (EngineCrashed("it broke"), 1, "it broke [engine_crashed]"),
        ],
    )
    def test_how_it_ends(
        self, monkeypatch: Any, error: BaseException, code: int, said: str
    ) -> None:
        async def fails(*_: Any) -> None:
            raise error

        monkeypatch.setattr(bench, "measure", fails)
        done = run("ghost")
        assert done.exit_code == code
        assert said in done.stderr
        assert not done.stdout

    def test_results_are_written(self, monkeypatch: Any, tmp_path: Path) -> None:
        async def measured(*_: Any) -> dict[str, Any]:
            return finished()

        monkeypatch.setattr(bench, "measure", measured)
        assert run("--json", str(tmp_path / "x.json")).exit_code == 0
        assert '"share_reached": 0.25' in (tmp_path / "x.json").read_text()

    @pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_plot(self, monkeypatch: Any, tmp_path: Path) -> None:
        async def measured(*_: Any) -> dict[str, Any]:
            return finished()

        monkeypatch.setattr(bench, "measure", measured)
        assert run("--plot", str(tmp_path / "x.svg")).exit_code == 0
        assert "<svg" in (tmp_path / "x.svg").read_text()


def run(*args: str) -> Result:
    return CliRunner().invoke(main, ["bench", *args])


def test_matplotlib_waits_until_it_is_needed() -> None:
    import subprocess

    code = (
        "import shimmy_jupyter.cli, shimmy_jupyter.bench, sys; print('matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
