"""Pulling from a real HTTPS server on loopback that plays a hub and its content network, into an empty
cache or beside what huggingface_hub has there. Cases:

fresh: one file, listed under its stem with its SHA-256, in the exact layout; in a folder; of a commit;
 by tag; a list in pages; named projector and adapter; names of unusual characters; progress
again: nothing is downloaded; after a push that changed another file; by a branch that has moved
addresses: without a checksum, with the right one, with another; there already; refused by the validator,
 in the making and there already; of a host that is not allowed
resuming: after a kill, a cut, a cancel, a new commit; of the second part; complete but not listed
discard: parts, complete ones, an address', nothing; while a pull is under way
disk: no room before the first byte, counting what is there; full on the way
lies: about the size both ways, a redirect to a link-local address by number and by name, other bytes, no
 commit, another, no checksum, another than the person's; bytes that are right and no model
parts: three in one step, one missing, one that is no part; beside others in the same snapshot
refusals: gated with and without token, unknown repository, revision, file; what is no GGUF
neighbours: a layout made by huggingface_hub, complete, without the link, with a link that leads nowhere or
 elsewhere; a damaged blob, one that is a link; one that is finished by another meanwhile; refs
at once: the same twice; another of the same repository while one is listed; finished by the other
a fault at any step: nothing half-done is listed, and the same pull goes on
Always: no path, no secret in what is raised.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import ssl
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import random_gguf
from fake_hub import SIGNATURE, FakeHub, make_certificates

from shimmy_jupyter.errors import Cancelled, InvalidValue, ModelLoadFailed, ShimmyError
from shimmy_jupyter.models import fetch_part
from shimmy_jupyter.models.addresses import refusal
from shimmy_jupyter.models.fetch import (
    ChecksumMismatch,
    DiskFull,
    Fetcher,
    FetchFailed,
    FetchInterrupted,
    FetchRefused,
    FileExists,
)
from shimmy_jupyter.models.pull import Puller, PullProgress
from shimmy_jupyter.models.sources import Found, Places, Scanner

REPO = "org/name"
TOKEN = "hf_s3cretToken"

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes certificates")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder)
    return folder


@dataclass(frozen=True)
class Models:
    """Real ones: a model, another, three parts of one, an adapter."""

    one: bytes
    other: bytes
    parts: tuple[bytes, ...]
    adapter: bytes


@pytest.fixture(scope="session")
def models(tmp_path_factory: Any) -> Models:
    folder = tmp_path_factory.mktemp("models")
    one = random_gguf.write(folder / "one.gguf").read_bytes()
    other = random_gguf.write(folder / "other.gguf", seed=1).read_bytes()
    random_gguf.write(folder / "split.gguf", split=7)
    parts = tuple(path.read_bytes() for path in sorted(folder.glob("split-*")))
    adapter = random_gguf.write_adapter(folder / "adapter.gguf").read_bytes()
    assert len(parts) == 3
    return Models(one, other, parts, adapter)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def part(number: int, folder: str = "") -> str:
    return f"{folder}split-{number:05}-of-00003.gguf"


@dataclass
class Client:
    """A puller and its folders, and the hub that it talks to."""

    hub: FakeHub
    cache: Path
    downloads: Path
    progress: list[PullProgress] = field(default_factory=list)

    def have(self, path: str, data: bytes, repo: str = REPO) -> bytes:
        """On the hub."""
        file = self.hub.folder / repo / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return data

    def have_parts(self, models: Models, folder: str = "") -> None:
        for number, data in enumerate(models.parts, 1):
            self.have(part(number, folder), data)

    def puller(self, *, options: dict[str, Any] | None = None, **fields: Any) -> Puller:
        fetcher = self.hub.fetcher(**options or {})
        return Puller(
            fetcher, cache=self.cache, downloads=self.downloads, hub=self.hub.url, **fields
        )

    def pull(
        self,
        reference: str = REPO,
        *,
        puller: Puller | None = None,
        progress: Callable[[PullProgress], None] | None = None,
        **fields: Any,
    ) -> Any:
        self.progress.clear()
        self.hub.seen.clear()

        def report(said: PullProgress) -> None:
            self.progress.append(said)
            if progress is not None:
                progress(said)

        try:
            return (puller or self.puller()).pull(reference, progress=report, **fields)
        finally:
            done = [said.done for said in self.progress]
            assert done == sorted(done)
            assert all(said.total is None or said.done <= said.total for said in self.progress)

    def fails(self, error: type[ShimmyError], why: str, *args: Any, **fields: Any) -> str:
        with pytest.raises(error, match=why) as caught:
            self.pull(*args, **fields)
        assert caught.type is error
        message = caught.value.message
        for secret in (str(self.cache), str(self.downloads), "127.0.0.1", SIGNATURE, TOKEN):
            assert secret not in message
        return message

    @property
    def repository(self) -> Path:
        return self.cache / f"models--{REPO.replace('/', '--')}"

    def snapshot(self, path: str = "", commit: str | None = None) -> Path:
        return self.repository / "snapshots" / (commit or self.hub.commit(REPO)) / path

    def blob(self, data: bytes) -> Path:
        return self.repository / "blobs" / sha(data)

    def listed(self) -> dict[str, Found]:
        """By the scanner, which must have nothing to say against any."""
        scanned = Scanner(Places(huggingface=self.cache, home_models=self.downloads)).scan()
        assert [found for found in scanned.found if found.problem] == []
        return {found.id: found for found in scanned.found if not found.bundled}

    @property
    def tree(self) -> list[str]:
        """Every file and link in the cache, without locks."""
        paths = self.cache.rglob("*") if self.cache.exists() else ()
        names = (path.relative_to(self.cache).as_posix() for path in paths if not path.is_dir())
        return sorted(name for name in names if not name.startswith(".locks/"))

    @property
    def asked(self) -> list[tuple[str, str]]:
        return [(seen.method, seen.path.partition("?")[0]) for seen in self.hub.seen]

    @property
    def bytes_at(self) -> list[str | None]:
        """Where each request for bytes began."""
        return [seen.headers.get("range") for seen in self.hub.seen if seen.path[:7] == "/blobs/"]


@pytest.fixture
def client(tmp_path: Path, certificates: Path) -> Iterator[Client]:
    (tmp_path / "repositories").mkdir()
    with FakeHub(tmp_path / "repositories", certificates) as hub:
        yield Client(hub, tmp_path / "cache" / "hub", tmp_path / "downloads")


def stages(client: Client) -> list[str]:
    found: list[str] = []
    for said in client.progress:
        if found[-1:] != [said.stage]:
            found.append(said.stage)
    return found


class TestFresh:
    def test_it_is_listed(self, client: Client, models: Models) -> None:
        data = client.have("m-Q8_0.gguf", models.one)
        client.have("README.md", b"#")
        pulled = client.pull()
        assert list(client.listed()) == ["m-Q8_0"]
        found = client.listed()["m-Q8_0"]
        assert (found.expected_sha256, found.size_bytes) == (sha(data), len(data))
        assert found.origin is not None
        assert (found.origin.name, found.origin.revision) == (REPO, client.hub.commit(REPO))
        assert found.path.read_bytes() == data
        assert pulled.files == (client.snapshot("m-Q8_0.gguf"),)
        assert (pulled.sha256, pulled.size_bytes) == ((sha(data),), len(data))
        assert (pulled.repo, pulled.revision) == (REPO, client.hub.commit(REPO))
        assert (pulled.name, pulled.new, pulled.notes) == ("m-Q8_0", True, ())

    def test_the_layout(self, client: Client, models: Models) -> None:
        """As https://huggingface.co/docs/hub/local-cache has it, and nothing else."""
        data, commit = client.have("m.gguf", models.one), client.hub.commit(REPO)
        client.pull()
        home = "models--org--name"
        assert client.tree == [
            f"{home}/blobs/{sha(data)}", f"{home}/refs/main", f"{home}/snapshots/{commit}/m.gguf",
        ]  # fmt: skip
        assert str(client.snapshot("m.gguf").readlink()) == f"../../blobs/{sha(data)}"
        assert (client.repository / "refs" / "main").read_bytes() == commit.encode()
        assert sorted(path.name for path in client.repository.iterdir()) == [
            "blobs", "refs", "snapshots",
        ]  # fmt: skip

    @pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
    def test_who_may_read_it(self, client: Client, models: Models, umask: int, mode: int) -> None:
        data = client.have("m.gguf", models.one)
        before = os.umask(umask)
        try:
            client.pull()
        finally:
            os.umask(before)
        assert stat.S_IMODE(client.blob(data).stat().st_mode) == mode

    def test_what_is_asked(self, client: Client, models: Models) -> None:
        data, commit = client.have("m.gguf", models.one), client.hub.commit(REPO)
        client.pull()
        assert client.asked == [
            ("GET", f"/api/models/{REPO}/tree/main"),
            ("HEAD", f"/{REPO}/resolve/main/m.gguf"),
            ("GET", f"/{REPO}/resolve/{commit}/m.gguf"),
            ("GET", f"/blobs/{sha(data)}"),
        ]

    def test_progress(self, client: Client, models: Models) -> None:
        client.have_parts(models)
        total = sum(map(len, models.parts))
        client.pull()
        assert stages(client) == ["looking", "downloading", "checking"]
        assert client.progress[0] == PullProgress("looking", 0, None, REPO)
        assert {said.total for said in client.progress[1:]} == {total}
        assert client.progress[-1] == PullProgress("checking", total, total, part(1))
        assert [said.file for said in client.progress[1:-1:2]] == [part(n) for n in (1, 2, 3)]
        client.pull()
        assert stages(client) == ["looking", "hashing", "checking"]

    def test_in_a_folder(self, client: Client, models: Models) -> None:
        data = client.have("a/b/m.gguf", models.one)
        assert client.pull(f"{REPO}:a/b/m.gguf").files == (client.snapshot("a/b/m.gguf"),)
        assert str(client.snapshot("a/b/m.gguf").readlink()) == f"../../../../blobs/{sha(data)}"
        assert client.listed()["m"].expected_sha256 == sha(data)

    def test_of_a_commit(self, client: Client, models: Models) -> None:
        client.have("m.gguf", models.one)
        client.pull(f"{REPO}@{client.hub.commit(REPO)}")
        assert list(client.listed()) == ["m"]
        assert not (client.repository / "refs").exists()

    def test_by_tag(self, client: Client, models: Models) -> None:
        client.have("m-Q4_K_M.gguf", models.one)
        client.have("m-Q8_0.gguf", models.other)
        assert client.pull(f"hf.co/{REPO}:q8_0").sha256 == (sha(models.other),)
        assert client.pull().sha256 == (sha(models.one),)
        assert list(client.listed()) == ["m-Q4_K_M", "m-Q8_0"]

    def test_a_list_in_pages(self, client: Client, models: Models) -> None:
        for number in range(5):
            client.have(f"{number}.txt", b"x")
        client.have("m.gguf", models.one)
        client.hub.tricks.page = 2
        client.pull()
        assert [path for _, path in client.asked].count(f"/api/models/{REPO}/tree/main") == 3

    def test_what_is_named(self, client: Client, models: Models) -> None:
        client.have("m.gguf", models.one)
        client.have("m-lora.gguf", models.adapter)
        client.pull(f"{REPO}:m-lora.gguf")
        assert client.listed()["m-lora"].kind == "adapter"
        assert "m" not in client.listed()

    @pytest.mark.parametrize("name", ["é (1).gguf", "..gguf", f"{'n' * 250}.gguf", "+a.GGUF"])
    def test_unusual_names(self, client: Client, models: Models, name: str) -> None:
        data = client.have(name, models.one)
        assert client.pull().files == (client.snapshot(name),)
        assert client.snapshot(name).read_bytes() == data

    def test_with_the_persons_own_checksum(self, client: Client, models: Models) -> None:
        data = client.have("m.gguf", models.one)
        client.hub.tricks.no_digest = True
        client.fails(FetchFailed, "gives no SHA-256 for m.gguf; give the one")
        client.pull(sha256=sha(data).upper())
        assert client.listed()["m"].expected_sha256 == sha(data)


