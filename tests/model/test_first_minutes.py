"""From an empty machine to an answer, as an unfamiliar person goes: what is there, what would fit, get it, ask.
Each step says how far it is, and what comes next. The hub is a real HTTPS server on loopback.

Cases: the whole way; the same once more; what is typed wrong on it; interrupted and gone on with; a hub
whose file is no model; the same from a notebook's magic, by HTTP; nobody may download; offline.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import random_gguf
from click.testing import CliRunner, Result
from fake_hub import FakeHub, make_certificates

from shimmy_jupyter import compose
from shimmy_jupyter.cli import main
from shimmy_jupyter.models import suggest
from shimmy_jupyter.models.pull import Puller
from shimmy_jupyter.notebook.grammar import Command, parse_line

from ..notebooks import run

REPO = "Qwen/Qwen3-0.6B-GGUF"
FILE = "Qwen3-0.6B-Q8_0.gguf"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder)
    return folder


@pytest.fixture
def hub(tmp_path: Path, certificates: Path) -> Iterator[FakeHub]:
    """Has one of the models that are suggested, as far as its name goes."""
    folder = tmp_path / "hub" / REPO
    folder.mkdir(parents=True)
    random_gguf.write(folder / FILE, words=True, template=random_gguf.CHATML)
    (folder / "README.md").write_text("# A model")
    with FakeHub(tmp_path / "hub", certificates) as running:
        yield running


@pytest.fixture
def shimmy(hub: FakeHub, tmp_path: Path, monkeypatch: Any) -> Callable[..., Result]:
    """The command, on a machine of its own."""
    cache = tmp_path / "home" / "hub"
    cache.mkdir(parents=True)
    for name, folder in {"HF_HUB_CACHE": cache, "JUPYTER_DATA_DIR": tmp_path / "data"}.items():
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "config"))
    # The name in the package is the function's.
    monkeypatch.setattr(sys.modules["shimmy_jupyter.cli.follow"], "_SOON", 0.0)
    usual = compose.build_puller

    def puller(settings: Any) -> Puller:
        usual(settings)  # refuses what it refuses
        downloads = tmp_path / "home" / "models"
        downloads.mkdir(exist_ok=True)
        return Puller(hub.fetcher(), cache=cache, downloads=downloads, hub=hub.url)

    monkeypatch.setattr(compose, "build_puller", puller)
    return lambda *args: CliRunner().invoke(main, args)


def test_the_whole_way(shimmy: Callable[..., Result], hub: FakeHub) -> None:
    there = shimmy("models")
    assert there.exit_code == 0, there.output
    assert "`shimmy models --suggest` lists real ones" in there.output

    suggested = shimmy("models", "--suggest", "--task", "chat")
    (first,) = re.findall(r"^Next: shimmy pull (\S+)$", suggested.output, re.MULTILINE)
    assert first in {one.id for one in suggest.suggestions("chat")}

    hub.tricks.slow = 0.1
    pulled = shimmy("pull", "qwen3-0.6b")
    assert pulled.exit_code == 0, pulled.output
    assert re.search(r"downloading: .*Qwen3-0\.6B-Q8_0\.gguf  .*%", pulled.stderr)
    assert "downloaded" in pulled.stdout
    (name,) = re.findall(r"^Next: shimmy generate --model (\S+) ", pulled.stdout, re.MULTILINE)
    assert name == "Qwen3-0.6B-Q8_0"

    asked = shimmy("generate", "--model", name, "--max-tokens", "8", "--temperature", "0", "Hello")
    assert asked.exit_code == 0, asked.output
    assert "hashing" in asked.stderr or "probing" in asked.stderr
    assert re.fullmatch(r"\S.{6,}\n", asked.stdout)

    # It is what answers now where none is named, and nothing is read or tried out again.
    listed = json.loads(shimmy("models", "--json").stdout)
    assert listed["default"] == name
    (model, _) = listed["models"]
    assert model["origin"]["name"] == REPO
    assert model["state"] == "available"
    again = shimmy("generate", "--max-tokens", "8", "--temperature", "0", "Hello")
    assert again.stdout == asked.stdout
    assert "probing" not in again.stderr
    assert "✓" in shimmy("models", "--suggest").output


def test_once_more_downloads_nothing(shimmy: Callable[..., Result], hub: FakeHub) -> None:
    assert shimmy("pull", REPO).exit_code == 0
    hub.seen.clear()
    again = shimmy("pull", f"{REPO}:Q8_0", "--json")
    assert json.loads(again.stdout)["new"] is False
    assert hub.served == 0


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("pull", "qwen3:4b"), "name a repository as org/name"),
        (("pull", f"{REPO}:Q4_K_M"), r"Qwen3-0\.6B-Q8_0\.gguf"),
        (("pull", f"{REPO}:Qwen3-0.6B-Q8_0.ggfu"), "did you mean"),
        (("pull", "Qwen/Nothing-GGUF"), r"(?i)Qwen/Nothing-GGUF"),
        (("pull", "http://example.org/a.gguf"), "https"),
        (("pull", "https://example.org/a.gguf"), "example.org"),
        (("pull", REPO, "--sha256", "0" * 64), "(?i)sha-?256"),
        (("pull", REPO, "--sha256", "zz"), "(?i)sha-?256"),
        (
            ("generate", "--model", "Qwen3", "Hello"),
            "there is no model 'Qwen3'; there are: self-test",
        ),
        (("models", "--task", "chat"), "--task goes with --suggest"),
    ],
)
def test_typed_wrong(shimmy: Callable[..., Result], args: tuple[str, ...], why: str) -> None:
    done = shimmy(*args)
    assert done.exit_code in {1, 2}
    assert re.search(why, done.stderr), done.stderr
    assert "Traceback" not in done.output
    assert "/tmp" not in done.output


def test_interrupted_and_gone_on_with(
    shimmy: Callable[..., Result], hub: FakeHub, monkeypatch: Any
) -> None:
    hub.tricks.cut_after = 100_000
    failed = shimmy("pull", REPO)
    assert failed.exit_code == 1
    assert "fetch_interrupted" in failed.stderr
    assert json.loads(shimmy("models", "--json").stdout)["default"] == "self-test"
    hub.tricks.cut_after = None
    hub.seen.clear()
    assert shimmy("pull", REPO).exit_code == 0
    size = (hub.folder / REPO / FILE).stat().st_size
    assert 0 < hub.served < size


def test_what_is_no_model(shimmy: Callable[..., Result], hub: FakeHub) -> None:
    (hub.folder / REPO / FILE).write_bytes(b"not a model at all" * 1000)
    done = shimmy("pull", REPO)
    assert done.exit_code == 1
    assert "GGUF" in done.stderr
    assert len(json.loads(shimmy("models", "--json").stdout)["models"]) == 1


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"ShimmyApp": {"offline": True}}, "ShimmyApp.offline"),
        ({"ShimmyModels": {"allow_pull": False}}, "ShimmyModels.allow_pull is off"),
    ],
)
def test_nobody_may(
    shimmy: Callable[..., Result], hub: FakeHub, tmp_path: Path, setting: Any, why: str
) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "jupyter_server_config.json").write_text(json.dumps(setting))
    done = shimmy("pull", REPO)
    assert done.exit_code == 1
    assert why in done.stderr
    assert "policy_denied" in done.stderr
    assert hub.seen == []


@pytest.fixture
def jp_server_config() -> dict[str, Any]:
    return {
        "ServerApp": {"jpserver_extensions": {"shimmy_jupyter": True}},
        "ShimmyModels": {"search": []},
    }


async def test_from_a_notebook(
    hub: FakeHub, jp_serverapp: Any, jp_fetch: Any, jp_http_port: int, jp_base_url: str,
    tmp_path: Path, monkeypatch: Any,
) -> None:  # fmt: skip
    """By HTTP, as the magic goes, while the server answers others."""
    import asyncio

    from shimmy_jupyter.notebook.client import HttpTransport, Server

    folder = tmp_path / "cache"
    folder.mkdir()
    library = jp_serverapp.web_app.settings["shimmy_service"].library
    library._make_puller = lambda: Puller(
        hub.fetcher(), cache=folder, downloads=folder, hub=hub.url
    )
    token = jp_serverapp.identity_provider.token
    transport = HttpTransport(Server(f"http://127.0.0.1:{jp_http_port}{jp_base_url}", token))
    shown = await asyncio.to_thread(run, f"pull {REPO}:Q8_0", transport)
    assert re.match(rf"{re.escape(FILE)} downloaded: ", shown[-1][0])
    shown = await asyncio.to_thread(run, "models", transport)
    assert "self-test" in shown[-1][0]
    transport._client.close()


@pytest.mark.parametrize(
    "line", ["models of the atom", "pull the other one", "pulls a/b", "models?", ""]
)
def test_a_prompt_that_begins_like_a_command(line: str) -> None:
    assert not isinstance(parse_line(line), Command)
