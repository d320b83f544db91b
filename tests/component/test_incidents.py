"""What went wrong elsewhere, tried here. `docs/security.md` says which incident each is about.

Cases: a GET, whatever it claims to be, changes nothing; every number of every body, out of its bounds,
not finite, of another type; parameters of other servers; images by any address; digests that are none;
ids that lead elsewhere; an unexpected error says nothing of the server; another user's download and
computed prompt; a token that was replaced; no pickles and no cache made of them; what an installation
brings along; no setting that would hold a secret.
"""

from __future__ import annotations

import ast
import asyncio
import importlib.metadata
import json
import re
import socket
import threading
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from jupyter_server.auth import Authorizer, IdentityProvider, User
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import shimmy_jupyter
from shimmy_jupyter.cli import main
from shimmy_jupyter.config import CONFIGURABLES
from shimmy_jupyter.engine.fake import FakeBackend
from shimmy_jupyter.models.jobs import Progress
from shimmy_jupyter.notebook.magics import ShimmyMagics
from shimmy_jupyter.server import embeddings, model_requests, requests, token_requests
from shimmy_jupyter.server.app import ShimmyApp
from shimmy_jupyter.server.handlers import ROUTES
from shimmy_jupyter.server.handlers.base import ShimmyHandler
from shimmy_jupyter.types import EmbeddingFacts, Principal

from .conftest import MODEL, Fakes, chat
from .test_access import EVERY, OURS, Sweep, no_engine, sweep, token_header

__all__ = ["sweep"]  # a fixture

PACKAGE = Path(shimmy_jupyter.__file__).parent
ROOT = PACKAGE.parent
SHAPE = EmbeddingFacts("mean", 4, 64, 64, 4)
HELLO = [{"role": "user", "content": "hello"}]
VALID: dict[str, tuple[Any, dict[str, Any]]] = {
    "v1/chat/completions": (requests._Chat, {"messages": HELLO, "logprobs": True}),
    "v1/completions": (requests._Completion, {"prompt": "hello"}),
    "v1/embeddings": (embeddings._Embeddings, {"input": "hello"}),
    "v1/rerank": (embeddings._Rerank, {"query": "q", "documents": ["a"]}),
    "api/tokenize": (token_requests._Tokenize, {"messages": HELLO}),
    "api/detokenize": (token_requests._Detokenize, {"tokens": [104]}),
    "api/apply-template": (token_requests._Template, {"messages": HELLO}),
    "api/models/pull": (model_requests._Pull, {"model": "org/name"}),
}
"""What each route reads a body as, and the least that it takes, beside the model."""


@pytest.fixture
def ask(http_server_client: Any, jp_base_url: str, server: Any) -> Any:
    """POST a body, given as JSON or as its text: the status and the error, if it is one."""

    async def ask(path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        response = await http_server_client.fetch(
            f"{jp_base_url}shimmy/{path}",
            method="POST",
            body=body if isinstance(body, str) else json.dumps(body),
            headers={**token_header(server), **headers},
            raise_error=False,
        )
        answer: dict[str, Any] = json.loads(response.body)
        return response.code, answer.get("error") or answer

    return ask


# JupyterHub CVE-2026-40864, and any page with an image whose address is ours.


async def test_no_get_changes_anything(
    sweep: Sweep, server: Any, jp_fetch: Any, ask: Any, fakes: Fakes, tmp_path: Path
) -> None:
    status, _ = await ask("v1/chat/completions", chat())
    assert status == 200
    status, answer = await ask(f"api/models/{MODEL}/load", "")
    library = server.web_app.settings["shimmy_service"].library
    await library.jobs.get(answer["job"], Principal("local")).wait()

    async def state() -> tuple[Any, ...]:
        asked = [("api", "models"), ("api", "jobs"), ("v1", "models")]
        seen = [(await jp_fetch("shimmy", *path)).body for path in asked]
        files = [(str(p), p.stat().st_mtime_ns) for p in sorted(tmp_path.rglob("*")) if p.is_file()]
        scheduler = fakes.models[0].engine.scheduler
        return seen, [f for f in files if "jpserver" not in f[0]], len(fakes.made), repr(scheduler)

    paths = {path for path, _ in EVERY} | {f"shimmy/api/jobs/{answer['job']}"}
    safe = [(path, method) for path in paths for method in ("GET", "HEAD", "OPTIONS")]
    claims = {
        **token_header(server),
        **dict.fromkeys(("X-HTTP-Method-Override", "X-Method-Override", "X-HTTP-Method"), "DELETE"),
    }
    before = await state()
    await sweep.all(claims, f"?_method=DELETE&method=POST&model={MODEL}&unload=1", safe)
    assert await state() == before


# llama.cpp CVE-2026-21869, GHSA-7rxv-5jhh-j6xx.


def numbers(kind: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Any], bool]]:
    """The path of every number in a body, its JSON Schema, and whether it may also be true or false."""
    schema = kind.model_json_schema()

    def walk(
        node: Mapping[str, Any], path: tuple[str, ...], flags: bool
    ) -> Iterator[tuple[tuple[str, ...], dict[str, Any], bool]]:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        options = node.get("anyOf", ())
        for option in options:
            yield from walk(option, path, any(o.get("type") == "boolean" for o in options))
        if node.get("type") in ("integer", "number"):
            yield path, dict(node), flags
        for name, value in node.get("properties", {}).items():
            yield from walk(value, (*path, name), False)
        if isinstance(node.get("additionalProperties"), dict):
            yield from walk(node["additionalProperties"], (*path, "7"), False)

    yield from walk(schema, (), False)


