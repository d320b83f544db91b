"""Take away one guard at a time, and see that a test fails.

    python scripts/guard_mutants.py [--only PATTERN] [--list] [--jobs N] [--without NODE]

One line for each guard: killed, by which test, or SURVIVED, which ends with status 1. Guards are every
`@web.authenticated` and `@authorized` of the handlers, found by themselves, and those of `GUARDS` below.
Each runs in a copy of the tree, which is thrown away; first the tests must pass in a copy without a change.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HANDLERS = "shimmy_jupyter/server/handlers"
DECORATORS = {"web.authenticated", "authorized"}
ACCESS = ("tests/component/test_access.py",)
SECONDS = 300
"""For one run of tests; what takes longer counts as a test that failed."""
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "build", "dist", "results", "node_modules"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Guard:
    """`find` occurs once in `file`; with `replace` in its place one of `tests` must fail."""

    name: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]


# What stands between a request and what it wants, besides the decorators. A new guard is a new entry:
# the text as it stands in the file, what is left when the guard is forgotten, and the tests that notice.
GUARDS: tuple[Guard, ...] = (
    Guard(
        "prepare refuses nobody",
        f"{HANDLERS}/base.py",
        'if not self.current_user and self.request.method != "OPTIONS":',
        "if False:",
        ACCESS,
    ),
    Guard(
        "the kernels' secret is compared",
        f"{HANDLERS}/base.py",
        "if hmac.compare_digest(given.encode(), secret.encode()):",
        "if given:",
        ACCESS,
    ),
    Guard(
        "the kernels' secret is of this machine",
        f"{HANDLERS}/base.py",
        "if not secret or not self._from_this_machine():",
        "if not secret:",
        ACCESS,
    ),
    Guard(
        "the kernels' secret is not through a proxy",
        f"{HANDLERS}/base.py",
        "if any(name in self.request.headers for name in _FORWARDED):",
        "if False:",
        ACCESS,
    ),
    Guard(
        "a job is its owner's",
        "shimmy_jupyter/models/jobs.py",
        "if job is None or not (principal.admin or job.owner == principal.name):",
        "if job is None:",
        ("tests/component/test_incidents.py",),
    ),
    Guard(
        "a list of jobs is its owner's",
        "shimmy_jupyter/models/jobs.py",
        "return [j for j in self._jobs.values() if principal.admin or j.owner == principal.name]",
        "return list(self._jobs.values())",
        ("tests/component/test_incidents.py",),
    ),
    Guard(
        "a body is counted as it comes",
        f"{HANDLERS}/body.py",
        "        self._check_size(self._received)\n",
        "",
        ("tests/component/test_completions.py::test_body_over_the_limit",),
    ),
    Guard(
        "an unexpected error says nothing",
        f"{HANDLERS}/base.py",
        "            error = kind(message)\n",
        "            error = kind(repr(error))\n",
        ("tests/component/test_incidents.py",),
    ),
)


def decorators() -> Iterator[Guard]:
    """Each decorator of a handler's method, with the line or lines that it takes."""
    for path in sorted((ROOT / HANDLERS).glob("*.py")):
        text = path.read_text()
        lines = text.splitlines(keepends=True)
        for cls in ast.walk(ast.parse(text)):
            for method in cls.body if isinstance(cls, ast.ClassDef) else ():
                if not isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                for decorator in method.decorator_list:
                    called = decorator.func if isinstance(decorator, ast.Call) else decorator
                    if (spelled := ast.unparse(called)) not in DECORATORS:
                        continue
                    # The same two lines stand above every method: with what follows they are unique.
                    assert decorator.end_lineno is not None
                    after = "".join(lines[decorator.end_lineno :])
                    whole = "".join(lines[decorator.lineno - 1 :])
                    yield Guard(
                        f"{path.stem}.{cls.name}.{method.name} @{spelled}",
                        str(path.relative_to(ROOT)),
                        whole,
                        after,
                        ACCESS,
                    )


class NotApplicable(Exception):
    """The table or the tree must be put right first."""


def mutate(tree: Path, guard: Guard) -> None:
    path = tree / guard.file
    text = path.read_text()
    if (count := text.count(guard.find)) != 1:
        raise NotApplicable(f"{guard.name}: its text is {count} times in {guard.file}, not once")
    path.write_text(text.replace(guard.find, guard.replace))


def tested(tree: Path, tests: tuple[str, ...], without: list[str]) -> tuple[int, str]:
    """The status of pytest, and which test failed first."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "--show-capture=no"]
    command += ["-p", "no:cacheprovider", *(f"--deselect={node}" for node in without), *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, check=False,
            timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 1, f"no end within {SECONDS} s"
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return done.returncode, failed[1] if failed else done.stdout[-2000:] + done.stderr[-2000:]


def copied(folder: str) -> Path:
    tree = Path(folder, "tree")
    shutil.copytree(ROOT, tree, ignore=NOT_COPIED)
    return tree


def attempt(guard: Guard, without: list[str]) -> tuple[bool, str]:
    """Whether a test failed, and which. Raises `NotApplicable` where the tests could not run."""
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(folder)
        mutate(tree, guard)
        status, said = tested(tree, guard.tests, without)
    if status not in (0, 1):
        raise NotApplicable(f"{guard.name}: the tests did not run\n{said}")
    return status == 1, said


def check_unchanged(guards: list[Guard], without: list[str]) -> None:
    """Raises `NotApplicable` where tests fail anyway, or look at another installation."""
    tests = tuple(sorted({test for guard in guards for test in guard.tests}))
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(folder)
        where = [sys.executable, "-c", "import shimmy_jupyter; print(shimmy_jupyter.__file__)"]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        found = subprocess.run(
            where, cwd=tree, env=environment, capture_output=True, text=True, check=True
        )
        if not found.stdout.startswith(str(tree)):
            raise NotApplicable(f"the tests would look at {found.stdout.strip()}")
        status, said = tested(tree, tests, without)
    if status:
        raise NotApplicable(f"the tests fail without any change\n{said}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="of names, a regular expression"
    )
    parser.add_argument("--list", action="store_true", help="only the names")
    parser.add_argument("--jobs", type=int, default=1, help="so many at once (1)")
    parser.add_argument(
        "--without", action="append", default=[], metavar="NODE", help="leave out a test"
    )
    given = parser.parse_args()
    guards = [g for g in (*decorators(), *GUARDS) if re.search(given.only, g.name)]
    if given.list:
        print(*(guard.name for guard in guards), sep="\n")
        return 0
    if not guards:
        raise NotApplicable(f"no guard is called {given.only!r}")
    check_unchanged(guards, given.without)
    survived = 0
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        for guard, (killed, by) in zip(
            guards, pool.map(lambda g: attempt(g, given.without), guards), strict=True
        ):
            survived += not killed
            print(
                f"killed    {guard.name}: {by}" if killed else f"SURVIVED  {guard.name}", flush=True
            )
    print(f"{len(guards) - survived} of {len(guards)} killed")
    return 1 if survived else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NotApplicable as error:
        sys.exit(f"error: {error}")