class TestAgain:
    def test_nothing_is_downloaded(self, client: Client, models: Models) -> None:
        client.have("m.gguf", models.one)
        first = client.pull()
        again = client.pull()
        assert (again.new, client.hub.served, client.bytes_at) == (False, 0, [])
        assert (again.files, again.sha256) == (first.files, first.sha256)

    def test_after_a_push_of_something_else(self, client: Client, models: Models) -> None:
        data, old = client.have("m.gguf", models.one), client.hub.commit(REPO)
        client.pull()
        client.have("README.md", b"new")
        again = client.pull()
        new = client.hub.commit(REPO)
        assert new != old
        assert (again.new, again.revision, client.bytes_at) == (False, new, [])
        assert (client.repository / "refs" / "main").read_text() == new
        assert client.snapshot("m.gguf", old).samefile(client.snapshot("m.gguf", new))
        assert list(client.listed()) == ["m"]
        assert client.listed()["m"].expected_sha256 == sha(data)

    def test_another_version(self, client: Client, models: Models) -> None:
        client.have("m.gguf", models.one)
        client.pull()
        client.have("m.gguf", models.other)
        assert client.pull().new
        assert client.listed()["m"].expected_sha256 == sha(models.other)
        assert client.blob(models.one).exists()


class TestAddresses:
    def url(self, client: Client, name: str = "m.gguf") -> str:
        return f"{client.hub.url}/{REPO}/resolve/main/{name}?token={TOKEN}"

    def test_without_a_checksum(self, client: Client, models: Models) -> None:
        data = client.have("m.gguf", models.one)
        pulled = client.pull(self.url(client))
        assert pulled.files == (client.downloads / "m.gguf",)
        assert (pulled.repo, pulled.revision, pulled.name, pulled.new) == (None, None, "m", True)
        assert pulled.notes == (
            f"the address gives no checksum: the SHA-256 {sha(data)} was recorded",
        )
        assert list(client.listed()) == ["m"]
        assert client.tree == []
        assert stages(client) == ["looking", "downloading", "checking"]
        assert {said.total for said in client.progress} == {None, len(data)}

    def test_with_the_right_one(self, client: Client, models: Models) -> None:
        data = client.have("m.gguf", models.one)
        assert client.pull(self.url(client), sha256=sha(data)).notes == ()
        again = client.pull(self.url(client), sha256=sha(data))
        assert (again.new, client.hub.seen, again.size_bytes) == (False, [], len(data))
        client.fails(FileExists, "no SHA-256 to say whether it is the same", self.url(client))

    def test_with_another(self, client: Client, models: Models) -> None:
        client.have("m.gguf", models.one)
        url = self.url(client)
        client.fails(ChecksumMismatch, "not the file that was asked", url, sha256="0" * 64)
        assert list(client.downloads.iterdir()) == []

    def test_the_validator_refuses(self, client: Client) -> None:
        data = client.have("m.gguf", b"GGUF" + bytes(100))
        why = "m.gguf cannot be used: .*version"
        client.fails(FetchRefused, why, self.url(client))
        assert list(client.downloads.iterdir()) == []
        (client.downloads / "m.gguf").write_bytes(data)
        client.fails(FetchRefused, why, self.url(client), sha256=sha(data))
        assert (client.downloads / "m.gguf").exists()

    def test_while_it_is_validated_it_is_not_listed(self, client: Client, models: Models) -> None:
        client.have("m.gguf", models.one)
        seen: list[Any] = []
        puller = client.puller(validate=lambda _path: seen.append(client.listed()))
        client.pull(self.url(client), puller=puller)
        assert seen == [{}]

    def test_of_a_host_that_is_not_allowed(self, client: Client) -> None:
        client.fails(FetchRefused, "example.org is not among", "https://example.org/m.gguf")
        assert (client.downloads.exists(), client.hub.seen) == (False, [])

    def test_interrupted(self, client: Client, models: Models) -> None:
        data = client.have("m.gguf", models.one)
        client.hub.tricks.cut_after = 100_000
        client.fails(FetchInterrupted, "ask again to continue", self.url(client))
        assert client.listed() == {}
        client.hub.tricks.cut_after = None
        client.pull(self.url(client))
        assert client.hub.served == len(data) - 100_000


