"""Who may do what: the same decision whichever way it is asked for.

Cases: every route of a model that is denied, by pattern, user, group, admin, and an allow-list; what is not
listed; addresses by their paths, however these are written, and by their queries; the kernel's own transport
and the magic, in a kernel and over HTTP; a kernel that may not compute; a model that is not loaded, for
somebody who may only use it; adapters; ceilings and features; others' receipts, records and jobs; an
administrator by configuration; a denied request changes nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from jupyter_server.auth import IdentityProvider

from shimmy_jupyter import local
from shimmy_jupyter.config import GuardSettings, Settings, files
from shimmy_jupyter.core.policy import FEATURES, Policy, Rule
from shimmy_jupyter.errors import AccessDenied, ModelNotFound, ShimmyError
from shimmy_jupyter.guard.guard import Guard, Rules
from shimmy_jupyter.local import LocalTransport
from shimmy_jupyter.models.sources import Found
from shimmy_jupyter.notebook.client import HttpTransport, Server
from shimmy_jupyter.types import Principal

from ..notebooks import magics
from ..offered import found
from .conftest import MODEL, Ask, Fakes, People, chat, new_guard, new_service, records, until

pytestmark = pytest.mark.parametrize("fakes", ["in process"], indirect=True)

CHAT = "v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
USING: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO},
    "v1/completions": {"prompt": ">hi"},
    "v1/embeddings": {"input": "hi"},
    "v1/rerank": {"query": "hi", "documents": ["a"]},
    "api/tokenize": {"prompt": "hi"},
    "api/detokenize": {"tokens": [104]},
    "api/apply-template": {"messages": HELLO},
}
ACTING = ("load", "unload", "probe", "verify")
DENIED, NO_VALUE = (403, "policy_denied", "model"), (400, "invalid_value", "model")
NOT_HERE = (403, "policy_denied", None)
"""Of what the rules allow: nothing is downloaded by these servers."""


@pytest.fixture
def identity_provider_class() -> type[IdentityProvider] | None:
    return People


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    return new_guard(tmp_path)


@pytest.fixture
def offered() -> list[Found]:
    return [found(name, Path(f"{name}.gguf")) for name in (MODEL, "other-70b")]


def deny(*actions: str, model: str = MODEL, **whom: Any) -> Rules:
    return Rules((Policy((Rule(False, actions or ("use",), (model,), **whom),)),))


class TestEveryRoute:
    @pytest.mark.parametrize("path", USING)
    @pytest.mark.parametrize("stream", [False, True])
    async def test_use(self, guard: Guard, ask: Ask, fakes: Fakes, path: str, stream: bool) -> None:
        if stream and path not in {CHAT, "v1/completions"}:
            return
        guard.rules = deny()
        body = {"model": MODEL, **USING[path]} | ({"stream": True} if stream else {})
        refused = await ask(path, body)
        assert refused.error == (403, "policy_denied", "model")
        assert refused.json["error"]["type"] == "permission_error"
        assert fakes.made == []

    @pytest.mark.parametrize("action", ACTING)
    async def test_acts(self, guard: Guard, ask: Ask, fakes: Fakes, action: str) -> None:
        guard.rules = deny(action)
        refused = await ask(f"api/models/{MODEL}/{action}", "")
        assert refused.error == (403, "policy_denied", "model")
        assert (await ask("api/jobs")).json["jobs"] == []
        assert fakes.made == []
        for other in {"load", "unload"} - {action}:
            assert (await ask(f"api/models/{MODEL}/{other}", "")).status == 202, other

    async def test_pull(self, guard: Guard, ask: Ask) -> None:
        guard.rules = deny("pull", model="*evil*")
        for name in ("evil/model", "https://huggingface.co/evil/model/resolve/main/a.gguf"):
            refused = await ask("api/models/pull", {"model": name})
            assert refused.error == (403, "policy_denied", "model")
            assert "you may not pull" in refused.json["error"]["message"]

    @pytest.mark.parametrize(
        "path",
        ["%65vil/a.gguf", "EVI%4c/a.gguf", "ev;x/il.gguf", "a.gguf?of=evil", "a.gguf?of=%65vil", "o/n;v/a.gguf"],
    )  # fmt: skip
    async def test_an_address_that_is_denied(self, guard: Guard, ask: Ask, path: str) -> None:
        guard.rules = Rules((Policy((Rule(False, ("pull",), ("*evil*", "*/ev/il*", "o/n")),)),))
        refused = await ask("api/models/pull", {"model": f"https://models.example.org/{path}"})
        assert refused.error == (403, "policy_denied", "model")
        assert "?" not in refused.json["error"]["message"]

    @pytest.mark.parametrize(
        ("path", "error"),
        [
            ("public/a.gguf", NOT_HERE),
            ("public/%61%20b/a.gguf?sig=x/../y", NOT_HERE),
            ("public/../private/a.gguf", NO_VALUE),
            ("public/%2e%2e/private/a.gguf", NO_VALUE),
            ("public/..%2fprivate/a.gguf", NO_VALUE),
            ("%70ublic/a.gguf", DENIED),
            ("private/a.gguf?/public/a.gguf", DENIED),
            ("secret%20b/a.gguf", DENIED),
        ],
    )
    async def test_an_address_on_an_allow_list(
        self, guard: Guard, ask: Ask, path: str, error: tuple[int, str, str | None]
    ) -> None:
        """Under each of its names: `secret%20b` reads as one with 20b in it, and is none."""
        allowed = "https://models.example.org/public/*", "https://*20b/*"
        guard.rules = Rules((Policy((Rule(True, ("pull",), allowed),)),))
        asked = await ask("api/models/pull", {"model": f"https://models.example.org/{path}"})
        assert asked.error == error

    async def test_lists(self, guard: Guard, ask: Ask) -> None:
        guard.rules = deny("use", users=("ann",))
        for who, names in (("ann", ["other-70b"]), ("bob", [MODEL, "other-70b"])):
            listed = (await ask("v1/models", who=who)).json["data"]
            assert [one["id"] for one in listed] == names
            for answer in (
                await ask("api/models", who=who),
                await ask("api/models/discover", "", who=who),
            ):
                assert [one["id"] for one in answer.json["models"]] == names
                assert answer.json["default"] in names
        for path in (f"v1/models/{MODEL}", f"api/models/{MODEL}"):
            assert (await ask(path, who="bob")).status == 200
            hidden = await ask(path)
            assert hidden.error == (404, "model_not_found", "model")

    async def test_names(self, guard: Guard, ask: Ask) -> None:
        """Of those that somebody may not use no answer says more than of what is not there."""
        guard.rules = Rules((Policy((Rule(False, ("use", "load"), ("other*",), users=("ann",)),)),))
        for path, body in (
            (CHAT, chat(model="other-70c")),
            (CHAT, chat(adapter="other-70c")),
            ("v1/embeddings", {"model": "zzz", "input": "hi"}),
            ("api/tokenize", {"model": "zzz", "prompt": "hi"}),
            ("v1/models/zzz", None),
            ("api/models/zzz", None),
            ("api/models/zzz/load", ""),
            ("api/models/zzz/unload", ""),
        ):
            said = (await ask(path, body)).body.decode()
            assert ("no model" in said or "policy_denied" in said, "70b" in said) == (True, False)
            told = (await ask(path, body, who="bob")).body.decode()
            assert "other-70b" in told
        there, not_there = [await ask(f"api/models/other-70{x}/load", "") for x in "bc"]
        assert there.error == not_there.error == (403, "policy_denied", "model")

    async def test_nothing_but_the_record_comes_of_it(
        self, guard: Guard, ask: Ask, tmp_path: Path
    ) -> None:
        guard.rules = deny()
        await ask(CHAT, chat())
        assert not (tmp_path / "limits.sqlite").exists()
        begin, end = await records(guard)
        assert (begin["kind"], end["outcome"]) == ("begin", "denied")


class TestWhom:
    @pytest.mark.parametrize(
        ("rule", "may", "may_not"),
        [
            (Rule(False, models=("fa*",)), [], ["ann", "root!"]),
            (Rule(False, models=("FAKE", "?", "fak[!e]")), ["ann"], []),
            (Rule(False, users=("bob",)), ["ann", "bobby"], ["bob", "bob:x", "bob!"]),
            (Rule(False, groups=("x",)), ["ann", "ann:y"], ["ann:x", "bob:y,x"]),
            (Rule(False, users=("ann",), groups=("x",)), ["bob"], ["ann", "bob:x"]),
            (Rule(False, admin=False), ["root!"], ["ann"]),
            (Rule(False, admin=True), ["ann"], ["root!"]),
            (Rule(True, models=("other*",)), [], ["ann", "root!"]),
            (Rule(True, models=("fa*",), groups=("x",)), ["ann:x"], ["ann", "root!"]),
            (Rule(True, admin=True), ["root!"], ["ann"]),
        ],
    )
    async def test_a_rule(
        self, guard: Guard, ask: Ask, rule: Rule, may: list[str], may_not: list[str]
    ) -> None:
        guard.rules = Rules((Policy((rule,)),))
        for who in may:
            assert (await ask(CHAT, chat(), who)).status == 200, who
        for who in may_not:
            refused = await ask(CHAT, chat(), who)
            assert refused.error == (403, "policy_denied", "model"), who

    async def test_deny_wins(self, guard: Guard, ask: Ask) -> None:
        rules = Rule(True), Rule(False, users=("ann",)), Rule(True, users=("ann",))
        for one in (rules, rules[::-1]):
            guard.rules = Rules((Policy(one),))
            assert (await ask(CHAT, chat())).status == 403
            assert (await ask(CHAT, chat(), "bob")).status == 200
        # Of two policies either.
        guard.rules = Rules((Policy((Rule(True),)), Policy((Rule(False),))))
        assert (await ask(CHAT, chat())).status == 403

    @pytest.mark.parametrize(
        "more", [{"admins": frozenset({"ann"})}, {"admin_groups": frozenset({"ops"})}]
    )
    async def test_administrators_by_configuration(
        self, guard: Guard, ask: Ask, more: dict[str, Any]
    ) -> None:
        policy = Policy((Rule(False, admin=False),))
        guard.rules = Rules((policy,))
        assert (await ask(CHAT, chat(), "ann:ops")).status == 403
        guard.rules = Rules((policy,), **more)
        assert (await ask(CHAT, chat(), "ann:ops")).status == 200
        other = await ask(CHAT, chat(), "bob")
        assert other.status == 403
        assert (await ask(f"api/audit/receipts/{other.id}", who="ann:ops")).status == 200


class TestLoading:
    async def test_only_what_is_loaded(self, guard: Guard, ask: Ask, fakes: Fakes) -> None:
        guard.rules = deny("load", users=("ann",))
        for path, fields in USING.items():
            refused = await ask(path, {"model": MODEL, **fields})
            assert refused.error == (403, "policy_denied", "model"), path
            assert "not load it" in refused.json["error"]["message"]
        pinned = await ask(CHAT, chat(pin={"size": 1, "sha256": "0" * 64}))
        assert pinned.error == (
            403,
            "policy_denied",
            "model",
        )  # nothing is read for who may not load
        assert fakes.made == []
        assert (await ask(CHAT, chat(), "bob")).status == 200
        assert (await ask(CHAT, chat())).status == 200
        assert (await ask("api/tokenize", {"model": MODEL, "prompt": "x"})).status == 200

    async def test_an_adapter_is_used_too(self, guard: Guard, ask: Ask) -> None:
        guard.rules = deny(model="tuned*")
        refused = await ask(CHAT, chat(adapter="tuned-1"))
        assert refused.error == (403, "policy_denied", "adapter")


class TestAsked:
    @pytest.mark.parametrize(
        ("name", "body"),
        [
            ("max_tokens", chat(max_tokens=3)),
            ("max_seconds", chat(max_seconds=3)),
            ("min_tokens", chat(min_tokens=3)),
            ("n", chat(n=3)),
            ("thinking", chat(thinking=3)),
            ("top_logprobs", chat(logprobs=True, top_logprobs=3)),
        ],
    )
    async def test_ceilings(self, guard: Guard, ask: Ask, name: str, body: str) -> None:
        guard.rules = Rules((Policy(ceilings={name: 2.0}),))
        assert (await ask(CHAT, body)).error == (403, "policy_denied", name)
        guard.rules = Rules((Policy(ceilings={name: 3.0}),))
        assert (await ask(CHAT, body)).status != 403
        guard.rules = Rules((Policy(ceilings={name: 3.0}), Policy(ceilings={name: 2.0})))
        assert (await ask(CHAT, body)).error == (403, "policy_denied", name)

    OF = {
        "chat": (CHAT, USING[CHAT]),
        "completions": ("v1/completions", USING["v1/completions"]),
        "embeddings": ("v1/embeddings", USING["v1/embeddings"]),
        "rerank": ("v1/rerank", USING["v1/rerank"]),
        "tokenize": ("api/tokenize", USING["api/tokenize"]),
        "adapters": (CHAT, {"messages": HELLO, "adapter": "a"}),
        "constraints": (CHAT, {"messages": HELLO, "response_format": {"type": "json_object"}}),
        "echo": ("v1/completions", {"prompt": "hi", "echo": True}),
        "ignore_eos": (CHAT, {"messages": HELLO, "ignore_eos": True}),
        "infill": ("v1/completions", {"prompt": "hi", "suffix": "x"}),
        "logprobs": (CHAT, {"messages": HELLO, "logprobs": True}),
        "reasoning": (CHAT, {"messages": HELLO, "thinking": True}),
        "reproducible": (CHAT, {"messages": HELLO, "reproducible": True}),
    }

    @pytest.mark.parametrize("name", FEATURES)
    async def test_features(self, guard: Guard, ask: Ask, fakes: Fakes, name: str) -> None:
        path, fields = self.OF[name]
        guard.rules = Rules((Policy(features=frozenset(FEATURES) - {name}),))
        status, code, _ = (await ask(path, {"model": MODEL, **fields})).error
        assert (status, code) == (403, "policy_denied")
        assert fakes.made == []
        if name == "tokenize":
            for other in ("api/detokenize", "api/apply-template"):
                assert (await ask(other, {"model": MODEL, **USING[other]})).status == 403
        guard.rules = Rules((Policy(features=frozenset({name, "chat", "completions"})),))
        assert (await ask(path, {"model": MODEL, **fields})).status != 403


class TestOthers:
    async def test_are_not_there(self, server: Any, guard: Guard, ask: Ask) -> None:
        asked = await ask(CHAT, chat())
        job = (await ask(f"api/models/{MODEL}/load", "")).json["job"]
        service = server.web_app.settings["shimmy_service"]
        await service.library.jobs.get(job, Principal("ann")).wait()
        for path in (f"api/audit/receipts/{asked.id}", f"api/jobs/{job}"):
            assert (await ask(path)).status == 200
            assert (await ask(path, who="bob")).error == (404, "not_found", None)
        assert (await ask(f"api/jobs/{job}", who="bob", method="DELETE")).status == 404
        assert (await ask("api/audit", who="bob")).json["records"] == []
        assert (await ask("api/jobs", who="bob")).json["jobs"] == []


class TestInKernel:
    """jupyter-ai #1514: an allow-list that has no effect on magics."""

    @pytest.fixture
    def rules(self) -> Rules:
        return deny("use", "load")

    @pytest.fixture
    def transport(
        self, monkeypatch: Any, fakes: Fakes, tmp_path: Path, rules: Rules, offered: list[Found]
    ) -> Iterator[LocalTransport]:
        made = []

        def build(_settings: Settings) -> Any:
            made.append(new_guard(tmp_path / "kernel"))
            made[-1].rules = rules
            return new_service(fakes, made[-1], offered)

        monkeypatch.setattr(local, "build_service", build)
        transport = LocalTransport(Settings())
        yield transport
        transport.close()

    def check(self, transport: Any, fakes: Fakes) -> set[str]:
        """Refusals of the same kind; their messages."""
        said = set()
        for path, body in ((CHAT, json.loads(chat(stream=True))),):
            with (
                pytest.raises(AccessDenied) as caught,
                transport.stream(f"shimmy/{path}", body) as b,
            ):
                list(b)
            said.add(caught.value.message)
        with pytest.raises(AccessDenied):
            transport.post(f"shimmy/api/models/{MODEL}/load", {})
        assert [m["id"] for m in transport.get("shimmy/v1/models")["data"]] == ["other-70b"]
        assert [m["id"] for m in transport.get("shimmy/api/models")["models"]] == ["other-70b"]
        with pytest.raises(ModelNotFound):
            transport.get(f"shimmy/api/models/{MODEL}")
        with pytest.raises(AccessDenied) as caught:
            magics(transport).shimmy(f"--model {MODEL} hello")
        said.add(caught.value.message)
        assert fakes.made == []
        return said

    def test_the_kernel_s_own(self, transport: LocalTransport, fakes: Fakes) -> None:
        assert self.check(transport, fakes) == {f"you may not use {MODEL!r} here"}

    async def test_over_http(
        self, server: Any, guard: Guard, fakes: Fakes, http_server_client: Any, jp_base_url: str,
        jp_http_port: int, rules: Rules,
    ) -> None:  # fmt: skip
        guard.rules = rules
        transport = HttpTransport(Server(f"http://127.0.0.1:{jp_http_port}{jp_base_url}", ""))
        transport._client.headers["X-Test-User"] = "ann"
        said = await asyncio.to_thread(self.check, transport, fakes)
        assert said == {f"you may not use {MODEL!r} here"}
        transport._client.close()

    def test_acts_are_on_record(self, transport: LocalTransport, tmp_path: Path) -> None:
        with pytest.raises(ShimmyError):
            transport.post(f"shimmy/api/models/{MODEL}/load", {})
        guard = transport._service.guard
        (act,) = transport._start(records(guard, kind="act")).result()
        assert (act["user"], act["action"], act["outcome"]) == ("local", "load", "denied")


