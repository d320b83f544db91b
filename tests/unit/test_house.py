"""The layout's rules, checked over the imports: who may need whom, and what must stay unloaded."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import shimmy_jupyter
from shimmy_jupyter import errors
from shimmy_jupyter.types import Failure

PACKAGE = Path(shimmy_jupyter.__file__).parent
LOW = {"types", "errors", "cgroups", "recurrent"}
MAY_NEED: dict[str, set[str]] = {
    "types": set(),
    "errors": {"types"},
    "cgroups": set(),
    "recurrent": set(),
    "core": LOW,
    "models": LOW | {"offloop"},
    "engine": LOW | {"core", "offloop"},
    "audit": LOW,
    "guard": LOW | {"core", "audit", "offloop"},
    "completion": LOW | {"core", "engine", "audit", "guard"},
    "offloop": {"errors"},
    "administration": LOW | {"models", "guard"},
    "auditing": LOW | {"audit", "guard", "offloop"},
    "submission": LOW | {"engine"},
    "service": LOW
    | {"core", "engine", "models", "completion", "guard", "auditing", "submission", "offloop"},
    "health": LOW | {"engine", "models", "guard", "audit", "service", "offloop"},
    "server": LOW
    | {"core", "engine", "models", "completion", "service", "guard", "audit", "health"}
    | {"administration", "auditing"},
    "notebook": LOW,
    "frames": LOW | {"notebook"},
}
EDGE = {
    "api",
    "config",
    "compose",
    "local",
    "inkernel",
    "framing",
    "kernel",
    "cli",
    "doctor",
    "bench",
    "__init__",
    "server.app",
}
"""Composition: these put rooms together and may need any of them."""
IMPURE = {
    "asyncio", "anyio", "threading", "tornado", "llama_cpp", "time", "os", "pathlib", "io",
    "socket", "subprocess", "datetime", "queue", "concurrent",
}  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(path: Path) -> set[str]:
    """Absolute names of everything a module imports, at any depth of its code."""
    found: set[str] = set()
    package = ["shimmy_jupyter", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join(package[: len(package) - node.level + 1])
            found |= (
                {f"{base}.{node.module}"}
                if node.module
                else {f"{base}.{alias.name}" for alias in node.names}
            )
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_rooms_need_only_what_they_may(path: Path) -> None:
    module = dotted(path)
    if module in EDGE or module.split(".")[0] in EDGE:
        return
    room = module.split(".")[0]
    for name in imports(path):
        if not name.startswith("shimmy_jupyter"):
            continue
        needed = name.split(".")[1] if "." in name else "__init__"
        assert needed == room or needed in MAY_NEED[room], f"{module} needs {name}"


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent.name == "core"], ids=dotted)
def test_the_core_is_pure(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & IMPURE


def test_one_importer_of_the_binding() -> None:
    users = {dotted(p) for p in MODULES if any(n.startswith("llama_cpp") for n in imports(p))}
    assert users == {"engine.llama.binding"}


def test_one_opener_of_outbound_connections() -> None:
    """Beside the kernel's client, which talks to its own server, and sockets between processes."""

    def users(*names: str) -> set[str]:
        return {dotted(p) for p in MODULES if {n.split(".")[0] for n in imports(p)} & set(names)}

    # Of these, `addresses` only spells names.
    assert users("httpx") == {
        "models.fetch_http",
        "models.addresses",
        "notebook.client",
        "notebook.remote",
    }
    assert users("socket") == {
        "models.fetch_http",
        "engine.isolated",
        "engine.channel",
        "engine.child",
    }
    assert users("requests", "http", "aiohttp", "huggingface_hub", "ftplib", "smtplib") == set()
    importing = {dotted(p): imports(p) for p in MODULES}
    assert not [m for m, names in importing.items() if "urllib.request" in names]
    assert not [m for m, names in importing.items() if "tornado.httpclient" in names]


def test_one_reader_of_the_environment() -> None:
    readers = {dotted(p) for p in MODULES if re.search(r"os\.environ|getenv", p.read_text())}
    # The engine sets a variable of llama.cpp's; a child gets a few of ours; the app hands kernels
    # their secret.
    assert readers == {"config", "engine.llama.binding", "engine.isolated", "server.app"}


def test_nobody_forgets_that_they_were_cancelled() -> None:
    """Python 3.11's `asyncio.wait_for` does, where what it waited for came at the same moment."""
    assert [dotted(p) for p in MODULES if "asyncio.wait_for(" in p.read_text()] == []


def test_modules_stay_small() -> None:
    assert {dotted(p): n for p in MODULES if (n := len(p.read_text().splitlines())) > 400} == {}


HEAVY = ("llama_cpp", "llguidance", "numpy", "ipywidgets", "pydantic", "httpx")


@pytest.mark.parametrize(
    "code",
    [
        "import shimmy_jupyter",
        "import shimmy",
        "import shimmy_jupyter.server.app",
        "import shimmy_jupyter.compose",
    ],
)
def test_importing_loads_nothing_heavy(code: str) -> None:
    check = f"{code}\nimport sys\nprint([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class TestErrors:
    def test_every_code_comes_back_as_its_error(self) -> None:
        leaves = [cls for cls in errors.all_errors() if cls is not errors.ShimmyError]
        for cls in leaves:
            back = errors.from_failure(Failure(cls.code, "why"))
            assert back.code == cls.code
            assert (back.status, back.type, back.message) == (cls.status, cls.type, "why")

    def test_codes_are_drawn_in_the_module(self) -> None:
        for cls in errors.all_errors():
            assert cls.code in str(errors.__doc__)
            assert cls.__name__ in str(errors.__doc__)

    def test_unknown_code_is_an_internal_error(self) -> None:
        assert isinstance(errors.from_code("from the future", "x"), errors.InternalError)

    def test_ipython_shows_one_line(self) -> None:
        shown = errors.InvalidValue("too hot", param="temperature")._render_traceback_()
        assert shown == ["InvalidValue: too hot (field 'temperature') [invalid_value]"]


def test_the_alias_is_the_same_thing() -> None:
    import shimmy

    assert shimmy.load_ipython_extension is shimmy_jupyter.load_ipython_extension
    assert shimmy.__version__ == shimmy_jupyter.__version__
