"""Ollama's folder: `manifests/<registry>/<namespace>/<model>/<tag>` is JSON that lists layers, and a
layer is `blobs/sha256-<digest>`. Of a manifest only what is used here is read, and that has its type.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from .peek import Kind, Problem, attempt, kind_of, read
from .scan import Disk, File, join, why

Param = bool | int | float | str | tuple[str, ...]
T = TypeVar("T")

_LAYERS = {
    f"application/vnd.ollama.image.{kind}": kind
    for kind in ("model", "template", "params", "adapter", "projector", "system")
}
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_PARAM = re.compile(r"[a-z][a-z0-9_]{0,63}")
_MANIFEST_BYTES, _PARAMS_BYTES, _TEXT_BYTES = 256 << 10, 64 << 10, 256 << 10
_MOST_LAYERS, _MOST_PARAMS, _LONGEST = 256, 64, 1024


@dataclass(frozen=True, slots=True)
class Layer:
    """A blob of `size` bytes with this SHA-256, in 64 hex digits."""

    kind: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class OllamaModel:
    """What a manifest stands for. `names` are registry, namespace, model and tag as the disk has
    them, `manifest` the manifest's path. `size_bytes` is the model's: on the disk, or else by the
    manifest. `changed` is seconds since 1970. `problem` says what cannot be used of it, if so.
    """

    names: tuple[str, str, str, str]
    manifest: str
    path: Path
    sha256: str
    size_bytes: int
    changed: float
    kind: Kind
    template: str | None
    system: str | None
    params: tuple[tuple[str, Param], ...]
    adapters: tuple[Path, ...]
    projector: Path | None
    problem: str | None


class Malformed(Exception):
    """What was read is not what it should be; the message says how."""


def models(disk: Disk, root: str) -> Iterator[OllamaModel]:
    """By name. `root` is resolved. A manifest that does not say which file to load is a warning."""
    manifests = join(root, "manifests")
    for registry in disk.folders(manifests):
        for namespace in disk.folders(join(manifests, registry)):
            for model in disk.folders(join(manifests, registry, namespace)):
                folder = join(manifests, registry, namespace, model)
                for entry in disk.entries(folder):
                    if entry.type == "folder" or not (file := disk.file(folder, entry, root)):
                        continue
                    found = _model(disk, root, file, (registry, namespace, model, entry.name))
                    if isinstance(found, Problem):
                        disk.warn(join(folder, entry.name), found.reason)
                    else:
                        yield found


def _model(
    disk: Disk, root: str, manifest: File, names: tuple[str, str, str, str]
) -> OllamaModel | Problem:
    layers = attempt(disk, "manifest", manifest, _MANIFEST)
    if isinstance(layers, Problem):
        return layers
    by_kind: dict[str, list[Layer]] = {kind: [] for kind in _LAYERS.values()}
    for layer in layers:
        by_kind[layer.kind].append(layer)
    if len(by_kind["model"]) != 1 or len(by_kind["projector"]) > 1:
        counts = f"{len(by_kind['model'])} models and {len(by_kind['projector'])} projectors"
        return Problem(f"lists {counts}, where one of each can be used")
    (model,) = by_kind["model"]
    blobs = _Blobs(disk, root)
    path, file = blobs.find(model)
    if path is None:
        return Problem(blobs.problems[0])
    return OllamaModel(
        names=names,
        manifest=manifest.path,
        path=path,
        sha256=model.sha256,
        size_bytes=file.size if file else model.size,
        changed=(file or manifest).changed,
        kind=blobs.read(model, kind_of) or "unknown",
        template=blobs.last(by_kind["template"], _TEXT),
        system=blobs.last(by_kind["system"], _TEXT),
        params=blobs.last(by_kind["params"], _PARAMS) or (),
        adapters=blobs.paths(by_kind["adapter"]),
        projector=next(iter(blobs.paths(by_kind["projector"])), None),
        problem=blobs.problems[0] if blobs.problems else None,
    )


class _Blobs:
    """The files of layers. `problems` collects what is wrong with them."""

    def __init__(self, disk: Disk, root: str) -> None:
        self.problems: list[str] = []
        self._disk = disk
        self._root = root

    def find(self, layer: Layer) -> tuple[Path | None, File | None]:
        """Where it is, or would be; None where that is outside, or a link that goes in circles."""
        path = join(self._root, "blobs", f"sha256-{layer.sha256}")
        try:
            file = self._disk.find(path, self._root)
        except OSError as error:
            self.problems.append(f"its {layer.kind} {why(error)}")
            would_be = Path(os.path.realpath(path))
            usable = would_be.is_relative_to(self._root) and not would_be.is_symlink()
            return would_be if usable else None, None
        if file.size != layer.size:
            self.problems.append(f"its {layer.kind} has {file.size} of {layer.size} bytes")
        return Path(file.path), file

    def paths(self, layers: Iterable[Layer]) -> tuple[Path, ...]:
        """Of those that are there."""
        found = [self.find(layer) for layer in layers]
        return tuple(path for path, file in found if path and file)

    def read(self, layer: Layer, look: Callable[[File], T | Problem]) -> T | None:
        _, file = self.find(layer)
        said = attempt(self._disk, layer.kind, file, look) if file else None
        if isinstance(said, Problem):
            self.problems.append(f"its {layer.kind} {said.reason}")
            return None
        return said

    def last(self, layers: Iterable[Layer], look: Callable[[File], T | Problem]) -> T | None:
        """What the last of several says: that is the one which Ollama uses."""
        said = None
        for layer in layers:
            said = self.read(layer, look)
        return said


def _parsed(parse: Callable[[bytes], T], limit: int, file: File) -> T | Problem:
    if file.size > limit:
        return Problem(f"has {file.size} bytes, more than {limit}")
    try:
        return parse(read(file, limit))
    except Malformed as error:
        return Problem(str(error))


def _manifest(data: bytes) -> tuple[Layer, ...]:
    fields = _json(data)
    layers = fields.get("layers") if isinstance(fields, dict) else None
    if not isinstance(layers, list) or len(layers) > _MOST_LAYERS:
        raise Malformed(f"is no manifest of up to {_MOST_LAYERS} layers")
    return tuple(layer for raw in layers if (layer := _layer(raw)))


def _layer(raw: object) -> Layer | None:
    fields = raw if isinstance(raw, dict) else {}
    type, digest, size = (fields.get(name) for name in ("mediaType", "digest", "size"))
    if not isinstance(type, str):
        raise Malformed("has a layer without a type")
    if type not in _LAYERS:
        return None
    match = _DIGEST.fullmatch(digest) if isinstance(digest, str) else None
    if match is None:
        raise Malformed(f"has a {_LAYERS[type]} layer without a SHA-256 digest")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**63:
        raise Malformed(f"has a {_LAYERS[type]} layer without a size")
    return Layer(_LAYERS[type], match[1], size)


def _params(data: bytes) -> tuple[tuple[str, Param], ...]:
    fields = _json(data)
    if not isinstance(fields, dict) or len(fields) > _MOST_PARAMS:
        raise Malformed(f"is no object of up to {_MOST_PARAMS} parameters")
    if not all(_PARAM.fullmatch(name) for name in fields):
        raise Malformed("has a name that no parameter has")
    return tuple((name, _param(value)) for name, value in fields.items())


def _param(value: object) -> Param:
    match value:
        case bool():
            return value
        case str() if _is_short(value):
            return value
        case float() if math.isfinite(value):
            return value
        case int() if abs(value) < 2**63:
            return value
        case list() if len(value) <= _MOST_PARAMS and all(map(_is_short, value)):
            return tuple(value)
    raise Malformed("has a value that no parameter has")


def _is_short(value: object) -> bool:
    """A string that is not long, and can be written: JSON can spell half of a character."""
    if not isinstance(value, str) or len(value) > _LONGEST:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Malformed("is not UTF-8") from None


def _json(data: bytes) -> object:
    try:
        value: object = json.loads(_text(data))
    except (ValueError, RecursionError):  # the latter where it is nested deep
        raise Malformed("is no JSON") from None
    return value


_MANIFEST = partial(_parsed, _manifest, _MANIFEST_BYTES)
_PARAMS = partial(_parsed, _params, _PARAMS_BYTES)
_TEXT = partial(_parsed, _text, _TEXT_BYTES)
