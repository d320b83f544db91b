"""The context that is listed is the one that requests are held to, on the real engine.

Cases: listed before the model is loaded and after, for settings that make it shorter and for none; a setting that
no model can have; vectors only; a pin of more than there is. In a notebook: a dry run says by how much a prompt
is too long as the refusal does, and `--context` names cells to leave out.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import minilm_gguf
import pytest

from shimmy_jupyter.compose import build_service
from shimmy_jupyter.config import Settings
from shimmy_jupyter.errors import ContextLengthExceeded, ModelDrifted
from shimmy_jupyter.local import LocalTransport
from shimmy_jupyter.models.sources import BUNDLED, Places
from shimmy_jupyter.notebook.extension import unload
from shimmy_jupyter.service import CompletionService
from shimmy_jupyter.types import CompletionRequest, PinnedModel, Principal, Sampling

from ..notebooks import magics
from .test_embedding import tiny_bert

ME = Principal("local")


async def listed(service: CompletionService, id: str = "self-test") -> dict[str, Any]:
    return (await service.library.describe_one(id)).to_json()


@pytest.fixture
def serve(tmp_path: Path, jp_asyncio_loop: Any) -> Iterator[Callable[..., CompletionService]]:
    """Services that look for models in one folder, and try none out."""
    made: list[CompletionService] = []

    def serve(**settings: Any) -> CompletionService:
        made.append(
            build_service(Settings(places=Places(roots=(tmp_path,)), probe=False, **settings))
        )
        return made[-1]

    yield serve
    for service in made:
        jp_asyncio_loop.run_until_complete(service.close())


@pytest.mark.parametrize(
    "settings",
    [{}, {"context_size": 128}, {"kv_tokens": 300}, {"context_size": 300, "kv_tokens": 256}],
    ids=str,
)
async def test_what_is_said_before_is_what_the_engine_has(
    serve: Callable[..., CompletionService], settings: dict[str, int]
) -> None:
    service = serve(**settings)
    before = await listed(service)
    async with service.pool.use("self-test") as model:
        loaded = await listed(service)
        assert loaded["usable_context"] == model.facts.context_size
        assert (before["context"], loaded["context"]) == (1024, 1024)
    assert before["usable_context"] == loaded["usable_context"]
    (row,) = [one.to_json() for one in await service.library.describe()]
    assert row["usable_context"] == loaded["usable_context"]


async def test_more_than_the_model_knows(serve: Callable[..., CompletionService]) -> None:
    assert (await listed(serve(context_size=4096)))["usable_context"] is None


async def test_what_makes_vectors_only(
    serve: Callable[..., CompletionService], tmp_path: Path
) -> None:
    (tmp_path / "checkpoint").mkdir()
    minilm_gguf.convert(tiny_bert(tmp_path / "checkpoint", head=False), tmp_path / "bert.gguf")
    service = serve()
    assert (await listed(service, "bert"))["usable_context"] is None
    async with service.pool.use("bert") as model:
        found = await listed(service, "bert")
        assert found["usable_context"] == model.facts.context_size


async def test_a_pin_of_more_than_the_cache_has(serve: Callable[..., CompletionService]) -> None:
    service = serve(kv_tokens=256)
    row = await listed(service)
    sha256 = hashlib.sha256(BUNDLED.read_bytes()).hexdigest()
    for context, error in ((256, None), (512, ModelDrifted)):
        pin = PinnedModel(row["size_bytes"], sha256, context_size=context)
        request = CompletionRequest(
            "r", ME, "self-test", tuple(b"once"), 1, Sampling(temperature=0), pin=pin
        )
        if error is not None:
            with pytest.raises(error, match="512 is pinned, 256 was found"):
                await service.start(request)
        else:
            async with await service.start(request) as completion:
                await completion.text()


@pytest.fixture
def ip() -> Iterator[Any]:
    """A notebook whose engine has 128 tokens for a request."""
    transport = LocalTransport(Settings(places=Places(), probe=False, context_size=128))
    shell = magics(transport).session.shell
    before, config = dict(shell.user_ns), copy.deepcopy(shell.config)
    yield shell
    unload(shell)
    shell.user_ns.clear()
    shell.user_ns.update(before)
    shell.config = config
    transport.close()


def run(ip: Any, cell: str) -> None:
    ip.run_cell(cell, store_history=True).raise_error()


@pytest.mark.parametrize(
    ("words", "options"), [(4, "--max-tokens 100"), (60, ""), (60, "--max-tokens 100")]
)
def test_a_dry_run_says_what_the_refusal_does(
    ip: Any, capsys: Any, words: int, options: str
) -> None:
    asked = f"\n{'What does len do? ' * words}"
    run(ip, f"%%shimmy --dry-run {options}{asked}")
    (said,) = re.findall(r"^answer: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert said.endswith(("context of 128", "the context of 128 has room for"))
    with pytest.raises(ContextLengthExceeded, match="context of 128") as caught:
        run(ip, f"%%shimmy {options}{asked}")
    over = re.findall(r"(\d+) (?:too many|tokens more)", caught.value.message)
    assert over == re.findall(r"(\d+) (?:tokens too long|more than)", said)


def test_context_names_cells_to_leave_out(ip: Any) -> None:
    run(ip, "b = 'the quick brown fox jumps over the lazy dog ' * 20\nb")
    run(ip, "y = 7")
    with pytest.raises(ContextLengthExceeded, match=r"--leave-out (?:In|Out)\[\d+\]") as caught:
        run(ip, "%%shimmy --context 2 --max-tokens 5\nWhat does len do?")
    (names,) = re.findall(r"--leave-out (\S+?)(?:;|$)", caught.value.message)
    run(ip, f"%%shimmy --context 2 --max-tokens 5 --leave-out {names}\nWhat does len do?")