class TestNoKernel:
    """`allow_in_kernel` off: models answer in a server only."""

    @pytest.fixture
    def transport(
        self, monkeypatch: Any, fakes: Fakes, tmp_path: Path, offered: list[Found]
    ) -> Iterator[LocalTransport]:
        guard = new_guard(tmp_path / "kernel")
        monkeypatch.setattr(local, "build_service", lambda _: new_service(fakes, guard, offered))
        transport = LocalTransport(Settings(guard=GuardSettings(allow_in_kernel=False)))
        yield transport
        transport.close()

    def test_the_kernel_s_own(self, transport: LocalTransport, fakes: Fakes) -> None:
        body: Mapping[str, Any] = json.loads(chat(stream=True))
        with (
            pytest.raises(AccessDenied) as caught,
            transport.stream(f"shimmy/{CHAT}", dict(body)) as b,
        ):
            list(b)
        assert "allow_in_kernel" in caught.value.message
        computing = {
            "api/models/{MODEL}/load": {},
            **{path: {"model": MODEL, **fields} for path, fields in USING.items()},
            "api/detokenize": {"model": MODEL, "tokens": [1]},
        }
        for path, fields in computing.items():
            with pytest.raises(AccessDenied, match="allow_in_kernel"):
                transport.post("shimmy/" + path.replace("{MODEL}", MODEL), fields)
        with pytest.raises(AccessDenied):
            magics(transport).shimmy(f"--model {MODEL} hello")
        assert fakes.made == []
        ends = transport._start(records(transport._service.guard, kind="end")).result()
        assert [end["code"] for end in ends] == ["policy_denied"] * 6


