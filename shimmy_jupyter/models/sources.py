"""Where model files come from, and which id each gets: folders of one's own, and what Ollama, the
Hugging Face cache and LM Studio have already downloaded.

Nothing is found outside the place it was looked for in: paths are resolved first and compared by
their parts. Hidden folders, and folders deeper than 32, are passed over.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from . import ollama
from .ollama import Param
from .peek import Kind, Problem, attempt, kind_of, read
from .scan import Disk, Entry, File, Warning, join, never, why

SELF_TEST = "self-test"
BUNDLED = Path(__file__).parent.parent / "bundled" / "self-test.gguf"
DEEPEST = 32
_ROUTES = ("discover", "pull")
"""Names that mean something else where a model's stands in a route."""
MOST_MISSING = 1000
"""So many numbers of missing shards are listed at most."""

_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._:@-]+")
_LONGEST_NAME = 119  # leaves room for "@" and 8 hex digits within 128
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.DOTALL | re.ASCII | re.IGNORECASE)
_Group = tuple[str, str, str]
_USER = re.compile(r"[A-Za-z0-9_@-][A-Za-z0-9._@-]{0,127}")
_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SUFFIX = ".gguf"
_REGISTRY, _NAMESPACE = "registry.ollama.ai", "library"

Source = Literal["root", "paths", "ollama", "huggingface", "lmstudio", "home", "system", "bundled"]


@dataclass(frozen=True, slots=True)
class Places:
    """Where to look, in this order. `~` is expanded in each of them, and `{username}` in `roots`.

    `ollama` is what OLLAMA_MODELS names, `huggingface` what HF_HUB_CACHE does, and `lmstudio` folders
    of publishers' folders. Only of `roots` and `model_paths` it is said when they are not there.
    """

    roots: tuple[Path, ...] = ()
    model_paths: tuple[Path, ...] = ()
    ollama: Path | None = None
    huggingface: Path | None = None
    lmstudio: tuple[Path, ...] = ()
    home_models: Path | None = None
    system: tuple[Path, ...] = ()
    username: str = ""

    @property
    def named(self) -> tuple[Path, ...]:
        """Those that somebody has asked for."""
        roots = (Path(str(root).replace("{username}", self.username)) for root in self.roots)
        return (*roots, *self.model_paths)


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose model it is: `org/name` and the revision, or Ollama's `name:tag` (its registry and
    namespace before it where they are not the usual ones). Plain characters only.
    """

    name: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A model, adapter or projector under the id that requests use; usable or not.

    `path` is its first file and `parts` are all that are there, without links; `root` is the resolved
    folder that they were inside of, for whoever opens them to check again. `missing` are the numbers
    of shards that are not there, `MOST_MISSING` at most. `size_bytes` counts all parts, `created` is
    seconds since 1970, in UTC. `expected_sha256` is what `path`'s bytes should have by the cache it
    is in; nothing has been computed. `problem` says why it cannot be used, without a path.
    The last five are an Ollama model's own; its template is one for Go, not for Jinja.
    """

    id: str
    path: Path
    source: Source
    size_bytes: int
    created: int
    kind: Kind
    parts: tuple[Path, ...]
    root: Path
    missing: tuple[int, ...] = ()
    origin: Origin | None = None
    expected_sha256: str | None = None
    problem: str | None = None
    template: str | None = None
    system: str | None = None
    params: tuple[tuple[str, Param], ...] = ()
    adapters: tuple[Path, ...] = ()
    projector: Path | None = None

    @property
    def bundled(self) -> bool:
        return self.source == "bundled"


@dataclass(frozen=True, slots=True)
class Scan:
    found: tuple[Found, ...]
    warnings: tuple[Warning, ...]


class Scanner:
    """Finds model files, the bundled one last. Remembers what it saw: see `scan.py` for what a second
    look costs. For any thread; a second call waits for the first.
    """

    def __init__(self, places: Places, clock: Callable[[], float] = time.time) -> None:
        self._places = places
        self._disk = Disk(clock)
        self._lock = threading.Lock()

    def scan(self, stop: Callable[[], bool] = never) -> Scan:
        """Everything there is now. Raises `Cancelled` once `stop()` is true, which is asked before
        each folder and each file.
        """
        with self._lock:
            self._disk.begin(stop)
            look = _Look(self._places, self._disk)
            look.everywhere()
            return Scan(tuple(look.found), self._disk.finish())


