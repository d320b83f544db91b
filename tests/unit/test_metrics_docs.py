"""`docs/metrics.md` against the registry and the schemas, in both directions.

Cases: names, types and labels of the table are those that are registered, and the other way round; every
metric has a meaning there; each query and alert is about metrics and labels that exist; each dependency of
health is described, and no other; each event.
"""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from shimmy_jupyter import health
from shimmy_jupyter.server.events import ACT, HEAD, REQUEST
from shimmy_jupyter.server.metrics import Metrics

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": (), "gauge": ()}


def described() -> dict[str, tuple[str, tuple[str, ...]]]:
    rows = re.findall(r"^\| `(shimmy_\w+)` \| (\w+) \| (.*?) ?\| (.+) \|$", PAGE, re.MULTILINE)
    assert all(len(meaning) > 10 for *_, meaning in rows)
    return {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _ in rows}


def registered() -> dict[str, tuple[str, tuple[str, ...]]]:
    metrics = Metrics(CollectorRegistry(auto_describe=True))
    labelled = {
        one._name: one._labelnames for one in vars(metrics).values() if hasattr(one, "_labelnames")
    } | {one._name: one._labelnames for one in metrics.jobs.values()}
    return {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            tuple(labelled.get(family.name, ())),
        )
        for family in metrics.describe()
    }


def test_the_table_is_the_registry() -> None:
    assert described() == registered()


def test_what_is_collected_is_what_is_described() -> None:
    metrics = Metrics(CollectorRegistry(auto_describe=True))
    collected = [(family.name, family.type, family.documentation) for family in metrics.collect()]
    said = [(family.name, family.type, family.documentation) for family in metrics.describe()]
    assert sorted(collected) == sorted(said)
    assert all(documentation for *_, documentation in said)


def test_queries_and_alerts_are_about_what_exists() -> None:
    known = registered()
    allowed = {
        name + suffix: labels
        for name, (kind, labels) in known.items()
        for suffix in _SUFFIXES[kind] or ("",)
    }
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", PAGE, re.DOTALL))
    used = re.findall(r"(shimmy_\w+)(?:\{(\w+)=)?", blocks)
    assert len(used) > 8
    for name, label in used:
        assert name in allowed, name
        assert not label or label in allowed[name], (name, label)


def test_every_dependency_of_health() -> None:
    section = PAGE[PAGE.index("## Health") : PAGE.index("## Events")]
    names = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    source = Path(health.__file__).read_text()
    assert names == re.findall(r'^        "(\w+)": _\w+\(', source, re.MULTILINE)
    assert f"more than {health.STALLED:.0f} s" in section
    assert f"{health.LEAST_FREE // 10**6} MB" in section
    assert f"{health._MANY} records" in section


def test_every_event() -> None:
    assert re.findall(r"^\| `(https://\S+)` \|", PAGE, re.MULTILINE) == [REQUEST, ACT, HEAD]