KEPT = 200_000
KILLED = """
import sys
from pathlib import Path
import ssl
from shimmy_jupyter.models import fetch_job, fetch_part
from shimmy_jupyter.models.fetch import Fetcher
from shimmy_jupyter.models.pull import Puller
port, authority, cache = sys.argv[1:]
fetch_part.CHECK_BYTES = fetch_job._REPORT_BYTES = 1
fetcher = Fetcher(
    [f"hub.test:{port}", f"cdn.test:{port}"], resolver=lambda host, port: ["127.0.0.1"], reserve=0,
    verify=ssl.create_default_context(cafile=authority), refused=lambda address: None,
)
puller = Puller(fetcher, cache=Path(cache), downloads=Path(cache), hub=f"https://hub.test:{port}")
puller.pull("org/name", progress=lambda said: print(said.done, flush=True))
"""


class TestResuming:
    def cut(self, client: Client, after: int = KEPT, reference: str = REPO) -> None:
        client.hub.tricks.cut_after = after
        client.fails(FetchInterrupted, "are kept, ask again to continue", reference)
        client.hub.tricks.cut_after = None
        assert client.listed() == {}

    def test_after_a_kill(self, client: Client, models: Models) -> None:
        data = client.have("m.gguf", models.one)
        client.hub.tricks.stall_after = KEPT
        arguments = [
            str(client.hub.server_address[1]),
            str(client.hub.authority),
            str(client.cache),
        ]
        command = [sys.executable, "-c", KILLED, *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if int(line) == KEPT:
                    child.kill()
                    break
        assert child.returncode == -9
        assert client.listed() == {}
        client.hub.tricks.stall_after = None
        assert client.pull().new
        assert client.bytes_at == [f"bytes={KEPT}-"]
        assert client.hub.served == len(data) - KEPT
        assert client.listed()["m"].expected_sha256 == sha(data)
        assert stages(client) == ["looking", "hashing", "downloading", "checking"]
        assert not (client.repository / ".shimmy").exists()

    def test_after_a_cut(self, client: Client, models: Models) -> None:
        data = client.have("m.gguf", models.one)
        self.cut(client)
        client.pull()
        assert (client.bytes_at, client.hub.served) == ([f"bytes={KEPT}-"], len(data) - KEPT)
        assert list(client.listed()) == ["m"]

    def test_ranges_that_are_ignored(self, client: Client, models: Models) -> None:
        data = client.have("m.gguf", models.one)
        self.cut(client)
        client.hub.tricks.no_ranges = True
        assert client.pull().new
        assert client.hub.served == len(data)

    def test_after_a_cancel(self, client: Client, models: Models) -> None:
        data = client.have("m.gguf", models.one)
        asked = iter(range(1000))
        why = "pulling org/name was cancelled; what has come is kept"
        client.fails(Cancelled, why, cancelled=lambda: next(asked) == 4)
        assert client.listed() == {}
        client.pull()
        (begun,) = client.bytes_at
        assert begun is not None
        kept = int(begun[6:-1])
        assert 0 < kept < len(data)
        assert client.hub.served == len(data) - kept

    def test_cancelled_at_once(self, client: Client, models: Models) -> None:
        client.have("m.gguf", models.one)
        client.fails(Cancelled, "was cancelled", cancelled=lambda: True)
        assert (client.tree, client.bytes_at) == ([], [])

    def test_cancelled_while_what_is_there_is_read(self, client: Client, models: Models) -> None:
        client.have("m.gguf", models.one)
        client.pull()
        asked = iter(range(1000))
        client.fails(Cancelled, "pulling org/name was", cancelled=lambda: next(asked) == 2)
        assert list(client.listed()) == ["m"]

    def test_of_another_commit_with_the_same_file(self, client: Client, models: Models) -> None:
        data = client.have("m.gguf", models.one)
        self.cut(client)
        client.have("README.md", b"new")
        client.pull()
        assert client.hub.served == len(data) - KEPT

    def test_another_version_begins_anew(self, client: Client, models: Models) -> None:
        client.have("m.gguf", models.one)
        self.cut(client)
        data = client.have("m.gguf", models.other)
        client.pull()
        assert client.hub.served == len(data)

    def test_of_the_second_part(self, client: Client, models: Models) -> None:
        client.have_parts(models)
        first, second, third = map(len, models.parts)
        cut = min(first, second) // 2

        def after_the_first(said: PullProgress) -> None:
            if said.done == first:
                client.hub.tricks.cut_after = cut

        client.fails(FetchInterrupted, "ask again to continue", progress=after_the_first)
        assert client.listed() == {}
        client.hub.tricks.cut_after = None
        client.pull()
        assert client.hub.served == second - cut + third
        assert client.bytes_at == [f"bytes={cut}-", None]
        assert list(client.listed()) == ["split"]

    def test_complete_but_not_listed(self, client: Client, models: Models) -> None:
        client.have("m.gguf", models.one)

        def defect(_path: Path) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            client.pull(puller=client.puller(validate=defect))
        assert client.listed() == {}
        pulled = client.pull()
        assert (client.bytes_at, pulled.new, list(client.listed())) == ([], False, ["m"])

    def test_a_complete_one_that_is_damaged(self, client: Client, models: Models) -> None:
        data = client.have("m.gguf", models.one)
        private = client.repository / ".shimmy" / sha(data) / "m.gguf"
        private.parent.mkdir(parents=True)
        private.write_bytes(data[::-1])
        assert client.pull().notes == ("a damaged copy of m.gguf in the cache was replaced",)
        assert client.blob(data).read_bytes() == data


class TestDiscard:
    def test_of_a_repository(self, client: Client, models: Models) -> None:
        client.have_parts(models)
        TestResuming().cut(client, len(models.parts[0]))
        assert any(".shimmy" in name for name in client.tree)
        client.puller().discard(f"{REPO}:anything.gguf")
        assert client.tree == []
        client.pull()
        assert client.hub.served == sum(map(len, models.parts))
        client.puller().discard(REPO)
        assert list(client.listed()) == ["split"]

    def test_of_an_address(self, client: Client, models: Models) -> None:
        client.have("m.gguf", models.one)
        url = f"{client.hub.url}/{REPO}/resolve/main/m.gguf"
        client.puller().discard(url)
        client.hub.tricks.cut_after = KEPT
        client.fails(FetchInterrupted, "kept", url)
        assert list(client.downloads.iterdir()) != []
        client.puller().discard(url)
        assert list(client.downloads.iterdir()) == []

    def test_nothing(self, client: Client) -> None:
        client.puller().discard(REPO)
        assert not client.cache.exists()
        with pytest.raises(InvalidValue):
            client.puller().discard("qwen3:4b")

    def test_while_it_is_pulled(self, client: Client, models: Models) -> None:
        client.have_parts(models)
        first, second, _ = map(len, models.parts)
        refused = []

        def discard(said: PullProgress) -> None:
            if said.done == first + second and said.file == part(2):
                with pytest.raises(FetchRefused, match="already being fetched"):
                    client.puller().discard(REPO)
                refused.append(said)

        client.pull(progress=discard)
        assert refused
        assert list(client.listed()) == ["split"]


class TestDisk:
    def free(self, monkeypatch: Any, size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=size))

    def test_no_room_for_all(self, client: Client, models: Models, monkeypatch: Any) -> None:
        client.have_parts(models)
        total = sum(map(len, models.parts))
        assert total == 385_280
        self.free(monkeypatch, total - 1)
        client.fails(DiskFull, r"^split needs 385\.3 kB, 385\.3 kB are free in hub; make room")
        assert (client.bytes_at, client.tree, client.cache.exists()) == ([], [], False)
        self.free(monkeypatch, total + 999)
        puller = client.puller(options={"reserve": 1000})
        why = r"386\.3 kB are free in hub, of which 1\.0 kB are kept"
        client.fails(DiskFull, why, puller=puller)
        self.free(monkeypatch, total + 1000)
        client.pull(puller=puller)

    def test_what_is_there_counts(self, client: Client, models: Models, monkeypatch: Any) -> None:
        data = client.have("m.gguf", models.one)
        TestResuming().cut(client)
        self.free(monkeypatch, len(data) - KEPT - 1)
        client.fails(DiskFull, r"^m needs 184\.9 kB")
        self.free(monkeypatch, len(data) - KEPT)
        client.pull()
        self.free(monkeypatch, 0)
        client.pull(puller=client.puller(options={"reserve": 1000}))

    def test_full_on_the_way(self, client: Client, models: Models, monkeypatch: Any) -> None:
        client.have("m.gguf", models.one)
        before, written = fetch_part._write_all, []

        def write(fd: int, data: bytes) -> None:
            written.append(len(data))
            if sum(written) > 100_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(client.cache))
            before(fd, data)

        monkeypatch.setattr(fetch_part, "_write_all", write)
        client.fails(DiskFull, "disk or the quota is full; m.gguf.part is removed")
        assert (client.listed(), client.tree) == ({}, [])
        monkeypatch.undo()
        client.pull()
        assert list(client.listed()) == ["m"]

    def test_the_cache_is_no_folder(self, client: Client, models: Models) -> None:
        client.have("m.gguf", models.one)
        client.cache.parent.mkdir()
        client.cache.write_text("")
        client.fails(FetchRefused, "m.gguf cannot be kept in the models' folder: Not a directory")

    def test_no_links(self, client: Client, models: Models, monkeypatch: Any) -> None:
        client.have("m.gguf", models.one)

        def symlink(*args: Any, **options: Any) -> None:
            raise PermissionError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "symlink", symlink)
        client.fails(FetchRefused, "models' folder: Operation not permitted")
        monkeypatch.undo()
        assert client.listed() == {}
        assert not client.pull().new


