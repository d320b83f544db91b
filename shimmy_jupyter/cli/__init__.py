"""`shimmy`: the engine from a terminal."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from .. import __version__
from ..notebook.client import events
from ..notebook.display import clean

from .local import Local
from .measure import bench


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="shimmy")
def main() -> None:
    """A local language model, the one that your Jupyter server would run."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def models(*, as_json: bool) -> None:
    """List the models that this machine offers."""
    with Local() as local:
        found = local.get("shimmy/v1/models")["data"]
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    width = max(len(model["id"]) for model in found)
    for model in found:
        size = model["shimmy"]["size_bytes"] / (1 << 20)
        click.echo(f"{model['id']:<{width}}  {size:9.1f} MB  {model['owned_by']}")


@main.command()
@click.argument("prompt")
@click.option(
    "--model", default="self-test", show_default=True, help="A name from `shimmy models`."
)
@click.option("--system", help="A system message in front of the prompt.")
@click.option("--max-tokens", type=click.IntRange(min=0), help="Most tokens to generate.")
@click.option(
    "--temperature", type=click.FloatRange(0, 2), help="0 is greedy. Default: the engine's."
)
@click.option("--seed", type=int, help="For the same answer to the same question.")
@click.option("--stats", is_flag=True, help="Print tokens, tokens/s and time to first token.")
def generate(prompt: str, *, stats: bool, system: str | None, **options: Any) -> None:
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
    last: dict[str, Any] = {}
    with Local() as local, local.stream("shimmy/v1/chat/completions", body) as chunks:
        for item in events(chunks):
            for choice in item["choices"]:
                thought = clean(choice["delta"].get("reasoning_content", ""))
                if thought:
                    click.echo(thought, nl=False, err=True)
                click.echo(clean(choice["delta"].get("content", "")), nl=False)
            last = item
    click.echo()
    if stats:
        click.echo(json.dumps(last["usage"] | last["shimmy"]), err=True)


main.add_command(bench)
