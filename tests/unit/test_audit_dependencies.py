"""scripts/audit_dependencies.py, with pip-audit's answers as it writes them.

Cases: nothing known; excepted; excepted by another of its names; not excepted; another package's
exception; an expired exception, also where nobody can be asked; its last day; one that is no longer
needed; a service that cannot be reached, is slow, fails, does not know the packages, or not what is
excepted; the other one then; neither; garbage; a crash; what is no exceptions file; the file that
there is; no package of the front end without an audit of its own.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import audit_dependencies as audit
import pytest
from audit_dependencies import Ran

ROOT = Path(__file__).parent.parent.parent
TODAY = dt.date(2026, 12, 1)
EXCEPTED = """
[[exception]]
id = "CVE-2025-69872"
package = "DiskCache"
version = "5.6.3"
reason = "never constructed"
reviewed = 2026-11-21
expires = 2026-12-01
"""
KNOWN = {"id": "GHSA-w8v5-vhqr-4h9v", "aliases": ["CVE-2025-69872"], "fix_versions": []}
OTHER = {"id": "PYSEC-2026-1", "aliases": ["CVE-2026-1"], "fix_versions": ["6.7", "6.6.2"]}


def report(skipped: Sequence[str] = (), **vulnerable: list[dict[str, Any]]) -> Ran:
    known = [
        {"name": name, "version": "5.6.3", "vulns": vulns} for name, vulns in vulnerable.items()
    ]
    unknown = [{"name": name, "skip_reason": "Dependency not found"} for name in skipped]
    said = json.dumps({"dependencies": [*known, *unknown], "fixes": []})
    return Ran(int(any(vulnerable.values())), said, "Found some\n")


UNREACHABLE = Ran(
    1,
    "",
    "Traceback (most recent call last):\n  …\nrequests.exceptions.ConnectionError: "
    "HTTPSConnectionPool(host='…', port=443): Max retries exceeded with url: /v1/query",
)
WITNESS = report(diskcache=[KNOWN])
CLEAN = report(diskcache=[KNOWN], tornado=[])


class Service:
    """Stands for pip-audit: for each service what it answers, about the exceptions and about all."""

    def __init__(self, pypi: tuple[Ran, Ran], osv: tuple[Ran, Ran] = (UNREACHABLE, CLEAN)) -> None:
        self._answers = {"pypi": pypi, "osv": osv}
        self.asked: list[str] = []

    def __call__(self, arguments: Sequence[str]) -> Ran:
        (service,) = [
            argument.removeprefix("--vulnerability-service=")
            for argument in arguments
            if argument.startswith("--vulnerability-service=")
        ]
        files = [a for a in arguments if a.startswith("--requirement=")]
        self.asked.append(f"{service} {'exceptions' if files else 'all'}")
        if files:
            said = Path(files[0].removeprefix("--requirement=")).read_text()
            assert said == "diskcache==5.6.3\n"
            assert {"--no-deps", "--disable-pip"} <= set(arguments)
        return self._answers[service][0 if files else 1]


def run(everything: Ran, text: str = EXCEPTED, today: dt.date = TODAY) -> tuple[int, str]:
    code, lines = audit.audit(text, Service((WITNESS, everything)), today)
    return code, "\n".join(lines)


def test_excepted() -> None:
    assert run(CLEAN) == (
        0,
        "2 packages: pypi knows of nothing beside the written exceptions; "
        "CVE-2025-69872 of DiskCache until 2026-12-01",
    )
    by_id = EXCEPTED.replace("CVE-2025-69872", KNOWN["id"])
    assert run(CLEAN, by_id)[0] == 0


def test_nothing_is_excepted_and_nothing_known() -> None:
    service = Service((UNREACHABLE, report(tornado=[], jinja2=[])))
    assert audit.audit("", service, TODAY) == (0, ["2 packages: pypi knows of nothing"])
    assert service.asked == ["pypi all"]


def test_not_excepted() -> None:
    found = report(diskcache=[KNOWN], tornado=[OTHER])
    assert run(found) == (
        1,
        "tornado 5.6.3: PYSEC-2026-1 (CVE-2026-1), fixed in 6.7, 6.6.2",
    )
    code, said = run(report(diskcache=[KNOWN, {**OTHER, "fix_versions": []}]))
    assert (code, said) == (1, "diskcache 5.6.3: PYSEC-2026-1 (CVE-2026-1), not fixed")


def test_an_exception_is_for_its_package_alone() -> None:
    code, said = run(report(diskcache=[KNOWN], other=[KNOWN]))
    assert code == 1
    assert said.startswith("other 5.6.3: GHSA-w8v5-vhqr-4h9v (CVE-2025-69872), not fixed")


@pytest.mark.parametrize("everything", [report(tornado=[]), report(tornado=[], diskcache=[])])
def test_an_exception_that_nothing_needs(everything: Ran) -> None:
    code, said = run(everything)
    assert code == 1
    assert "CVE-2025-69872 of DiskCache is no longer reported" in said


@pytest.mark.parametrize("reached", [True, False])
def test_an_expired_exception(reached: bool) -> None:
    service = Service((WITNESS, CLEAN) if reached else (UNREACHABLE, UNREACHABLE))
    code, lines = audit.audit(EXCEPTED, service, TODAY + dt.timedelta(days=1))
    assert (code, len(lines)) == (1, 1)
    assert "ended on 2026-12-01" in lines[0]
    assert service.asked == []


SLOW = Ran(-1, "", "")
BUSY = Ran(1, "", "requests.exceptions.HTTPError: 503 Server Error: Service Unavailable for url")
TLS = Ran(1, "", "requests.exceptions.SSLError: HTTPSConnectionPool(…): certificate verify failed")
WORDS = Ran(1, "", "ERROR:pip_audit._cli:Could not connect to PyPI's vulnerability feed")
INDEX_ONLY = report(skipped=["diskcache"])
KNOWS_NOTHING = report(diskcache=[])


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (UNREACHABLE, "cannot be reached"),
        (BUSY, "cannot be reached"),
        (TLS, "cannot be reached"),
        (WORDS, "cannot be reached"),
        (SLOW, "does not answer in time"),
        (INDEX_ONLY, "does not know CVE-2025-69872 of diskcache 5.6.3"),
        (KNOWS_NOTHING, "does not know CVE-2025-69872 of diskcache 5.6.3"),
        (report(other=[KNOWN]), "does not know CVE-2025-69872 of diskcache 5.6.3"),
    ],
)
def test_nobody_can_be_asked(answer: Ran, why: str) -> None:
    service = Service((answer, CLEAN), (answer, CLEAN))
    code, lines = audit.audit(EXCEPTED, service, TODAY)
    assert code == 0
    assert lines == [
        f"not audited: no advisory service could be asked: pypi {why}; osv {why}",
    ]
    assert service.asked == ["pypi exceptions", "osv exceptions"]  # about nothing else


def test_lost_on_the_way() -> None:
    service = Service((WITNESS, UNREACHABLE), (WITNESS, report(skipped=["diskcache", "tornado"])))
    code, (line,) = audit.audit(EXCEPTED, service, TODAY)
    assert (code, line.startswith("not audited: ")) == (0, True)
    assert line.endswith("pypi cannot be reached; osv knows none of the installed packages")


def test_the_other_service_then() -> None:
    service = Service((INDEX_ONLY, CLEAN), (WITNESS, report(diskcache=[KNOWN], tornado=[OTHER])))
    code, lines = audit.audit(EXCEPTED, service, TODAY)
    assert (code, len(lines)) == (1, 1)
    assert service.asked == ["pypi exceptions", "osv exceptions", "osv all"]


def test_what_a_service_does_not_know_is_said() -> None:
    code, said = run(report(["shimmy_jupyter", "another"], diskcache=[KNOWN]))
    assert code == 0
    assert said.endswith("; not audited: another, shimmy-jupyter")


@pytest.mark.parametrize(
    "garbage",
    [
        Ran(0, "No known vulnerabilities found", ""),
        Ran(0, "", ""),
        Ran(1, "", "No module named pip_audit"),
        Ran(2, CLEAN.out, "pip-audit: error: unrecognized arguments"),
        Ran(-11, "", "Segmentation fault"),
        Ran(0, "[]", ""),
        Ran(0, "{}", ""),
        Ran(0, "null", ""),
        Ran(0, '{"dependencies": [{"name": "a", "version": "1"}]}', ""),
        Ran(0, '{"dependencies": [{"name": "a", "version": "1", "vulns": [{}]}]}', ""),
        Ran(0, '{"dependencies": [1]}', ""),
        Ran(0, '{"dependencies": [{"name": null, "version": "1", "vulns": [{}]}]}', ""),
    ],
)
def test_garbage_is_an_error(garbage: Ran) -> None:
    for answers in ((garbage, CLEAN), (WITNESS, garbage)):
        code, lines = audit.audit(EXCEPTED, Service(answers), TODAY)
        assert (code, len(lines)) == (2, 1)
        assert "pip-audit" in lines[0]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[[exception", "no TOML"),
        ("ignore = ['CVE-1']", "nothing else"),
        ("exception = 1", "nothing else"),
        ("[[exception]]\nid = 'CVE-1'", "exception 1 must have id, package"),
        (EXCEPTED + "more = 1", "no other keys"),
        (EXCEPTED.replace('"never constructed"', '" "'), "reason must be a text"),
        (EXCEPTED.replace('"5.6.3"', "5.6"), "version must be a text"),
        (EXCEPTED.replace("= 2026-12-01", '= "2026-12-01"'), "expires must be a day"),
        (EXCEPTED.replace("= 2026-12-01", "= 2026-12-01T00:00:00"), "expires must be a day"),
        (EXCEPTED.replace("= 2026-12-01", "= 2027-11-23"), "within a year"),
        (EXCEPTED.replace("= 2026-12-01", "= 2026-11-21"), "within a year"),
    ],
)
def test_what_is_no_exceptions_file(text: str, wrong: str) -> None:
    service = Service((WITNESS, CLEAN))
    code, (line,) = audit.audit(text, service, TODAY)
    assert (code, service.asked) == (2, [])
    assert wrong in line


def test_the_exceptions_that_there_are() -> None:
    (one,) = audit.read_exceptions(audit.EXCEPTIONS.read_text())
    assert (one.id, one.package) == ("CVE-2025-69872", "diskcache")
    page = (ROOT / "docs" / "security.md").read_text()
    assert one.id in page
    assert str(one.expires) in page


def test_what_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real pip-audit understands its arguments; its services are out of reach."""
    pytest.importorskip("pip_audit")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    exceptions = audit.EXCEPTIONS.read_text()
    (one,) = audit.read_exceptions(exceptions)
    code, lines = audit.audit(exceptions, audit.pip_audit, one.reviewed)
    assert (code, lines) == (
        0,
        [
            "not audited: no advisory service could be asked: pypi cannot be reached; "
            "osv cannot be reached"
        ],
    )


def test_the_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(
        r"^audit: .*\n\t\$\(BIN\)/python scripts/audit_dependencies\.py$", makefile, re.MULTILINE
    )


def test_there_is_no_front_end_package_to_audit() -> None:
    """Once there is one, `npm audit` belongs beside pip-audit."""
    assert not [*ROOT.glob("package*.json"), *ROOT.glob("labextension/package*.json")]