class TestLies:
    @pytest.mark.parametrize("lie", [-1, 1, 1000, -100_000])
    def test_about_the_size(self, client: Client, models: Models, lie: int) -> None:
        data = client.have("m.gguf", models.one)
        client.hub.tricks.size_lie = lie
        client.fails(FetchFailed, f"offers {len(data)} bytes where {len(data) + lie} were expected")
        assert (client.listed(), client.tree) == ({}, [])

    def test_a_redirect_to_a_link_local_address(self, client: Client, models: Models) -> None:
        client.have("m.gguf", models.one)
        client.hub.tricks.redirect_to = "https://169.254.169.254/latest/meta-data"
        client.fails(FetchRefused, "redirects to where nothing is fetched from.*names an address")
        assert (client.tree, {seen.host for seen in client.hub.seen}) == ([], {"hub.test"})

    def test_a_name_of_a_link_local_address(self, client: Client, models: Models) -> None:
        client.have("m.gguf", models.one)

        def resolver(host: str, _port: int) -> list[str]:
            return ["169.254.169.254" if host == "cdn.test" else "127.0.0.1"]

        puller = client.puller(options={"resolver": resolver})
        client.fails(
            FetchRefused, "cdn.test resolves to an address that is link-local", puller=puller
        )
        assert client.tree == []

    def test_loopback_is_refused_but_in_tests(self, client: Client) -> None:
        puller = client.puller(options={"refused": refusal})
        client.fails(
            FetchRefused, "hub.test resolves to an address that is loopback", puller=puller
        )
        assert client.hub.seen == []

    def test_other_bytes(self, client: Client, models: Models) -> None:
        client.have("m.gguf", models.one)
        client.hub.tricks.corrupt = True
        why = "what came from hub.test as m.gguf is not the file"
        message = client.fails(ChecksumMismatch, why)
        assert "it is removed" in message
        assert ChecksumMismatch.code == "checksum_mismatch"
        assert (client.listed(), client.tree) == ({}, [])
        client.hub.tricks.corrupt = False
        client.pull()
        assert list(client.listed()) == ["m"]

    def test_no_commit(self, client: Client, models: Models) -> None:
        client.have("m.gguf", models.one)
        client.hub.tricks.no_commit = True
        client.fails(FetchFailed, "does not say of which commit m.gguf is")
        assert (client.tree, client.bytes_at) == ([], [])

    def test_another_commit(self, client: Client, models: Models, monkeypatch: Any) -> None:
        client.have("m.gguf", models.one)
        asked = "a" * 40
        monkeypatch.setattr(
            type(client.hub), "revisions", lambda _hub, repo: {asked: client.hub.commit(repo)}
        )
        client.fails(FetchFailed, "names another", f"{REPO}@{asked}")

    def test_another_checksum_than_the_persons(self, client: Client, models: Models) -> None:
        data = client.have("m.gguf", models.one)
        client.fails(ChecksumMismatch, f"has m.gguf with the SHA-256 {sha(data)}", sha256="0" * 64)
        assert (client.tree, client.bytes_at) == ([], [])

    @pytest.mark.parametrize("digest", ["", "0" * 63, "g" * 64])
    def test_what_is_no_checksum(self, client: Client, digest: str) -> None:
        client.fails(InvalidValue, "64 hex digits", sha256=digest)
        assert client.hub.seen == []

    def test_no_model_of_the_right_checksum(self, client: Client, models: Models) -> None:
        for data, why in (
            (b"GGUF" + bytes(100), "m.gguf cannot be used: .*version"),
            (b"<html>" * 100, "m.gguf cannot be used: "),
            (models.one[:-1], "m.gguf cannot be used: "),
        ):
            client.have("m.gguf", data)
            client.fails(FetchRefused, why)
            assert (client.listed(), client.tree) == ({}, [])

    def test_no_model_that_is_there(self, client: Client) -> None:
        """Of another's making, and listed by him: what it is, it stays."""
        data = client.have("m.gguf", b"GGUF" + bytes(100))
        link = Neighbour(client).add("m.gguf", data)
        client.fails(FetchRefused, "m.gguf cannot be used")
        assert link.read_bytes() == data
        assert not (client.repository / ".shimmy").exists()

    def test_no_room_is_lost_to_a_refusal(self, client: Client, models: Models) -> None:
        def refuse(path: Path) -> None:
            assert path.name == part(1)
            assert [path.with_name(part(n)).read_bytes() for n in (1, 2, 3)] == list(models.parts)
            raise ModelLoadFailed("too strange")

        client.have_parts(models)
        client.fails(
            FetchRefused, "cannot be used: too strange", puller=client.puller(validate=refuse)
        )
        assert client.tree == []


