"""From a lock's name to a request, and from a model to a pin.

Cases, of finding: by bytes under any name; of several the first, and of one first file the one of the
size; by size where nobody has read it, its own name first; another size, other bytes, another number of
files; adapters and projectors; any list at all. Of what is said: nothing here; the name is here with
another size, other bytes, other files; where to get it, from a repository, its folder, an address, in
one file and in several; what a shell would make of it. Of adapters: bytes, name, drift, nobody has read.
Of requests: nothing but bytes; everything; falsy values; seeds; adapters that cannot be; a request's own
values. Of locks: none; other names; broken ones; above; changed meanwhile; profiles; no folder; versions
of the engine. Of pins: files' names; sources; what was pinned has not drifted; contexts.
Of notebooks: a name of the lock; other names; nothing named; settings and environment; warnings once.
"""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell

from shimmy_jupyter import kernel
from shimmy_jupyter.config import KernelEnvironment, home, kernel_environment
from shimmy_jupyter.errors import ModelNotFound, UnsupportedParameter
from shimmy_jupyter.models.drift import Severity, drift
from shimmy_jupyter.models.lockfile import (
    NAME,
    Adapter,
    Defaults,
    Lock,
    LockError,
    Override,
    Pin,
    Source,
    dump,
    parse,
)
from shimmy_jupyter.models.pinning import (
    Locks,
    file_name,
    found_of,
    located,
    located_adapter,
    merged,
    namesake,
    pin_of,
    pull_command,
    request_fields,
    source_of,
)
from shimmy_jupyter.models.references import HubReference, UrlReference
from shimmy_jupyter.models.references import parse as parse_reference
from shimmy_jupyter.notebook.extension import load, unload
from shimmy_jupyter.notebook.magics import ShimmyMagics
from shimmy_jupyter.notebook.session import Tools

from .test_notebook import Scripted, shell  # noqa: F401  a fixture

A, B, C = "a" * 64, "b" * 64, "c" * 64
REVISION = "0123456789" * 4
PIN = Pin("course-Q4.gguf", 100, A)
FULL = Pin(
    "course-Q4.gguf",
    100,
    A,
    chat_template=C,
    context_size=512,
    sampling=Defaults(0.0, 0, 1.0, 0.0, 1.1, 0),
    adapters=(Adapter("french", B),),
    engine="0.3.36",
)
SPLIT = Pin("big-00001-of-00003.gguf", 300, A, (B, C))


def model(id: str = "course-Q4", sha256: str | None = A, **more: Any) -> dict[str, Any]:
    """As the server lists it."""
    given = {
        "kind": "model", "size_bytes": 100, "files": 1, "chat_template": C, "context": 2048,
        "usable_context": 2048, "source": "root", "origin": None, "fit": None,
    }  # fmt: skip
    return {"id": id, "sha256": sha256} | given | more


def adapter(id: str = "french", sha256: str | None = B) -> dict[str, Any]:
    return model(id, sha256, kind="lora", chat_template=None, context=None)


