"""What data frames are answered by: the same asker as functions from Python, and a cache of the user's own."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_core.paths import jupyter_data_dir

from .errors import AccessDenied
from .frames.fill import Wiring

if TYPE_CHECKING:  # they are needed once a frame is
    from .notebook.asking import Asker
    from .notebook.classifying import Classifier


def wiring() -> Wiring:
    """For one call on a frame."""
    from .api import session
    from .notebook.schemas import shape_of

    found = session()
    asker = found.asker

    async def ask(body: dict[str, Any]) -> dict[str, Any]:
        return await asker.post("shimmy/v1/chat/completions", await asker.prepared(body))

    def embed(model: str) -> Callable[[list[str]], Awaitable[Sequence[Sequence[float]]]]:
        async def vectors(texts: list[str]) -> Sequence[Sequence[float]]:
            rows: Any = await asker.vectors(texts, model)
            return rows if isinstance(rows, list) else rows.tolist()

        return vectors

    def structure(kind: Any) -> tuple[Mapping[str, Any], Callable[[str], Any]]:
        shape = shape_of(kind)
        return shape.schema, lambda text: shape.plain(shape.value(text))

    return Wiring(
        run=lambda work: found.portal.run(lambda: work),
        ask=ask,
        embed=embed,
        classify=lambda model: _Classes(asker, model),
        resolve=lambda model, task: _resolved(asker, model, task),
        identity=lambda model: _identity(asker, model),
        structure=structure,
        folder=Path(jupyter_data_dir()) / "shimmy_jupyter" / "rows",
    )


class _Classes:
    """One classifier for each list of labels, as what they have in common is asked once."""

    def __init__(self, asker: Asker, model: str) -> None:
        self._asker, self._model = asker, model
        self._made: dict[tuple[str, ...], Classifier] = {}

    async def __call__(self, text: str, labels: Sequence[str]) -> Mapping[str, float]:
        from .notebook.classifying import Classifier

        key = tuple(labels)
        if key not in self._made:
            self._made[key] = Classifier(self._asker, key, model=self._model)
        return (await self._made[key].classify(text)).probabilities


async def _resolved(asker: Asker, model: str | None, task: str) -> str:
    if task == "embed":
        return await asker.embeds(model)
    return await asker.named(model)


async def _identity(asker: Asker, model: str) -> str:
    """What answers depend on: the model's bytes, read if nobody has done so yet, its template, the engine, and
    what a project's lock adds to each request, such as an adapter or a seed.
    """
    added = await asker.prepared({"model": model})
    meant = str(added.pop("model"))
    listed = await asker.get("shimmy/api/models")
    row = next((one for one in listed["models"] if one["id"] == meant), None)
    if row is None:
        return ""
    sha256 = row["sha256"] or await _read(asker, meant)
    if not sha256:
        return ""
    fixed = json.dumps(added, sort_keys=True) if added else ""
    return f"{sha256}:{row['chat_template']}:{listed['engine']}{fixed}"


async def _read(asker: Asker, model: str) -> str | None:
    """None where they cannot be read, or not by whom it is asked for: a model can still be used then."""
    from .notebook.held import verified

    try:
        look = await verified(asker, model)
    except AccessDenied:
        return None
    # As the listing has it from then on: of the first file.
    return None if look["error"] is not None else str(look["result"]["sha256"][0])
