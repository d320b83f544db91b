"""Our own routes about models: what there is, loading, unloading, and jobs.

Cases: the list and one of it; not there; loaded by a job, watched by looking and by events; twice; unloaded,
busy or not; stopped; a load that fails; jobs that are not there, and all of one's own; a download that is
not allowed; bodies that say something; a stream that begins while its model is being loaded, that fails
then, and whose client goes away; what idle shutdown is told.
"""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from tornado.httpclient import HTTPClientError

from shimmy_jupyter.engine.fake import FakeBackend
from shimmy_jupyter.errors import ModelLoadFailed
from shimmy_jupyter.models.jobs import Progress
from shimmy_jupyter.types import Principal, Sampling

from .conftest import MODEL, chat
from .test_completions import _post


@pytest.fixture
def post(jp_fetch: Any) -> Any:
    async def post(*path: str, body: str = "") -> Any:
        response = await jp_fetch("shimmy", "api", *path, method="POST", body=body)
        return response.code, json.loads(response.body)

    return post


@pytest.fixture
def get(jp_fetch: Any) -> Any:
    async def get(*path: str) -> Any:
        return json.loads((await jp_fetch("shimmy", "api", *path)).body)

    return get


async def refused(made: Any) -> tuple[int, dict[str, Any]]:
    with pytest.raises(HTTPClientError) as caught:
        await made
    assert caught.value.response is not None
    return caught.value.code, json.loads(caught.value.response.body)["error"]


async def ended(server: Any, id: str) -> dict[str, Any]:
    job = server.web_app.settings["shimmy_service"].library.jobs.get(id, Principal("local"))
    await job.wait()
    found: dict[str, Any] = job.to_json()
    return found


async def test_what_there_is(server: Any, get: Any) -> None:
    found = await get("models")
    assert found["default"] == MODEL
    (model,) = found["models"]
    assert (model["id"], model["state"], model["kind"]) == (MODEL, "available", "model")
    assert (model["context"], model["usable_context"]) == (None, None)  # nobody has looked
    assert await get("models", MODEL) == model
    status, error = await refused(get("models", "ghost"))
    assert (status, error["code"]) == (404, "model_not_found")


async def test_loaded_and_unloaded(server: Any, post: Any, get: Any, fakes: Any) -> None:
    status, answer = await post("models", MODEL, "load")
    assert status == 202
    job = await ended(server, answer["job"])
    assert job == await get("jobs", answer["job"])
    assert (job["state"], job["kind"], job["model"]) == ("done", "load", MODEL)
    assert job["result"]["state"] == "loaded"
    row = await get("models", MODEL)
    context = fakes.models[0].facts.context_size
    assert (row["state"], row["context"], row["usable_context"]) == ("loaded", None, context)
    assert (await get("models"))["models"] == [row]
    _, again = await post("models", MODEL, "load")
    assert (await ended(server, again["job"]))["state"] == "done"
    assert len(fakes.models) == 1

    _, answer = await post("models", MODEL, "unload", body="{}")
    assert (await ended(server, answer["job"]))["result"] == {"unloaded": True}
    row = await get("models", MODEL)
    assert (row["state"], row["usable_context"]) == ("available", None)
    _, answer = await post("models", MODEL, "unload")
    assert (await ended(server, answer["job"]))["result"] == {"unloaded": False}
    kinds = [job["kind"] for job in (await get("jobs"))["jobs"]]
    assert kinds == ["load", "load", "unload", "unload"]


async def test_who_is_answering_is_not_unloaded(
    server: Any, post: Any, get: Any, jp_fetch: Any, fakes: Any
) -> None:
    stream = await answering(server, post, fakes)
    _, answer = await post("models", MODEL, "unload")
    while (await get("models", MODEL))["state"] == "loaded":
        pass
    assert (await get("models", MODEL))["state"] == "unloading"
    assert (await get("jobs", answer["job"]))["message"] == "waiting until nobody uses it"
    (extension,) = server.extension_manager.extension_apps["shimmy_jupyter"]
    assert extension.current_activity() == 2
    stream.close()
    assert (await ended(server, answer["job"]))["result"] == {"unloaded": True}


async def answering(server: Any, post: Any, fakes: Any) -> Any:
    """A stream that has not ended, until it is closed."""
    gate = threading.Semaphore(0)
    fakes.make = lambda: FakeBackend(lambda _: ["word "] * 50, gate=gate)
    _, answer = await post("models", MODEL, "load")
    await ended(server, answer["job"])
    (model,) = fakes.models
    stream = model.submit("somebody", (1, 2), 4, Sampling(temperature=0), ())
    gate.release(3)
    return stream


async def test_a_job_is_stopped(server: Any, post: Any, jp_fetch: Any, fakes: Any) -> None:
    stream = await answering(server, post, fakes)
    _, answer = await post("models", MODEL, "unload")
    await jp_fetch("shimmy", "api", "jobs", answer["job"], method="DELETE")
    job = await ended(server, answer["job"])
    assert (job["state"], job["error"]["code"]) == ("cancelled", "cancelled")
    (model,) = fakes.models
    assert model.failure is None
    stream.close()
    fakes.made[0].gate.release(100) if fakes.made else None
    while model.active:
        await asyncio.sleep(0.001)


async def test_events_of_a_job(server: Any, post: Any, jp_fetch: Any) -> None:
    _, answer = await post("models", MODEL, "load")
    response = await jp_fetch(
        "shimmy", "api", "jobs", answer["job"], headers={"Accept": "text/event-stream"}
    )
    assert response.headers["Content-Type"] == "text/event-stream"
    looks = [json.loads(line[6:]) for line in response.body.decode().split("\n\n") if line]
    assert looks[-1]["state"] == "done"
    assert {look["id"] for look in looks} == {answer["job"]}


