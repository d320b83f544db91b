"""The recipes in docs/examples, read and checked. nginx's is run, by tests/component/test_nginx.py.

Cases: what compose.yaml confines, publishes, mounts and knows; the image's user, its sources (of which
a wheel is built), versions, command and health check; what reaches the build; the unit's promises, what
the engine needs of it, and what systemd says of it; the server's configuration has settings that exist
and agrees with nginx's; the health check's answers, and where the token goes; links in the pages.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from jupyter_server.auth import IdentityProvider
from jupyter_server.serverapp import ServerApp
from traitlets.config.loader import PyFileConfigLoader

from shimmy_jupyter.config import CONFIGURABLES, settings
from shimmy_jupyter.engine import confine
from shimmy_jupyter.server.app import ShimmyApp

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "docs" / "examples"
OWNERS: dict[str, Any] = {
    cls.__name__: cls for cls in (*CONFIGURABLES, ShimmyApp, ServerApp, IdentityProvider)
}
SECRET = re.compile(r"token|password|secret", re.IGNORECASE)


class TestCompose:
    whole: dict[str, Any] = yaml.safe_load((EXAMPLES / "compose.yaml").read_text())
    service: dict[str, Any] = whole["services"]["jupyter"]

    def test_what_it_may_do(self) -> None:
        assert self.service["read_only"] is True
        assert self.service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in self.service["security_opt"]
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", self.service["user"])
        widening = {
            "privileged", "cap_add", "devices", "network_mode", "pid", "ipc", "userns_mode",
            "uts", "cgroup", "group_add", "device_cgroup_rules", "sysctls",
        }  # fmt: skip
        assert not widening & set(self.service)
        assert not [one for one in self.service["security_opt"] if "unconfined" in one]
        assert list(self.whole["services"]) == ["jupyter"]

    def test_what_it_may_use(self) -> None:
        assert self.service["mem_limit"] == self.service["memswap_limit"]
        assert self.service["cpus"] > 0
        assert 0 < self.service["pids_limit"] <= 4096
        assert self.service["ulimits"]["core"] == 0
        assert self.service["restart"] == "unless-stopped"
        assert "disable" not in self.service.get("healthcheck", {})

    def test_who_reaches_it(self) -> None:
        assert self.service["ports"]
        for port in self.service["ports"]:
            assert re.fullmatch(r"127\.0\.0\.1:\d+:8888", port)

    def test_what_it_sees_of_this_machine(self) -> None:
        named = set(self.whole["volumes"])
        writable = []
        for volume in self.service["volumes"]:
            source, target, *mode = volume.split(":")
            assert "docker.sock" not in source
            assert source in named or (source.startswith("./") and mode == ["ro"])
            writable += [target] if mode != ["ro"] else []
        assert writable == ["/home/jupyter/work", "/home/jupyter/state"]
        for place in self.service["tmpfs"]:
            path, _, options = place.partition(":")
            assert path == "/tmp"
            assert {"noexec", "nosuid", "nodev"} <= set(options.split(","))
            assert "size=" in options

    def test_the_token_is_a_file(self) -> None:
        ((name, path),) = self.service["environment"].items()
        assert (name, path) == ("JUPYTER_TOKEN_FILE", "/run/secrets/jupyter_token")
        assert self.service["secrets"] == ["jupyter_token"]
        secret = self.whole["secrets"]["jupyter_token"]
        assert secret == {"file": "./secrets/jupyter_token"}
        assert "secrets/" in (EXAMPLES / ".gitignore").read_text().splitlines()
        assert "environment" not in self.service.get("build", {})

    def test_what_it_builds(self) -> None:
        build = self.service["build"]
        assert (EXAMPLES / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]) == EXAMPLES / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (EXAMPLES / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(kind, rest) for kind, _, rest in (line.partition(" ") for line in lines if line)]


class TestDockerfile:
    lines = instructions()

    def last(self, kind: str) -> str:
        return [rest for one, rest in self.lines if one == kind][-1]

    def copied(self) -> list[str]:
        found = [rest.split() for kind, rest in self.lines if kind == "COPY"]
        return [path for words in found if "--from=build" not in words for path in words[:-1]]

    def test_who_it_runs_as(self) -> None:
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", self.last("USER"))
        kinds = [kind for kind, _ in self.lines]
        after = kinds[len(kinds) - kinds[::-1].index("USER") :]
        assert not {"RUN", "COPY", "ADD"} & set(after)
        assert self.last("USER") == TestCompose.service["user"]
        assert f"--uid {self.last('USER').split(':')[0]} " in self.last("RUN")

    def test_what_it_is_made_of(self) -> None:
        kinds = {kind for kind, _ in self.lines}
        assert kinds <= set("FROM RUN ENV COPY USER WORKDIR EXPOSE HEALTHCHECK CMD".split())
        bases = [rest.split()[0] for kind, rest in self.lines if kind == "FROM"]
        assert len(set(bases)) == 1
        assert re.fullmatch(r"python:3\.\d+-slim-\w+", bases[0])
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        (engine,) = [d for d in project["dependencies"] if d.startswith("llama-cpp-python")]
        assert f"pip install --no-cache-dir {engine}" in [
            rest.partition("/bin/")[2] for kind, rest in self.lines if kind == "RUN"
        ]
        assert "[lab]" in " ".join(rest for _, rest in self.lines)
        assert "lab" in project["optional-dependencies"]

    def test_no_secret_is_in_it(self) -> None:
        for kind, rest in self.lines:
            assert not SECRET.search(rest), kind

    def test_what_is_run(self) -> None:
        command = json.loads(self.last("CMD"))
        flags = dict(one.removeprefix("--").split("=") for one in command if "=" in one)
        assert flags["ServerApp.allow_unauthenticated_access"] == "False"
        assert flags["ServerApp.allow_remote_access"] == "False"
        assert flags["ShimmyApp.offline"] == "True"
        assert flags["ShimmyEngine.isolation"] == "process"
        for flag in flags:
            owner, dot, trait = flag.partition(".")
            assert not dot or trait in OWNERS[owner].class_traits(config=True), flag
        assert self.last("EXPOSE") == flags["port"] == "8888"

    def test_the_check_of_its_health(self) -> None:
        options, _, command = self.last("HEALTHCHECK").partition("CMD ")
        assert json.loads(command) == ["/opt/jupyter/bin/python", "/opt/jupyter/healthcheck.py"]
        seconds = float(re.search(r"--timeout=(\d+)s", options)[1])  # type: ignore[index]
        assert seconds > 10.0

    def test_what_reaches_the_build(self) -> None:
        lines = (EXAMPLES / "Dockerfile.dockerignore").read_text().splitlines()
        assert lines[0] == "*"
        allowed = [line[1:] for line in lines if line.startswith("!")]
        assert sorted(allowed) == sorted(self.copied())

    def test_a_wheel_is_built_of_its_sources(self, tmp_path: Path) -> None:
        for path in self.copied():
            source, target = ROOT / path, tmp_path / path
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "made"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        (wheel,) = (tmp_path / "made").iterdir()
        assert fnmatch(wheel.name, "shimmy_jupyter-*.whl")

    def test_where_it_writes(self) -> None:
        """Its root is read-only, so that has to be a volume, or memory."""
        text = " ".join(rest for kind, rest in self.lines if kind == "ENV")
        folders = dict(re.findall(r"(\w+(?:DIR|PATHS))=(/\S+)", text))
        assert folders.pop("SHIMMY_MODEL_PATHS") == "/models"
        assert set(folders) == {
            "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"
        }  # fmt: skip
        writable = ("/tmp/", "/home/jupyter/state", "/home/jupyter/work")
        assert all(folder.startswith(writable) for folder in folders.values())
        assert self.last("WORKDIR").startswith(writable)


UNIT = (EXAMPLES / "shimmy-jupyter.service").read_text()


def unit(section: str) -> dict[str, list[str]]:
    text = re.search(rf"^\[{section}\]\n(.*?)(?=^\[|\Z)", UNIT, re.MULTILINE | re.DOTALL)
    assert text is not None
    found: dict[str, list[str]] = {}
    for line in text[1].splitlines():
        if line and not line.startswith("#"):
            key, equals, value = line.partition("=")
            assert equals, line
            found.setdefault(key, []).append(value)
    return found


def systemd(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not on this machine")
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    if int(said.stdout.split()[1]) < 250:
        pytest.skip("this machine's systemd is older than the unit is for")
    # Nobody is asked about this machine's own units.
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


class TestUnit:
    service = unit("Service")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("DynamicUser", "yes"),
            ("NoNewPrivileges", "yes"),
            ("CapabilityBoundingSet", ""),
            ("AmbientCapabilities", ""),
            ("ProtectSystem", "strict"),
            ("ProtectHome", "yes"),
            ("PrivateTmp", "yes"),
            ("PrivateDevices", "yes"),
            ("ProtectProc", "invisible"),
            ("RestrictNamespaces", "yes"),
            ("RestrictSUIDSGID", "yes"),
            ("LockPersonality", "yes"),
            ("UMask", "0077"),
            ("StateDirectoryMode", "0700"),
            ("MemorySwapMax", "0"),
            ("LimitCORE", "0"),
            ("Restart", "on-failure"),
            ("SystemCallErrorNumber", "EPERM"),
            ("SystemCallArchitectures", "native"),
        ],
    )
    def test_promises(self, key: str, value: str) -> None:
        assert self.service[key] == [value]

    def test_limits(self) -> None:
        assert re.fullmatch(r"\d+G", self.service["MemoryMax"][0])
        assert int(self.service["TasksMax"][0]) <= 4096

    def test_what_the_engine_needs(self) -> None:
        # The engine's process is to die for want of memory, and the server not with it.
        assert self.service["OOMPolicy"] == ["continue"]
        # It reads /proc/meminfo and /proc/cpuinfo.
        assert "ProcSubset" not in self.service
        assert "MemoryDenyWriteExecute" not in self.service
        assert "SystemCallFilter" in self.service
        (families,) = self.service["RestrictAddressFamilies"]
        assert families.split() == ["AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"]

    def test_what_a_probe_confines_itself_by(self) -> None:
        calls = set(self.service["SystemCallFilter"][0].split())
        assert calls == {
            "@system-service", "seccomp",
            "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self",
        }  # fmt: skip
        # All three are what it uses.
        assert (confine._CREATE_RULESET, confine._ADD_RULE, confine._RESTRICT_SELF) == (
            444, 445, 446,
        )  # fmt: skip

    def test_the_token_is_a_file(self) -> None:
        (name, source) = self.service["LoadCredential"][0].split(":")
        assert (name, source) == ("token", "/etc/shimmy-jupyter.credentials/token")
        assert "JUPYTER_TOKEN_FILE=%d/token" in self.service["Environment"]
        for line in (*self.service["Environment"], *self.service["ExecStart"]):
            assert not SECRET.search(line.replace("JUPYTER_TOKEN_FILE=%d/token", ""))

    def test_where_it_writes(self) -> None:
        """All but these folders is read-only."""
        folders = [one.partition("=")[2] for one in self.service["Environment"]]
        own = ("%S/shimmy-jupyter", "%t/shimmy-jupyter", "%d/", "/srv/models")
        assert all(folder.startswith(own) for folder in folders)
        assert self.service["StateDirectory"] == self.service["RuntimeDirectory"]
        assert self.service["StateDirectory"] == ["shimmy-jupyter"]
        assert self.service["WorkingDirectory"] == ["%S/shimmy-jupyter"]

    def test_what_is_run(self) -> None:
        program, *words = shlex.split(self.service["ExecStart"][0])
        assert program == "/opt/shimmy-jupyter/bin/jupyter"
        assert words == [
            "lab", "--config=/etc/shimmy-jupyter/jupyter_server_config.py", "--no-browser"
        ]  # fmt: skip

    def test_systemd_understands_it(self, tmp_path: Path) -> None:
        program = self.service["ExecStart"][0].partition(" ")[0]
        path = tmp_path / "shimmy-jupyter.service"
        path.write_text(UNIT.replace(program, shutil.which("true") or ""))
        done = systemd("verify", "--man=no", str(path))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        path.write_text(path.read_text().replace("ProtectSystem=strict", "ProtectSystem=perhaps"))
        assert "perhaps" in systemd("verify", "--man=no", str(path)).stderr

    def test_what_systemd_thinks_of_it(self) -> None:
        """From 0, which is confined, to 10 (times 10 here)."""
        path = str(EXAMPLES / "shimmy-jupyter.service")
        done = systemd("security", "--offline=true", "--threshold=25", path)
        assert done.returncode == 0, done.stdout


class TestServerConfiguration:
    config = PyFileConfigLoader("jupyter_server_config.py", path=str(EXAMPLES)).load_config()
    nginx = (EXAMPLES / "nginx.conf").read_text()

    def test_its_settings_exist(self) -> None:
        for owner, traits in self.config.items():
            for trait in traits:
                assert trait in OWNERS[owner].class_traits(config=True), (owner, trait)
        assert settings(self.config, {}).isolation == "process"

    def test_it_agrees_with_nginx(self) -> None:
        app = self.config.ServerApp
        assert f"server {app.ip}:{app.port};" in self.nginx
        names = set(re.findall(r"^    server_name (\S+);", self.nginx, re.MULTILINE))
        assert names == {app.local_hostnames[1]}
        limits = settings(self.config, {})
        here = re.search(
            r"location /shimmy/ \{.*?client_max_body_size (\d+)m;", self.nginx, re.DOTALL
        )
        assert here is not None
        assert int(here[1]) << 20 == limits.max_request_bytes
        hours = re.search(r"proxy_read_timeout (\d+)h;", self.nginx)
        assert hours is not None
        assert limits.guard.limits[0].default.seconds is not None
        assert int(hours[1]) * 3600 > limits.guard.limits[0].default.seconds

    def test_what_it_is_for(self) -> None:
        app = self.config.ServerApp
        assert app.ip == "127.0.0.1"
        assert app.trust_xheaders is True
        assert app.allow_unauthenticated_access is False
        assert "allow_origin" not in app
        assert "disable_check_xsrf" not in app
        assert "token" not in self.config.IdentityProvider


TOKEN = "0123456789abcdef"


@pytest.fixture
def answering() -> Iterator[Callable[[int], tuple[str, list[str | None]]]]:
    """A server that answers with a status; its address, and the Authorization headers that came."""
    servers = []

    def start(status: int) -> tuple[str, list[str | None]]:
        came: list[str | None] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                assert TOKEN not in self.path
                came.append(self.headers["Authorization"])
                self.send_response(status)
                self.end_headers()
                self.wfile.write(b'{"status": "ok"}' if status == 200 else b"<html>")

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/shimmy/health", came

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


class TestHealthcheck:
    def check(self, **environment: str) -> tuple[int, str]:
        command = [sys.executable, "-I", str(EXAMPLES / "healthcheck.py")]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert TOKEN not in done.stdout + done.stderr
        assert done.stderr == ""
        return done.returncode, done.stdout.strip()

    @pytest.fixture
    def token(self, tmp_path: Path) -> str:
        (tmp_path / "token").write_text(f"{TOKEN}\n")
        return str(tmp_path / "token")

    def test_well(self, answering: Any, token: str) -> None:
        url, came = answering(200)
        proxy = "http://127.0.0.1:9"
        found = self.check(SHIMMY_HEALTH_URL=url, JUPYTER_TOKEN_FILE=token, http_proxy=proxy)
        assert found == (0, "")
        assert came == [f"token {TOKEN}"]

    @pytest.mark.parametrize("status", [403, 404, 500, 503])
    def test_not_well(self, answering: Any, token: str, status: int) -> None:
        url, _ = answering(status)
        found = self.check(SHIMMY_HEALTH_URL=url, JUPYTER_TOKEN_FILE=token)
        assert found == (1, f"the server answers {status}")

    def test_nobody_there(self, answering: Any, token: str, tmp_path: Path) -> None:
        found = self.check(SHIMMY_HEALTH_URL="http://127.0.0.1:9/", JUPYTER_TOKEN_FILE=token)
        assert found == (1, "no answer: URLError")
        missing = str(tmp_path / "missing")
        assert self.check(JUPYTER_TOKEN_FILE=missing) == (1, "no answer: FileNotFoundError")
        assert self.check()[0] == 1

    def test_another_s_answer(self, answering: Any, token: str) -> None:
        url, _ = answering(204)
        assert self.check(SHIMMY_HEALTH_URL=url, JUPYTER_TOKEN_FILE=token)[0] == 1


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


class TestPages:
    pages = (ROOT / "SECURITY.md", ROOT / "docs" / "security.md")

    @pytest.mark.parametrize("page", pages, ids=lambda page: page.name)
    def test_links(self, page: Path) -> None:
        for path, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
            target = page.parent / path if path else page
            assert target.exists(), path
            assert not anchor or anchor in anchors(target), (path, anchor)

    @pytest.mark.parametrize("page", pages, ids=lambda page: page.name)
    def test_no_address_that_nobody_has(self, page: Path) -> None:
        text = page.read_text()
        assert not re.search(r"\b[\w.+-]+@[\w-]+\.\w+", text)
        assert not re.search(r"TODO|TBD|FIXME|<your|example\.com", text)

    def test_every_recipe_is_described(self) -> None:
        text = (ROOT / "docs" / "security.md").read_text()
        for path in EXAMPLES.iterdir():
            if not path.name.startswith((".", "__")) and path.is_file():
                assert path.name in text or path.suffix == ".dockerignore", path.name
        assert os.access(EXAMPLES / "healthcheck.py", os.R_OK)

    def test_the_supported_version(self) -> None:
        import shimmy_jupyter

        minor = ".".join(shimmy_jupyter.__version__.split(".")[:2])
        assert f"| {minor}.x | yes |" in (ROOT / "SECURITY.md").read_text()