def bounds(node: Mapping[str, Any]) -> tuple[Any, Any]:
    """The largest value that is too small, and the smallest that is too large."""
    step = 1 if node["type"] == "integer" else 1e-3
    low = node.get("exclusiveMinimum", node.get("minimum", 0) - step)
    high = node.get("exclusiveMaximum", node.get("maximum", 0) + step)
    return low, high


NUMBERS = [
    (route, path, node, flags)
    for route, (kind, _) in VALID.items()
    for path, node, flags in numbers(kind)
]
AROUND = {"pin": {"size": 1, "sha256": "0" * 64}, "logit_bias": {}}
"""What the rest of an object must be, in which a number is."""


def test_there_are_numbers() -> None:
    named = {".".join(path) for _, path, _, _ in NUMBERS}
    assert named >= {
        "temperature",
        "seed",
        "top_k",
        "pin.size",
        "logit_bias.7",
        "dimensions",
        "top_n",
    }
    for route, path, node, _ in NUMBERS:
        assert {"minimum", "exclusiveMinimum"} & set(node), f"{route} {path} has no least value"
        assert {"maximum", "exclusiveMaximum"} & set(node), f"{route} {path} has no largest value"


@no_engine
@pytest.mark.parametrize("route", VALID)
async def test_numbers_are_refused_before_the_engine(ask: Any, fakes: Fakes, route: str) -> None:
    for _, path, node, flags in (found for found in NUMBERS if found[0] == route):
        low, high = bounds(node)
        wrong = [json.dumps(v) for v in (low, high, -(2**70), 2**70, "1", [1], {})]
        wrong += ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000]
        wrong += [] if flags else ["true"]
        wrong += ["0.5"] if node["type"] == "integer" else []
        for text in wrong:
            name, inner = path[0], path[1:]
            value = {**AROUND[name], inner[0]: "WRONG"} if inner else "WRONG"
            body = json.dumps({"model": MODEL, **VALID[route][1], name: value})
            status, error = await ask(route, body.replace('"WRONG"', text))
            assert (status, error["code"]) == (400, "invalid_value"), (path, text[:20])
            assert error["param"] in (name, ".".join(path), None), (path, text[:20])
            # Without a name only where it is not even JSON.
            assert error["param"] or text.strip("-") in ("NaN", "Infinity", "9" * 5000), (
                path,
                text,
            )
    assert fakes.made == []


@no_engine
async def test_what_was_wrong_was_the_number(ask: Any, fakes: Fakes) -> None:
    fakes.make = lambda: FakeBackend(embedding=SHAPE)
    for route, (_, least) in VALID.items():
        status, error = await ask(route, {"model": MODEL, **least})
        # Nobody may download here, and this model makes vectors, but no ranks.
        expected = {"api/models/pull": 403, "v1/rerank": 400}.get(route, 200)
        assert status == expected, (route, error)


