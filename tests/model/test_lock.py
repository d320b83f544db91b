"""`shimmy lock` on this machine's service, with folders of its own: files are read, compared and answer.

Cases: pinned, as it was, one byte of weights changed (known and not), pinned again; refused without a
word written; what another file's taking over the name, the size, or both changes; renamed, gone, gone
with a source. Adding: names, places, options, what is taken, bad, missing, too long, or of another kind;
models in several files, of the Hugging Face cache, with an adapter, whose bytes cannot be read. Profiles,
by option and environment. Updating: all, some, nothing new, not confirmed, changed meanwhile. Versions of
the engine. The small commands. Locks that are not there, or broken. Requests by a name of the lock.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import random_gguf
from click.testing import CliRunner, Result

from shimmy_jupyter.cli import lock as commands
from shimmy_jupyter.cli import main
from shimmy_jupyter.models import hashes, lockfile
from shimmy_jupyter.models.lockfile import NAME, Adapter, Defaults, Lock, Override, Source
from shimmy_jupyter.models.sources import BUNDLED
from shimmy_jupyter.server import answers

LEN = "Return the number of items in a container."
REVISION = "0123456789" * 4
PULL = f"shimmy pull me/course-GGUF@{REVISION}:UD/course.gguf --sha256 "


def flip(path: Path, at: int = -100) -> None:
    """Another byte amid the weights, at the same size."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of models of somebody who has nothing else, and works in the folder `work`."""
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "work").mkdir()
    for name in ("HF_HOME", "XDG_CACHE_HOME", "SHIMMY_PROFILE", "JUPYTER_PATH", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, place in {
        "HOME": "home", "JUPYTER_DATA_DIR": "data", "JUPYTER_CONFIG_DIR": "config",
        "HF_HUB_CACHE": "hub", "OLLAMA_MODELS": "ollama", "SHIMMY_MODEL_PATHS": "models",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(tmp_path / place))
    monkeypatch.chdir(tmp_path / "home" / "work")
    return folder


@pytest.fixture
def course(models: Path) -> Path:
    """A model that answers as the bundled one does, and is another."""
    path = models / "course.gguf"
    shutil.copy(BUNDLED, path)
    flip(path)
    return path


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the server says that its engine is."""
    said = {"engine": version("llama-cpp-python")}
    plain = answers.library

    async def library(*given: Any) -> bytes:
        return json.dumps(json.loads(await plain(*given)) | said).encode()

    monkeypatch.setattr(answers, "library", library)
    return said


def shimmy(*words: str, code: int = 0, answer: str | None = None) -> Result:
    result = CliRunner().invoke(main, words, input=answer, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def lock(*words: str, code: int = 0, answer: str | None = None) -> str:
    """What it prints; of a failure its one line."""
    result = shimmy("lock", *words, code=code, answer=answer)
    if result.stdout:
        return result.stdout
    if code == 1:
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
    return result.stderr


def pinned(name: str = NAME) -> Lock:
    return lockfile.read(Path(name))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Requests of `generate`, which nothing is loaded for."""
    bodies: list[dict[str, Any]] = []

    def answer(_local: Any, body: dict[str, Any]) -> dict[str, Any]:
        bodies.append(body)
        return {}

    monkeypatch.setattr("shimmy_jupyter.cli._answer", answer)
    return bodies


def checked(*words: str, code: int = 0) -> dict[str, Any]:
    """What `check` found, by alias."""
    found = json.loads(lock("check", "--json", *words, code=code))
    assert found["ok"] is (code == 0)
    return {row["alias"]: row for row in found["models"]}


@pytest.mark.usefixtures("engine")
class TestTheWayOfAPin:
    @pytest.mark.parametrize("settled", [True, False], ids=["known", "just changed"])
    def test_from_adding_to_updating(
        self, course: Path, settled: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if settled:
            monkeypatch.setattr(hashes, "SETTLED", -1e9)
        Path(NAME).write_text("# Ask before you change a hash.\nversion = 1\n")
        source = f"me/course-GGUF@{REVISION}:UD"
        said = lock("add", "course", "--as", "tutor", "--source", source)
        before = sha256(course)
        assert said.startswith("shimmy.lock pins tutor:\n")
        assert before in said
        assert checked()["tutor"] == {
            "alias": "tutor", "file": "course.gguf", "model": "course", "ok": True, "drifts": [],
            "errors": [],
        }  # fmt: skip

        flip(course, -200)
        after = sha256(course)
        for _ in range(2):  # the second time, its bytes may be known
            row = checked(code=1)["tutor"]
            assert [
                (d["key"], d["expected"], d["found"], d["severity"]) for d in row["drifts"]
            ] == [("sha256", before, after, "refuse")]
            assert row["model"] == "course"
            assert f"`{PULL}{before}`" in row["errors"][0]
        text = lock("check", code=1)
        assert f"sha256: the file holds other bytes: {before} is pinned, {after} was found" in text
        assert text.splitlines()[1].split() == [
            "tutor", "course.gguf", "3.3", "MB", "course", "refused",
        ]  # fmt: skip
        refused = shimmy("generate", "--model", "tutor", "hi", code=1)
        assert "the course that is here has drifted" in refused.stderr
        assert not refused.stdout

        old = Path(NAME).read_text()
        said = lock("update", "tutor", answer="n\n", code=1)
        assert f"sha256: {before} → {after}" in said
        assert f"source: {source} → none" in said
        assert Path(NAME).read_text() == old
        lock("update", "tutor", "--yes")
        assert Path(NAME).read_text().startswith("# Ask before you change a hash.\n\nversion")
        assert pinned().models["tutor"].sha256 == after
        assert pinned().models["tutor"].source is None
        assert checked()["tutor"]["ok"]

    def test_it_answers(self, course: Path) -> None:
        lock("add", "course", "--as", "tutor", "--temperature", "0", "--seed", "0")
        done = shimmy("generate", "--model", "tutor", "What does len do?")
        assert (done.stdout, done.stderr) == (f"{LEN}\n", "course: tutor of shimmy.lock\n")

    def test_what_is_asked_of_the_service(self, course: Path, asked: list[dict[str, Any]]) -> None:
        lock("add", "course", "--as", "tutor", "--seed", "0", "--top-k", "0", "--context", "64")
        shimmy("generate", "--model", "tutor", "--temperature", "0", "--max-tokens", "0", "hi")
        pin = pinned().models["tutor"]
        (body,) = asked
        assert (body["model"], body["seed"], body["reproducible"]) == ("course", 0, True)
        assert (body["top_k"], body["temperature"], body["max_tokens"]) == (0, 0, 0)
        assert body["pin"] == {
            "size": pin.size, "sha256": sha256(course), "parts": [],
            "chat_template": pin.chat_template, "context_size": 64, "adapter": None,
        }  # fmt: skip
        shimmy("generate", "--model", "course", "hi")
        assert "pin" not in asked[1]

    def test_renamed_and_gone(self, course: Path) -> None:
        source = "https://models.example.org/course.gguf"
        lock("add", "course", "--as", "tutor", "--source", source)
        lock("add", "self-test")
        elsewhere = course.rename(course.with_name("other.gguf"))
        assert checked()["tutor"]["model"] == "other"
        elsewhere.unlink()
        rows = checked(code=1)
        assert rows["self-test"]["ok"]
        pin = pinned().models["tutor"]
        assert (rows["tutor"]["model"], rows["tutor"]["drifts"]) == (None, [])
        assert rows["tutor"]["errors"] == [
            f"shimmy.lock pins 'tutor' to course.gguf (3.3 MB, sha256 {pin.sha256[:12]}…): it is not "
            f"here; `shimmy pull {source} --sha256 {pin.sha256}`"
        ]
        assert "not here" in lock("check", "tutor", code=1)
        assert list(checked("self-test")) == ["self-test"]
        for words in (["update", "tutor", "--yes"], ["check", "tutor"]):
            assert f"shimmy pull {source}" in lock(*words, code=1)


@pytest.mark.usefixtures("engine")
class TestTwoOfOneName:
    """The first in the path has the name; the other one, of the same size, has it with a digest."""

    @pytest.fixture
    def both(self, course: Path) -> tuple[Path, Path]:
        first, second = course.parent / "a", course.parent / "b"
        for folder in (first, second):
            folder.mkdir()
            shutil.copy(course, folder)
        course.unlink()
        flip(second / "course.gguf", -300)
        return first / "course.gguf", second / "course.gguf"

    def test_neither_is_taken_for_the_other(self, both: tuple[Path, Path]) -> None:
        first, second = both
        lock("add", "course")
        assert pinned().models["course"].sha256 == sha256(first)
        shutil.move(first, first.with_name("aside"))
        row = checked(code=1)["course"]
        assert row["model"] == "course"  # the other one, which is called so now
        assert [each["found"] for each in row["drifts"]] == [sha256(second)]
        refused = shimmy("generate", "--model", "course", "hi", code=1)
        assert "drifted" in refused.stderr
        shutil.move(first.with_name("aside"), first)
        assert checked()["course"]["model"] == "course"

    def test_of_two_that_nobody_has_read_the_one_with_the_bytes_is_asked(
        self, course: Path, asked: list[dict[str, Any]]
    ) -> None:
        lock("add", "course", "--as", "tutor")
        shutil.copy(course, course.with_name("z.gguf"))
        flip(course, -300)
        shimmy("generate", "--model", "tutor", "hi")
        assert [body["model"] for body in asked] == ["z"]

    def test_the_name_taken_by_another(self, both: tuple[Path, Path]) -> None:
        first, second = both
        shutil.copy(first, first.parent.parent / "z.gguf")
        flip(first, -400)
        shutil.move(first.parent.parent / "z.gguf", second)  # now the second has the pinned bytes
        lock("add", "course", "--as", "first")
        (again,) = [
            model["id"]
            for model in json.loads(shimmy("models", "--json").stdout)["models"]
            if model["id"].startswith("course@")
        ]
        lock("add", again, "--as", "second")
        pin = pinned().models["second"]
        assert (pin.file, pin.sha256) == ("course.gguf", sha256(second))
        rows = checked()
        assert (rows["first"]["model"], rows["second"]["model"]) == ("course", again)
        assert lock("update", "--all") == "first: as it is pinned\nsecond: as it is pinned\n"


@pytest.mark.usefixtures("engine")
class TestAdding:
    def test_all_of_it(self, course: Path) -> None:
        said = lock(
            "add", "course", "--as", "tutor:4b", "--context", "512", "--temperature", "0", "--top-k",
            "0", "--top-p", "1", "--min-p", "0", "--repeat-penalty", "1.5", "--seed", "-3",
            "--source", f"me/m@{REVISION}:a/b/Other.GGUF",
        )  # fmt: skip
        pin = pinned().models["tutor:4b"]
        assert (pin.size, pin.sha256) == (course.stat().st_size, sha256(course))
        assert pin.sampling == Defaults(0.0, 0, 1.0, 0.0, 1.5, -3)
        assert (pin.context_size, pin.engine) == (512, version("llama-cpp-python"))
        assert (pin.file, pin.source) == ("Other.GGUF", Source("me/m", REVISION, "a/b"))
        assert pin.chat_template is not None
        assert pin.locked_at is not None
        for shown in (pin.sha256, pin.chat_template, "context_size  512", "seed -3", "a/b"):
            assert shown in said

    def test_the_nearest_lock_or_a_new_one(self, models: Path, tmp_path: Path) -> None:
        lock("add", "self-test")
        assert pinned().models.keys() == {"self-test"}
        Path(NAME).rename(tmp_path / "home" / NAME)
        assert lock("add", "self-test", "--as", "b").startswith("../shimmy.lock pins b:")
        assert not Path(NAME).exists()
        assert pinned("../shimmy.lock").models.keys() == {"self-test", "b"}
        lock("add", "self-test", "--as", "c", "--file", NAME)
        assert pinned().models.keys() == {"c"}

    def test_a_name_that_is_taken(self, course: Path) -> None:
        lock("add", "self-test", "--as", "tutor")
        before = Path(NAME).read_text()
        assert "is pinned already" in lock("add", "course", "--as", "tutor", code=1)
        assert Path(NAME).read_text() == before
        lock("add", "course", "--as", "tutor", "--replace")
        assert pinned().models["tutor"].sha256 == sha256(course)

    @pytest.mark.parametrize(
        ("words", "said", "code"),
        [
            (["ghost"], "there is no model 'ghost'; there are: course, french, self-test", 1),
            (["a/b"], 'models."a/b": must be a name', 1),
            (["course", "--as", ".."], 'models."..": must be a name', 1),
            (["french"], "french is no model", 1),
            (["course", "--adapter", "self-test"], "self-test is no adapter", 1),
            (["course", "--adapter", "ghost"], "there is no model 'ghost'", 1),
            (["course", "--adapter", "french", "--adapter", "french"], "one adapter at scale 1", 1),
            (["course", "--context", "4096"], "has a context of 1024 tokens", 1),
            (["course", "--context", "0"], "models.course.context_size: must be a whole number", 1),
            (["course", "--temperature", "nan"], "models.course.sampling.temperature: must be", 1),
            (["course", "--seed", str(2**63)], "models.course.sampling.seed: must be a whole", 1),
            (["course", "--source", "me/m@main"], "models.course.source.revision: must be a commit", 1),
            (["course", "--source", "https://h/m?token=x"], "source.url: must be an https URL", 1),
            (["course", "--source", "me/m"], "name a commit, as in OWNER/NAME@COMMIT", 2),
            (["course", "--file", "my.lock"], "no other file than shimmy.lock is ever looked for", 2),
        ],
    )  # fmt: skip
    def test_what_is_refused_leaves_nothing(
        self, course: Path, words: list[str], said: str, code: int
    ) -> None:
        random_gguf.write_adapter(course.parent / "french.gguf")
        assert said in lock("add", *words, code=code)
        assert list(Path().iterdir()) == []

    def test_bytes_are_not_read_for_what_is_bad_anyway(
        self, course: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def read(*_: object) -> Any:
            raise AssertionError("read for nothing")

        lock("add", "course")
        monkeypatch.setattr(commands.Here, "read", read)
        for words in (["course"], ["course", "--as", "a/b"], ["self-test", "--source", "m@x"]):
            lock("add", *words, code=1)

    def test_of_the_hugging_face_cache(self, course: Path, tmp_path: Path) -> None:
        repository = tmp_path / "hub" / "models--me--course-GGUF"
        snapshot = repository / "snapshots" / REVISION
        snapshot.mkdir(parents=True)
        (repository / "blobs").mkdir()
        blob = course.rename(repository / "blobs" / sha256(course))
        (snapshot / "course-Q8_0.gguf").symlink_to(blob)
        lock("add", "course-Q8_0", "--as", "tutor")
        pin = pinned().models["tutor"]
        assert (pin.file, pin.source) == ("course-Q8_0.gguf", Source("me/course-GGUF", REVISION))
        lock("add", "course-Q8_0", "--as", "b", "--source", "https://h.example/m.gguf")
        assert pinned().models["b"].source == Source(url="https://h.example/m.gguf")

        # What the cache says that it downloaded is not what is there: nothing is pinned by that.
        flip(blob)
        for words in (["add", "course-Q8_0", "--as", "c"], ["update", "tutor", "--yes"]):
            assert "pull it again" in lock(*words, code=1)
        lock("add", "self-test")
        rows = checked(code=1)
        assert "course-Q8_0: its bytes are not those" in rows["tutor"]["errors"][0]
        assert rows["self-test"]["ok"]

    def test_in_several_files(self, models: Path) -> None:
        first = random_gguf.write(models / "big.gguf", split=8)
        parts = sorted(models.iterdir())
        assert len(parts) > 2
        lock("add", "big")
        pin = pinned().models["big"]
        assert (pin.file, pin.size) == (first.name, sum(part.stat().st_size for part in parts))
        assert [pin.sha256, *pin.parts] == [sha256(part) for part in parts]
        assert checked()["big"]["ok"]
        before = sha256(parts[2])
        flip(parts[2])
        drifts = checked(code=1)["big"]["drifts"]
        assert [(each["key"], each["expected"]) for each in drifts] == [("parts[1]", before)]
        assert f"parts: {', '.join(pin.parts)} → " in lock("update", "big", "--yes")
        assert pinned().models["big"].parts[1] == sha256(parts[2])
        parts[1].unlink()
        assert "big" in lock("check", code=1)

    def test_with_an_adapter(self, models: Path) -> None:
        random_gguf.write(models / "random.gguf")
        french = random_gguf.write_adapter(models / "french.gguf")
        lock("add", "random", "--as", "tutor", "--adapter", "french", "--temperature", "0")
        assert pinned().models["tutor"].adapters == (Adapter("french", sha256(french)),)
        assert checked()["tutor"]["ok"]
        french.rename(models / "renamed.gguf")
        checked("tutor", code=1)  # nobody has read it under that name
        shimmy("verify", "renamed")
        (models / "renamed.gguf").rename(french)

        before = sha256(french)
        flip(french)
        (drift,) = checked(code=1)["tutor"]["drifts"]
        assert (drift["key"], drift["expected"], drift["found"]) == (
            "adapters.french", before, sha256(french),
        )  # fmt: skip
        lock("update", "tutor", "--yes")
        assert checked()["tutor"]["ok"]
        french.unlink()
        assert checked(code=1)["tutor"]["drifts"][0]["found"] == "none"
        assert "the adapter 'french' of 'tutor'" in lock("update", "tutor", "--yes", code=1)

    def test_what_no_engine_can_have_is_refused_when_it_is_checked(self, models: Path) -> None:
        random_gguf.write(models / "random.gguf")
        random_gguf.write_adapter(models / "french.gguf")
        lock("add", "random", "--adapter", "french")
        Path(NAME).write_text(Path(NAME).read_text().replace("scale = 1.0", "scale = 0.5"))
        row = checked(code=1)["random"]
        assert row["model"] == "random"
        assert row["drifts"] == []
        assert "one adapter at scale 1" in row["errors"][0]


@pytest.mark.usefixtures("engine")
class TestProfiles:
    @pytest.fixture
    def both(self, course: Path) -> None:
        lock("add", "course", "--as", "tutor")
        lock("add", "self-test", "--as", "small")
        long, short = Override("small", 4096), Override("small", 512)
        profiles = {"laptop": {"tutor": short}, "long": {"tutor": long}, "hub": {}}
        lockfile.write(Path(NAME), Lock(pinned().models, profiles))

    def test_checked(self, both: None, monkeypatch: pytest.MonkeyPatch) -> None:
        assert checked()["tutor"]["model"] == "course"
        assert checked("--profile", "hub")["tutor"]["model"] == "course"
        row = checked("--profile", "long", "tutor", code=1)["tutor"]
        assert row["model"] == "self-test"
        assert [(each["key"], each["found"]) for each in row["drifts"]] == [
            ("context_size", "1024")
        ]
        assert "there is no profile 'x'" in lock("check", "--profile", "x", code=1)
        monkeypatch.setenv("SHIMMY_PROFILE", "laptop")
        assert checked()["tutor"]["model"] == "self-test"
        assert checked("--profile", "hub")["tutor"]["model"] == "course"

    def test_asked(self, both: None, monkeypatch: pytest.MonkeyPatch) -> None:
        words = ["generate", "--temperature", "0", "What does len do?"]
        done = shimmy(*words, "--model", "tutor", "--profile", "laptop")
        assert done.stdout == f"{LEN}\n"
        assert done.stderr == "self-test: tutor of shimmy.lock, profile laptop\n"
        monkeypatch.setenv("SHIMMY_PROFILE", "laptop")
        assert shimmy(*words, "--model", "tutor").stderr == done.stderr
        other = shimmy(*words, "--model", "tutor", "--profile", "hub").stderr
        assert other == "course: tutor of shimmy.lock, profile hub\n"
        assert "there is no profile 'x'" in shimmy(
            *words, "--model", "tutor", "--profile", "x", code=1
        ).stderr  # fmt: skip
        for model in ([], ["--model", "course"]):
            refused = shimmy(*words, *model, "--profile", "hub", code=2)
            assert "--profile is for a --model that shimmy.lock has" in refused.stderr


class TestUpdating:
    def test_nothing_new_is_not_written(self, course: Path, engine: dict[str, str]) -> None:
        lock("add", "course")
        before = Path(NAME).read_text()
        assert lock("update", "course") == "course: as it is pinned\n"
        assert lock("update", "--all", "--yes") == "course: as it is pinned\n"
        assert Path(NAME).read_text() == before

    def test_another_engine(self, course: Path, engine: dict[str, str]) -> None:
        lock("add", "course")
        digest = lock("digest")
        engine["engine"] = "0.9.9"
        row = checked()["course"]
        assert [(each["key"], each["severity"]) for each in row["drifts"]] == [("engine", "warn")]
        text = lock("check")
        assert "ok, with a warning" in text
        assert "0.9.9 was found" in text
        asked = shimmy("generate", "--model", "course", "--max-tokens", "1", "hi")
        assert "0.9.9 was found" in asked.stderr
        assert lock("update", "course", "--yes").splitlines()[1].endswith("→ 0.9.9")
        assert pinned().models["course"].engine == "0.9.9"
        assert lock("digest") == digest

    def test_what_was_chosen_stays(self, course: Path, engine: dict[str, str]) -> None:
        lock("add", "course", "--context", "64", "--seed", "5", "--source", f"me/m@{REVISION}")
        # Not pinned: somebody wants it so.
        text = Path(NAME).read_text().splitlines(keepends=True)
        Path(NAME).write_text("".join(line for line in text if "chat_template" not in line))
        old = pinned().models["course"]
        engine["engine"] = "0.9.9"
        lock("update", "course", "--yes")
        new = pinned().models["course"]
        assert (new.context_size, new.sampling, new.source) == (64, Defaults(seed=5), old.source)
        assert new.chat_template is None
        assert (new.sha256, new.engine) == (old.sha256, "0.9.9")

    def test_some_all_and_none(self, course: Path, engine: dict[str, str]) -> None:
        lock("add", "course")
        lock("add", "self-test")
        flip(course, -500)
        assert lock("update", "self-test") == "self-test: as it is pinned\n"
        for words in ([], ["course", "--all"]):
            assert "name what to update, or --all" in lock("update", *words, code=2)
        assert "there is no model 'ghost' in the lock" in lock("update", "ghost", code=1)
        said = lock("update", "--all", answer="y\n")
        assert "self-test: as it is pinned" in said
        assert pinned().models["course"].sha256 == sha256(course)

    def test_a_lock_that_somebody_else_writes_meanwhile(
        self, course: Path, engine: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lock("add", "course")
        flip(course, -500)

        def confirm(*_: Any, **__: Any) -> None:
            Path(NAME).write_text("version = 1\n")

        monkeypatch.setattr(commands.click, "confirm", confirm)
        result = shimmy("lock", "update", "course", code=1)
        assert "has changed meanwhile; nothing was written" in result.stderr
        assert Path(NAME).read_text() == "version = 1\n"

    def test_a_context_that_the_new_one_cannot_have(
        self, course: Path, engine: dict[str, str]
    ) -> None:
        lock("add", "course", "--context", "1024")
        before = Path(NAME).read_text()
        random_gguf.write(course, random_gguf.Shape(context=512))
        keys = [each["key"] for each in checked(code=1)["course"]["drifts"]]
        assert keys == ["size", "sha256", "chat_template", "context_size"]
        assert "has a context of 512 tokens" in lock("update", "course", "--yes", code=1)
        assert Path(NAME).read_text() == before


@pytest.mark.usefixtures("engine")
class TestTheSmallOnes:
    @pytest.fixture
    def two(self, course: Path) -> None:
        lock("add", "course", "--as", "tutor", "--seed", "7")
        lock("add", "self-test", "--as", "small")
        lockfile.write(
            Path(NAME), Lock(pinned().models, {"laptop": {"tutor": Override("small", 8)}})
        )

    def test_remove_and_rename(self, two: None) -> None:
        assert "is named by the profile laptop" in lock("remove", "small", code=1)
        lock("rename", "small", "tiny")
        assert pinned().profiles["laptop"]["tutor"].use == "tiny"
        before = Path(NAME).read_text()
        for words in (["rename", "tiny", "tutor"], ["rename", "x", "y"], ["remove", "x"],
                      ["rename", "tiny", "a b"]):  # fmt: skip
            lock(*words, code=1)
        assert Path(NAME).read_text() == before
        lockfile.write(Path(NAME), Lock(pinned().models))
        lock("remove", "tiny")
        assert pinned().models.keys() == {"tutor"}

    def test_show_and_digest(self, two: None) -> None:
        found = json.loads(lock("show", "--json"))
        assert found["models"]["tutor"]["sampling"] == {"seed": 7}
        assert found["models"]["tutor"]["locked_at"].endswith("Z")
        assert found["profiles"] == {"laptop": {"tutor": {"use": "small", "context_size": 8}}}
        text = lock("show")
        digest = lockfile.digest(pinned())
        assert text.startswith(f"shimmy.lock, digest {digest}\n")
        for shown in (
            "tutor:",
            "sampling      seed 7",
            "profile laptop:",
            "tutor: as small, context 8",
        ):
            assert shown in text
        assert lock("digest") == f"{digest}\n"
        assert json.loads(lock("check", "--json"))["digest"] == digest

    @pytest.mark.parametrize(
        "words",
        [
            ["check"],
            ["update", "--all"],
            ["show"],
            ["digest"],
            ["remove", "a"],
            ["rename", "a", "b"],
        ],
    )
    def test_without_a_lock_and_with_a_broken_one(self, models: Path, words: list[str]) -> None:
        assert "`shimmy lock add NAME` begins one" in lock(*words, code=1)
        Path(NAME).write_text("version = 1\n[models.m]\nfile = 3\n")
        assert lock(*words, code=1).startswith("Error: shimmy.lock: models.m.size: is missing")
        assert Path(NAME).read_text() == "version = 1\n[models.m]\nfile = 3\n"
        assert "is missing" in lock("add", "self-test", code=1)
        assert "is missing" in shimmy("generate", "--model", "x", "hi", code=1).stderr

    def test_a_lock_that_cannot_be_written(
        self, two: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device", "/secret")

        monkeypatch.setattr("os.fsync", full)
        assert lock("rename", "tutor", "x", code=1) == (
            "Error: shimmy.lock cannot be written: No space left on device\n"
        )
        assert pinned().models.keys() == {"tutor", "small"}


def test_every_command_is_explained() -> None:
    said = shimmy("lock", "-h").stdout
    for name, command in commands.lock_command.commands.items():
        assert name in said
        assert command.help
        assert shimmy("lock", name, "--help").stdout.startswith("Usage:")
