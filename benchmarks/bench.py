"""Measure, side by side: ours, the raw loop and the peers that are installed.

    python benchmarks/bench.py [--only throughput,prefill] [--models 0.6b,3b] [--quick]

Every section writes its result into the JSON file as soon as it has one, so that sections can be run
one at a time and again. Within a section everything compared is measured in one run, in turns, and
a ratio is the median of the ratios of neighbouring measurements. A `--quick` run shows that
everything works; its figures mean nothing, and are marked so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "scripts")]

import peers  # noqa: E402
import prompts  # noqa: E402
from sections import Plan  # noqa: E402

BY_MODEL = ("throughput", "goodput", "prefill", "warm", "busy", "memory")
OF_THE_MACHINE = ("bandwidth", "host")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )

    def names(text: str) -> list[str]:
        return text.split(",")

    every = ",".join(OF_THE_MACHINE + BY_MODEL)
    parser.add_argument("--only", type=names, default=names(every), help=every)
    parser.add_argument("--models", type=names, default=["0.6b", "3b"], help="0.6b,3b,check")
    parser.add_argument(
        "--sides", type=names, default=list(peers.SIDES), help=",".join(peers.SIDES)
    )
    parser.add_argument("--repeats", type=int, help="rounds; else 5, or 3 for the 3B shape")
    parser.add_argument("--tokens", type=int, help="of an answer; else 96, or 48")
    parser.add_argument("--seconds", type=float, help="of a run of goodput (30) or busy (20)")
    parser.add_argument("--clients", type=names, help="of throughput; else 1,4,8,16,32")
    parser.add_argument("--long", type=int, default=4000, help="tokens of prefill's prompt")
    parser.add_argument(
        "--serial-to", type=int, default=8, help="most clients for a peer that serves one at a time"
    )
    parser.add_argument(
        "--busy", type=names, help="processes beside; else 0,1 and one for each core"
    )
    parser.add_argument(
        "--label",
        help="store what is measured beside, not in place of, what is there; says what differs",
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "bench.json")
    parser.add_argument("--folder", type=Path, default=HERE / "results", help="of the models")
    return parser.parse_args()


def plan(options: argparse.Namespace, model: prompts.Model) -> Plan:
    quick = options.quick
    clients = options.clients or (["1", "4"] if quick else ["1", "4", "8", "16", "32"])
    return Plan(
        model=model,
        file=model.file(options.folder),
        quick=quick,
        repeats=options.repeats or (1 if quick else model.repeats),
        tokens=options.tokens or (12 if quick else model.tokens),
        sides=tuple(options.sides),
        seconds=options.seconds,
        long_tokens=options.long,
        clients=tuple(map(int, clients)),
        serial_to=options.serial_to,
        busy=tuple(map(int, options.busy)) if options.busy else (),
    )


def machine() -> dict[str, Any]:
    return {
        "cores": peers.cores(),
        "cpu": _cpu(),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30)),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2] for line in lines if line.startswith("model name")), "")
    return " ".join(name.split()) or platform.machine()


def record(file: Path, section: str, model: str | None, result: dict[str, Any]) -> None:
    """Merge it into what is there, under another name until it is whole."""
    data = json.loads(file.read_text()) if file.exists() else {}
    data |= {"machine": machine(), "versions": peers.versions()}
    sections = data.setdefault("sections", {})
    if model is None:
        sections[section] = result
    else:
        sections.setdefault(section, {})[model] = result
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    part.rename(file)


def measure(options: argparse.Namespace, section: str, model: prompts.Model | None) -> bool:
    """Whether it worked. What fails does not keep the rest from being measured."""
    print(f"── {section}" + (f", {model.title}" if model else ""), flush=True)
    began = time.monotonic()
    try:
        if model is not None:
            result = importlib.import_module(f"sections.{section}").run(plan(options, model))
            result["title"], result["weight_bytes"] = model.title, model.weight_bytes
        elif section == "host":
            from host_cost import costs, host_cost

            result = {"us_per_step": host_cost()}
            print(costs(result["us_per_step"]))
        else:
            result = importlib.import_module(f"sections.{section}").run(quick=options.quick)
    except Exception:  # noqa: BLE001  the other sections are worth measuring all the same
        traceback.print_exc()
        return False
    result["quick"], result["took_seconds"] = options.quick, round(time.monotonic() - began)
    result["instructions"] = peers.instructions()
    key = model.name if model else None
    if options.label and model:
        key, result["title"] = f"{model.name} {options.label}", f"{model.title}: {options.label}"
    record(options.json, section, key, result)
    print(f"   {result['took_seconds']} s", flush=True)
    return True


def main() -> None:
    options = arguments()
    known = prompts.models()
    unknown = [s for s in options.only if s not in OF_THE_MACHINE + BY_MODEL]
    unknown += [m for m in options.models if m not in known]
    unknown += [s for s in options.sides if s not in peers.SIDES]
    if unknown:
        sys.exit(f"no such section, model or side: {', '.join(unknown)}")
    # A native library's abort attaches no debugger, and who stops us stops the servers, too.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    worked = [measure(options, s, None) for s in options.only if s in OF_THE_MACHINE]
    for name in options.models:
        worked += [measure(options, s, known[name]) for s in options.only if s in BY_MODEL]
    print(f"in {options.json}")
    sys.exit(not all(worked))


if __name__ == "__main__":
    main()
