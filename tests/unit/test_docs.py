"""The docs are tested: what the code has is described, and what is described exists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import notebook_docs
import pytest

import shimmy_jupyter
from shimmy_jupyter import errors
from shimmy_jupyter.cli import main
from shimmy_jupyter.config import CONFIGURABLES, Bytes, settings
from shimmy_jupyter.core.policy import FEATURES
from shimmy_jupyter.notebook.arguments import FLAGS
from shimmy_jupyter.notebook.magics import ShimmyMagics
from shimmy_jupyter.server.app import ShimmyApp
from shimmy_jupyter.server.handlers import ROUTES
from shimmy_jupyter.server.requests import _Chat, _Completion

ROOT = Path(__file__).parent.parent.parent
DESIGN = (ROOT / "docs" / "design.md").read_text()
README = (ROOT / "README.md").read_text()
CONTRACT = DESIGN[DESIGN.index("## Contract") : DESIGN.index("## Agreed, not there yet")]


@pytest.mark.parametrize(
    ("owner", "trait"),
    [
        *((cls, name) for cls in CONFIGURABLES for name in cls.class_own_traits(config=True)),
        (ShimmyApp, "offline"),
        (ShimmyApp, "bind_localhost_only"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_setting_with_its_default(owner: type, trait: str) -> None:
    row = re.search(rf"\| `{owner.__name__}\.{trait}` \| (.+?) \|", CONTRACT)
    assert row, "not in the table of settings"
    default = getattr(owner(), trait)
    if default == list(FEATURES):
        assert row[1] == "all"
    elif isinstance(owner.class_traits()[trait], Bytes):
        assert row[1].strip('"') == f"{default >> 20}MB"
    else:
        assert row[1].strip('"') == str(default)
    assert owner.class_traits()[trait].help


def test_no_setting_is_described_that_is_not_there() -> None:
    owners = {cls.__name__: cls for cls in (*CONFIGURABLES, ShimmyMagics, ShimmyApp)}
    pages = (ROOT / "docs" / name for name in ("install.md", "models.md", "lock.md"))
    for text in (CONTRACT, README, *(page.read_text() for page in pages)):
        for owner, trait in re.findall(r"\b(Shimmy[A-Z]\w+)\.(\w+)", text):
            assert trait in owners[owner].class_traits(config=True), (owner, trait)


@pytest.mark.parametrize("trait", sorted(ShimmyMagics.class_own_traits(config=True)))
def test_settings_of_a_notebook(trait: str) -> None:
    assert f"`.{trait}`" in CONTRACT or f"`ShimmyMagics.{trait}`" in CONTRACT


@pytest.mark.parametrize("cls", errors.all_errors()[1:], ids=lambda cls: cls.code)
def test_every_code_with_its_status(cls: type[errors.ShimmyError]) -> None:
    assert f"| `{cls.code}` | {cls.status} |" in CONTRACT


@pytest.mark.parametrize("pattern", [pattern for pattern, _ in ROUTES[:-1]])
def test_every_route(pattern: str) -> None:
    assert pattern.replace("([^/]+)", "{id}") in CONTRACT


@pytest.mark.parametrize("field", sorted({*_Chat.model_fields, *_Completion.model_fields}))
def test_every_field_of_a_request(field: str) -> None:
    assert re.search(rf"`{field}(\.\w+)?`", CONTRACT)


@pytest.mark.parametrize("variable", ["SHIMMY_SERVER_URL", "SHIMMY_KERNEL_TOKEN"])
def test_environment(variable: str) -> None:
    assert f"`{variable}`" in CONTRACT


def test_commands_and_options() -> None:
    for command in main.commands:
        assert f"`{command}`" in DESIGN
        assert f"shimmy {command}" in README
    for flag in FLAGS:
        assert flag.names[0] in str(ShimmyMagics.shimmy.__doc__)


def test_readme_names_targets_and_files_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z]+)\b", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for path in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / path).exists(), (page.name, path)


def test_the_layout_is_the_one_that_is_drawn() -> None:
    drawn = DESIGN[DESIGN.index("```\nshimmy_jupyter/") : DESIGN.index("**Dependency rule**")]
    package = Path(shimmy_jupyter.__file__).parent
    for path in package.rglob("*.py"):
        if not path.name.startswith("__") and "handlers" not in path.parts:
            assert re.search(rf"\b{path.stem}\b(\.py|/|,| )", drawn), path


def test_one_version_and_one_engine() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["version"]["path"] == "shimmy_jupyter/__init__.py"
    assert re.search(
        rf"## {re.escape(shimmy_jupyter.__version__)}\b", (ROOT / "CHANGELOG.md").read_text()
    )
    (engine,) = [d for d in project["project"]["dependencies"] if d.startswith("llama-cpp-python")]
    for name in ("Makefile", "docs/install.md"):
        assert engine in (ROOT / name).read_text(), name


def test_the_notebook_is_saved_without_secrets() -> None:
    book = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text())
    assert "token=" not in json.dumps(book)


def test_what_a_wheel_holds(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "shimmy.py",
        "shimmy_jupyter/bundled/self-test.gguf",
        "shimmy_jupyter/bundled/self-test.json",
        "etc/jupyter/jupyter_server_config.d/shimmy_jupyter.json",
        "licenses/LICENSE",
        "entry_points.txt",
    ):
        assert any(name.endswith(needed) for name in names), needed
    assert not [n for n in names if n.endswith(".pth") or n.startswith(("tests", "shimmy/"))]


class TestSettings:
    def test_sizes(self) -> None:
        from traitlets import TraitError
        from traitlets.config import Config

        def size(value: object) -> int:
            config = Config({"ShimmyLimits": {"max_request_size": value}})
            return settings(config, {}).max_request_bytes

        assert (size("1MB"), size("8 KiB"), size(77), size("1.5M"), size("2g")) == (
            1 << 20, 8 << 10, 77, 3 << 19, 2 << 30,
        )  # fmt: skip
        for bad in ("lots", "-1", 0, "0MB", True, None, -5):
            with pytest.raises(TraitError, match="max_request_size"):
                size(bad)

    def test_model_paths(self) -> None:
        from traitlets.config import Config

        config = Config({"ShimmyModels": {"roots": ["/a"]}})
        found = settings(config, {"SHIMMY_MODEL_PATHS": "/b::/c"})
        assert [str(path) for path in found.places.named] == ["/a", "/b", "/c"]
        assert settings(Config(), {}).places.named == ()

    @pytest.mark.parametrize(
        ("owner", "name", "value"),
        [
            ("ShimmyEngine", "weights", {"ann": float("nan")}),
            ("ShimmyEngine", "weights", {"ann": 0}),
            ("ShimmyEngine", "threads", 100_000),
            ("ShimmyEngine", "isolation", "container"),
            ("ShimmyEngine", "public_prefixes", ["\ud800"]),
            ("ShimmyEngine", "nice", -5),
            ("ShimmyEngine", "saved_kv", -1),
            ("ShimmyLimits", "max_seconds", float("nan")),
            ("ShimmyLimits", "max_seconds", 0),
        ],
    )
    def test_what_makes_no_sense_is_refused_by_name(
        self, owner: str, name: str, value: object
    ) -> None:
        from traitlets import TraitError
        from traitlets.config import Config

        with pytest.raises(TraitError, match=name):
            settings(Config({owner: {name: value}}), {})

    def test_sharing_and_isolation_arrive(self) -> None:
        from traitlets.config import Config

        engine = {
            "weights": {"ann": 2.5},
            "isolation": "process",
            "public_prefixes": ["You are a tutor."],
            "saved_kv": 0,
            "nice": 3,
        }
        found = settings(Config({"ShimmyEngine": engine, "ShimmyLimits": {"max_seconds": 9.5}}), {})
        assert (found.weights, found.isolation, found.nice) == ({"ann": 2.5}, "process", 3)
        assert (found.public_prefixes, found.saved_kv_bytes) == (("You are a tutor.",), 0)
        assert found.guard.limits[0].default.seconds == 9.5


def test_the_notebook_s_page_has_every_option_and_command() -> None:
    page = notebook_docs.PAGE.read_text()
    assert notebook_docs.written(page) == page, "python scripts/notebook_docs.py"
    for name in shimmy_jupyter.API:
        assert re.search(rf"\b{name.removeprefix('a') if name != 'a' else name}\b", page), name