OTHERS = {
    "n_discard": -5, "n_keep": -1, "n_predict": 2**31, "id_slot": -7, "cache_prompt": False,
    "slot_id": 0, "t_max_predict_ms": -1, "n_probs": 10**9, "mirostat": 99, "dry_multiplier": -1,
    "n_ctx": 2**40, "num_ctx": -1, "lora": [{"id": -1, "scale": 1e30}], "samplers": "x" * 99,
}  # fmt: skip


def test_parameters_of_other_servers_do_nothing() -> None:
    """They are named as ignored, and what reaches the engine is the same without them."""
    body = {"model": MODEL, "messages": HELLO}
    who = Principal("local")
    plain = requests.parse_chat(body, "id", who)
    given = requests.parse_chat({**body, **OTHERS}, "id", who)
    assert set(given.ignored) == set(OTHERS)
    assert given.request == plain.request


@no_engine
@pytest.mark.parametrize("name", OTHERS)
async def test_own_routes_refuse_what_they_do_not_know(ask: Any, name: str) -> None:
    for route, (_, least) in VALID.items():
        if route.startswith("api/"):
            status, error = await ask(route, {"model": MODEL, **least, name: OTHERS[name]})
            assert (status, error["code"], error["param"]) == (400, "unknown_parameter", name)


# llama-cpp-python's `_load_image`.


@no_engine
async def test_images_are_not_fetched(ask: Any, fakes: Fakes, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"\x89PNG")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        here = f"127.0.0.1:{listener.getsockname()[1]}"
        for url in (
            f"http://{here}/x.png", f"https://{here}/x.png", f"//{here}/x.png", f"ftp://{here}/x",
            f"file://{secret}", str(secret), "data:image/png;base64,iVBORw0KGgo=", "data:text/html,x",
            "gopher://x", "",
        ):  # fmt: skip
            for part in (
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "image_url", "image_url": url},
                {"type": "input_image", "image_url": url},
                {"type": "image", "source": {"type": "url", "url": url}},
                {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
                {"type": "video_url", "video_url": {"url": url}},
                {"type": "file", "file": {"file_id": url}},
            ):
                for route in ("v1/chat/completions", "api/tokenize", "api/apply-template"):
                    parts = [{"type": "text", "text": "what is this?"}, part]
                    messages = [{"role": "user", "content": parts}]
                    status, error = await ask(route, {"model": MODEL, "messages": messages})
                    assert (status, error["code"]) == (400, "unsupported_parameter"), part
                    assert error["param"] == "messages.0.content.1.type"
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert fakes.made == []


# Ollama CVE-2026-7020, jupyter_server CVE-2026-35397.


@no_engine
async def test_a_digest_is_64_hex_digits(ask: Any, fakes: Fakes) -> None:
    good = "0123456789abcdef" * 4
    wrong = (
        "", good[1:], good + "0", good.upper(), f"sha256:{good}", f"sha256-{good}", good + "\n",
        "\n" + good, good[:-1] + "g", "../" * 21 + "a", good[:-1] + "/", good[:-1] + "\0",
        "٠" * 64, good[:-1] + "．",
    )  # fmt: skip
    fields: list[tuple[str, str]] = []
    for digest in wrong:
        for route, name, body in (
            ("api/models/pull", "sha256", {"model": "org/name", "sha256": digest}),
            *(
                ("v1/chat/completions", f"pin.{name}", json.loads(chat(pin={
                    "size": 1, "sha256": good, name: [digest] if name == "parts" else digest
                })))
                for name in ("sha256", "parts", "chat_template", "adapter")
            ),
        ):  # fmt: skip
            status, error = await ask(route, body)
            assert (status, error["code"]) == (400, "invalid_value"), (name, digest)
            assert error["param"].startswith(name), (name, digest)
            fields.append((route, name))
    assert len(set(fields)) == 5
    assert fakes.made == []


