"""`shimmy`: the engine from a terminal."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from .. import __version__
from ..models.sources import SELF_TEST
from ..notebook.client import events
from ..notebook.display import clean
from .audit import audit_command
from .checklist import doctor_command
from .follow import follow, path, said
from .here import addressed
from .library import models, probe, pull, verify
from .local import Local
from .lock import lock_command
from .measure import bench


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="shimmy")
def main() -> None:
    """A local language model, the one that your Jupyter server would run."""


@main.command()
@click.argument("prompt")
@click.option(
    "--model",
    help="A name that shimmy.lock has, or one from `shimmy models`, where the one with * answers if "
    "none is named.",
)
@click.option("--profile", help="Of shimmy.lock. Default: SHIMMY_PROFILE.")
@click.option("--system", help="A system message in front of the prompt.")
@click.option("--max-tokens", type=click.IntRange(min=0), help="Most tokens to generate.")
@click.option(
    "--temperature", type=click.FloatRange(0, 2), help="0 is greedy. Default: the engine's."
)
@click.option("--seed", type=int, help="For the same answer to the same question.")
@click.option("--stats", is_flag=True, help="Print tokens, tokens/s and time to first token.")
def generate(
    prompt: str, *, stats: bool, system: str | None, profile: str | None, **options: Any
) -> None:
    """Answer PROMPT; "-" reads it from standard input."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise click.UsageError("the prompt is empty")
    messages = [{"role": "system", "content": system}] if system else []
    body = {name: value for name, value in options.items() if value is not None}
    if "seed" in body:
        body["reproducible"] = True
    body |= {
        "messages": [*messages, {"role": "user", "content": text}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with Local() as local:
        body = addressed(local, body, profile)
        if "model" not in body:
            body["model"] = local.get("shimmy/api/models")["default"]
            if body["model"] == SELF_TEST:
                said(
                    f"{SELF_TEST} answers, which recites docstrings and nothing else; for a real model: "
                    "shimmy models --suggest"
                )
        # What is pinned is compared before it is loaded, which the request alone does.
        if "pin" not in body:
            # First, as it may take a while: then it is said how far it is.
            follow(local, local.post(f"{path(body['model'])}/load", {})["job"])
        last = _answer(local, body)
    click.echo()
    if stats:
        click.echo(json.dumps(last["usage"] | last["shimmy"]), err=True)


def _answer(local: Any, body: dict[str, Any]) -> dict[str, Any]:
    """Print it as it comes. The last item says what it cost."""
    last: dict[str, Any] = {}
    with local.stream("shimmy/v1/chat/completions", body) as chunks:
        for item in events(chunks):
            for choice in item["choices"]:
                thought = clean(choice["delta"].get("reasoning_content", ""))
                if thought:
                    click.echo(thought, nl=False, err=True)
                click.echo(clean(choice["delta"].get("content", "")), nl=False)
            last = item
    return last


for command in (audit_command, bench, doctor_command, lock_command, models, probe, pull, verify):
    main.add_command(command)