class TestParts:
    @pytest.mark.parametrize("folder", ["", "Q8_0/", "a/b/"])
    def test_in_one_step(self, client: Client, models: Models, folder: str) -> None:
        client.have_parts(models, folder)
        pulled = client.pull(f"{REPO}:{part(2, folder)}")
        assert pulled.files == tuple(client.snapshot(part(n, folder)) for n in (1, 2, 3))
        assert pulled.sha256 == tuple(map(sha, models.parts))
        assert (pulled.name, pulled.size_bytes) == ("split", sum(map(len, models.parts)))
        (found,) = client.listed().values()
        assert (found.id, found.missing, len(found.parts)) == ("split", (), 3)
        assert found.expected_sha256 == sha(models.parts[0])

    def test_one_is_missing(self, client: Client, models: Models) -> None:
        client.have_parts(models)
        (client.hub.folder / REPO / part(2)).unlink()
        client.fails(InvalidValue, f"lacks 1 of the 3 files.*{part(2)}")
        assert (client.tree, client.bytes_at) == ([], [])

    def test_one_is_no_part(self, client: Client, models: Models) -> None:
        client.have_parts(models)
        client.have(part(2), models.one)
        client.fails(FetchRefused, f"{part(1)} cannot be used: part 2: split.no")
        assert (client.listed(), client.tree) == ({}, [])

    def test_a_checksum_is_one_files(self, client: Client, models: Models) -> None:
        client.have_parts(models)
        message = client.fails(InvalidValue, "and this model has 3", sha256="0" * 64)
        assert "SHA-256" in message

    def test_all_are_of_the_first_ones_commit(self, client: Client, models: Models) -> None:
        client.have_parts(models)
        commit = client.hub.commit(REPO)
        client.pull()
        assert [path.split("/")[-2] for method, path in client.asked if method == "HEAD"] == [
            "main", commit, commit,
        ]  # fmt: skip

    @pytest.mark.parametrize("folder", ["", "Q8_0/", "a/b/"])
    def test_beside_others(self, client: Client, models: Models, folder: str) -> None:
        client.have_parts(models, folder)
        client.have("Q8_0/m.gguf", models.other)
        client.have("m.gguf", models.one)
        client.pull(f"{REPO}:m.gguf")
        client.pull(f"{REPO}:Q8_0/m.gguf")
        client.pull(f"{REPO}:{part(1, folder)}")
        assert sorted(name.partition("@")[0] for name in client.listed()) == ["m", "m", "split"]
        for name in (part(1, folder), part(3, folder), "m.gguf", "Q8_0/m.gguf"):
            assert str(client.snapshot(name).readlink()).startswith("../../")
        assert not (client.repository / ".shimmy").exists()


