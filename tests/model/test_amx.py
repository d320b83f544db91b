"""A build of llama.cpp that cannot use the processor's matrix instructions is kept from them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shimmy_jupyter.engine.backend import LoadSpec, Sharing, capacity_of
from shimmy_jupyter.engine.llama import LlamaBackend, amx, amx_trial
from shimmy_jupyter.engine.llama.binding import native
from shimmy_jupyter.models.sources import BUNDLED

FLAGS = "processor\t: 0\nflags\t\t: fpu avx2 amx_bf16 amx_int8\n\nprocessor\t: 1\n"


def child(source: str) -> tuple[str, ...]:
    return sys.executable, "-c", source


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Asked anew, in the test and after it."""
    amx.usable.cache_clear()
    yield
    amx.usable.cache_clear()


class TestPresent:
    @pytest.mark.parametrize(
        ("text", "there"),
        [
            (FLAGS, True),
            (FLAGS.replace("amx_int8", "amx_tile"), False),
            (FLAGS.replace("amx_int8", "amx_int8_not"), False),
            ("model name\t: amx_int8\n", False),
            ("", False),
        ],
    )
    def test_as_the_kernel_says(self, tmp_path: Path, text: str, there: bool) -> None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/cpuinfo").write_text(text)
        assert amx.present(tmp_path) is there

    def test_a_system_that_does_not_say(self, tmp_path: Path) -> None:
        assert not amx.present(tmp_path)


class TestFault:
    def test_none(self) -> None:
        assert amx.fault(child("print('fine')")) is None

    @pytest.mark.parametrize("signal", ["SIGSEGV", "SIGILL", "SIGABRT"])
    def test_a_crash(self, signal: str) -> None:
        source = f"import os, signal; os.kill(os.getpid(), signal.{signal})"
        assert amx.fault(child(source)) == f"it crashes ({signal})"

    def test_it_says_why(self) -> None:
        source = "import sys; print('noise'); print('it computes something else'); sys.exit(1)"
        assert amx.fault(child(source)) == "it computes something else"
        assert amx.fault(child("raise ValueError('so')")) == "ValueError: so"
        assert amx.fault(child("import sys; sys.exit(3)")) == (
            "a trial fails, and does not say why"
        )

    def test_it_does_not_end(self) -> None:
        found = amx.fault(child("import time; time.sleep(600)"), seconds=0.2)
        assert found == "a trial took longer than 0.2 seconds"

    def test_it_does_not_start(self, tmp_path: Path) -> None:
        found = amx.fault((str(tmp_path / "nothing"),))
        assert found == "a trial does not start: No such file or directory"

    def test_this_build_computes_the_same(self) -> None:
        assert amx.fault() is None


class TestTrial:
    """What it compares; that both are the same here is tested above."""

    @pytest.mark.parametrize("wrong", [3.0, float("nan"), float("inf")])
    def test_other_numbers_are_told(
        self, monkeypatch: Any, capsys: pytest.CaptureFixture[str], wrong: float
    ) -> None:
        def logits(_path: Path, *, repacked: bool) -> list[float]:
            found = [1.0, -2.0, 9.0, 0.5]  # none that were computed: they may end this process
            return [*found[:-1], found[-1] + wrong] if repacked else found

        monkeypatch.setattr(amx_trial, "logits", logits)
        assert amx_trial.main() == 1
        assert "computes something else" in capsys.readouterr().out

    def test_both_kinds_of_weights(self, monkeypatch: Any) -> None:
        seen: list[str] = []

        def difference(path: Path) -> float:
            seen.append(path.name)
            return 0.0

        monkeypatch.setattr(amx_trial, "difference", difference)
        assert amx_trial.main() == 0
        assert seen == ["self-test.gguf", "q4_0.gguf"]


@pytest.mark.usefixtures("forgetful")
class TestRowBlock:
    @pytest.mark.parametrize(
        ("build", "present", "fault", "rows"),
        [
            (b"CPU : AVX2 = 1 | AMX_INT8 = 1 | ", True, None, 32),
            (b"CPU : AVX2 = 1 | ", True, None, 1),
            (b"CPU : AVX2 = 1 | AMX_INT8 = 1 | ", False, None, 1),
            (b"CPU : AVX2 = 1 | AMX_INT8 = 1 | ", True, "it crashes (SIGSEGV)", 1),
        ],
    )
    def test_where_it_is_computed_with(
        self, monkeypatch: Any, build: bytes, present: bool, fault: str | None, rows: int
    ) -> None:
        monkeypatch.setattr(amx, "present", lambda: present)
        monkeypatch.setattr(amx, "fault", lambda: fault)
        assert amx.row_block(build) == rows

    def test_the_scheduler_is_told(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(amx, "row_block", lambda _build: 48)
        backend, spec = LlamaBackend(), LoadSpec(str(BUNDLED), kv_tokens=256, sequences=1)
        try:
            loaded = backend.load(spec)
        finally:
            backend.unload()
        assert capacity_of(loaded, spec, Sharing(), queue=1).row_block == 48


@pytest.mark.usefixtures("forgetful")
class TestUsable:
    @pytest.mark.parametrize(
        ("present", "fault", "usable"),
        [(False, "unasked", True), (True, None, True), (True, "it crashes (SIGSEGV)", False)],
    )
    def test_the_engine_obeys(
        self,
        monkeypatch: Any,
        caplog: pytest.LogCaptureFixture,
        present: bool,
        fault: str | None,
        usable: bool,
    ) -> None:
        asked: list[bool] = []
        real = native.llama_model_load_from_file

        def load(path: bytes, params: Any) -> Any:
            asked.append(params.use_extra_bufts)
            return real(path, params)

        monkeypatch.setattr(amx, "present", lambda: present)
        monkeypatch.setattr(amx, "fault", lambda: fault)
        monkeypatch.setattr(native, "llama_model_load_from_file", load)
        with caplog.at_level(logging.WARNING, "shimmy_jupyter.engine"):
            for _ in range(2):
                backend = LlamaBackend()
                backend.load(LoadSpec(str(BUNDLED), kv_tokens=256, sequences=1))
                backend.unload()
        assert asked == [usable, usable]
        said = [record.getMessage() for record in caplog.records if "AMX" in record.getMessage()]
        assert len(said) == (not usable)  # once, however many models are loaded
        if fault is not None and present:
            assert fault in said[0]
            assert "shimmy doctor" in said[0]
