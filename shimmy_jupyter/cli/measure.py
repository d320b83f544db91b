"""`shimmy bench`, and what it prints."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from traitlets import TraitError

from ..errors import InvalidValue, ModelNotFound, ShimmyError
from .files import check_writable
from .local import Progress

_FILE = click.Path(dir_okay=False, path_type=Path)
_AT_LEAST_2 = click.IntRange(min=2)


class _Terse(click.Command):
    """Says in one line what is wrong with an option, without the usage."""

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        try:
            return super().make_context(*args, **more)
        except click.UsageError as error:
            error.ctx = None
            raise

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            error.ctx = None
            raise


def _clients(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int, ...]:
    from ..bench import parse_clients

    try:
        return parse_clients(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _target(_context: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    """A file that can be written later, and matplotlib with which to."""
    if path is None:
        return None
    check_writable(path)
    if option.name == "plot":
        if path.suffix not in {".png", ".svg"}:
            raise click.BadParameter(f"{str(path)!r} ends neither in .png nor in .svg")
        if find_spec("matplotlib") is None:
            raise click.BadParameter("matplotlib is not installed: pip install matplotlib")
    return path


@click.command(cls=_Terse)
@click.argument("model", required=False)
@click.option("--clients", default="1,2,4,8", show_default=True, callback=_clients, help="At once.")
@click.option("--tokens", type=_AT_LEAST_2, default=64, show_default=True, help="Of an answer.")
@click.option(
    "--prompt-tokens", type=_AT_LEAST_2, default=256, show_default=True, help="Of a prompt."
)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Rounds.")
@click.option(
    "--isolation", type=click.Choice(["process", "none"]), help="Default: Jupyter's configuration."
)
@click.option("--json", "as_json", type=_FILE, callback=_target, help="Every measurement, as JSON.")
@click.option("--plot", type=_FILE, callback=_target, help="A picture; needs matplotlib.")
def bench(*, as_json: Path | None, plot: Path | None, isolation: str | None, **plan: Any) -> None:
    """Measure how fast MODEL, or the one with * in `shimmy models`, answers on this machine."""
    from ..bench import Plan, measure
    from ..config import load_config, load_system_config, settings

    progress = Progress()
    try:
        chosen = settings(load_config(), system=load_system_config(), kernel=True)
        if isolation is not None:
            chosen = dataclasses.replace(chosen, isolation=isolation)
        found = asyncio.run(measure(Plan(**plan), chosen, progress.say))
    except KeyboardInterrupt:
        progress.end()
        click.echo("interrupted: nothing was reported or written", err=True)
        raise click.exceptions.Exit(130) from None
    except TraitError as error:
        raise click.ClickException(f"in Jupyter's configuration: {error}") from error
    except (InvalidValue, ModelNotFound) as error:
        progress.end()
        raise click.BadParameter(error.message, param_hint=error.param or "MODEL") from error
    except ShimmyError as error:
        progress.end()
        raise click.ClickException(f"{error.message} [{error.code}]") from error
    progress.end()
    click.echo(report(found))
    _write(found, as_json, plot)


def _write(found: dict[str, Any], as_json: Path | None, plot: Path | None) -> None:
    try:
        if as_json is not None:
            as_json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if plot is not None:
            _draw(found, plot)
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from error


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def report(found: dict[str, Any]) -> str:
    """What `bench` prints. What could not be measured is a dash, or among what was left out."""
    from ..bench import layout

    model, chosen, machine = found["model"], found["settings"], found["machine"]
    head = ["clients", "tokens/s", "each", "first ms p50", "p95", "gap ms p50", "p95", "p99"]
    rows = [
        [
            str(row["clients"]),
            *(_number(row[key]) for key in ("tokens_per_second", "stream_tokens_per_second")),
            *(_number(value) for value in row["first_token_ms"].values()),
            *(_number(value, 2) for value in row["inter_token_ms"].values()),
        ]
        for row in found["throughput"]
    ]
    return "\n".join(
        [
            f"{model['id']}: {model['description']}, {model['size_bytes'] / 1e6:,.1f} MB of weights",
            f"{machine['processor']}, {machine['usable_cores']} of {machine['cores']} cores; "
            f"{machine['os']}",
            f"Python {machine['python']}, llama-cpp-python {machine['llama_cpp_python']}, "
            f"{model['threads']} threads, isolation {chosen['isolation']}",
            "",
            layout(head, rows),
            "",
            f"{chosen['tokens']} tokens to prompts of {chosen['prompt_tokens']}, all at once, in "
            f"{chosen['repeats']} rounds.",
            "tokens/s: of all clients, prompts included; each: of one stream after its first text;",
            "first: from the request to its first text; gap: between texts of one stream.",
            *_remarks(found),
            "",
            *_facts(found),
        ]
    )


def _remarks(found: dict[str, Any]) -> Iterator[str]:
    model, chosen, rows = found["model"], found["settings"], found["throughput"]
    values = [
        v for row in rows for k in ("first_token_ms", "inter_token_ms") for v in row[k].values()
    ]
    if None in values:
        yield "–: too few values; p95 needs 20, p99 100 (more --repeats or --tokens)."
    if early := sum(row["ended_early"] for row in rows):
        total, tokens = sum(r["answers"] for r in rows), sum(r["tokens"] for r in rows)
        yield f"{early} of {total} answers ended early, by themselves; {tokens} tokens came in all."
    if (pieces := sum(r["pieces"] for r in rows)) < (tokens := sum(r["tokens"] for r in rows)):
        yield f"{tokens - pieces} of {tokens} tokens had no text of their own, so their gaps are one."
    each = chosen["prompt_tokens"] + chosen["tokens"]
    most = min(chosen["max_sequences"], model["kv_tokens"] // each)
    if max(chosen["clients"]) > most:
        yield f"At most {most} of these run together; further clients waited (see ShimmyEngine)."


def _facts(found: dict[str, Any]) -> Iterator[str]:
    memory, prefill, warm = found["memory"], found["prefill"], found["warm_prefix"]
    yield f"load         {found['load_seconds']:.2f} s; the file may have been in the system's cache"
    sizes = [memory[key] for key in ("loaded_bytes", "at_end_bytes")]
    grown = [None if v is None else (v - (memory["before_bytes"] or 0)) / 1e6 for v in sizes]
    whose = (
        "of the engine's process" if memory["isolated"] else "more in this process, engine included"
    )
    yield f"memory       {_number(grown[0])} MB loaded, {_number(grown[1])} MB at the end, {whose}"
    yield (
        f"prefill      {_number(prefill['tokens_per_second'])} tokens/s: {prefill['prompt_tokens']} "
        f"tokens alone, and the first of the answer, in {prefill['seconds'] * 1e3:,.1f} ms"
    )
    if warm:
        yield (
            f"warm prefix  {warm['seconds'] * 1e3:,.1f} ms to the first token of the same prompt: "
            f"{warm['times_sooner']:.1f} times sooner, {warm['cached_tokens']} tokens reused"
        )
    if found["bandwidth_bytes_per_second"]:
        speed = found["bandwidth_bytes_per_second"] / 1e9
        yield f"bandwidth    {speed:,.1f} GB/s read by {found['model']['threads']} threads"
    if allowed := found["limit"]:
        share = allowed["share_reached"]
        yield (
            f"limit        {allowed['tokens_per_second']:,.1f} tokens/s of one stream"
            + ("" if share is None else f", of which {share:.0%} were reached")
            + "; assumes that every token reads all weights once, from memory, and nothing else"
        )
    for name, why in found["left_out"].items():
        yield f"left out     {name}: {why}"


def _draw(found: dict[str, Any], file: Path) -> None:
    figure = importlib.import_module("matplotlib.figure").Figure((8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = found["throughput"]
    lines = [
        (left, "all", [row["tokens_per_second"] for row in rows]),
        (left, "each", [row["stream_tokens_per_second"] for row in rows]),
        (right, "first, p50", [row["first_token_ms"]["p50"] for row in rows]),
        (right, "gap, p50", [row["inter_token_ms"]["p50"] for row in rows]),
        (right, "gap, p99", [row["inter_token_ms"]["p99"] for row in rows]),
    ]
    for axes, label, values in lines:
        points = [(r["clients"], v) for r, v in zip(rows, values, strict=True) if v is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=label)
    right.set_yscale("log")
    for axes, title in ((left, "tokens/s"), (right, "ms")):
        axes.set(xlabel="clients", title=title, xticks=[row["clients"] for row in rows])
        axes.legend(frameon=False)
    figure.suptitle(f"{found['model']['id']} on {found['machine']['processor']}")
    figure.savefig(file)
