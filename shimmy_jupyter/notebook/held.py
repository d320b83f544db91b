"""What a project pins, where a request has no field for it: vectors and tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ..errors import ModelDrifted, ModelNotFound, from_code
from .display import one_line

if TYPE_CHECKING:
    from .asking import Asker

_POLL = 0.2


@dataclass(frozen=True, slots=True)
class Held:
    """A model that is what a project pins; `adapter` is the id of the one that is pinned with it."""

    id: str
    adapter: str | None = None


async def held(asker: Asker, prepared: Mapping[str, Any]) -> Held:
    """Of a request that has been prepared. Raises `ModelDrifted`, and `AccessDenied` where the bytes would
    have to be read and may not be.
    """
    id, pin = str(prepared["model"]), prepared.get("pin")
    if pin is None:
        return Held(id)
    row = next((one for one in await asker.models() if one["id"] == id), None)
    if row is None:
        raise ModelNotFound(f"there is no model {id!r} any more", param="model")
    digests: Sequence[str] = [] if row["sha256"] is None else [row["sha256"]]
    # The list has the first file's digest only.
    if len(digests) < 1 + len(pin["parts"]):
        look = await verified(asker, id)
        if (error := look["error"]) is not None:
            raise from_code(error["code"], one_line(error["message"]), param=error["param"])
        digests = look["result"]["sha256"]
    if said := _differences(pin, row, digests):
        raise ModelDrifted(f"{id} is not what is pinned: {'; '.join(said)}", param="model")
    return Held(id, prepared.get("adapter"))


def _differences(
    pin: Mapping[str, Any], row: Mapping[str, Any], digests: Sequence[str]
) -> list[str]:
    wanted: list[tuple[str, Any, Any]] = [
        ("size", pin["size"], row["size_bytes"]),
        ("sha256", ", ".join([pin["sha256"], *pin["parts"]]), ", ".join(digests)),
    ]
    if pin["chat_template"] is not None:
        wanted.append(("chat_template", pin["chat_template"], row["chat_template"]))
    return [
        f"{name}: {one} is pinned, {here or 'none'} was found"
        for name, one, here in wanted
        if one != here
    ]


async def verified(asker: Asker, id: str) -> dict[str, Any]:
    """The job that reads all bytes of a model, once it has ended."""
    job = (await asker.post(f"shimmy/api/models/{quote(id, safe='')}/verify", {}))["job"]
    while (look := await asker.get(f"shimmy/api/jobs/{job}"))["state"] == "running":  # noqa: ASYNC110
        await asyncio.sleep(_POLL)
    return look