@no_engine
async def test_ids_lead_nowhere(
    server: Any, http_server_client: Any, jp_base_url: str, fakes: Fakes, tmp_path: Path
) -> None:
    (tmp_path / "models-evil").mkdir()
    (tmp_path / "models-evil" / "m.gguf").write_bytes(b"GGUF")
    hostile = (
        "..", "..%2f..%2fetc%2fpasswd", "%2e%2e%2f%2e%2e", "%2Fetc%2Fpasswd", "..%5c..%5cx", "%00", "~",
        "models-evil%2Fm", f"{tmp_path}/models-evil/m.gguf".replace("/", "%2F"), f"{MODEL}%00", "%252e%252e",
        f"{MODEL}%2F..%2F{MODEL}", "a" * 5000, "%E2%80%AE", "{MODEL}", "*",
    )  # fmt: skip
    asked = 0
    for path, method in OURS:
        if f"/{MODEL}" not in path:
            continue
        for id in hostile:
            response = await http_server_client.fetch(
                jp_base_url + path.replace(MODEL, id), method=method, headers=token_header(server),
                body="" if method == "POST" else None, raise_error=False,
            )  # fmt: skip
            asked += 1
            assert response.code in (404, 405), (path, id)
            # But for what was asked for.
            said = response.body.decode().replace(unquote(id), "")
            assert not any(part in said for part in (str(tmp_path), "evil", "passwd")), (path, id)
    assert asked >= 8 * len(hostile)
    assert fakes.made == []


# Shimmy's promise: no internal errors to users.


@no_engine
async def test_an_unexpected_error_says_nothing_of_the_server(
    server: Any, http_server_client: Any, jp_base_url: str, monkeypatch: Any, caplog: Any
) -> None:
    secret = "/srv/models/secret.gguf hunter2"

    def broken(_handler: ShimmyHandler) -> Any:
        raise RuntimeError(secret)

    monkeypatch.setattr(ShimmyHandler, "service", property(broken))
    bodies = {f"shimmy/{route}": {"model": MODEL, **least} for route, (_, least) in VALID.items()}
    failed = set()
    for path, method in OURS:
        body = json.dumps(bodies[path]) if path in bodies else ""
        response = await http_server_client.fetch(
            jp_base_url + path, method=method, body=body if method in ("POST", "PUT") else None,
            headers=token_header(server), raise_error=False,
        )  # fmt: skip
        text = f"{response.headers} {response.body.decode()}"
        for part in ("secret.gguf", "hunter2", "RuntimeError", "Traceback", "/srv", ".py"):
            assert part not in text, (path, part)
        if response.code == 500:
            failed.add((path, method))
            error = json.loads(response.body)["error"]
            assert error["code"] == "internal_error"
            assert error["request_id"] == response.headers["x-shimmy-request-id"]
    assert len(failed) >= 20
    assert "hunter2" in caplog.text  # the log has it


# Open WebUI CVE-2026-45349, CVE-2026-45402; the timing of a prefix that somebody else's prompt left.


class ByName(IdentityProvider):  # type: ignore[misc]
    """Whoever the request says it is: what a Hub would vouch for."""

    async def get_user(self, handler: Any) -> User | None:  # type: ignore[override]
        name = handler.request.headers.get("X-Test-User")
        if name is None:
            return None
        handler._token_authenticated = True
        user = User(username=name)
        user.hub_user = {"name": name, "groups": [], "admin": name == "root"}  # type: ignore[attr-defined]
        return user


