"""`%shimmy bench`: what is asked, and what is said of it.

Cases: as many runs of each prompt as wanted and one before them; no prompt begins as another does, nor
as one of an earlier call; medians with the least and the most; memory as far as it is known; a dot of the
plot for each run; answers of a single token, which have no rate; a model whose name is HTML; an error ends it.
"""

from __future__ import annotations

from typing import Any

import pytest

from shimmy_jupyter.errors import RateLimitExceeded
from shimmy_jupyter.notebook.board import Board
from shimmy_jupyter.notebook.measuring import bench

FIT = {"needed": 2_500_000_000, "available": 9_000_000_000, "ok": True, "max_context": 8192}


class Shown(Board):
    def __init__(self) -> None:
        super().__init__(rich=False)
        self.texts: list[str] = []
        self.page = ""

    def show(self, text: str, page: str) -> None:
        self.texts.append(text)
        self.page = page


class Server:
    """Answers with 10, 20, 30 … tokens per second in turn."""

    def __init__(self, **facts: Any) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.facts = {"id": "m", "size_bytes": 600_000_000, "fit": FIT, **facts}
        self.single = False

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        assert path == "shimmy/v1/completions"
        if len(self.bodies) == 40:
            raise RateLimitExceeded("enough for today")
        self.bodies.append(body)
        rate = None if self.single else 10.0 * len(self.bodies)
        used = {"prompt_tokens": len(body["prompt"].split()), "completion_tokens": 64}
        return {
            "usage": used,
            "shimmy": {"ttft_ms": 100.0 + len(self.bodies), "tokens_per_second": rate},
        }

    def get(self, path: str) -> dict[str, Any]:
        assert path == "shimmy/api/models"
        return {"models": [{**self.facts, "id": "other", "fit": None}, self.facts]}


def test_the_figures() -> None:
    server, board = Server(), Shown()
    bench(server, {"model": "m"}, board, runs=3)  # type: ignore[arg-type]
    assert len(server.bodies) == 7
    head, _, *table = board.texts[-1].splitlines()
    assert head == "m, needs 2.5 GB of memory (600.0 MB of weights): medians of 3, least to most"
    assert [line.split("  ")[0] for line in table[1:]] == ["short prompt", "long prompt"]
    assert "103.0 (102.0 to 104.0)" in table[1]
    assert "30.0 (20.0 to 40.0)" in table[1]
    assert "60.0 (50.0 to 70.0)" in table[2]
    assert board.page.count("<circle") == 6
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in server.bodies)


def test_nothing_is_in_the_cache() -> None:
    server = Server()
    for _ in range(2):
        bench(server, {"model": "m"}, Shown(), runs=3)  # type: ignore[arg-type]
    assert len({body["prompt"].split()[0] for body in server.bodies}) == 14


@pytest.mark.parametrize(
    ("facts", "said"),
    [({"fit": None}, "m, 600.0 MB of weights: "), ({"id": "gone"}, "m: medians")],
)
def test_memory_that_is_not_known(facts: dict[str, Any], said: str) -> None:
    board = Shown()
    bench(Server(**facts), {"model": "m"}, board, runs=1)  # type: ignore[arg-type]
    assert board.texts[-1].startswith(said)


def test_single_tokens_have_no_rate() -> None:
    server, board = Server(), Shown()
    server.single = True
    bench(server, {"model": "m"}, board, runs=2)  # type: ignore[arg-type]
    assert board.texts[-1].splitlines()[3].endswith("–")
    assert "<svg" not in board.page


def test_a_name_is_text() -> None:
    board = Shown()
    bench(Server(id="<b>\x1b[2Jm"), {"model": "<b>\x1b[2Jm"}, board, runs=1)  # type: ignore[arg-type]
    assert "<b>" not in board.page
    assert "\x1b" not in board.texts[-1]


def test_an_error_ends_it() -> None:
    server = Server()
    with pytest.raises(RateLimitExceeded):
        bench(server, {"model": "m"}, Shown(), runs=30)  # type: ignore[arg-type]