class TestLocated:
    def test_by_its_bytes_whatever_it_is_called(self) -> None:
        assert located(PIN, "t", [model("x", B), model("y"), model(sha256=None)]) == "y"

    def test_of_several_the_first(self) -> None:
        assert located(PIN, "t", [model("x", B), model("y"), model(), model("z")]) == "y"

    def test_of_one_first_file_the_one_of_the_size(self) -> None:
        # The other one lacks a file, or is another model that begins as this one does.
        listed = [model("x", size_bytes=200, files=2), model("y", size_bytes=300, files=3)]
        assert located(SPLIT, "t", listed) == "y"
        assert located(SPLIT, "t", listed[:1]) == "x"

    def test_by_its_size_where_nobody_has_read_it(self) -> None:
        listed = [model("x", None), model("course-Q4", None), model("z", None)]
        assert located(PIN, "t", listed) == "course-Q4"
        assert located(PIN, "t", [listed[0], listed[2]]) == "x"
        unread = [model("x", None, size_bytes=300, files=3), model("big", None, size_bytes=300)]
        assert located(SPLIT, "t", unread) == "x"
        named = model("big", None, size_bytes=300, files=3)
        assert located(SPLIT, "t", [unread[0], named]) == "big"
        upper = replace(PIN, file="Mödel 漢 (1).GGUF")
        assert located(upper, "t", [model("x", None), model("M-del-1-", None)]) == "M-del-1-"

    @pytest.mark.parametrize(
        "other",
        [
            model(sha256=B),
            model(sha256=None, size_bytes=101),
            model(sha256=None, files=2),
            model(kind="lora"),
            model(kind="projector"),
            model(sha256=None, kind="lora"),
        ],
    )
    def test_no_other_in_its_stead(self, other: dict[str, Any]) -> None:
        with pytest.raises(ModelNotFound, match="it is not here") as caught:
            located(PIN, "t", [other, model("x", B)])
        assert caught.value.param == "model"

    @given(
        st.lists(
            st.builds(
                model,
                st.sampled_from(["course-Q4", "x", "y"]),
                st.sampled_from([None, A, B, C]),
                size_bytes=st.sampled_from([100, 101, 300]),
                files=st.sampled_from([1, 3]),
                kind=st.sampled_from(["model", "model", "lora", "unknown"]),
            ),
            max_size=6,
        ),
        st.sampled_from([PIN, FULL, SPLIT]),
    )
    def test_never_one_whose_bytes_are_known_to_be_others(
        self, listed: list[dict[str, Any]], pin: Pin
    ) -> None:
        listed = [each | {"id": f"{each['id']}{i or ''}"} for i, each in enumerate(listed)]
        usable = [each for each in listed if each["kind"] != "lora"]
        try:
            id = located(pin, "t", listed)
        except ModelNotFound:
            assert all(each["sha256"] != pin.sha256 for each in usable)
            assert all(each["sha256"] or each["size_bytes"] != pin.size
                       or each["files"] != 1 + len(pin.parts) for each in usable)  # fmt: skip
            return
        (chosen,) = [each for each in usable if each["id"] == id]
        assert chosen["sha256"] == pin.sha256 or (
            chosen["sha256"] is None
            and chosen["size_bytes"] == pin.size
            and all(each["sha256"] != pin.sha256 for each in usable)
        )


def missing(pin: Pin, *listed: dict[str, Any]) -> str:
    with pytest.raises(ModelNotFound) as caught:
        located(pin, "tutor", listed)
    return caught.value.message


class TestWhatWouldHelp:
    def test_without_a_source(self) -> None:
        assert missing(replace(PIN, size=2_500_000_000)) == (
            f"shimmy.lock pins 'tutor' to course-Q4.gguf (2.5 GB, sha256 {'a' * 12}…): it is not here"
        )

    def test_with_one(self) -> None:
        pin = replace(PIN, source=Source("example/course-GGUF", REVISION))
        assert missing(pin).endswith(
            f"it is not here; `shimmy pull example/course-GGUF@{REVISION}:course-Q4.gguf --sha256 {A}`"
        )

    @pytest.mark.parametrize(
        ("other", "said"),
        [
            (model(sha256=None, size_bytes=99), "99 bytes, not 100"),
            (model(sha256=B), f"sha256 {'b' * 12}…, not {'a' * 12}…"),
            (
                model(sha256=B, size_bytes=7),
                f"7 bytes, not 100, sha256 {'b' * 12}…, not {'a' * 12}…",
            ),
            (model(sha256=None, files=2), "2 files, not 1"),
        ],
    )
    def test_what_has_its_name(self, other: dict[str, Any], said: str) -> None:
        assert missing(PIN, model("x", B), other).endswith(
            f"; the course-Q4 that is here has drifted: it has {said}"
        )
        assert namesake(PIN, [model("x"), other]) == other
        assert namesake(PIN, [model("x"), adapter("course-Q4")]) is None
        assert "drifted" not in missing(PIN, adapter("course-Q4"))

    @pytest.mark.parametrize(
        ("source", "file", "reference"),
        [
            (Source("me/m", REVISION), "m.gguf", HubReference("me/m", REVISION, "m.gguf")),
            (Source("me/m", REVISION, "UD/K"), "m.gguf", HubReference("me/m", REVISION, "UD/K/m.gguf")),
            (Source("me/m", REVISION, "a b"), "$(x);`y`'.gguf",
             HubReference("me/m", REVISION, "a b/$(x);`y`'.gguf")),
            (Source(url="https://h.example/a/m.gguf"), "m.gguf",
             UrlReference("https://h.example/a/m.gguf", "m.gguf")),
            (Source(url="https://h.example/$(x);&'/m.gguf"), "m.gguf",
             UrlReference("https://h.example/$(x);&'/m.gguf", "m.gguf")),
        ],
    )  # fmt: skip
    def test_it_can_be_typed(self, source: Source, file: str, reference: Any) -> None:
        """A shell takes it as one word, and `shimmy pull` for what was pinned."""
        pin = replace(PIN, source=source, file=file)
        assert parse(dump(Lock({"m": pin}))).models["m"] == pin
        words = shlex.split(str(pull_command(pin)))
        assert words == ["shimmy", "pull", words[2], "--sha256", A]
        assert parse_reference(words[2]) == reference

    def test_of_several_files_no_digest_is_given(self) -> None:
        pin = replace(SPLIT, source=Source("me/m", REVISION))
        assert pull_command(pin) == f"shimmy pull me/m@{REVISION}:big-00001-of-00003.gguf"


