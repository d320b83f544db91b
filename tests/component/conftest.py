"""A real Jupyter server with the extension enabled, its engine played by the scripted backend: in
the server, and behind sockets as with `isolation = "process"`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from jupyter_server.auth import Authorizer

from shimmy_jupyter.engine import isolated
from shimmy_jupyter.engine.backend import Backend, LoadSpec
from shimmy_jupyter.engine.fake import FakeBackend
from shimmy_jupyter.engine.isolated import IsolatedBackend
from shimmy_jupyter.engine.model import LoadedModel
from shimmy_jupyter.errors import AccessDenied
from shimmy_jupyter.models.library import ModelLibrary
from shimmy_jupyter.models.lifecycle import ModelPool
from shimmy_jupyter.models.sources import Found
from shimmy_jupyter.service import CompletionService

from ..offered import catalog, found
from .threads import ThreadProcess

MODEL = "fake"


@dataclass
class Fakes:
    """What the next model that is loaded will be, and those that were."""

    make: Callable[[], FakeBackend] = FakeBackend
    spec: LoadSpec = field(default_factory=lambda: LoadSpec(path="", sequences=16))
    queue_size: int = 64
    stream_capacity: int = 256
    isolated: bool = False
    made: list[FakeBackend] = field(default_factory=list)
    models: list[LoadedModel] = field(default_factory=list)

    async def load(self, _file: Found) -> LoadedModel:
        def backend() -> Backend:
            return IsolatedBackend() if self.isolated else self._made()

        model = await LoadedModel.load(
            backend, self.spec, queue_size=self.queue_size, stream_capacity=self.stream_capacity
        )
        self.models.append(model)
        return model

    def start(self, _factory: str, descriptors: list[int]) -> ThreadProcess:
        return ThreadProcess(self._made, descriptors)

    def _made(self) -> FakeBackend:
        self.made.append(self.make())
        return self.made[-1]

    def check(self) -> None:
        """Nothing is left of any request, and the scheduler agrees with itself."""
        for model in self.models:
            scheduler = model.engine.scheduler
            scheduler.check_invariants()
            assert not scheduler.sequences, scheduler
            assert model.active == 0


@pytest.fixture(params=["in process", "behind sockets"])
def fakes(request: Any, monkeypatch: Any) -> Fakes:
    fakes = Fakes(isolated=request.param == "behind sockets")
    monkeypatch.setattr(isolated, "_start", fakes.start)
    return fakes


@pytest.fixture
def authorizer_class() -> type[Authorizer] | None:
    return None


@pytest.fixture
def jp_server_config(authorizer_class: type[Authorizer] | None) -> dict[str, Any]:
    config: dict[str, Any] = {
        "ServerApp": {
            "jpserver_extensions": {"shimmy_jupyter": True},
            "allow_unauthenticated_access": False,
        }
    }
    if authorizer_class is not None:
        config["ServerApp"]["authorizer_class"] = authorizer_class
    return config


def no_puller() -> Any:
    raise AccessDenied("nothing is downloaded here")


@pytest.fixture
def server(jp_serverapp: Any, fakes: Fakes) -> Any:
    """The running server, its service now on the fake backend. Ends with nothing left over."""
    pool = ModelPool(catalog(found(MODEL, Path("fake.gguf"))), fakes.load)
    service = CompletionService(pool, ModelLibrary(pool, None, no_puller), default_max_tokens=64)
    extension = jp_serverapp.extension_manager.extension_apps["shimmy_jupyter"].pop()
    jp_serverapp.extension_manager.extension_apps["shimmy_jupyter"].add(extension)
    extension.service = service
    jp_serverapp.web_app.settings["shimmy_service"] = service
    yield jp_serverapp
    fakes.check()


def chat(prompt: str = "one two three", **fields: Any) -> str:
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **fields}
    return json.dumps(body)