async def test_a_load_that_fails(
    server: Any, post: Any, get: Any, fakes: Any, monkeypatch: Any
) -> None:
    async def load(_file: Any) -> Any:
        raise ModelLoadFailed("it needs 6.1 GB, 4.8 GB are available")

    server.web_app.settings["shimmy_service"].pool._loader = load
    _, answer = await post("models", MODEL, "load")
    job = await ended(server, answer["job"])
    assert job["state"] == "failed"
    assert job["error"]["code"] == "model_load_failed"
    assert job["error"]["message"] == f"{MODEL}: it needs 6.1 GB, 4.8 GB are available"
    assert (await get("models", MODEL))["error"] == "it needs 6.1 GB, 4.8 GB are available"


@pytest.mark.parametrize("verb", ["load", "unload", "probe", "verify"])
async def test_of_what_is_not_there(server: Any, post: Any, verb: str) -> None:
    status, error = await refused(post("models", "ghost", verb))
    assert (status, error["code"]) == (404, "model_not_found")


async def test_jobs_that_are_not_there(server: Any, get: Any, jp_fetch: Any) -> None:
    assert (await refused(get("jobs", "0" * 32)))[0] == 404
    made = jp_fetch("shimmy", "api", "jobs", "0" * 32, method="DELETE")
    assert (await refused(made))[1]["code"] == "not_found"


async def test_a_download_that_nobody_may(server: Any, post: Any) -> None:
    body = json.dumps({"model": "org/name"})
    status, error = await refused(post("models", "pull", body=body))
    assert (status, error["code"]) == (403, "policy_denied")


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        (("models", "pull"), "{}", "invalid_value", "model"),
        (("models", "pull"), '{"model": ""}', "invalid_value", "model"),
        (("models", "pull"), '{"model": "a/b", "sha256": "zz"}', "invalid_value", "sha256"),
        (("models", "pull"), '{"model": "a/b", "quiet": 1}', "unknown_parameter", "quiet"),
        (("models", "pull"), "[]", "invalid_value", None),
        (("models", MODEL, "load"), '{"force": true}', "unknown_parameter", "force"),
        (("models", MODEL, "unload"), "x", "invalid_value", None),
        (("models", "discover"), '{"roots": ["/"]}', "unknown_parameter", "roots"),
    ],
)
async def test_bodies(server: Any, post: Any, path: Any, body: str, code: str, param: Any) -> None:
    status, error = await refused(post(*path, body=body))
    assert (status, error["code"], error["param"]) == (400, code, param)


class TestLoadingInAStream:
    """A stream says how far the loading of its model is, and then answers as ever."""

    @pytest.fixture
    def slow(self, server: Any, fakes: Any, monkeypatch: Any) -> Any:
        """A door that the model waits behind."""
        monkeypatch.setattr("shimmy_jupyter.server.answers.PATIENCE", 0.01)
        door, pool = asyncio.Event(), server.web_app.settings["shimmy_service"].pool

        async def load(file: Any) -> Any:
            for entry in pool._entries.values():
                entry.report(Progress("hashing", 1, 4, "bytes"))
            await door.wait()
            return await fakes.load(file)

        pool._loader = load
        return door

    async def asked(self, jp_fetch: Any, said: Any) -> str:
        body = chat(stream=True, max_tokens=2)
        response = await jp_fetch(
            "shimmy", "v1", "chat", "completions", method="POST", body=body, streaming_callback=said
        )
        assert response.code == 200
        return str(response.headers["Content-Type"])

    async def test_it_says_how_far_it_is(self, slow: Any, jp_fetch: Any) -> None:
        pieces: list[str] = []

        def said(chunk: bytes) -> None:
            pieces.append(chunk.decode())
            if "hashing" in pieces[-1]:
                slow.set()

        assert await self.asked(jp_fetch, said) == "text/event-stream"
        blocks = "".join(pieces).split("\n\n")
        comments = [json.loads(block[2:]) for block in blocks if block.startswith(": {")]
        assert {
            "state": "loading", "message": "hashing", "done": 1, "total": 4, "unit": "bytes",
        } in comments  # fmt: skip
        assert blocks[-2] == "data: [DONE]"
        assert '"finish_reason":"length"' in "".join(blocks)

    async def test_it_says_what_went_wrong(self, server: Any, slow: Any, jp_fetch: Any) -> None:
        pool = server.web_app.settings["shimmy_service"].pool
        pieces: list[str] = []

        async def load(_file: Any) -> Any:
            await slow.wait()
            raise ModelLoadFailed("no")

        pool._loader = load

        def said(chunk: bytes) -> None:
            pieces.append(chunk.decode())
            slow.set()

        await self.asked(jp_fetch, said)
        last = "".join(pieces).strip().split("\n\n")[-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["code"], error["message"]) == ("model_load_failed", f"{MODEL}: no")

    async def test_who_hangs_up_leaves_nothing_behind(
        self, server: Any, slow: Any, jp_fetch: Any, jp_http_port: int, jp_base_url: str
    ) -> None:
        body = chat(stream=True).encode()
        stream = await _post(server, jp_http_port, jp_base_url, body)
        await stream.read_until(b"hashing")
        stream.close()
        service = server.web_app.settings["shimmy_service"]
        slow.set()
        while not service.pool.loaded():
            await asyncio.sleep(0.001)
        while service.active:
            await asyncio.sleep(0.001)
