"""Write docs/performance.md and its plots from the JSON of the last measurements.

    python benchmarks/report.py [--json FILE] [--startup FILE] [--page FILE]

What was not measured is said to be so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pages

HERE = Path(__file__).parent
SECTIONS = {
    "throughput": "What reaches clients",
    "goodput": "Goodput",
    "prefill": "A long prompt beside running streams",
    "warm": "A warm prefix",
    "busy": "A busy machine",
    "memory": "Memory",
}
INTRODUCTION = """\
Made by `make bench`; do not edit. Ratios carry over to other machines, the figures beside them do
not. Everything in a table was measured side by side in one run, in turns, and a ratio is the median
of those of neighbouring measurements (in brackets: the least and the most).

The client is a bare socket client in a process of its own. All sides have the same model, prompts of
the same tokens, answers of the same length, samplers, room for context and number of slots; no two
prompts have a beginning in common except where that is the question. *shimmy* is a Jupyter server with
its authenticated handlers, and chooses its threads itself. *raw loop* is `llama_decode` and the same
sampler chains, nothing else. *llama-cpp-python* is its high-level API without HTTP, *llama_cpp.server*
its server, told not to interrupt requests; both serve one request at a time. *xllamacpp* is
llama-server's scheduler in a Python process, *llama-server* the program itself. Unless said otherwise they
have a thread for each core. xllamacpp is published for any processor with AVX2, ours and the other peers are
compiled on the machine: where these compute with more, a ratio to xllamacpp tells of the builds, and where all
have AVX2 of the schedulers.

The models have random weights in the shape of real ones, so they run at the speed of these; they never
end an answer by themselves, and a client can count their tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description="docs/performance.md from the last measurements")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "bench.json")
    parser.add_argument("--startup", type=Path, default=HERE / "results" / "startup.json")
    parser.add_argument("--frames", type=Path, default=HERE / "results" / "frames.json")
    default = HERE.parent / "docs" / "performance.md"
    parser.add_argument("--page", type=Path, default=default)
    parser.add_argument("--plots", default="plots", help="their folder, beside the page")
    parser.add_argument("--title", help="for a page beside the usual one, of another machine")
    parser.add_argument("--measured-only", action="store_true", help="without empty sections")
    options = parser.parse_args()
    found = _read(options.json)
    if frames := _read(options.frames):
        found["frames"] = frames
    folder = options.page.parent / options.plots
    text = page(found, _read(options.startup), folder)
    if options.title:
        text = text.replace("# Performance", f"# {options.title}", 1)
    if options.measured_only:
        text = _measured(text)
    options.page.write_text(text)
    print(f"written to {options.page}")


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file.exists() else {}


def _measured(text: str) -> str:
    head, *sections = text.rstrip("\n").split("\n\n## ")
    kept = [one for one in sections if "\n\nNot measured" not in one]
    return "\n\n## ".join([head, *kept]) + "\n"


def page(found: dict[str, Any], startup: dict[str, Any], plots: Path) -> str:
    sections = found.get("sections", {})
    bandwidth = sections.get("bandwidth", {}).get("gb_per_second")
    parts = ["# Performance", INTRODUCTION, _machine(found, bandwidth)]
    for name, title in SECTIONS.items():
        parts.append(f"## {title}")
        by_model = sections.get(name)
        if not by_model:
            parts.append("Not measured.")
            continue
        for model, result in by_model.items():
            parts += _section(name, model, result, bandwidth, plots)
    parts += ["## A data frame", pages.frames(found.get("frames"))]
    parts += ["## Constraints", pages.constraints(sections.get("constraints"))]
    parts += ["## Answers that copy", pages.lookup(sections.get("lookup"))]
    parts += ["## What a step costs besides the model", _host(sections.get("host"))]
    parts += ["## What the extension adds to a Jupyter server's start", _startup(startup)]
    return "\n\n".join(parts) + "\n"


def _section(
    name: str, model: str, result: dict[str, Any], bandwidth: float | None, plots: Path
) -> list[str]:
    parts = [f"### Random weights in {result['title']}"]
    if result["quick"]:
        parts.append("**A quick run: these figures mean nothing.**")
    if "remark" in result:  # by whoever ran it: what was different about the run
        parts.append(f"*{result['remark']}*")
    if "instructions" in result:
        builds = "; ".join(f"{name}: {what}" for name, what in result["instructions"].items())
        parts.append(f"Builds compute with: {builds}.")
    if name != "memory":
        parts.append(pages.limit_line(result, bandwidth))
    parts.append(getattr(pages, name)(result, bandwidth) + pages.skipped(result))
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no plot of {name}: matplotlib is not installed", file=sys.stderr)
        return parts
    import plots as drawing

    if name in drawing.DRAWN:
        file = plots / f"{name}-{model.replace(' ', '-')}.svg"
        drawing.DRAWN[name](result, pages.steps(result, bandwidth), file)
        parts.append(f"![{SECTIONS[name]}: {result['title']}]({plots.name}/{file.name})")
    return parts


def _machine(found: dict[str, Any], bandwidth: float | None) -> str:
    machine = found.get("machine")
    if machine is None:
        return "Nothing has been measured yet."
    versions = ", ".join(
        f"{name} {version or '(not installed)'}" for name, version in found["versions"].items()
    )
    reads = f"{bandwidth:.1f} GB/s read by all cores" if bandwidth else "its speed was not measured"
    return (
        f"Machine: {machine['cores']} cores ({machine['cpu']}), {machine['memory_gib']} GiB of memory "
        f"({reads}), {machine['system']}, Python {machine['python']}.\nVersions: {versions}.\n\n"
        "The physical limit beside the figures is memory's: a step reads all weights once, however "
        "many sequences are in it. From some number of sequences on, arithmetic is the narrower "
        "limit, and the raw loop shows where."
    )


def _host(host: dict[str, Any] | None) -> str:
    if host is None:
        return "Not measured."
    by_mode = host["us_per_step"]
    counts = list(next(iter(by_mode.values())))
    rows = [[mode, *(f"{by_rows[n]:.0f}" for n in counts)] for mode, by_rows in by_mode.items()]
    return (
        "Microseconds a step, with a backend that decodes in no time, through streams, server-sent "
        "events, tornado's HTTP server and a socket. In lockstep nothing overlaps and nothing is sent "
        "together; without a socket the events' bytes are made and nobody sends them: the rest is "
        "tornado's and the system's; flat out, what has gathered goes in one write, as it does when the "
        "engine is faster than the reader.\n\n" + pages.table(["sequences", *counts], rows)
    )


def _startup(startup: dict[str, Any]) -> str:
    if not startup:
        return "Not measured."
    return (
        f"{startup['added_seconds']:+.3f} s and {startup['added_mib']:+.1f} MiB (medians of "
        f"{startup['starts']} starts each, in turn). The engine is loaded when somebody first asks."
    )


if __name__ == "__main__":
    main()
