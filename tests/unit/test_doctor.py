"""`shimmy doctor`: each check with each of its answers, and the whole once for real.

Cases. Packages: as asked for; missing; too old, too new; markers; not installed at all. Engine: works;
another version; breaks, by an error, a signal, an illegal instruction, in silence, not in time, not at
all; dies after its answer. Processor: x86 and Arm; uses what is lacking; leaves unused what counts, and
what does not; not to be read. GPU: none, used, idle by kind. Name: ours, another's, none. Extension:
enabled; by nobody; disabled by level, by the configuration, over another level; null; broken files.
Configuration: wrong setting; files that fail, by kind, without what they were working on. Files: none;
anybody can change a file, its folder; the system's by this account. Models' folders: none, there,
missing, a file, unreadable, no path, everybody's with and without the sticky bit, on a network with and
without isolation. State: there, not yet, not to be written, seen by others, on a network. Disk and
memory: enough and at both borders. Servers: nobody asked; all addresses with and without TLS, also
where the record hides it; sockets; a hub; ended, left over and damaged records; several. Configured:
nothing; each way to say token, password, address, TLS, identity. Isolation: locks, none, no POSIX.
All: each failure has a next step; without a configuration the rest still comes; no secret, ever.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from traitlets.config import Config

from shimmy_jupyter import config as settings_room
from shimmy_jupyter.cli.checklist import doctor_command, table
from shimmy_jupyter.config import Settings
from shimmy_jupyter.doctor import Build, Check, Level, Machine, Process, checks, this_machine
from shimmy_jupyter.doctor.look import ask_engine
from shimmy_jupyter.doctor.servers import extension
from shimmy_jupyter.models.sources import Places
from shimmy_jupyter.models.suggest import suggestions

SECRET = "c0ffee5ec2e7"  # stands in for every token and password
X86 = "flags\t\t: fpu pni ssse3 avx avx2 fma f16c bmi2 avx512f\n"
BUILT = "CPU : SSE3 = 1 | SSSE3 = 1 | AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | BMI2 = 1 | REPACK = 1 | "
GB = 10**9
LOCAL = "27 1 254:0 / / rw - ext4 /dev/vda rw\n"
DISABLED = {"ServerApp": {"jpserver_extensions": {"shimmy_jupyter": False}}}
ENABLED = {"ServerApp": {"jpserver_extensions": {"shimmy_jupyter": True}}}


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., Machine]:
    """A machine on which all is well, but for what is given."""
    root, home = tmp_path / "root", tmp_path / "home"
    write(root / "proc/cpuinfo", f"processor\t: 0\n{X86}\nprocessor\t: 1\n")
    write(root / "proc/self/mountinfo", LOCAL)
    write(root / "proc/sys/kernel/seccomp/actions_avail", "kill_process errno allow\n")
    write(home / "shimmy.py", "")
    levels = tuple(Level(name, tmp_path / name) for name in ("user", "environment", "system"))
    write_json(tmp_path / "environment/jupyter_server_config.d/shimmy_jupyter.json", ENABLED)
    for folder in (tmp_path, *(level.folder for level in levels)):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
    (home / "runtime").mkdir()
    (home / "data/shimmy_jupyter").mkdir(parents=True, mode=0o700)
    installed = {"shimmy-jupyter": "1.0", "jupyter-server": "2.16.0", "llama-cpp-python": "0.3.36"}

    def make(
        config: dict[str, Any] | None = None,
        roots: tuple[Path, ...] = (),
        versions: dict[str, str | None] | None = None,
        **given: Any,
    ) -> Machine:
        said = Config(config or {})
        chosen = Settings(
            places=Places(model_paths=roots, huggingface=home / "hub"),
            isolation=given.pop("isolation", "none"),
        )
        usual: dict[str, Any] = {
            "root": root,
            "posix": True,
            "python": "3.11.9",
            "requirements": ("jupyter-server<3,>=2.15", "llama-cpp-python==0.3.36"),
            "installed": (installed | (versions or {})).get,
            "build": lambda: Build(version="0.3.36", system=BUILT, landlock=4),
            "ours": home / "shimmy.py",
            "alias": home / "shimmy.py",
            "levels": levels,
            "configuration": lambda: said,
            "settings": lambda _config: chosen,
            "data": home / "data",
            "runtime": home / "runtime",
            "access": lambda path, mode: True,
            "disk": lambda folder: 100 * GB,
            "memory": lambda: 16 * GB,
            "total": lambda: 20 * GB,
            "process": lambda pid: Process(("python", "jupyter-lab"), (("127.0.0.1", 8888),)),
        }
        return Machine(**usual | given)

    return make


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def write_json(path: Path, value: object) -> Path:
    return write(path, json.dumps(value))


def named(found: list[Check], name: str) -> Check:
    """The check of that name. Whatever is looked for, what fails says what to do about it."""
    for check in found:
        assert (check.action is not None) == (check.status in {"warn", "fail"}), check
    (one,) = [check for check in found if check.name == name]
    return one


def test_all_is_well(machine: Callable[..., Machine]) -> None:
    found = checks(machine())
    assert {check.status for check in found} == {"ok", "skip"}
    assert [check.name for check in found if check.status == "skip"] == ["gpu", "models folder"]
    assert [check.name for check in found] == [
        "packages", "engine", "processor", "gpu", "import name", "server extension", "configuration",
        "configuration files", "models folder", "state folder", "disk", "memory", "address", "isolation",
        "offline",
    ]  # fmt: skip


class TestPackages:
    def test_versions_are_said(self, machine: Callable[..., Machine]) -> None:
        detail = named(checks(machine()), "packages").detail
        assert detail == (
            "Python 3.11.9, shimmy-jupyter 1.0, jupyter-server 2.16.0, llama-cpp-python 0.3.36"
        )

    @pytest.mark.parametrize("version", ["2.14.2", "3.0.0", "not a version"])
    def test_one_that_does_not_suit(self, machine: Callable[..., Machine], version: str) -> None:
        found = named(checks(machine(versions={"jupyter-server": version})), "packages")
        assert found.status == "fail"
        assert version in found.detail
        assert found.action == "pip install 'jupyter-server<3,>=2.15'"

    def test_one_that_is_missing(self, machine: Callable[..., Machine]) -> None:
        found = named(checks(machine(versions={"jupyter-server": None})), "packages")
        assert (found.status, "is missing" in found.detail) == ("fail", True)

    def test_a_release_candidate_counts_as_what_it_is(
        self, machine: Callable[..., Machine]
    ) -> None:
        look = machine(versions={"jupyter-server": "2.17.0rc1"})
        assert named(checks(look), "packages").status == "ok"

    def test_what_is_for_others_is_not_asked_for(self, machine: Callable[..., Machine]) -> None:
        others = ("nothing>=1; extra == 'test'", "nothing>=1; sys_platform == 'plan9'")
        look = machine(requirements=(*others, "llama-cpp-python==0.3.36"))
        assert named(checks(look), "packages").status == "ok"

    def test_not_installed(self, machine: Callable[..., Machine]) -> None:
        found = named(checks(machine(requirements=())), "packages")
        assert (found.status, found.action) == ("warn", "pip install shimmy-jupyter")


class TestEngine:
    def test_another_version(self, machine: Callable[..., Machine]) -> None:
        look = machine(build=lambda: Build(version="0.3.20", system=BUILT))
        found = named(checks(look), "engine")
        assert found.status == "fail"
        assert ("0.3.20" in found.detail, "==0.3.36" in str(found.action)) == (True, True)

    def test_any_version_where_none_is_pinned(self, machine: Callable[..., Machine]) -> None:
        look = machine(
            build=lambda: Build(version="9.9", system=BUILT), requirements=("click>=8",),
            versions={"click": "8.2"},
        )  # fmt: skip
        assert named(checks(look), "engine").status == "ok"

    def test_broken_leaves_the_rest_to_be_looked_at(self, machine: Callable[..., Machine]) -> None:
        found = checks(machine(build=lambda: Build(broken="OSError: libcudart.so.12")))
        assert named(found, "engine").status == "fail"
        assert "libcudart" in named(found, "engine").detail
        assert named(found, "processor").status == named(found, "gpu").status == "skip"
        assert named(found, "isolation").status == "ok"

    def test_a_build_for_another_processor(self, machine: Callable[..., Machine]) -> None:
        look = machine(build=lambda: Build(broken="importing it ends the process", illegal=True))
        found = named(checks(look), "engine")
        assert (found.status, "another processor" in found.detail) == ("fail", True)
        assert "build it on this machine" in str(found.action)


class TestAskingTheEngine:
    """Whatever happens to the process that imports it, this one goes on."""

    def told(self, code: str, seconds: float = 20.0) -> Build:
        return ask_engine((sys.executable, "-c", code), seconds)

    def test_for_real(self) -> None:
        build = ask_engine()
        assert build.broken is None
        assert build.version.count(".") == 2
        assert "CPU : " in build.system
        assert build.landlock is not None

    def test_signals(self) -> None:
        build = self.told("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
        assert (build.illegal, build.broken) == (True, "importing it ends the process (SIGILL)")
        build = self.told("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
        assert (build.illegal, "SIGSEGV" in str(build.broken)) == (False, True)

    def test_errors_come_without_folders(self) -> None:
        build = self.told("raise OSError('Failed to load /opt/secret/lib/libllama.so: no libgomp')")
        assert build.broken == "OSError: Failed to load libllama.so: no libgomp"
        assert self.told("import sys; sys.exit(3)").broken == "it says nothing"
        assert "No module named" in str(self.told("import llama_dpp").broken)

    def test_time_and_programs_that_are_not_there(self) -> None:
        build = self.told("import signal; signal.pause()", 0.05)
        assert build.broken == "importing it took longer than 0.05 seconds"
        assert "does not start" in str(ask_engine(("/nowhere/python",)).broken)

    def test_what_it_said_before_it_was_killed_counts(self) -> None:
        told = '{"version": "1.2.3", "system": "CPU : AVX = 1 | ", "offload": false, "gpu": null}'
        end = "import os, signal; os.kill(os.getpid(), signal.SIGSYS)"
        build = self.told(f"print('{{noise'); print('''{told}''', flush=True); {end}")
        assert (build.version, build.broken, build.landlock) == ("1.2.3", None, None)

    def test_its_environment_has_no_secrets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("JUPYTER_TOKEN", SECRET)
        build = self.told("import os; raise OSError(sorted(os.environ))")
        assert "PATH" in str(build.broken)
        assert "TOKEN" not in str(build.broken)


class TestProcessor:
    def test_it_uses_what_there_is(self, machine: Callable[..., Machine]) -> None:
        detail = named(checks(machine()), "processor").detail
        assert detail == "the engine uses SSE3, SSSE3, AVX, AVX2, BMI2, F16C, FMA"

    @pytest.mark.parametrize("lacking", ["avx2", "fma", "f16c", "pni", "bmi2"])
    def test_it_uses_what_there_is_not(self, machine: Callable[..., Machine], lacking: str) -> None:
        look = machine()
        write(look.root / "proc/cpuinfo", X86.replace(f" {lacking}", ""))
        found = named(checks(look), "processor")
        assert (found.status, "lacks" in found.detail) == ("fail", True)

    @pytest.mark.parametrize("unused", ["AVX2", "FMA", "F16C"])
    def test_it_leaves_unused_what_counts(
        self, machine: Callable[..., Machine], unused: str
    ) -> None:
        system = BUILT.replace(f"{unused} = 1", f"{unused} = 0")
        found = named(checks(machine(build=lambda: Build("0.3.36", system))), "processor")
        assert (found.status, f"processor's {unused}:" in found.detail) == ("warn", True)

    def test_avx512_may_be_left_unused(self, machine: Callable[..., Machine]) -> None:
        assert named(checks(machine()), "processor").status == "ok"

    def test_amx_that_fails(self, machine: Callable[..., Machine]) -> None:
        look = machine(build=lambda: Build("0.3.36", f"{BUILT}AMX_INT8 = 1 | ", amx="it crashes"))
        write(look.root / "proc/cpuinfo", X86.replace("fma", "fma amx_int8"))
        found = named(checks(look), "processor")
        assert (found.status, "it crashes" in found.detail) == ("warn", True)
        command = shlex.split(str(found.action).removeprefix("build it with "))
        flag, header = command[0].removeprefix("CXXFLAGS=").split()
        assert flag == "-include"
        assert "ldtilecfg" in Path(header).read_text()
        assert "llama-cpp-python==0.3.36" in command

    def test_a_gpus_part_is_not_the_processors(self, machine: Callable[..., Machine]) -> None:
        system = f"CUDA : ARCHS = 890 | AMX_INT8 = 1 | {BUILT}"
        assert (
            named(checks(machine(build=lambda: Build("0.3.36", system))), "processor").status
            == "ok"
        )

    def test_arm(self, machine: Callable[..., Machine]) -> None:
        look = machine(build=lambda: Build("0.3.36", "CPU : NEON = 1 | DOTPROD = 1 | "))
        write(look.root / "proc/cpuinfo", "Features\t: fp asimd asimddp\n")
        assert named(checks(look), "processor").status == "ok"
        write(look.root / "proc/cpuinfo", "Features\t: fp asimd\n")
        assert "DOTPROD" in named(checks(look), "processor").detail
        look = machine(build=lambda: Build("0.3.36", "CPU : REPACK = 1 | "))
        assert "processor's NEON" in named(checks(look), "processor").detail

    @pytest.mark.parametrize("text", [None, "", "processor\t: 0\n"])
    def test_a_system_that_does_not_say(
        self, machine: Callable[..., Machine], text: str | None
    ) -> None:
        look = machine()
        (look.root / "proc/cpuinfo").unlink()
        if text is not None:
            write(look.root / "proc/cpuinfo", text)
        assert named(checks(look), "processor").status == "skip"


class TestGpu:
    @pytest.mark.parametrize(
        ("gpu", "offload", "status", "command"),
        [
            (None, False, "skip", "None"),
            (None, True, "skip", "None"),
            ("an NVIDIA GPU", True, "ok", "None"),
            ("an NVIDIA GPU", False, "warn", 'CMAKE_ARGS="-DGGML_CUDA=on" pip install'),
            ("an AMD GPU", False, "warn", 'CMAKE_ARGS="-DGGML_VULKAN=on" pip install'),
            ("Apple's GPU", False, "warn", "pip install"),
        ],
    )
    def test_used_or_idle(
        self, machine: Callable[..., Machine], gpu: str, offload: bool, status: str, command: str
    ) -> None:
        build = Build(version="0.3.36", system=BUILT, gpu=gpu, offload=offload)
        found = named(checks(machine(build=lambda: build)), "gpu")
        assert found.status == status
        assert str(found.action).startswith(command)


class TestImportName:
    def test_another_package(self, machine: Callable[..., Machine], tmp_path: Path) -> None:
        found = named(checks(machine(alias=tmp_path / "shimmy/__init__.py")), "import name")
        assert (found.status, found.action) == ("warn", "in notebooks, %load_ext shimmy_jupyter")

    def test_none(self, machine: Callable[..., Machine]) -> None:
        assert named(checks(machine(alias=None)), "import name").status == "warn"

    def test_ours_by_way_of_a_link(self, machine: Callable[..., Machine], tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(machine().ours.parent)
        assert (
            named(checks(machine(alias=tmp_path / "link/shimmy.py")), "import name").status == "ok"
        )


class TestExtension:
    def found(self, look: Machine) -> Check:
        return named(checks(look), "server extension")

    def file(self, look: Machine, level: int, name: str = "jupyter_server_config.d/x.json") -> Path:
        return look.levels[level].folder / name

    def test_nobody_enables_it(self, machine: Callable[..., Machine]) -> None:
        look = machine()
        self.file(look, 1, "jupyter_server_config.d/shimmy_jupyter.json").unlink()
        found = self.found(look)
        assert found.status == "fail"
        assert found.action == "jupyter server extension enable shimmy_jupyter"

    @pytest.mark.parametrize(
        ("level", "option"),
        [(0, " --user"), (1, ""), (2, " --system")],
        ids=["user", "env", "system"],
    )
    def test_a_level_disables_it(
        self, machine: Callable[..., Machine], level: int, option: str
    ) -> None:
        look = machine()
        self.file(look, 1, "jupyter_server_config.d/shimmy_jupyter.json").unlink()
        write_json(self.file(look, level), DISABLED)
        found = self.found(look)
        assert (found.status, "x.json" in found.detail) == ("fail", True)
        assert found.action == f"jupyter server extension enable shimmy_jupyter{option}"

    def test_the_first_level_that_names_it_counts(self, machine: Callable[..., Machine]) -> None:
        look = machine()
        file = write_json(self.file(look, 0), DISABLED)
        assert self.found(look).status == "fail"
        file.unlink()
        write_json(self.file(look, 2), DISABLED)
        found = self.found(look)
        assert (found.status, "(system)" in found.detail) == ("warn", True)

    def test_within_a_level_the_main_file_counts(self, machine: Callable[..., Machine]) -> None:
        look = machine()
        write_json(self.file(look, 1, "jupyter_server_config.json"), DISABLED)
        assert self.found(look).status == "fail"
        write_json(self.file(look, 1, "jupyter_server_config.json"), ENABLED)
        write_json(self.file(look, 1, "jupyter_server_config.d/aaa.json"), DISABLED)
        assert self.found(look).status == "ok"

    def test_null_takes_back_what_was_said(self, machine: Callable[..., Machine]) -> None:
        look = machine()
        none = {"ServerApp": {"jpserver_extensions": {"shimmy_jupyter": None}}}
        write_json(self.file(look, 0), none)
        assert self.found(look).status == "ok"
        write_json(self.file(look, 1, "jupyter_server_config.json"), none)
        assert self.found(look).status == "fail"

    @pytest.mark.parametrize(
        "text",
        ["{", "[]", "{}", '{"ServerApp": 1}', '{"ServerApp": {"jpserver_extensions": {}}}', "\xff"],
    )
    def test_files_that_say_nothing(self, machine: Callable[..., Machine], text: str) -> None:
        look = machine()
        write(self.file(look, 0), "")
        self.file(look, 0).write_bytes(text.encode("latin-1"))
        assert self.found(look).status == "ok"

    def test_the_configuration_comes_before_all_levels(
        self, machine: Callable[..., Machine]
    ) -> None:
        found = self.found(machine(config=DISABLED))
        assert (found.status, "ServerApp.jpserver_extensions" in str(found.action)) == (
            "fail",
            True,
        )
        look = machine(config=ENABLED)
        write_json(self.file(look, 0), DISABLED)
        assert self.found(look).status == "warn"

    def test_a_configuration_that_adds_to_what_is_there(
        self, machine: Callable[..., Machine]
    ) -> None:
        config = Config()
        config.ServerApp.jpserver_extensions.update({"shimmy_jupyter": False})
        assert self.found(machine(configuration=lambda: config)).status == "fail"

    def test_as_jupyter_decides_it(self, machine: Callable[..., Machine]) -> None:
        from jupyter_server.extension.config import ExtensionConfigManager

        def jupyters(look: Machine) -> bool:
            manager = ExtensionConfigManager(
                read_config_path=[str(level.folder) for level in look.levels]
            )
            return bool(manager.get_jpserver_extensions().get("shimmy_jupyter"))

        look = machine()
        files = [
            self.file(look, level, name)
            for level in range(3)
            for name in ("jupyter_server_config.d/b.json", "jupyter_server_config.json")
        ]
        for number in range(3 ** len(files)):
            for place, file in enumerate(files):
                value = (None, ENABLED, DISABLED)[number // 3**place % 3]
                file.unlink(missing_ok=True)
                if value is not None:
                    write_json(file, value)
            assert (extension(look, None).status != "fail") == jupyters(look)


class TestConfiguration:
    def test_a_setting_that_is_wrong_is_named(self, machine: Callable[..., Machine]) -> None:
        look = machine(
            config={"ShimmyEngine": {"threads": "many"}}, settings=settings_room.settings
        )
        found = checks(look)
        assert named(found, "configuration").status == "fail"
        assert "threads" in named(found, "configuration").detail
        assert named(found, "models folder").status == named(found, "offline").status == "skip"
        assert named(found, "address").status == "ok"

    @pytest.mark.parametrize(
        ("code", "detail"),
        [
            ("c.X = [", "jupyter_server_config.py, line 2: '[' was never closed"),
            (f"x = '{SECRET}'\nopen(x)", "FileNotFoundError in jupyter_server_config.py, line 3"),
            (f"raise ValueError('{SECRET}')", "ValueError in jupyter_server_config.py, line 2"),
        ],
    )
    def test_a_file_that_fails(
        self, machine: Callable[..., Machine], tmp_path: Path, code: str, detail: str
    ) -> None:
        from traitlets.config.loader import PyFileConfigLoader

        write(tmp_path / "jupyter_server_config.py", f"c = get_config()\n{code}\n")
        loader = PyFileConfigLoader("jupyter_server_config.py", path=str(tmp_path))
        found = checks(machine(configuration=loader.load_config))
        assert named(found, "configuration").detail == detail
        assert named(found, "address").status == "skip"
        assert named(found, "server extension").status == "ok"
        assert SECRET not in str(found)

    def test_a_file_that_is_no_json(self, machine: Callable[..., Machine]) -> None:
        found = named(checks(machine(configuration=lambda: json.loads("{,}"))), "configuration")
        assert (found.status, "not JSON" in found.detail) == ("fail", True)

    def test_an_error_elsewhere_is_only_named(self, machine: Callable[..., Machine]) -> None:
        def fails() -> Config:
            raise OSError(f"/home/ann/{SECRET}")

        assert named(checks(machine(configuration=fails)), "configuration").detail == "OSError"


class TestConfigurationFiles:
    def found(self, look: Machine) -> Check:
        return named(checks(look), "configuration files")

    def test_none(self, machine: Callable[..., Machine]) -> None:
        look = machine()
        (look.levels[1].folder / "jupyter_server_config.d/shimmy_jupyter.json").unlink()
        assert self.found(look).detail == "there are none"

    @pytest.mark.parametrize("name", ["jupyter_server_config.py", "jupyter_config.json"])
    def test_a_file_that_everybody_can_change(
        self, machine: Callable[..., Machine], name: str
    ) -> None:
        look = machine()
        file = write(look.levels[0].folder / name, "")
        file.chmod(0o666)
        found = self.found(look)
        assert (found.status, f"{name} (user)" in found.detail) == ("fail", True)
        file.chmod(0o664)
        assert self.found(look).status == "ok"

    @pytest.mark.parametrize("mode", [0o777, 0o1777])
    @pytest.mark.parametrize("below", ["", "jupyter_server_config.d"])
    def test_a_folder_that_everybody_can_put_one_into(
        self, machine: Callable[..., Machine], mode: int, below: str
    ) -> None:
        look = machine()
        folder = look.levels[1].folder / below
        folder.chmod(mode)
        assert self.found(look).status == "fail"
        folder.chmod(0o755)
        assert self.found(look).status == "ok"

    def test_a_folder_counts_before_there_is_a_file(self, machine: Callable[..., Machine]) -> None:
        look = machine()
        (look.levels[1].folder / "jupyter_server_config.d/shimmy_jupyter.json").unlink()
        look.levels[0].folder.chmod(0o777)
        assert self.found(look).status == "fail"

    def test_permissions_mean_nothing_without_posix(self, machine: Callable[..., Machine]) -> None:
        look = machine(posix=False)
        look.levels[1].folder.chmod(0o777)
        assert self.found(look).status == "ok"

    def test_the_systems_files_of_whoever_asks(self, machine: Callable[..., Machine]) -> None:
        look = machine(access=lambda path, mode: "environment" in str(path))
        write(look.levels[2].folder / "jupyter_config.py", "")
        assert "its own choice" not in self.found(look).detail
        look = machine(access=lambda path, mode: mode == os.W_OK)
        assert "its own choice" in self.found(look).detail
        assert self.found(look).status == "ok"


class TestModelsFolders:
    def found(self, look: Machine) -> Check:
        return named(checks(look), "models folder")

    def test_there(self, machine: Callable[..., Machine], tmp_path: Path) -> None:
        (tmp_path / "models").mkdir(mode=0o755)
        found = self.found(machine(roots=(tmp_path / "models",)))
        assert (found.status, found.detail) == ("ok", str(tmp_path / "models"))

    def test_each_has_its_line(self, machine: Callable[..., Machine], tmp_path: Path) -> None:
        found = checks(machine(roots=(tmp_path, tmp_path / "gone")))
        lines = [check for check in found if check.name == "models folder"]
        assert [line.status for line in lines] == ["ok", "fail"]

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("gone", "does not exist"),
            ("file", "is no folder"),
            ("nul\0", "is no path"),
            ("circle", "is no path"),
            ("~nobody-of-that-name/x", "is no path"),
        ],
    )
    def test_not_there(
        self, machine: Callable[..., Machine], tmp_path: Path, name: str, why: str
    ) -> None:
        write(tmp_path / "file", "")
        (tmp_path / "circle").symlink_to(tmp_path / "circle")
        root = Path(name) if name.startswith("~") else tmp_path / name
        found = self.found(machine(roots=(root,)))
        assert (found.status, found.detail) == ("fail", f"{root} {why}")

    def test_not_to_be_read(self, machine: Callable[..., Machine], tmp_path: Path) -> None:
        def access(path: Path, mode: int) -> bool:
            return path != tmp_path or mode != os.R_OK | os.X_OK

        found = self.found(machine(roots=(tmp_path,), access=access))
        assert (found.status, "cannot be read" in found.detail) == ("fail", True)

    @pytest.mark.parametrize(
        ("mode", "status"), [(0o777, "warn"), (0o757, "warn"), (0o1777, "ok"), (0o775, "ok")]
    )
    def test_everybodys(
        self, machine: Callable[..., Machine], tmp_path: Path, mode: int, status: str
    ) -> None:
        (tmp_path / "models").mkdir()
        (tmp_path / "models").chmod(mode)
        assert self.found(machine(roots=(tmp_path / "models",))).status == status
        assert self.found(machine(roots=(tmp_path / "models",), posix=False)).status == "ok"

    @pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs", "9p", "lustre"])
    def test_on_a_network(self, machine: Callable[..., Machine], tmp_path: Path, kind: str) -> None:
        models = tmp_path / "my models"
        models.mkdir()
        look = machine(roots=(models,))
        mount = str(models).replace(" ", "\\040")
        write(
            look.root / "proc/self/mountinfo",
            f"{LOCAL}30 27 0:9 / {mount} rw shared:1 - {kind} x rw\n",
        )
        found = self.found(look)
        assert (found.status, kind in found.detail, "SIGBUS" in found.detail) == (
            "warn",
            True,
            True,
        )
        isolated = self.found(machine(roots=(models,), isolation="process"))
        assert (isolated.status, kind in isolated.detail) == ("ok", True)

    def test_what_counts_is_the_last_and_nearest_mount(
        self, machine: Callable[..., Machine], tmp_path: Path
    ) -> None:
        look = machine(roots=(tmp_path,))
        mounts = look.root / "proc/self/mountinfo"
        over = f"31 27 0:9 / {tmp_path} rw - {{}} x rw\n"
        write(mounts, LOCAL + over.format("nfs") + over.format("ext4"))
        assert self.found(look).status == "ok"
        write(mounts, over.format("nfs") + LOCAL)
        assert self.found(look).status == "warn"
        write(mounts, LOCAL + f"32 27 0:9 / {tmp_path}-other rw - nfs x rw\n")
        assert self.found(look).status == "ok"

    @pytest.mark.parametrize("text", [None, "", "nonsense\n", "1 2 3 4 - \n"])
    def test_mounts_that_cannot_be_read(
        self, machine: Callable[..., Machine], tmp_path: Path, text: str | None
    ) -> None:
        look = machine(roots=(tmp_path,))
        (look.root / "proc/self/mountinfo").unlink()
        if text is not None:
            write(look.root / "proc/self/mountinfo", text)
        assert self.found(look).status == "ok"


class TestState:
    def found(self, look: Machine) -> Check:
        return named(checks(look), "state folder")

    def test_not_there_yet(self, machine: Callable[..., Machine]) -> None:
        look = machine()
        look.state.rmdir()
        look.data.rmdir()
        assert self.found(look).status == "ok"
        assert "will be made" in self.found(look).detail
        assert not look.data.exists()

    @pytest.mark.parametrize("there", [True, False])
    def test_not_to_be_written(self, machine: Callable[..., Machine], there: bool) -> None:
        look = machine(access=lambda path, mode: mode != os.W_OK | os.X_OK)
        if not there:
            look.state.rmdir()
        found = self.found(look)
        assert found.status == "fail"
        assert ("cannot be written to" if there else "cannot be made") in found.detail

    def test_a_file_in_its_place(self, machine: Callable[..., Machine]) -> None:
        look = machine()
        look.state.rmdir()
        write(look.state, "")
        assert self.found(look).status == "fail"

    @pytest.mark.parametrize("mode", [0o755, 0o750, 0o701, 0o704])
    def test_seen_by_others(self, machine: Callable[..., Machine], mode: int) -> None:
        look = machine()
        look.state.chmod(mode)
        assert (self.found(look).status, self.found(look).action) == (
            "warn",
            "chmod 700 that folder",
        )
        assert self.found(machine(posix=False)).status == "ok"

    @pytest.mark.parametrize("there", [True, False])
    def test_on_a_network(self, machine: Callable[..., Machine], there: bool) -> None:
        look = machine()
        if not there:
            look.state.rmdir()
        write(look.root / "proc/self/mountinfo", f"3 2 0:9 / {look.data} rw - nfs x rw\n")
        found = self.found(look)
        assert (found.status, "nfs" in found.detail) == ("warn", True)


class TestRoom:
    @pytest.mark.parametrize(
        ("free", "status"),
        [(10 * GB, "ok"), (10 * GB - 1, "warn"), (GB, "warn"), (GB - 1, "fail"), (0, "fail")],
    )
    def test_disk(self, machine: Callable[..., Machine], free: int, status: str) -> None:
        asked: list[Path] = []

        def disk(folder: Path) -> int:
            asked.append(folder)
            return free

        look = machine(disk=disk)
        assert named(checks(look), "disk").status == status
        # The nearest folder above it that is there.
        assert asked == [look.data.parent]

    def test_a_disk_that_cannot_be_looked_at(self, machine: Callable[..., Machine]) -> None:
        def disk(folder: Path) -> int:
            raise OSError(5, "Input/output error", "/home/ann")

        found = named(checks(machine(disk=disk)), "disk")
        assert (found.status, "/home/ann" in found.detail) == ("warn", False)

    def test_memory(self, machine: Callable[..., Machine]) -> None:
        least = min(one.memory_bytes for one in suggestions("chat"))
        for settings, kept in (
            (Settings(), 2 * GB),
            (Settings(memory_reserve=1000), 1000),
        ):
            given: dict[str, Any] = {"settings": lambda _, s=settings: s}
            found = named(checks(machine(memory=lambda: least + kept, **given)), "memory")  # noqa: B023
            assert (found.status, "qwen3-0.6b is the largest" in found.detail) == ("ok", True)
            found = named(checks(machine(memory=lambda: least + kept - 1, **given)), "memory")  # noqa: B023
            assert (found.status, "too little for qwen3-0.6b" in found.detail) == ("warn", True)

    def test_what_the_administrator_has_set_holds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        system = Config({"ShimmyApp": {"offline": True}, "ShimmyEngine": {"isolation": "process"}})
        monkeypatch.setattr("shimmy_jupyter.config.load_system_config", lambda: system)
        found = this_machine().settings(Config({"ShimmyApp": {"offline": False}}))
        assert (found.offline, found.isolation) == (True, "process")


class TestServers:
    def record(self, look: Machine, pid: int = 4711, **changes: object) -> Path:
        info = {
            "pid": pid, "port": 8888, "hostname": "localhost", "secure": False, "token": SECRET,
            "password": False, "sock": "", "url": f"http://localhost:8888/?token={SECRET}",
        }  # fmt: skip
        return write_json(look.runtime / f"jpserver-{pid}.json", info | changes)

    def found(self, look: Machine, **changes: object) -> Check:
        self.record(look, **changes)
        found = checks(look)
        assert SECRET not in str(found)
        return named(found, f"server {changes.get('port', 8888) or 4711}")

    def listening(self, *ips: str, command: tuple[str, ...] = ("jupyter-lab",)) -> Any:
        return lambda pid: Process(command, tuple((ip, 8888) for ip in ips))

    def test_as_it_should_be(self, machine: Callable[..., Machine]) -> None:
        found = self.found(machine())
        assert (found.status, found.detail) == (
            "ok",
            "listens on 127.0.0.1 and asks for a token",
        )
        found = self.found(machine(), password=True)
        assert found.detail.endswith("asks for a token or a password")
        assert self.found(machine(), token="", password=True).status == "ok"

    @pytest.mark.parametrize("ip", ["127.0.0.1", "0.0.0.0"])
    def test_nobody_is_asked(self, machine: Callable[..., Machine], ip: str) -> None:
        found = self.found(machine(process=self.listening(ip)), token="", secure=True)
        assert (found.status, "asks nobody" in found.detail) == ("fail", True)

    @pytest.mark.parametrize(
        ("ips", "secure", "status", "place"),
        [
            (("127.0.0.1",), False, "ok", "127.0.0.1"),
            (("::1", "127.0.0.1"), False, "ok", "::1"),
            (("127.0.0.1", "192.168.1.5"), False, "warn", "192.168.1.5"),
            (("0.0.0.0",), False, "warn", "all addresses"),
            (("::",), False, "warn", "all addresses"),
            (("0.0.0.0",), True, "ok", "all addresses with TLS"),
        ],
    )
    def test_what_the_process_has_opened_counts(
        self,
        machine: Callable[..., Machine],
        ips: tuple[str, ...],
        secure: bool,
        status: str,
        place: str,
    ) -> None:
        found = self.found(machine(process=self.listening(*ips)), secure=secure)
        assert (found.status, f"listens on {place}" in found.detail) == (status, True)

    @pytest.mark.parametrize(
        ("hostname", "status"),
        [
            ("localhost", "ok"),
            ("127.0.0.2", "ok"),
            ("0.0.0.0", "warn"),
            ("lab.example.org", "warn"),
            ("", "warn"),
        ],
    )
    def test_else_what_the_record_says(
        self, machine: Callable[..., Machine], hostname: str, status: str
    ) -> None:
        look = machine(process=lambda pid: Process())
        assert self.found(look, hostname=hostname).status == status

    def test_a_socket(self, machine: Callable[..., Machine]) -> None:
        found = self.found(machine(), sock="/run/user/1000/jupyter.sock", port=0)
        assert (found.status, "a socket of this machine" in found.detail) == ("ok", True)

    @pytest.mark.parametrize(
        "command",
        [
            ("/usr/bin/python3", "/opt/bin/jupyterhub-singleuser", f"--token={SECRET}"),
            ("python", "-m", "jupyterhub.singleuser"),
            ("python", "/opt/bin/jupyter-labhub"),
        ],
    )
    def test_a_hub_asks_for_itself(
        self, machine: Callable[..., Machine], command: tuple[str, ...]
    ) -> None:
        look = machine(process=self.listening("127.0.0.1", command=command))
        found = self.found(look, token="")
        assert (found.status, "asks for JupyterHub" in found.detail) == ("ok", True)

    def test_a_folder_called_after_the_hub_is_none(self, machine: Callable[..., Machine]) -> None:
        command = ("/opt/jupyterhub/bin/python", "/opt/jupyterhub/bin/jupyter-lab")
        look = machine(process=self.listening("127.0.0.1", command=command))
        assert self.found(look, token="").status == "fail"

    def test_records_of_servers_that_ended_stay_and_do_not_count(
        self, machine: Callable[..., Machine]
    ) -> None:
        for process in (
            lambda pid: None,
            self.listening(),
            lambda pid: Process(("vi",), (("::", 1),)),
        ):
            look = machine(process=process)
            file = self.record(look, token="")
            assert not [check for check in checks(look) if check.name.startswith("server 8")]
            assert file.exists()

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "3", "{}", '{"pid": "x"}', '{"pid": 1, "port": []}', "\udcff"]
    )
    def test_damaged_records_are_passed_over(
        self, machine: Callable[..., Machine], text: str
    ) -> None:
        look = machine()
        (look.runtime / "jpserver-1.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        assert named(checks(look), "address").status == "ok"

    def test_several(self, machine: Callable[..., Machine]) -> None:
        look = machine(process=lambda pid: Process(("lab",), (("127.0.0.1", 8000 + pid),)))
        for pid in (1, 2):
            self.record(look, pid, port=8000 + pid)
        names = [check.name for check in checks(look) if check.name.startswith("server 8")]
        assert names == ["server 8001", "server 8002"]


class TestAddress:
    @pytest.mark.parametrize(
        ("config", "status", "said"),
        [
            ({}, "ok", "localhost and asks for a token"),
            ({"IdentityProvider": {"token": ""}}, "fail", "asks nobody"),
            ({"ServerApp": {"token": ""}}, "fail", "asks nobody"),
            ({"PasswordIdentityProvider": {"token": ""}}, "fail", "asks nobody"),
            ({"IdentityProvider": {"token": SECRET}}, "ok", "a token"),
            ({"ServerApp": {"token": "", "password": SECRET}}, "ok", "asks for a password"),
            (
                {"PasswordIdentityProvider": {"hashed_password": SECRET}},
                "ok",
                "asks for a password",
            ),
            (
                {"IdentityProvider": {"hashed_password": SECRET, "token": SECRET}},
                "ok",
                "a token or a",
            ),
            ({"ServerApp": {"ip": "0.0.0.0"}}, "warn", "all addresses without TLS"),
            ({"ServerApp": {"ip": "*"}}, "warn", "all addresses without TLS"),
            ({"ServerApp": {"ip": ""}}, "warn", "all addresses without TLS"),
            ({"ServerApp": {"ip": "::1"}}, "ok", "::1"),
            ({"ServerApp": {"ip": "0.0.0.0", "certfile": "/etc/x.pem"}}, "ok", "with TLS"),
            (
                {"ServerApp": {"ip": "0.0.0.0", "token": ""}},
                "fail",
                "all addresses and asks nobody",
            ),
            ({"ServerApp": {"ip": "0.0.0.0", "sock": "/run/x.sock"}}, "ok", "a socket"),
            (
                {"ServerApp": {"identity_provider_class": "our.Provider", "token": ""}},
                "ok",
                "an identity provider of its own",
            ),
        ],
    )
    def test_as_configured(
        self, machine: Callable[..., Machine], config: dict[str, Any], status: str, said: str
    ) -> None:
        found = named(checks(machine(config=config)), "address")
        assert (found.status, said in found.detail) == (status, True), found
        assert SECRET not in str(found)


class TestIsolation:
    def found(self, look: Machine) -> Check:
        return named(checks(look), "isolation")

    def test_locks(self, machine: Callable[..., Machine]) -> None:
        detail = self.found(machine()).detail
        assert (
            detail == "a model runs in the server's process; the kernel has Landlock 4 and seccomp"
        )
        look = machine(isolation="process", build=lambda: Build("0.3.36", BUILT, landlock=0))
        assert (
            self.found(look).detail
            == "a model runs in a process of its own; the kernel has seccomp"
        )

    def test_no_locks(self, machine: Callable[..., Machine]) -> None:
        look = machine(build=lambda: Build("0.3.36", BUILT))
        (look.root / "proc/sys/kernel/seccomp/actions_avail").unlink()
        assert self.found(look).status == "warn"
        assert self.found(machine()).status == "ok"

    def test_elsewhere(self, machine: Callable[..., Machine]) -> None:
        assert self.found(machine(posix=False)).status == "warn"
        found = self.found(machine(posix=False, isolation="process"))
        assert (found.status, found.action) == ("fail", 'set ShimmyEngine.isolation = "none"')


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"ShimmyModels": {"root": []}}, "ShimmyModels.root"),
        ({"ShimmyModel": {"roots": []}}, "ShimmyModel"),
        ({"ShimmyApp": {"ofline": True}}, "ShimmyApp.ofline"),
    ],
)
def test_misspelt_settings(machine: Callable[..., Machine], config: Any, said: str) -> None:
    found = named(checks(machine(config)), "configuration")
    assert (found.status, found.detail) == ("warn", f"no such setting: {said}")


def test_settings_of_others_and_of_ours(machine: Callable[..., Machine]) -> None:
    config = {"ServerApp": {"x": 1}, "ShimmyMagics": {"model": "m"}, "ShimmyApp": {"offline": True}}
    assert named(checks(machine(config)), "configuration").status == "ok"


def test_offline(machine: Callable[..., Machine]) -> None:
    assert "off:" in named(checks(machine()), "offline").detail
    found = named(checks(machine(settings=lambda config: Settings(offline=True))), "offline")
    assert (found.status, found.detail.startswith("on:")) == ("ok", True)


class TestTheCommand:
    def run(self, machine: Machine, monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
        monkeypatch.setattr("shimmy_jupyter.doctor.this_machine", lambda: machine)
        return CliRunner().invoke(doctor_command, options)

    def test_table(self, machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch) -> None:
        done = self.run(machine(alias=None), monkeypatch)
        assert done.exit_code == 0
        lines = done.output.splitlines()
        at = next(i for i, line in enumerate(lines) if line.startswith("! import name"))
        assert lines[at + 1].strip() == "→ in notebooks, %load_ext shimmy_jupyter"
        assert lines[0].startswith("✓ packages ")
        assert any(line.startswith("– gpu ") for line in lines)
        assert lines[-1] == "15 checks: 12 ok, 1 to look at, 2 skipped"

    def test_a_failure_is_an_exit_code(
        self, machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done = self.run(machine(disk=lambda folder: 0), monkeypatch)
        assert done.exit_code == 1
        assert "✗ disk" in done.output
        assert done.output.splitlines()[-1] == "15 checks: 12 ok, 1 failed, 2 skipped"

    def test_json(self, machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch) -> None:
        body = json.loads(self.run(machine(), monkeypatch, "--json").output)
        assert body["ok"] is True
        assert body["checks"][1] == {
            "name": "engine", "status": "ok", "detail": "llama.cpp of llama-cpp-python 0.3.36",
            "action": None,
        }  # fmt: skip
        done = self.run(machine(disk=lambda folder: 0), monkeypatch, "--json")
        assert (done.exit_code, json.loads(done.output)["ok"]) == (1, False)

    def test_nothing_acts_on_the_terminal(self) -> None:
        text = "\n".join(table([Check("x", "fail", "a\x1b[2Jb\n✓ y  c", "d\re")]))
        assert text == "✗ x  a[2Jb ✓ y  c\n     → de\n1 checks: 1 failed"


class TestForReal:
    @pytest.fixture
    def home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Jupyter's folders, with a secret wherever there can be one."""
        for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"):
            (tmp_path / name).mkdir(mode=0o700)
            monkeypatch.setenv(f"JUPYTER_{name}", str(tmp_path / name))
        monkeypatch.setenv("JUPYTER_TOKEN", SECRET)
        monkeypatch.setenv("SHIMMY_KERNEL_TOKEN", SECRET)
        monkeypatch.setenv("SHIMMY_MODEL_PATHS", str(tmp_path))
        identity = f"c.IdentityProvider.token = {SECRET!r}\nc.IdentityProvider.hashed_password = {SECRET!r}\n"
        write(tmp_path / "CONFIG_DIR/jupyter_server_config.py", identity)
        return tmp_path

    def test_it_ends_and_connects_to_nothing(
        self, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: object) -> None:
            raise AssertionError("a connection was opened")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket.socket, "connect_ex", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            record = {
                "pid": os.getpid(), "port": port, "hostname": "localhost", "token": SECRET,
                "url": f"http://localhost:{port}/?token={SECRET}", "secure": False, "password": True,
            }  # fmt: skip
            write_json(home / f"RUNTIME_DIR/jpserver-{os.getpid()}.json", record)
            write_json(home / "RUNTIME_DIR/jpserver-999999999.json", record | {"pid": 999999999})
            before = sorted(home.rglob("*"))
            for options in ([], ["--json"]):
                done = CliRunner().invoke(doctor_command, options)
                assert done.exit_code in {0, 1}, done.exception
                assert SECRET not in done.output
                assert str(home / "CONFIG_DIR") not in done.output
                assert f"server {port}" in done.output
        assert sorted(home.rglob("*")) == before
        found = {check["name"]: check for check in json.loads(done.output)["checks"]}
        assert found["engine"]["status"] == "ok"
        assert found["address"]["detail"].endswith("asks for a token or a password")
        assert found[f"server {port}"]["detail"].startswith("listens on 127.0.0.1 ")
        assert found["models folder"]["detail"] == str(home)
        assert found["state folder"]["status"] == "ok"

    def test_what_this_machine_is(self, home: Path) -> None:
        look = this_machine()
        assert Level("user", home / "CONFIG_DIR") in look.levels
        assert {level.name for level in look.levels} >= {"user", "environment", "system"}
        assert look.installed("click")
        assert look.installed("no-such-distribution") is None
        assert look.state == home / "DATA_DIR/shimmy_jupyter"
        assert look.memory() > 0
        assert look.disk(home) > 0
        assert look.process(999_999_999) is None
        mine = look.process(os.getpid())
        assert mine is not None
        assert mine.command
        assert "python" not in repr(mine)

    def test_levels_named_by_the_environment(
        self, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("JUPYTER_CONFIG_PATH", str(home / "etc/jupyter"))
        assert this_machine().levels[0] == Level("JUPYTER_CONFIG_PATH", home / "etc/jupyter")

    def test_servers_on_all_addresses_are_seen_though_their_record_hides_it(
        self, home: Path
    ) -> None:
        with socket.create_server(("0.0.0.0", 0)) as server:
            port = server.getsockname()[1]
            record = {"pid": os.getpid(), "port": port, "hostname": "localhost", "token": SECRET}
            write_json(home / f"RUNTIME_DIR/jpserver-{os.getpid()}.json", record)
            found = named(checks(this_machine()), f"server {port}")
        assert (found.status, "all addresses" in found.detail) == ("warn", True)

    def test_permissions_are_those_of_the_files(self, home: Path) -> None:
        (home / "CONFIG_DIR/jupyter_server_config.py").chmod(0o646)
        assert stat.S_IMODE((home / "CONFIG_DIR").stat().st_mode) == 0o700
        found = named(checks(this_machine()), "configuration files")
        assert (found.status, "jupyter_server_config.py (user)" in found.detail) == ("fail", True)