class TestOthers:
    @pytest.fixture
    def jp_server_config(self, jp_server_config: dict[str, Any]) -> dict[str, Any]:
        jp_server_config["ServerApp"]["identity_provider_class"] = ByName
        return jp_server_config

    @pytest.fixture
    def look(self, server: Any, http_server_client: Any, jp_base_url: str) -> Any:
        async def look(who: str, method: str, id: str = "", **headers: str) -> tuple[int, Any]:
            response = await http_server_client.fetch(
                f"{jp_base_url}shimmy/api/jobs{id and '/' + id}",
                method=method,
                headers={"X-Test-User": who, **headers},
                raise_error=False,
            )
            return response.code, response.body

        return look

    @no_engine
    async def test_a_download_is_its_owner_s(self, server: Any, look: Any) -> None:
        jobs = server.web_app.settings["shimmy_service"].library.jobs

        async def download(_report: Any) -> Mapping[str, Any]:
            await asyncio.Event().wait()
            raise AssertionError

        job = jobs.start("pull", "ann/secret-model", Principal("ann"), download)
        for method in ("GET", "DELETE"):
            status, body = await look("ben", method, job.id)
            assert (status, json.loads(body)["error"]["code"]) == (404, "not_found")
            # No more is said than of one that there never was.
            assert b"ann" not in body
            assert b"secret-model" not in body
        status, body = await look("ben", "GET", job.id, Accept="text/event-stream")
        assert status == 404
        assert json.loads((await look("ben", "GET"))[1]) == {"jobs": []}
        assert job.state == "running"
        for who in ("ann", "root"):
            assert json.loads((await look(who, "GET", job.id))[1])["state"] == "running"
            (listed,) = json.loads((await look(who, "GET"))[1])["jobs"]
            assert listed["id"] == job.id
        assert (await look("ann", "DELETE", job.id))[0] == 200
        await job.wait()
        assert job.state == "cancelled"

    async def test_nobody_finds_what_another_s_prompt_left(self, ask: Any) -> None:
        async def cached(who: str, route: str, **body: Any) -> int:
            headers = {"X-Test-User": who}
            status, answer = await ask(route, {"model": MODEL, "max_tokens": 2, **body}, **headers)
            assert status == 200
            return int(answer["shimmy"]["cached_tokens"])

        prompt = "the quarterly figures are " * 9
        said = [{"role": "user", "content": prompt}]
        for route, body in (
            ("v1/completions", {"prompt": prompt}),
            ("v1/chat/completions", {"messages": said}),
        ):
            assert await cached("ann", route, **body) == 0
            assert await cached("ann", route, **body) > len(prompt) // 2
            assert await cached("ben", route, **body) == 0


# Open WebUI CVE-2026-44553, as far as the next request goes.


@no_engine
async def test_a_token_that_was_replaced_opens_nothing(sweep: Sweep, server: Any) -> None:
    old = token_header(server)
    assert {got.status for got in (await sweep.all(old, routes=OURS)).values()} != {403}
    server.identity_provider.token = "another-token"
    assert await sweep.not_refused(old) == {}
    assert (await sweep.ask(("shimmy/health", "GET"), token_header(server))).status == 200


class Fickle(Authorizer):  # type: ignore[misc]
    """Allows, until it does not."""

    allows = True

    def is_authorized(self, handler: Any, user: Any, action: str, resource: str) -> bool:
        return self.allows


@no_engine
class TestRevoked:
    """Open WebUI CVE-2026-44553: what is open ends."""

    @pytest.fixture
    def authorizer_class(self, monkeypatch: Any) -> type[Authorizer]:
        monkeypatch.setattr(Fickle, "allows", True)
        monkeypatch.setattr("shimmy_jupyter.server.handlers.base.LOOK_AGAIN_SECONDS", 0.0)
        return Fickle

    @pytest.fixture(params=["token", "authorizer"])
    def revoke(self, request: Any, server: Any, monkeypatch: Any) -> Any:
        if request.param == "authorizer":
            return lambda: monkeypatch.setattr(Fickle, "allows", False)
        return lambda: setattr(server.identity_provider, "token", "another-token")

    @pytest.fixture
    def events(self, server: Any, http_server_client: Any, jp_base_url: str) -> Any:
        """Ask for server-sent events, do something when the first have come: all of them."""

        async def events(path: str, then: Any, **request: Any) -> list[dict[str, Any]]:
            parts: list[bytes] = []

            def heard(data: bytes) -> None:
                if not parts:
                    then()
                parts.append(data)

            headers = {**token_header(server), "Accept": "text/event-stream"}
            await http_server_client.fetch(
                jp_base_url + path, headers=headers, streaming_callback=heard, **request
            )
            blocks = b"".join(parts).decode().split("\n\n")
            return [json.loads(block[6:]) for block in blocks if block.startswith("data: {")]

        return events

    async def test_an_answer(self, server: Any, fakes: Fakes, events: Any, revoke: Any) -> None:
        gate = threading.Semaphore(0)
        fakes.make = lambda: FakeBackend(lambda _: ["word "] * 60, gate=gate)

        def then() -> None:
            revoke()
            gate.release(1000)

        gate.release(3)
        body = chat(stream=True, max_tokens=60)
        said = await events("shimmy/v1/chat/completions", then, method="POST", body=body)
        assert said[-1]["error"]["code"] == "policy_denied"
        assert sum("word" in str(event) for event in said) < 10
        while fakes.models[0].active:
            await asyncio.sleep(0)

    async def test_the_events_of_a_job(self, server: Any, events: Any, revoke: Any) -> None:
        jobs = server.web_app.settings["shimmy_service"].library.jobs
        go_on = asyncio.Event()

        async def work(report: Any) -> None:
            await go_on.wait()
            report(Progress("downloading"))
            await asyncio.Event().wait()

        def then() -> None:
            revoke()
            go_on.set()

        job = jobs.start("pull", "org/name", Principal("local"), work)
        said = await events(f"shimmy/api/jobs/{job.id}", then)
        assert [event.get("state") for event in said] == ["running", None]
        assert said[-1]["error"]["code"] == "policy_denied"
        assert job.state == "running"  # not what ends it
        jobs.cancel(job.id, Principal("local"))
        await job.wait()