async def test_the_answer_ends_where_the_policy_changes_nothing(
    guard: Guard, ask: Ask, dial: Any
) -> None:
    """What was allowed when it began is answered."""
    stream = await dial(CHAT, chat(stream=True))
    await stream.read_until(b"data")
    guard.rules = deny()
    await stream.read_until(b"[DONE]")
    stream.close()
    await until(lambda: not guard._open)
    assert (await ask(CHAT, chat())).status == 403


class TestCeilings:
    """What the system's file says, on a server whose user's configuration says otherwise."""

    @pytest.fixture
    def jp_server_config(
        self, jp_server_config: dict[str, Any], tmp_path: Path, monkeypatch: Any
    ) -> dict[str, Any]:
        system = tmp_path / "system"
        system.mkdir()
        (system / "jupyter_shimmy_jupyter_config.py").write_text(
            'c.ShimmyPolicy.rules = [{"deny": "*"}]\nc.ShimmyLimits.max_tokens_per_day = 5\n'
            "c.ShimmyAudit.enabled = True\n"
        )
        monkeypatch.setattr(files, "SYSTEM_CONFIG_PATH", [str(system)])
        monkeypatch.setattr(files, "ENV_CONFIG_PATH", [])
        hostile = {
            "ShimmyPolicy": {"rules": [{"allow": "*"}], "admins": ["ann"]},
            "ShimmyLimits": {"max_tokens_per_day": 5000},
            "ShimmyAudit": {"enabled": False},
        }
        return {**jp_server_config, **hostile}

    async def test_the_system_s_hold(
        self, jp_serverapp: Any, http_server_client: Any, jp_base_url: str, fakes: Fakes
    ) -> None:
        async def ask(path: str, body: str | None = None) -> tuple[int, Any]:
            response = await http_server_client.fetch(
                f"{jp_base_url}shimmy/{path}",
                method="GET" if body is None else "POST",
                body=body,
                headers={"X-Test-User": "ann", "Content-Type": "application/json"},
                raise_error=False,
            )
            return response.code, json.loads(response.body)

        status, refused = await ask(CHAT, chat())
        assert (status, refused["error"]["code"]) == (403, "policy_denied")
        _, limits = await ask("api/limits")
        assert limits["limits"]["max_tokens_per_day"]["limit"] == 5
        assert list(limits["locked"]) == ["max_tokens_per_day"]
        status, mine = await ask("api/audit")
        assert status == 200
        assert {one["user"] for one in mine["records"]} == {"ann"}
        assert (await ask("api/audit?user=bob"))[0] == 403