class TestRefusals:
    def test_gated(self, client: Client, models: Models) -> None:
        client.have("m.gguf", models.one)
        client.hub.tricks.gated = REPO
        terms = f"accept its terms at {client.hub.url}/{REPO} and set HF_TOKEN"
        client.fails(FetchFailed, f"only who agree to its terms: {re.escape(terms)}")
        assert client.tree == []
        puller = client.puller(options={"token_for": {"hub.test": TOKEN}.get})
        client.pull(puller=puller)
        assert list(client.listed()) == ["m"]
        sent = {(seen.host, seen.headers.get("authorization")) for seen in client.hub.seen}
        assert sent == {("hub.test", f"Bearer {TOKEN}"), ("cdn.test", None)}

    @pytest.mark.parametrize("status", [401, 403])
    def test_closed_without_a_reason(self, client: Client, models: Models, status: int) -> None:
        client.have("m.gguf", models.one)
        client.hub.tricks.answers = status
        client.fails(
            FetchFailed, f"closed to us.*accept its terms at {client.hub.url}/{REPO} and set"
        )

    @pytest.mark.parametrize("token", [None, TOKEN])
    def test_no_repository(self, client: Client, token: str | None) -> None:
        puller = client.puller(options={"token_for": lambda _host: token})
        host = client.hub.url.removeprefix("https://")
        why = f"there is no repository {REPO} at {host}, or it is private: then set HF_TOKEN"
        client.fails(FetchFailed, why, puller=puller)

    def test_no_revision(self, client: Client, models: Models) -> None:
        client.have("m.gguf", models.one)
        client.fails(FetchFailed, f"{REPO} has no branch, tag or commit v9", f"{REPO}@v9")

    def test_no_file(self, client: Client, models: Models) -> None:
        client.have("Model-Q4_K_M.gguf", models.one)
        why = "no file 'model-q4_k_m.gguf'; did you mean Model-Q4_K_M.gguf?"
        client.fails(InvalidValue, re.escape(why), f"{REPO}:model-q4_k_m.gguf")
        client.fails(
            InvalidValue, r"no Q8_0 model; it has Model-Q4_K_M\.gguf \(384\.9 kB\)", f"{REPO}:Q8_0"
        )

    def test_a_file_that_is_listed_only(self, client: Client, models: Models) -> None:
        client.have("m.gguf", models.one)
        client.hub.tricks.missing = "m.gguf"
        client.fails(FetchFailed, "lists a file that is not there")

    def test_no_gguf(self, client: Client, models: Models) -> None:
        client.have("config.json", b"{}")
        client.fails(InvalidValue, "config.json is no GGUF file", f"{REPO}:config.json")
        client.fails(InvalidValue, "has no GGUF file")
        assert client.tree == []

    def test_other_failures_stay_as_they_are(self, client: Client, models: Models) -> None:
        client.have("m.gguf", models.one)
        client.hub.tricks.answers = 503
        client.fails(FetchFailed, "hub.test answered 503: it has a problem of its own")


