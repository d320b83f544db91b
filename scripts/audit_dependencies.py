"""Ask advisory services about the installed packages, and compare with the written exceptions.

python scripts/audit_dependencies.py

Exits with 0 where nothing is known but what docs/advisories.toml excepts, and where nobody could be asked,
which it says; with 1 for an advisory without an exception, and for an exception that has expired or is no
longer needed; with 2 where pip-audit or the exceptions cannot be read.

A service is first asked about the advisories that are excepted. One that does not know those, such as a
package index that serves none, would call everything clean, and is not asked about anything else.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

EXCEPTIONS = Path(__file__).parent.parent / "docs" / "advisories.toml"
SERVICES = ("pypi", "osv")
LONGEST = dt.timedelta(days=366)
"""From an exception's review to its end."""
_SECONDS = 600
_UNREACHABLE = re.compile(
    r"\.(ConnectionError|ProxyError|SSLError|\w*Timeout|ChunkedEncodingError)\b"
    r"|Could not connect to|not redirecting properly|\b(429|5\d\d) (Client|Server) Error"
)


class Unreadable(Exception):
    """What came is not what was asked for."""


class Silent(Exception):
    """A service does not answer, or not what it should know."""


@dataclass(frozen=True, slots=True)
class Exempted:
    """An advisory that is lived with. `version` is one of the package's that it is about."""

    id: str
    package: str
    version: str
    reason: str
    reviewed: dt.date
    expires: dt.date


@dataclass(frozen=True, slots=True)
class Finding:
    """An advisory of an installed package. `names` are its id and other names."""

    package: str
    version: str
    id: str
    names: frozenset[str]
    fixed_in: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What a service said. `skipped` are the packages that it does not know."""

    audited: int
    skipped: tuple[str, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of a command: -1 where it took too long."""

    code: int
    out: str
    err: str


Run = Callable[[Sequence[str]], Ran]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_exceptions(text: str) -> tuple[Exempted, ...]:
    """Raises `Unreadable`, naming the entry and what is wrong with it."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Unreadable(f"the exceptions are no TOML: {error}") from None
    entries = table.pop("exception", [])
    if table or not isinstance(entries, list):
        raise Unreadable("the exceptions may hold [[exception]] and nothing else")
    return tuple(_exception(entry, place) for place, entry in enumerate(entries, 1))


def _exception(entry: object, place: int) -> Exempted:
    wanted = {
        field.name: dt.date if field.name in {"reviewed", "expires"} else str
        for field in fields(Exempted)
    }
    if not isinstance(entry, dict) or set(entry) != set(wanted):
        raise Unreadable(f"exception {place} must have {', '.join(wanted)}, and no other keys")
    for name, kind in wanted.items():
        # A date with a time is a date, too.
        if type(entry[name]) is not kind or (kind is str and not entry[name].strip()):
            what = "a day" if kind is dt.date else "a text"
            raise Unreadable(f"exception {place}: {name} must be {what}")
    found = Exempted(**entry)
    if not found.reviewed < found.expires <= found.reviewed + LONGEST:
        raise Unreadable(f"exception {place}: expires must be within a year after reviewed")
    return found


def read_report(text: str) -> Report:
    """pip-audit's JSON. Raises `Unreadable`."""
    try:
        said = json.loads(text)["dependencies"]
        known = [one for one in said if "skip_reason" not in one]
        findings = tuple(
            Finding(
                canonical(one["name"]),
                str(one["version"]),
                str(vuln["id"]),
                frozenset({str(vuln["id"]), *map(str, vuln.get("aliases", ()))}),
                tuple(map(str, vuln["fix_versions"])),
            )
            for one in known
            for vuln in one["vulns"]
        )
        skipped = tuple(sorted(canonical(one["name"]) for one in said if one not in known))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unreadable(f"pip-audit's report cannot be read: {type(error).__name__}") from None
    return Report(len(known), skipped, findings)