class TestLocatedAdapter:
    FRENCH = Adapter("french", B)

    def test_by_its_bytes_then_by_its_name(self) -> None:
        listed = [adapter("french", None), adapter("x", C), adapter("y")]
        assert located_adapter(self.FRENCH, "t", listed) == "y"
        assert located_adapter(self.FRENCH, "t", listed[:2]) == "french"

    def test_no_other(self) -> None:
        for listed in ([], [adapter("french", C)], [adapter("x", None)], [model("french", B)]):
            with pytest.raises(ModelNotFound, match="pins the adapter 'french' of 't'") as caught:
                located_adapter(self.FRENCH, "t", listed)
            assert caught.value.param == "adapter"
            drifted = listed == [adapter("french", C)]
            assert (f"has drifted: sha256 {'c' * 12}…" in caught.value.message) is drifted
            unread = listed == [adapter("x", None)]
            assert ("`shimmy verify x`" in caught.value.message) is unread


class TestRequestFields:
    def test_nothing_but_bytes(self) -> None:
        assert request_fields(PIN, [model()], "t") == {
            "model": "course-Q4",
            "pin": {
                "size": 100, "sha256": A, "parts": [], "chat_template": None, "context_size": None,
                "adapter": None,
            },
        }  # fmt: skip

    def test_everything_and_falsy_values(self) -> None:
        fields = request_fields(FULL, [model(), adapter("fr-x")], "t")
        assert json.loads(json.dumps(fields)) == {
            "model": "course-Q4",
            "adapter": "fr-x",
            "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.1,
            "seed": 0, "reproducible": True,
            "pin": {
                "size": 100, "sha256": A, "parts": [], "chat_template": C, "context_size": 512,
                "adapter": B,
            },
        }  # fmt: skip
        split = [model("big", size_bytes=300, files=3)]
        assert request_fields(SPLIT, split, "t")["pin"]["parts"] == [B, C]

    def test_without_a_seed_nothing_is_reproducible(self) -> None:
        pin = replace(PIN, sampling=Defaults(temperature=1.0))
        assert "reproducible" not in request_fields(pin, [model()], "t")

    @pytest.mark.parametrize(
        "adapters",
        [(Adapter("french", B), Adapter("more", C)), (Adapter("french", B, 0.5),),
         (Adapter("french", B, 0.0),)],
    )  # fmt: skip
    def test_what_the_engine_cannot_have(self, adapters: tuple[Adapter, ...]) -> None:
        pin = replace(PIN, adapters=adapters)
        with pytest.raises(UnsupportedParameter, match="one adapter at scale 1") as caught:
            request_fields(pin, [model(), adapter()], "t")
        assert caught.value.param == "adapter"
        assert "french" in caught.value.message

    def test_an_adapter_that_is_not_here(self) -> None:
        with pytest.raises(ModelNotFound, match="adapter 'french'"):
            request_fields(FULL, [model()], "t")

    def test_own_values_win_over_defaults_and_never_over_the_pin(self) -> None:
        fields = request_fields(FULL, [model(), adapter()], "t")
        own = {"model": "t", "seed": 5, "temperature": 0.7, "adapter": "x", "pin": {}, "stop": "."}
        body = merged(own, fields)
        assert (body["seed"], body["temperature"], body["stop"]) == (5, 0.7, ".")
        assert (body["top_k"], body["reproducible"]) == (0, True)
        assert {name: body[name] for name in ("model", "pin", "adapter")} == {
            name: fields[name] for name in ("model", "pin", "adapter")
        }
        free = merged({"model": "t", "adapter": "x"}, request_fields(PIN, [model()], "t"))
        assert free["adapter"] == "x"
        assert merged({"model": "t", "temperature": 0.0}, {"model": "m", "temperature": 1.0}) == {
            "model": "m",
            "temperature": 0.0,
        }