@dataclass
class Neighbour:
    """What huggingface_hub leaves in a cache."""

    client: Client

    def blob(self, data: bytes) -> Path:
        path = self.client.blob(data)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def add(self, path: str, data: bytes, *, blob: bool = True, commit: str | None = None) -> Path:
        if blob:
            self.blob(data)
        commit = commit or self.client.hub.commit(REPO)
        link = self.client.snapshot(path, commit)
        link.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (2 + path.count("/"))
        link.symlink_to(f"{up}blobs/{sha(data)}")
        reference = self.client.repository / "refs" / "main"
        reference.parent.mkdir(exist_ok=True)
        reference.write_text(commit)
        (self.client.cache / ".locks" / self.client.repository.name).mkdir(
            parents=True, exist_ok=True
        )
        return link

    def state(self) -> dict[str, tuple[int, int, int]]:
        paths = (self.client.cache / name for name in self.client.tree)
        found = {path.name: path.lstat() for path in paths}
        return {name: (one.st_ino, one.st_mtime_ns, one.st_mode) for name, one in found.items()}


@pytest.fixture
def neighbour(client: Client) -> Neighbour:
    return Neighbour(client)


class TestNeighbours:
    @pytest.mark.parametrize("path", ["m.gguf", "q/m.gguf"])
    def test_complete(
        self, client: Client, neighbour: Neighbour, models: Models, path: str
    ) -> None:
        client.have(path, models.one)
        neighbour.add(path, models.one)
        before = neighbour.state()
        pulled = client.pull()
        assert (pulled.new, pulled.notes, client.bytes_at) == (False, (), [])
        assert pulled.files == (client.snapshot(path),)
        assert neighbour.state() == before
        assert list(client.listed()) == ["m"]

    def test_without_the_link(self, client: Client, neighbour: Neighbour, models: Models) -> None:
        client.have("m.gguf", models.one)
        client.have("README.md", b"#")
        neighbour.add("README.md", b"#")
        blob = neighbour.blob(models.one)
        before = neighbour.state()
        assert not client.pull().new
        after = neighbour.state()
        assert set(after) - set(before) == {"m.gguf"}
        assert {name: after[name] for name in before} == before
        assert client.snapshot("m.gguf").samefile(blob)

    def test_a_link_that_leads_nowhere(
        self, client: Client, neighbour: Neighbour, models: Models
    ) -> None:
        client.have("m.gguf", models.one)
        link = neighbour.add("m.gguf", models.one, blob=False)
        client.pull()
        assert list(client.listed()) == ["m"]
        client.repository.joinpath("blobs", sha(models.one)).unlink()
        link.unlink()
        link.symlink_to("../../blobs/" + "f" * 64)
        client.pull()
        assert str(link.readlink()) == f"../../blobs/{sha(models.one)}"

    def test_a_link_to_something_else(
        self, client: Client, neighbour: Neighbour, models: Models
    ) -> None:
        client.have("m.gguf", models.one)
        link = neighbour.add("m.gguf", models.other)
        before = neighbour.state()
        client.fails(FileExists, "has another file as m.gguf of that commit; remove it")
        assert (client.bytes_at, neighbour.state()) == ([], before)
        link.unlink()
        link.write_bytes(models.one)
        client.fails(FileExists, "another file")

    def test_that_appears_meanwhile(
        self, client: Client, neighbour: Neighbour, models: Models
    ) -> None:
        client.have("m.gguf", models.one)
        links = []

        def appear(said: PullProgress) -> None:
            if said.stage == "checking":
                links.append(neighbour.add("m.gguf", models.one).lstat())

        assert client.pull(progress=appear).new
        assert client.snapshot("m.gguf").lstat().st_ino == links[0].st_ino
        assert client.blob(models.one).read_bytes() == models.one
        assert list(client.listed()) == ["m"]

    def test_another_that_appears_meanwhile(
        self, client: Client, neighbour: Neighbour, models: Models
    ) -> None:
        client.have_parts(models)

        def appear(said: PullProgress) -> None:
            if said.stage == "checking":
                neighbour.add(part(3), models.other)

        client.fails(FileExists, "has another file as", progress=appear)
        assert [path.name for path in client.snapshot().iterdir()] == [part(3)]
        assert client.snapshot(part(3)).read_bytes() == models.other

    @pytest.mark.parametrize("size", [0, 1000])
    def test_a_damaged_blob(
        self, client: Client, neighbour: Neighbour, models: Models, size: int
    ) -> None:
        client.have("m.gguf", models.one)
        neighbour.add("m.gguf", models.one).write_bytes(models.one[:size] + models.one[size:][::-1])
        pulled = client.pull()
        assert pulled.notes == ("a damaged copy of m.gguf in the cache was replaced",)
        assert client.blob(models.one).read_bytes() == models.one
        client.blob(models.one).write_bytes(models.one[:-1])
        assert client.pull().notes
        assert client.blob(models.one).read_bytes() == models.one

    def test_a_blob_that_is_no_file(self, client: Client, models: Models, tmp_path: Path) -> None:
        client.have("m.gguf", models.one)
        (tmp_path / "elsewhere").write_bytes(models.one)
        blob = client.blob(models.one)
        blob.parent.mkdir(parents=True)
        blob.symlink_to(tmp_path / "elsewhere")
        client.fails(FileExists, "what the cache has for m.gguf is no file; remove it")
        assert (blob.is_symlink(), client.bytes_at) == (True, [])

    def test_references(self, client: Client, neighbour: Neighbour, models: Models) -> None:
        old = "b" * 40
        neighbour.add("m.gguf", models.other, commit=old)
        (client.repository / "refs" / "v1").write_text(old)
        client.have("m.gguf", models.one)
        client.pull()
        references = {
            path.name: path.read_text() for path in (client.repository / "refs").iterdir()
        }
        assert references == {"main": client.hub.commit(REPO), "v1": old}
        assert client.snapshot("m.gguf", old).read_bytes() == models.other

    def test_a_reference_with_slashes(
        self, client: Client, models: Models, monkeypatch: Any
    ) -> None:
        client.have("m.gguf", models.one)
        monkeypatch.setattr(
            type(client.hub), "revisions", lambda hub, repo: {"refs/pr/1": hub.commit(repo)}
        )
        client.pull(f"{REPO}@refs/pr/1")
        path = client.repository / "refs" / "refs" / "pr" / "1"
        assert path.read_text() == client.hub.commit(REPO)