class _Names:
    """Ids: each plain, and each once. The first of a name has it; among files of one place the
    first by path, however the disk lists them.
    """

    def __init__(self) -> None:
        self._taken = {SELF_TEST, *_ROUTES}

    def take(self, name: str, path: str) -> str:
        plain = _NOT_IN_A_NAME.sub("-", name)[:_LONGEST_NAME] or "model"
        free = plain
        if plain in self._taken:
            free = next(id for id in self._more(plain, path) if id not in self._taken)
        self._taken.add(free)
        return free

    @staticmethod
    def _more(plain: str, path: str) -> Iterator[str]:
        """Longer where somebody has named files after a digest's beginnings, and never ending."""
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()
        for size in range(8, len(digest) + 1):
            yield f"{plain}@{digest[:size]}"[-128:]
        for number in itertools.count(2):
            yield f"{plain}@{digest}.{number}"[-128:]


@dataclass(frozen=True, slots=True)
class _Place:
    """A folder, without links, that everything found in it must be inside of."""

    source: Source
    root: str
    path: Path


class _Look:
    """One look at every place."""

    def __init__(self, places: Places, disk: Disk) -> None:
        self.found: list[Found] = []
        self._places = places
        self._disk = disk
        self._names = _Names()
        self._seen: set[str] = set()

    def everywhere(self) -> None:
        places = self._places
        self._trees("root", filter(None, map(self._of_user, places.roots)), named=True)
        self._trees("paths", places.model_paths, named=True)
        for place in self._there("ollama", [places.ollama]):
            self._ollama(place)
        for place in self._there("huggingface", [places.huggingface]):
            self._huggingface(place)
        for place in self._there("lmstudio", places.lmstudio):
            self._lmstudio(place)
        self._trees("home", [places.home_models])
        self._trees("system", places.system)
        self._bundled()

    def _of_user(self, root: Path) -> Path | None:
        if "{username}" not in str(root):
            return root
        name = self._places.username
        if not _USER.fullmatch(name) or ".." in name:
            self._disk.warn(str(root), "the user's name cannot be part of a path")
            return None
        return Path(str(root).replace("{username}", name))

    def _there(
        self, source: Source, places: Iterable[Path | None], *, named: bool = False
    ) -> Iterator[_Place]:
        """Those that are folders, without links. `named`: somebody has asked for them, and is told
        of those that are not there.
        """
        for place in places:
            if place is None:
                continue
            try:
                root = place.expanduser().resolve(strict=True)
                if root.is_dir():
                    self._disk.next_place()
                    yield _Place(source, str(root), root)
                elif named:
                    self._disk.warn(str(place), "is no folder")
            except FileNotFoundError:
                if named:
                    self._disk.warn(str(place), "does not exist")
            except OSError as error:
                self._disk.warn(str(place), why(error))
            except (RuntimeError, ValueError):  # a user that nobody knows; a NUL; links in circles
                self._disk.warn(str(place), "is no path")

    def _trees(self, source: Source, places: Iterable[Path | None], *, named: bool = False) -> None:
        for place in self._there(source, places, named=named):
            self._tree(place, place.root)

    def _tree(
        self, place: _Place, folder: str, origin: Origin | None = None, depth: int = 0
    ) -> None:
        """What is in a folder, and below it, by name."""
        entries = self._disk.entries(folder, _SUFFIX)
        shards = _shards(entries)
        for entry in entries:
            if entry.type == "folder":
                if depth < DEEPEST:
                    self._tree(place, join(folder, entry.name), origin, depth + 1)
                continue
            match = _SHARD.fullmatch(entry.name)
            if match is None:
                name, count, parts = entry.name[: -len(_SUFFIX)], 1, {1: entry}
            else:
                name, count, parts = match[1], int(match[3]), shards.pop(_group(match), {})
            files = {
                number: file
                for number, part in sorted(parts.items())
                if (file := self._part(folder, part, place.root, number, count))
            }
            if not all(file.path in self._seen for file in files.values()):
                id = self._names.take(name, next(iter(files.values())).path)
                self._add(place, id, files, count=count, origin=origin)

    def _part(self, folder: str, entry: Entry, root: str, number: int, count: int) -> File | None:
        if 1 <= number <= count:
            return self._disk.file(folder, entry, root)
        self._disk.warn(join(folder, entry.name), f"is numbered {number} of {count}")
        return None

    def _add(
        self,
        place: _Place,
        id: str,
        files: dict[int, File],
        *,
        count: int = 1,
        origin: Origin | None = None,
    ) -> None:
        """A model of these parts, by number; there is one at least."""
        self._seen.update(file.path for file in files.values())
        parts = tuple(Path(file.path) for file in files.values())
        said: list[Kind | Problem] = [
            attempt(self._disk, "kind", file, kind_of) for file in files.values()
        ]
        problems = [kind.reason for kind in said if isinstance(kind, Problem)]
        kind: Kind = "unknown" if isinstance(said[0], Problem) else said[0]
        missing: tuple[int, ...] = ()
        if len(files) < count:
            problems.insert(0, f"lacks {count - len(files)} of its {count} parts")
            gaps = (number for number in range(1, count + 1) if number not in files)
            missing = tuple(itertools.islice(gaps, MOST_MISSING))
        first = next(iter(files.values()))
        self.found.append(
            Found(
                id=id,
                path=parts[0],
                source=place.source,
                size_bytes=sum(file.size for file in files.values()),
                created=int(first.changed),
                kind=kind,
                parts=parts,
                root=place.path,
                missing=missing,
                origin=origin,
                expected_sha256=_digest(first.path) if place.source == "huggingface" else None,
                problem=problems[0] if problems else None,
            )
        )

    def _lmstudio(self, place: _Place) -> None:
        for publisher in self._disk.folders(place.root):
            for repo in self._disk.folders(join(place.root, publisher)):
                origin = _origin([publisher, repo])
                self._tree(place, join(place.root, publisher, repo), origin, DEEPEST)

    def _huggingface(self, place: _Place) -> None:
        for folder in self._disk.folders(place.root):
            kind, *names = folder.split("--")
            if kind != "models":
                continue
            snapshots = join(place.root, folder, "snapshots")
            main = self._revision(place.root, join(place.root, folder, "refs", "main"))
            for name in sorted(
                self._disk.folders(snapshots), key=lambda name: (name != main, name)
            ):
                origin = _origin(names, revision=name)
                self._tree(place, join(snapshots, name), origin)

    def _revision(self, root: str, path: str) -> str:
        """What a reference says, if it is there: a commit's 40 digits."""
        try:
            said = self._disk.once("start", self._disk.find(path, root), partial(read, limit=64))
        except OSError:
            return ""
        return said.decode("ascii", "replace").strip()

    def _ollama(self, place: _Place) -> None:
        for model in ollama.models(self._disk, place.root):
            registry, namespace, name, tag = model.names
            above = [registry, namespace]
            if registry == _REGISTRY:
                above = [] if namespace == _NAMESPACE else [namespace]
            self.found.append(
                Found(
                    # By the manifest: two tags can have one blob.
                    id=self._names.take("-".join([*above, f"{name}:{tag}"]), model.manifest),
                    path=model.path,
                    source=place.source,
                    size_bytes=model.size_bytes,
                    created=int(model.changed),
                    kind=model.kind,
                    parts=(model.path,),
                    root=place.path,
                    origin=_origin([*above, name], tag=tag),
                    expected_sha256=model.sha256,
                    problem=model.problem,
                    template=model.template,
                    system=model.system,
                    params=model.params,
                    adapters=model.adapters,
                    projector=model.projector,
                )
            )

    def _bundled(self) -> None:
        """The last one, and always under its own name."""
        for place in self._there("bundled", [BUNDLED.parent]):
            file = self._disk.file(place.root, Entry(BUNDLED.name, "file"), place.root)
            if file is not None:
                self._add(place, SELF_TEST, {1: file})


def _shards(entries: Iterable[Entry]) -> dict[_Group, dict[int, Entry]]:
    """The parts of models that are split, by number."""
    groups: dict[_Group, dict[int, Entry]] = {}
    for entry in entries:
        match = _SHARD.fullmatch(entry.name)
        if match and entry.type != "folder":
            groups.setdefault(_group(match), {})[int(match[2])] = entry
    return groups


def _group(match: re.Match[str]) -> _Group:
    return match[1], match[3], match[4]


def _origin(names: list[str], revision: str | None = None, tag: str | None = None) -> Origin | None:
    """None where a name has other characters than models' names have: it is shown to people."""
    if not all(map(_PLAIN.fullmatch, [*names, *filter(None, (revision, tag))])):
        return None
    return Origin("/".join(names) + (f":{tag}" if tag else ""), revision)


def _digest(path: str) -> str | None:
    """A blob's SHA-256, which large files are named by; small ones by Git's shorter digest."""
    name = Path(path).name
    return name if _SHA256.fullmatch(name) else None