# diskcache CVE-2025-69872.

PICKLES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "shelve",
    "marshal",
    "diskcache",
    "joblib",
}
CACHES = {"LlamaDiskCache", "LlamaRAMCache", "LlamaCache", "BaseLlamaCache", "set_cache", "Llama"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_pickles_and_no_cache_of_them(path: Path) -> None:
    text = path.read_text()
    assert "diskcache" not in text
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import(names=names):
                roots = {alias.name.split(".")[0] for alias in names}
            case ast.ImportFrom(module=str(module), level=0, names=names):
                roots = {module.split(".")[0], *(alias.name for alias in names)}
            case ast.Attribute(attr=name) | ast.Name(id=name):
                roots = {name}
            case _:
                continue
        assert not roots & (PICKLES | CACHES), (node.lineno, roots)


# litellm, March 2026.


def installed_with(names: list[str]) -> set[str]:
    """Canonical names of what an installation of these requirements brings, as far as it is here."""
    found: set[str] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        needed = waiting.pop()
        if needed.marker is not None and not any(
            needed.marker.evaluate({"extra": extra}) for extra in ("", *needed.extras)
        ):
            continue
        name = canonicalize_name(needed.name)
        if name in found:
            continue
        found.add(name)
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for text in requires:
            further = Requirement(text)
            marker = further.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in ("", *needed.extras)):
                further.marker = None
                waiting.append(further)
    return found


def test_what_the_base_installation_brings() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    brought = installed_with(project["dependencies"])
    assert {"llama-cpp-python", "diskcache", "tornado", "anyio"} <= brought  # it does look further
    unwanted = re.compile(
        r"(litellm|langchain|langsmith|openai|posthog|sentry|transformers|torch)\b"
    )
    assert not [name for name in brought if unwanted.match(name)]
    asked = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    for extra in project["optional-dependencies"].values():
        asked |= {canonicalize_name(Requirement(text).name) for text in extra}
    assert not [name for name in asked if name.startswith(("litellm", "langchain"))]


def test_the_package_brings_nothing_that_runs_by_itself() -> None:
    """`test_what_a_wheel_holds` looks into a wheel; this is for an installation from the sources."""
    names = [p.name for p in PACKAGE.rglob("*")] + [p.name for p in ROOT.iterdir()]
    assert not [
        n for n in names if n.endswith(".pth") or n in ("sitecustomize.py", "usercustomize.py")
    ]


# Keys only in the environment.


def test_no_setting_and_no_option_holds_a_secret() -> None:
    secret = re.compile(r"(^|_|-)(token|secret|password|passwd|api_?key|credentials?)($|_|-)")
    names = [
        name for cls in (*CONFIGURABLES, ShimmyMagics) for name in cls.class_traits(config=True)
    ]
    names += list(ShimmyApp.class_own_traits(config=True))
    names += [
        option
        for command in (main, *main.commands.values())
        for parameter in command.params
        for option in parameter.opts
    ]
    assert len(names) > 40
    assert not [name for name in names if secret.search(name)]


def test_every_route_that_reads_a_body_is_tried_here() -> None:
    """A new one belongs into `VALID`, or reads nothing but an empty object."""
    reading = {
        pattern.removeprefix("shimmy/")
        for pattern, handler in ROUTES
        if hasattr(handler, "take_body") and "(" not in pattern
    }
    assert reading - set(VALID) <= {
        "api/models/discover",
        "api/limits",
        "api/audit/verify",
        "api/audit/anchor",
    }