LOCK = Lock(
    {"tutor": FULL, "small": replace(PIN, sha256=B)}, {"laptop": {"tutor": Override("small")}}
)
LISTING = {
    "models": [model(), model("small-Q4", B), adapter()],
    "engine": "0.3.36",
    "default": "first",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a notebook, in a project that has a lock."""
    (tmp_path / "project" / "week 1").mkdir(parents=True)
    (tmp_path / "project" / NAME).write_text(dump(LOCK))
    return tmp_path / "project" / "week 1"


@pytest.fixture
def locks(folder: Path) -> Callable[..., Locks]:
    def locks(profile: str | None = None) -> Locks:
        return Locks(lambda: folder, folder.parent.parent, profile)

    return locks


def unasked() -> Any:
    raise AssertionError("nobody has to know which models there are")


class TestLocks:
    def test_a_name_of_the_lock_above(self, locks: Callable[..., Locks]) -> None:
        found = locks().fields("tutor", lambda: LISTING)
        assert found == request_fields(FULL, LISTING["models"], "tutor")

    def test_no_lock_and_other_names(self, locks: Callable[..., Locks], folder: Path) -> None:
        assert locks().fields("course-Q4", unasked) is None
        assert locks("ghost").fields("course-Q4", unasked) is None
        (folder.parent / NAME).unlink()
        assert locks("laptop").fields("tutor", unasked) is None

    def test_a_broken_one_is_not_passed_over(
        self, locks: Callable[..., Locks], folder: Path
    ) -> None:
        (folder / NAME).write_text("<<<<<<< HEAD\n")
        for name in ("tutor", "course-Q4"):
            with pytest.raises(LockError, match="not TOML"):
                locks().fields(name, unasked)
        (folder / NAME).unlink()
        (folder / NAME).symlink_to(folder.parent / NAME)
        with pytest.raises(LockError, match="is a link"):
            locks().fields("tutor", unasked)

    def test_it_is_read_each_time(self, locks: Callable[..., Locks], folder: Path) -> None:
        ours = locks()
        assert ours.fields("tutor", lambda: LISTING)
        (folder.parent / NAME).write_text(dump(Lock({"new": replace(PIN, sha256=B)})))
        assert ours.fields("tutor", unasked) is None
        assert ours.fields("new", lambda: LISTING)["model"] == "small-Q4"  # type: ignore[index]
        (folder / NAME).write_text(dump(Lock()))
        assert ours.fields("new", unasked) is None

    def test_profiles(self, locks: Callable[..., Locks]) -> None:
        found = locks("laptop").pinned("tutor", lambda: LISTING)
        assert found is not None
        assert (found.fields["model"], found.pin.sha256) == ("small-Q4", B)
        assert found.note == "tutor of shimmy.lock, profile laptop"
        with pytest.raises(LockError, match="there is no profile 'ghost'"):
            locks("ghost").fields("tutor", unasked)

    def test_a_folder_that_is_gone(self, locks: Callable[..., Locks], folder: Path) -> None:
        ours = locks()
        folder.rmdir()
        with pytest.raises(LockError, match="the folder to look from"):
            ours.fields("tutor", unasked)

    def test_no_other_model_where_the_pinned_one_is_not_here(
        self, locks: Callable[..., Locks]
    ) -> None:
        listing = LISTING | {"models": [model(sha256=C), model("tutor", B), adapter()]}
        with pytest.raises(ModelNotFound, match="drifted"):
            locks().fields("tutor", lambda: listing)

    @pytest.mark.parametrize(
        ("pinned", "here", "warned"),
        [
            ("0.3.36", "0.3.36", 0),
            ("0.3.35", "0.3.36", 1),
            (None, "0.3.36", 0),
            ("0.3.36", None, 1),
        ],
    )
    def test_versions_of_the_engine(
        self, locks: Callable[..., Locks], folder: Path, pinned: Any, here: Any, warned: int
    ) -> None:
        (folder / NAME).write_text(dump(Lock({"t": replace(SPLIT, engine=pinned)})))
        listing = {"models": [model("big", size_bytes=300, files=3)], "engine": here}
        found = locks().pinned("t", lambda: listing)
        assert found is not None
        assert len(found.warnings) == warned
        for warning in found.warnings:
            assert warning.startswith("t of shimmy.lock: engine: ")
            assert f"{pinned} is pinned, {here or 'none'} was found" in warning


class TestPins:
    @pytest.mark.parametrize(
        ("id", "files", "name"),
        [
            ("course-Q4", 1, "course-Q4.gguf"),
            ("big", 3, "big-00001-of-00003.gguf"),
            ("course-Q4@0123abcd", 1, "course-Q4.gguf"),
            (f"big@{C}", 2, "big-00001-of-00002.gguf"),
            (f"course@{C}.2", 1, "course.gguf"),
            ("qwen3:4b", 1, "qwen3:4b.gguf"),
            ("me@home", 1, "me@home.gguf"),
        ],
    )
    def test_files_by_ids(self, id: str, files: int, name: str) -> None:
        listed = model(id, files=files, size_bytes=100 * files)
        assert file_name(listed) == name
        pin = pin_of(listed, [A, B, C][:files], "0.3.36")
        assert parse(dump(Lock({"m": pin}))).models["m"] == pin

    @pytest.mark.parametrize(
        ("source", "name", "revision", "known"),
        [
            ("huggingface", "me/m", REVISION, True),
            ("huggingface", "me/m", "main", False),
            ("huggingface", "me/m", REVISION.upper().replace("0", "A"), False),
            ("huggingface", "gpt2", REVISION, False),
            ("huggingface", "me/m", None, False),
            ("lmstudio", "me/m", REVISION, False),
            ("ollama", "qwen3:4b", None, False),
        ],
    )
    def test_sources(self, source: str, name: str, revision: str | None, known: bool) -> None:
        listed = model(source=source, origin={"name": name, "revision": revision})
        assert source_of(listed) == (Source(name, revision) if known else None)
        assert source_of(model(source=source)) is None

    @given(
        st.builds(
            model,
            st.sampled_from(["course-Q4", "x@0123abcd", "a:b"]),
            st.sampled_from([A, None]),
            size_bytes=st.integers(1, 2**40),
            files=st.integers(1, 3),
            chat_template=st.sampled_from([C, None]),
            context=st.sampled_from([512, 4096]),
        ),
        st.sampled_from([None, 1, 512]),
    )
    def test_what_was_just_pinned_has_not_drifted(
        self, listed: dict[str, Any], context: int | None
    ) -> None:
        digests = [A, B, C][: listed["files"]]
        given = {"french": B, "zulu": C}
        adapters = [Adapter(name, sha256) for name, sha256 in given.items()]
        pin = pin_of(listed, digests, "0.3.36", context_size=context, adapters=adapters)
        assert drift(pin, found_of(listed, digests, "0.3.36", given)) == []
        assert located(pin, "t", [model("y", B), listed]) == listed["id"]
        others = found_of(listed, [B, *digests[1:]], None, {})
        keys = {each.key: each.severity for each in drift(pin, others)}
        assert keys == {
            "sha256": Severity.REFUSE, "adapters.french": Severity.REFUSE,
            "adapters.zulu": Severity.REFUSE, "engine": Severity.WARN,
        }  # fmt: skip

    def test_how_long_a_context_it_can_have(self) -> None:
        roomy, tight = {"max_context": 2048, "ok": True}, {"max_context": 256, "ok": False}
        sizes = {2048: roomy, 256: tight}
        for size, fit in sizes.items():
            assert found_of(model(fit=fit), [A], None).context_size == size
        assert found_of(model(context=4096), [A], None).context_size == 4096
        assert found_of(model(context=None), [A], None).context_size == 0

    def test_a_name_that_is_given(self) -> None:
        pin = pin_of(model("x"), [A], None, file="y.gguf", source=Source(url="https://h/y.gguf"))
        assert (pin.file, pin.source, pin.engine) == (
            "y.gguf",
            Source(url="https://h/y.gguf"),
            None,
        )


class Listing(Scripted):
    """A server that lists models, too."""

    def __init__(self, engine: str = "0.3.36") -> None:
        super().__init__("x")
        self.engine = engine

    def get(self, path: str) -> dict[str, Any]:
        return (
            LISTING | {"engine": self.engine} if path == "shimmy/api/models" else super().get(path)
        )


class TestNotebook:
    @pytest.fixture
    def ask(
        self,
        shell: InteractiveShell,  # noqa: F811
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> Iterator[Callable[..., Any]]:
        """Runs cells in that folder, and says what the server was asked."""
        monkeypatch.chdir(folder)
        monkeypatch.setattr(kernel, "home", lambda: folder.parent.parent)
        monkeypatch.setattr(kernel, "kernel_environment", lambda: kernel_environment({}))

        def ask(*cells: str, engine: str = "0.3.36") -> Any:
            transport = Listing(engine)
            load(shell, lambda: None, lambda: transport, Tools(kernel._resolve))
            for cell in cells:
                result = shell.run_cell(cell)
                if result.error_in_exec is not None:
                    raise result.error_in_exec
            return transport.bodies[-1]

        before = copy.deepcopy(shell.config)  # where %config leaves what it is told
        yield ask
        unload(shell)
        shell.config = before

    def test_a_name_of_the_lock(self, ask: Callable[..., Any], capsys: Any) -> None:
        body = ask("%%shimmy tutor\nhi")
        assert {name: body[name] for name in ("model", "adapter", "seed", "reproducible")} == {
            "model": "course-Q4", "adapter": "french", "seed": 0, "reproducible": True,
        }  # fmt: skip
        assert body["pin"]["sha256"] == A
        assert body["messages"] == [{"role": "user", "content": "hi"}]
        out = capsys.readouterr().out
        assert "[first · tutor of shimmy.lock · 1 tokens" in out
        assert "shimmy: tutor" not in out

    def test_own_values_win(self, ask: Callable[..., Any]) -> None:
        body = ask("%config ShimmyMagics.temperature = 0.5", "%shimmy --model tutor --seed 3 hi")
        assert (body["temperature"], body["seed"], body["top_k"]) == (0.5, 3, 0)

    def test_settings(self, ask: Callable[..., Any], capsys: Any) -> None:
        body = ask(
            "%config ShimmyMagics.model = 'tutor'",
            "%config ShimmyMagics.profile = 'laptop'",
            "%shimmy hi",
        )
        assert (body["model"], body["pin"]["sha256"]) == ("small-Q4", B)
        assert "tutor of shimmy.lock, profile laptop" in capsys.readouterr().out

    def test_environment(self, ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        known = KernelEnvironment(None, None, None, "laptop")
        monkeypatch.setattr(kernel, "kernel_environment", lambda: known)
        assert ask("%%shimmy tutor\nhi")["model"] == "small-Q4"
        with pytest.raises(LockError, match="there is no profile 'ghost'"):
            ask("%config ShimmyMagics.profile = 'ghost'", "%%shimmy tutor\nhi")

    def test_other_names_and_none(self, ask: Callable[..., Any], capsys: Any) -> None:
        for cell, id in (("%%shimmy small-Q4\nhi", "small-Q4"), ("%shimmy hi", "first")):
            body = ask(cell)
            assert body["model"] == id
            assert not {"pin", "reproducible", "adapter"} & body.keys()
        assert NAME not in capsys.readouterr().out

    def test_nothing_named_needs_no_lock(self, ask: Callable[..., Any], folder: Path) -> None:
        (folder / NAME).write_text("<<<<<<< HEAD\n")
        assert ask("%shimmy hi")["model"] == "first"
        with pytest.raises(LockError, match="not TOML"):
            ask("%%shimmy second\nhi")

    def test_another_version_of_the_engine_is_said_once(
        self, ask: Callable[..., Any], capsys: Any
    ) -> None:
        ask("%%shimmy tutor\nhi", "%%shimmy tutor\nhi", engine="0.4.0")
        out = capsys.readouterr().out
        assert out.count("shimmy: tutor of shimmy.lock: engine: ") == 1
        assert out.count("0.3.36 is pinned, 0.4.0 was found") == 1

    def test_the_setting_has_a_help(self) -> None:
        assert "SHIMMY_PROFILE" in str(ShimmyMagics.profile.help)


class TestEnvironment:
    def test_profile(self) -> None:
        assert kernel_environment({"SHIMMY_PROFILE": "laptop"}).profile == "laptop"
        assert kernel_environment({"SHIMMY_PROFILE": ""}).profile is None
        assert kernel_environment({}).profile is None

    def test_home(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        assert home() == tmp_path

        def nobody() -> Path:
            raise RuntimeError("could not determine home directory")

        monkeypatch.setattr(Path, "home", nobody)
        assert home() is None