def ask(run: Run, service: str, *options: str) -> Report:
    """Raises `Silent`, and `Unreadable`."""
    form = ("--format=json", "--aliases=on", "--desc=off", "--progress-spinner=off")
    ran = run([f"--vulnerability-service={service}", *form, *options])
    if ran.code == -1:
        raise Silent("does not answer in time")
    if not ran.out.strip() and _UNREACHABLE.search(ran.err):
        raise Silent("cannot be reached")
    if ran.code not in {0, 1} or not ran.out.strip():
        last = (ran.err.strip() or "nothing").splitlines()[-1][:300]
        raise Unreadable(f"pip-audit ended with {ran.code} and said: {last}")
    return read_report(ran.out)


def ask_as_witness(run: Run, service: str, exceptions: Iterable[Exempted]) -> None:
    """Raises `Silent` where it does not know an advisory that there is, and `Unreadable`."""
    wanted = {(canonical(one.package), one.version, one.id) for one in exceptions}
    # One version of a package at a time: a list of requirements cannot hold two.
    for package, version in sorted({(package, version) for package, version, _ in wanted}):
        with tempfile.TemporaryDirectory() as folder:
            asked = Path(folder, "requirements.txt")
            asked.write_text(f"{package}=={version}\n")
            said = ask(run, service, f"--requirement={asked}", "--no-deps", "--disable-pip")
        names = {name for one in said.findings if one.package == package for name in one.names}
        if lacking := sorted({id for p, v, id in wanted if (p, v) == (package, version)} - names):
            raise Silent(f"does not know {', '.join(lacking)} of {package} {version}")


def ask_about_all(run: Run, service: str) -> Report:
    """Of what is installed beside this interpreter. Raises `Silent`, and `Unreadable`."""
    report = ask(run, service)
    if not report.audited:
        raise Silent("knows none of the installed packages")
    return report


def judge(report: Report, exceptions: Sequence[Exempted]) -> list[str]:
    """What is wrong, in a line each."""
    wrong = []
    used: set[Exempted] = set()
    for found in report.findings:
        excepting = {
            one
            for one in exceptions
            if canonical(one.package) == found.package and one.id in found.names
        }
        used |= excepting
        if not excepting:
            fixed = f"fixed in {', '.join(found.fixed_in)}" if found.fixed_in else "not fixed"
            others = sorted(found.names - {found.id})
            known_as = f" ({', '.join(others)})" if others else ""
            wrong.append(f"{found.package} {found.version}: {found.id}{known_as}, {fixed}")
    return wrong + [
        f"{one.id} of {one.package} is no longer reported: take it out of docs/advisories.toml"
        for one in exceptions
        if one not in used
    ]


def expired(exceptions: Iterable[Exempted], today: dt.date) -> list[str]:
    return [
        f"the exception for {one.id} of {one.package} ended on {one.expires}: look at it again"
        for one in exceptions
        if one.expires < today
    ]


def audit(text: str, run: Run, today: dt.date) -> tuple[int, list[str]]:
    """The exit code, and what to print."""
    try:
        exceptions = read_exceptions(text)
        if wrong := expired(exceptions, today):
            return 1, wrong
        unasked = []
        for service in SERVICES:
            try:
                ask_as_witness(run, service, exceptions)
                report = ask_about_all(run, service)
            except Silent as why:
                unasked.append(f"{service} {why}")
                continue
            if wrong := judge(report, exceptions):
                return 1, wrong
            return 0, [_clean(service, report, exceptions)]
    except Unreadable as error:
        return 2, [str(error)]
    return 0, [f"not audited: no advisory service could be asked: {'; '.join(unasked)}"]


def _clean(service: str, report: Report, exceptions: Iterable[Exempted]) -> str:
    lived_with = "".join(f"; {one.id} of {one.package} until {one.expires}" for one in exceptions)
    skipped = f"; not audited: {', '.join(report.skipped)}" if report.skipped else ""
    beside = " beside the written exceptions" if lived_with else ""
    return f"{report.audited} packages: {service} knows of nothing{beside}{lived_with}{skipped}"


def pip_audit(arguments: Sequence[str]) -> Ran:
    command = [sys.executable, "-m", "pip_audit", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Ran(-1, "", "")
    return Ran(done.returncode, done.stdout, done.stderr)


def main() -> int:
    code, lines = audit(
        EXCEPTIONS.read_text(encoding="utf-8"), pip_audit, dt.datetime.now(dt.UTC).date()
    )
    for line in lines:
        print(line)
    return code


if __name__ == "__main__":
    sys.exit(main())
