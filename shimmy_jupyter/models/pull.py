"""What a person names becomes complete, checked model files, where other tools find them as well.

A hub's files land as huggingface_hub keeps them: `blobs/<sha256>`, a relative link to that in
`snapshots/<commit>/…`, and `refs/<revision>`. Until all files of a model are complete and the
validator has taken them they are in `.shimmy` beside these, a hidden folder of ours alone that nobody
lists, and an interrupted pull goes on from there. Then, one pull of a repository at a time: the bytes,
the links (those of a new folder in one step), the reference.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import Cancelled, InvalidValue
from . import gguf
from .fetch import Fetcher, FetchRequest, Progress
from .fetch_errors import (
    ChecksumMismatch,
    DiskFull,
    FetchFailed,
    FileExists,
    in_words,
)
from .fetch_hub import HUB, hub_file_url, hub_files, hub_resolve
from .fetch_part import explained
from .pull_cache import CachedRepository, WantedFile, check_by, size_of, stop
from .references import HubReference, UrlReference, choose, model_name, parse

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class PullProgress:
    """`stage` is "looking", "hashing" (what is there), "downloading" or "checking". `done` and `total`
    are bytes of all files together; `done` never goes back. `file` is the name of the one at hand.
    """

    stage: str
    done: int
    total: int | None
    file: str


@dataclass(frozen=True, slots=True)
class Pulled:
    """A model's files, the first part first. `revision` is a commit; `name` is what the model will be
    listed as, unless that is taken. `new` if anything was downloaded. `notes` are for people.
    """

    files: tuple[Path, ...]
    sha256: tuple[str, ...]
    repo: str | None
    revision: str | None
    name: str
    size_bytes: int
    new: bool
    notes: tuple[str, ...] = ()


def _ignored(_progress: PullProgress) -> None:
    pass


def _never() -> bool:
    return False


class Puller:
    """Pulls into `cache`, a Hugging Face cache, what a hub has, and into `downloads` what has an address
    of its own. `validate` raises a `ShimmyError` for a file that must not be listed; it is shown all
    parts beside each other and named the first. Safe to share between threads.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        *,
        cache: Path,
        downloads: Path,
        hub: str = HUB,
        validate: Callable[[Path], object] = gguf.validate,
    ) -> None:
        self.fetcher = fetcher
        self.cache = cache
        self.downloads = downloads
        self.hub = hub.rstrip("/")
        self.validate = validate

    def pull(
        self,
        reference: str,
        *,
        sha256: str | None = None,
        progress: Callable[[PullProgress], None] = _ignored,
        cancelled: Callable[[], bool] = _never,
    ) -> Pulled:
        """Blocks; for a thread of the caller's. What is there already is hashed, not downloaded.

        `Cancelled` and `FetchInterrupted` keep what has come; the same pull continues. Raises what
        `Fetcher.fetch` does, `FetchRefused` with the validator's reason for a file that it refuses
        (which is removed), and `InvalidValue` for what names no model.
        """
        wanted = parse(reference)
        digest = sha256.lower() if sha256 is not None else None
        if digest is not None and not _SHA256.fullmatch(digest):
            raise InvalidValue("a SHA-256 is 64 hex digits", param="sha256")
        meter = _Meter(progress)
        try:
            if isinstance(wanted, UrlReference):
                return self._from_url(wanted, digest, meter, cancelled)
            return self._from_hub(wanted, digest, meter, cancelled)
        except Cancelled:
            raise Cancelled(f"pulling {wanted} was cancelled; what has come is kept") from None

    def discard(self, reference: str) -> None:
        """Removes what interrupted pulls have kept: of a repository everything, whichever of its files
        is named. Asks no network. Raises `FetchRefused` for what is being pulled now.
        """
        wanted = parse(reference)
        if isinstance(wanted, UrlReference):
            if self.downloads.is_dir():
                self.fetcher.discard(self.downloads, wanted.name)
            return
        with explained(wanted.repo):
            CachedRepository(self.cache, wanted.repo).discard(self.fetcher)

    # Addresses

    def _from_url(
        self, wanted: UrlReference, sha256: str | None, meter: _Meter, cancelled: Callable[[], bool]
    ) -> Pulled:
        name = wanted.name
        self.fetcher.web.check(wanted.url)
        meter.say("looking", name)
        checked: list[Path] = []

        def check(path: Path) -> None:
            checked.append(path)
            meter.say("checking", name)
            check_by(self.validate, path, name)

        with explained(name):
            self.downloads.mkdir(parents=True, exist_ok=True)
        request = FetchRequest(wanted.url, self.downloads, name, expected_sha256=sha256)
        fetched = self.fetcher.fetch(request, meter.file(name, 0), cancelled, check)
        if not checked:  # it was there, and nobody knows whether it was looked at then
            check(fetched.path)
        unknown = f"the address gives no checksum: the SHA-256 {fetched.sha256} was recorded"
        return Pulled(
            files=(fetched.path,),
            sha256=(fetched.sha256,),
            repo=None,
            revision=None,
            name=model_name(name),
            size_bytes=fetched.size,
            new=meter.downloaded,
            notes=() if sha256 else (unknown,),
        )

    # Repositories

    def _from_hub(
        self, wanted: HubReference, sha256: str | None, meter: _Meter, cancelled: Callable[[], bool]
    ) -> Pulled:
        meter.say("looking", str(wanted))
        with self._in_words(wanted):
            listed = hub_files(self.fetcher, wanted.repo, wanted.revision, base=self.hub)
            chosen = [file.path for file in choose(listed, wanted)]
            if not chosen[0].lower().endswith(".gguf"):
                raise InvalidValue(
                    f"{chosen[0]} is no GGUF file, and only those are pulled", param="model"
                )
            commit, files = self._facts(wanted, chosen, sha256, cancelled)
        repository = CachedRepository(self.cache, wanted.repo)
        notes: list[str] = []
        with explained(files[0].name), repository.tidied(files):
            repository.refuse_others(files, commit)
            self._make_room(repository, files)
            repository.make()
            meter.total = sum(file.size for file in files)
            before = 0
            for file in files:
                url = hub_file_url(wanted.repo, commit, file.path, base=self.hub)
                notes += self._have(repository, file, url, meter.file(file.name, before), cancelled)
                before += file.size
            meter.say("checking", files[0].name, before)
            paths = repository.publish(files, commit, wanted.revision, self.validate, cancelled)
        return Pulled(
            files=paths,
            sha256=tuple(file.sha256 for file in files),
            repo=wanted.repo,
            revision=commit,
            name=model_name(files[0].path),
            size_bytes=before,
            new=meter.downloaded,
            notes=tuple(notes),
        )

    def _facts(
        self,
        wanted: HubReference,
        paths: Sequence[str],
        sha256: str | None,
        cancelled: Callable[[], bool],
    ) -> tuple[str, list[WantedFile]]:
        """The commit, and all files as they are there, whatever is pushed to a branch meanwhile."""
        if sha256 is not None and len(paths) > 1:
            raise InvalidValue(
                f"a SHA-256 is one file's, and this model has {len(paths)}", param="sha256"
            )
        host = self.hub.removeprefix("https://")
        revision, files = wanted.revision, []
        for path in paths:
            stop(cancelled)
            found = hub_resolve(self.fetcher, wanted.repo, revision, path, base=self.hub)
            if found.commit is None or (_COMMIT.fullmatch(revision) and found.commit != revision):
                raise FetchFailed(
                    f"{host} does not say of which commit {path} is, or names another"
                )
            revision = found.commit
            if sha256 is not None and found.sha256 not in (None, sha256):
                raise ChecksumMismatch(
                    f"{host} has {path} with the SHA-256 {found.sha256}, not with the one given"
                )
            digest = found.sha256 or sha256
            if digest is None:
                raise FetchFailed(
                    f"{host} gives no SHA-256 for {path}; give the one it should have"
                )
            files.append(WantedFile(path, found.size, digest))
        return revision, files

    def _make_room(self, repository: CachedRepository, files: Sequence[WantedFile]) -> None:
        needed = sum(repository.missing(file) for file in files)
        there = next(folder for folder in (self.cache, *self.cache.parents) if folder.is_dir())
        free, kept = shutil.disk_usage(there).free, self.fetcher.reserve
        if needed and free - needed < kept:
            of_which = f", of which {in_words(kept)} are kept" if kept else ""
            raise DiskFull(
                f"{model_name(files[0].path)} needs {in_words(needed)}, {in_words(free)} are free in "
                f"{self.cache.name}{of_which}; make room and ask again"
            )

    def _have(
        self,
        repository: CachedRepository,
        file: WantedFile,
        url: str,
        report: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> list[str]:
        """Sees to it that the file is complete, in the cache or for us alone. Returns notes."""
        private, notes = repository.private(file), []
        for path in (repository.blob(file), private):
            if not os.path.lexists(path):
                continue
            if size_of(path) is None:
                raise FileExists(f"what the cache has for {file.path} is no file; remove it")
            request = FetchRequest(url, path.parent, path.name, file.size, file.sha256)
            try:
                self.fetcher.fetch(request, report, cancelled)
            except FileExists:
                notes.append(f"a damaged copy of {file.path} in the cache was replaced")
                if path == private:
                    private.unlink()
            else:
                return []
        private.parent.mkdir(parents=True, exist_ok=True)
        # By its bytes: the same file of another commit goes on where this one's ended.
        request = FetchRequest(
            url,
            private.parent,
            private.name,
            file.size,
            file.sha256,
            identity=f"sha256:{file.sha256}",
        )
        self.fetcher.fetch(request, report, cancelled)
        return notes

    @contextlib.contextmanager
    def _in_words(self, wanted: HubReference) -> Iterator[None]:
        """What a hub's refusal means, with what to do about it."""
        try:
            yield
        except FetchFailed as error:
            status, code, repo = error.answered, error.answer_code, wanted.repo
            host = self.hub.removeprefix("https://")
            terms = (
                f"accept its terms at {self.hub}/{repo} and set HF_TOKEN to that account's token"
            )
            if code == "RevisionNotFound":
                what = f"{repo} has no branch, tag or commit {wanted.revision}"
            elif code == "EntryNotFound":
                what = f"{repo} lists a file that is not there at {host}; ask again"
            elif code == "RepoNotFound" or status in (404, 410):
                what = (
                    f"there is no repository {repo} at {host}, or it is private: then set HF_TOKEN"
                )
            elif code == "GatedRepo":
                what = f"{repo} is open to those only who agree to its terms: {terms}"
            elif status in (401, 403):
                what = f"{repo} is closed to us, or does not exist; if it does, {terms}"
            else:
                raise
            raise FetchFailed(what) from None


class _Meter:
    """Adds up what the fetches say. `downloaded` once there was anything to come."""

    def __init__(self, report: Callable[[PullProgress], None]) -> None:
        self.total: int | None = None
        self.downloaded = False
        self._report = report
        self._done = 0

    def say(self, stage: str, file: str, done: int = 0) -> None:
        # What was read again, and was not what it should be, is not taken back.
        self._done = max(self._done, done)
        total = None if self.total is None else max(self.total, self._done)
        self._report(PullProgress(stage, self._done, total, file))

    def file(self, name: str, before: int) -> Callable[[Progress], None]:
        """For a fetch that has so many bytes of other files before it."""
        alone = self.total is None

        def report(progress: Progress) -> None:
            if progress.stage == "downloading":
                self.downloaded = True
                if alone:
                    self.total = progress.total
            self.say(progress.stage, name, before + progress.done)

        return report
