"""What a sampler chain chooses of a few candidates is what it chooses of the whole vocabulary.

Cases: distributions of all kinds, ties, all k that are taken; greedy; rows that are not finite, masked rows,
rows with fewer possible tokens than k; who keeps the GIL for long; which requests it is for; and that the engine
answers with it as it does without.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from shimmy_jupyter.engine.llama import candidates as module
from shimmy_jupyter.engine.llama.binding import native, quick
from shimmy_jupyter.engine.llama.candidates import Candidates, limit
from shimmy_jupyter.engine.llama.sampling import sampler_chain
from shimmy_jupyter.types import Sampling

from .conftest import ask, loaded

SIZE = 30_000


def whole(sampling: Sampling, row: Any, times: int) -> list[int]:
    """Of a record for each token, as `llama_sampler_sample` has them."""
    chain = sampler_chain(sampling, len(row))
    found = []
    for _ in range(times):
        data = (native.llama_token_data * len(row))()
        view = np.frombuffer(data, [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        view["id"], view["logit"] = np.arange(len(row)), row
        array = native.llama_token_data_array(data, len(row), -1, False)
        quick.llama_sampler_apply(chain, ctypes.byref(array))
        found.append(int(array.data[array.selected].id))
    quick.llama_sampler_free(chain)
    return found


def few(sampling: Sampling, row: Any, times: int) -> list[int | None]:
    chain, k = sampler_chain(sampling, len(row)), limit(sampling, len(row))
    assert k is not None
    one = Candidates()
    found = [one.chosen(chain, row, k) for _ in range(times)]
    quick.llama_sampler_free(chain)
    return found


def logits(seed: int, scale: float, size: int = SIZE) -> Any:
    return np.random.default_rng(seed).normal(0, scale, size).astype(np.float32)


class TestTheSame:
    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(0, 2**32 - 1),
        st.sampled_from([0.01, 1.0, 4.0, 30.0]),
        st.integers(1, SIZE // 128 // 4),
        st.sampled_from([0.1, 0.7, 1.0, 3.0]),
        st.sampled_from([0.2, 0.95, 1.0]),
        st.sampled_from([0.0, 0.05]),
        st.integers(20_500, SIZE),
    )
    def test_sampled(
        self, seed: int, scale: float, k: int, heat: float, top_p: float, min_p: float, size: int
    ) -> None:
        if 4 * k > size // 128:
            k = size // 128 // 4
        sampling = Sampling(temperature=heat, top_k=k, top_p=top_p, min_p=min_p, seed=seed % 1000)
        row = logits(seed, scale, size)
        assert few(sampling, row, 4) == whole(sampling, row, 4)

    @given(st.integers(0, 2**32 - 1), st.integers(8192, SIZE))
    def test_greedy(self, seed: int, size: int) -> None:
        row = logits(seed, 2.0, size)
        assert few(Sampling(temperature=0), row, 1) == whole(Sampling(temperature=0), row, 1)

    @pytest.mark.parametrize("heat", [1e-45, 1e-40, 1e-38, 1e-30, 1e-7])
    def test_hardly_warm(self, heat: float) -> None:
        """Divided by that, a logit is no number any more."""
        row = logits(3, 30.0, SIZE)
        best = few(Sampling(temperature=0), row, 1)
        for top_k in (0, 40):
            sampling = Sampling(temperature=heat, top_k=top_k, seed=1)
            assert few(sampling, row, 1) == whole(sampling, row, 1) == best

    def test_all_of_the_best_in_one_column(self) -> None:
        row = logits(1, 0.1)
        row[5 :: SIZE // 128] = np.linspace(5, 6, len(row[5 :: SIZE // 128]))
        sampling = Sampling(temperature=1, top_k=40, top_p=1, min_p=0, seed=3)
        assert few(sampling, row, 8) == whole(sampling, row, 8)

    def test_the_best_are_last(self) -> None:
        """Beyond the last whole column."""
        row = logits(2, 0.1, SIZE + 77)
        row[-50:] = 9.0 + np.arange(50) / 100
        sampling = Sampling(temperature=0.5, top_k=40, seed=3)
        assert few(sampling, row, 8) == whole(sampling, row, 8)

    def test_of_tied_logits_any_is_chosen(self) -> None:
        row = np.zeros(SIZE, np.float32)
        row[100:160] = 3.0
        found = few(Sampling(temperature=1, top_k=40, top_p=1, min_p=0, seed=5), row, 20)
        assert set(found) <= set(range(100, 160))

    async def test_the_engine_answers_the_same(self, tmp_path: Path, monkeypatch: Any) -> None:
        path = random_gguf.write(tmp_path / "wide.gguf", random_gguf.Shape(vocabulary=20_736))
        answers: list[str] = []
        for off in (False, True):
            if off:
                monkeypatch.setattr(Candidates, "chosen", lambda *_: None)
            async with loaded(path) as model:
                for seed in range(3):
                    sampling = Sampling(temperature=0.9, top_k=40, seed=seed)
                    text, _ = await ask(model, "What?", 24, sampling)
                    answers.append(text)
                answers.append((await ask(model, "What?", 24))[0])
        assert answers[:4] == answers[4:]


class TestLeftToTheChain:
    def test_what_is_no_number(self) -> None:
        row = logits(1, 1.0)
        row[7] = np.nan
        assert few(Sampling(temperature=1, top_k=40, seed=1), row, 1) == [None]

    @pytest.mark.parametrize("possible", [1, 39])
    def test_fewer_than_k_are_possible(self, possible: int) -> None:
        row = np.full(SIZE, -np.inf, np.float32)
        row[:possible] = 1.0
        assert few(Sampling(temperature=1, top_k=40, seed=1), row, 1) == [None]

    @pytest.mark.parametrize("size", [SIZE, 300_000])
    def test_all_are_alike(self, size: int) -> None:
        """Also where there are more columns than candidates."""
        row = np.ones(size, np.float32)
        assert few(Sampling(temperature=1, top_k=40, seed=1), row, 1) == [None]

    def test_while_somebody_else_has_the_gil(self, monkeypatch: Any) -> None:
        """Longer each time, until it is quick again."""
        moments = iter(range(10**6))
        monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(moments)))
        one, row = Candidates(), logits(1, 1.0)
        chain = sampler_chain(Sampling(temperature=0), SIZE)

        def rests() -> int:
            assert one.chosen(chain, row, 0) is not None
            count = 0
            while one._resting:
                assert one.chosen(chain, row, 0) is None
                count += 1
            return count

        assert [rests() for _ in range(9)] == [32, 64, 128, 256, 512, 1024, 2048, 4096, 4096]
        monkeypatch.setattr(module.time, "perf_counter", lambda: 0.0)
        assert rests() == 0
        monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(moments)))
        assert rests() == 32
        quick.llama_sampler_free(chain)

    @pytest.mark.parametrize(
        ("fields", "vocabulary", "k"),
        [
            ({"temperature": 0}, 150_000, 0),
            ({"temperature": 0}, 2048, None),
            ({"temperature": 0, "repeat_penalty": 1.1, "repeat_last_n": 64}, 150_000, None),
            ({"temperature": 0, "repeat_penalty": 1.1, "repeat_last_n": 0}, 150_000, 0),
            ({"temperature": 0, "presence_penalty": 0.5}, 150_000, None),
            ({"temperature": 0, "frequency_penalty": 0.5}, 150_000, None),
            ({"temperature": 0, "logit_bias": ((5, 2.0),)}, 150_000, None),
            ({"temperature": 1, "top_k": 40}, 150_000, 40),
            ({"temperature": 1, "top_k": 40}, 20_000, None),
            ({"temperature": 1, "top_k": 0}, 150_000, None),
            ({"temperature": 1, "top_k": 300}, 150_000, None),
            ({"temperature": 1, "top_k": 40, "logit_bias": ((5, 2.0),)}, 150_000, None),
        ],
    )
    def test_whose_it_is(self, fields: dict[str, Any], vocabulary: int, k: int | None) -> None:
        assert limit(Sampling(**fields), vocabulary) == k