class TestAtOnce:
    def test_the_same(self, client: Client, models: Models) -> None:
        client.have("m.gguf", models.one)
        refused = []

        def again(said: PullProgress) -> None:
            if said.stage == "downloading" and not refused:
                with pytest.raises(FetchRefused, match=r"^m\.gguf is already being fetched$"):
                    client.puller().pull(REPO)
                refused.append(said)

        client.pull(progress=again)
        assert refused
        assert list(client.listed()) == ["m"]

    def test_finished_by_another_meanwhile(self, client: Client, models: Models) -> None:
        client.have_parts(models)
        others = []

        def again(said: PullProgress) -> None:
            if said.stage == "checking":
                others.append(client.puller().pull(REPO))

        pulled = client.pull(progress=again)
        assert pulled.files == others[0].files
        assert (pulled.new, others[0].new) == (True, False)
        assert list(client.listed()) == ["split"]
        assert not (client.repository / ".shimmy").exists()

    def test_taken_away(self, client: Client, models: Models) -> None:
        client.have("m.gguf", models.one)

        def take(said: PullProgress) -> None:
            if said.stage == "checking":
                shutil.rmtree(client.repository / ".shimmy")

        client.fails(FetchInterrupted, "m.gguf was taken away meanwhile; ask again", progress=take)
        assert client.listed() == {}

    def test_one_is_listed_after_the_other(self, client: Client, models: Models) -> None:
        client.have("one.gguf", models.one)
        client.have("other.gguf", models.other)
        waited = []

        def meanwhile(_path: Path) -> None:
            checking: list[PullProgress] = []

            def report(said: PullProgress) -> None:
                checking.extend([said] if said.stage == "checking" else [])

            with pytest.raises(Cancelled, match=r"pulling org/name:other\.gguf was cancelled"):
                client.puller().pull(
                    f"{REPO}:other.gguf", progress=report, cancelled=lambda: bool(checking)
                )
            waited.append(client.listed())

        client.pull(f"{REPO}:one.gguf", puller=client.puller(validate=meanwhile))
        assert waited == [{}]
        pulled = client.pull(f"{REPO}:other.gguf")
        assert (pulled.new, client.bytes_at) == (False, [])
        assert list(client.listed()) == ["one", "other"]

    def test_without_locks(self, client: Client, models: Models, monkeypatch: Any) -> None:
        client.have("m.gguf", models.one)

        def flock(_fd: int, _how: int) -> None:
            raise OSError(errno.ENOLCK, "no locks here")

        monkeypatch.setattr(fetch_part.fcntl, "flock", flock)
        client.pull()
        assert list(client.listed()) == ["m"]


def test_the_hub_by_itself(client: Client, models: Models) -> None:
    """As a script, which says where it is and how it can be trusted."""
    client.have("m.gguf", models.one)
    script = Path(random_gguf.__file__).with_name("fake_hub.py")
    command = [
        sys.executable,
        str(script),
        "--folder",
        str(client.hub.folder),
        "--cut-after",
        "9999",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        url, authority = child.stdout.readline().split()
        fetcher = Fetcher(
            [url.removeprefix("https://"), url.removeprefix("https://").replace("hub", "cdn", 1)],
            resolver=lambda _host, _port: ["127.0.0.1"],
            refused=lambda _address: None,
            verify=ssl.create_default_context(cafile=authority),
            reserve=0,
        )
        puller = Puller(fetcher, cache=client.cache, downloads=client.downloads, hub=url)
        client.fails(FetchInterrupted, "10.0 kB of 384.9 kB are kept", puller=puller)
        child.terminate()
    assert child.returncode == 0
    assert not Path(authority).exists()


class Fault(BaseException):
    """As a kill would be, but for what `finally` does."""


STEPS = "rename", "replace", "symlink", "link", "chmod", "mkdir", "unlink"


class TestFaults:
    @pytest.mark.parametrize(("beside", "folder"), [(False, ""), (False, "a/b/"), (True, "q/")])
    def test_what_a_look_finds_at_any_step(
        self, client: Client, models: Models, monkeypatch: Any, beside: bool, folder: str
    ) -> None:
        """Everything or nothing, without a second in which it lacks a part."""
        client.have_parts(models, folder)
        client.have("m.gguf", models.one)
        if beside:
            client.pull(f"{REPO}:m.gguf")
        always, seen = set(client.listed()), []

        def looking(before: Any) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                seen.append(set(client.listed()))
                return before(*args, **options)

            return call

        with monkeypatch.context() as patch:
            for name in STEPS:
                patch.setattr(os, name, looking(getattr(os, name)))
            client.pull(f"{REPO}:{part(1, folder)}")
        first = seen.index(always | {"split"})
        assert seen[:first] == [always] * first
        assert seen[first:] == [always | {"split"}] * (len(seen) - first)

    @pytest.mark.parametrize("beside", [False, True])
    def test_at_any_step(
        self, client: Client, models: Models, monkeypatch: Any, beside: bool
    ) -> None:
        client.have_parts(models)
        client.have("m.gguf", models.one)
        whole = client.puller()
        always = {"m"} if beside else set()
        number = 0
        while True:
            shutil.rmtree(client.cache, ignore_errors=True)
            if beside:
                whole.pull(f"{REPO}:m.gguf")
            steps = iter(range(10_000))

            def counting(before: Any, limit: int = number, steps: Any = steps) -> Any:
                def call(*args: Any, **options: Any) -> Any:
                    if next(steps) == limit:
                        raise Fault
                    return before(*args, **options)

                return call

            with monkeypatch.context() as patch:
                for name in STEPS[:5]:
                    patch.setattr(os, name, counting(getattr(os, name)))
                try:
                    whole.pull(f"{REPO}:{part(1)}")
                except Fault:
                    pass
                else:
                    break
            assert set(client.listed()) in (always, always | {"split"})
            client.hub.seen.clear()
            whole.pull(f"{REPO}:{part(1)}")
            assert set(client.listed()) == always | {"split"}
            assert not (client.repository / ".shimmy").exists()
            number += 1
        assert number > 12
