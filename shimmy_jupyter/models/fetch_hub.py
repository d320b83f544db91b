"""What a Hugging Face hub offers: which files a repository has, how long they are and the SHA-256
of each that is kept in large-file storage, as every model is. No library of theirs is needed for it.

Nothing that a hub says is a path here: names are checked before they are passed on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urljoin

from ..errors import InvalidValue
from .fetch import Fetcher
from .fetch_errors import FetchFailed, FetchRefused
from .fetch_http import Answer, unexpected

HUB = "https://huggingface.co"
HUB_HOSTS = ("huggingface.co", "*.huggingface.co", "*.hf.co")
"""The hub, and the content networks that it redirects to."""

_REPO = re.compile(r"[A-Za-z0-9._-]{1,96}/[A-Za-z0-9._-]{1,96}")
_REVISION = re.compile(r"[A-Za-z0-9._/-]{1,200}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SIZE = re.compile(r"[0-9]{1,18}")
_NEXT = re.compile(r'<([^<>]*)>\s*;\s*rel="?next"?')
_REDIRECTS = range(300, 400)
_MOST_PAGES = 20
_MOST_FILES = 20_000
_PAGE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository. `size` is bytes; `sha256` is None for what is no large file, and
    `commit` (40 hex digits) where the hub did not say it.
    """

    path: str
    size: int
    sha256: str | None
    commit: str | None = None


def hub_file_url(repo: str, revision: str, file: str, *, base: str = HUB) -> str:
    """Where a file is downloaded from. Raises `InvalidValue` for what can be no name there."""
    _check_names(repo, revision)
    if not _safe_path(file):
        raise InvalidValue("a file in a repository is named by a relative path", param="file")
    return f"{base.rstrip('/')}/{repo}/resolve/{quote(revision, safe='')}/{quote(file)}"


def hub_resolve(
    fetcher: Fetcher, repo: str, revision: str, file: str, *, base: str = HUB
) -> HubFile:
    """The file's size, SHA-256 and commit, from the headers that the hub itself answers with: the
    content network it redirects to is not asked. Raises `FetchFailed` and `FetchRefused`.
    """
    url = hub_file_url(repo, revision, file, base=base)
    with fetcher.web.request("HEAD", url, leave_origin=False) as answer:
        if answer.status != 200 and answer.status not in _REDIRECTS:
            raise unexpected(answer)
        # Not what a redirect's own body would have: only the hub's word about the file counts then.
        size = answer.headers.get("x-linked-size")
        if size is None and answer.status == 200:
            size = answer.headers.get("content-length")
        if size is None or not _SIZE.fullmatch(size):
            raise FetchFailed(f"{answer.target.host} does not say how long the file is")
        digest = answer.headers.get("x-linked-etag", "").removeprefix("W/").strip('"')
        commit = answer.headers.get("x-repo-commit", "")
        return HubFile(
            file,
            int(size),
            digest if _SHA256.fullmatch(digest) else None,
            commit if _COMMIT.fullmatch(commit) else None,
        )


def hub_files(fetcher: Fetcher, repo: str, revision: str, *, base: str = HUB) -> list[HubFile]:
    """Every file of a repository, as the hub lists them. Raises `FetchFailed`, and `FetchRefused`
    for more than 20000 files or 20 pages, which are not asked for.
    """
    _check_names(repo, revision)
    origin = base.rstrip("/")
    url = f"{origin}/api/models/{repo}/tree/{quote(revision, safe='')}?recursive=1"
    first = fetcher.web.check(url).origin
    found: list[HubFile] = []
    for _ in range(_MOST_PAGES):
        with fetcher.web.request("GET", url, leave_origin=False) as answer:
            if answer.status != 200:
                raise unexpected(answer)
            found += _entries(answer)
            link = _NEXT.search(answer.headers.get("link", ""))
            host = answer.target.host
        if len(found) > _MOST_FILES:
            break
        if link is None:
            return found
        try:
            url = urljoin(url, link[1])
        except ValueError:
            raise FetchFailed(f"{host} names a next page that is no URL") from None
        # The token goes with every page, so it must not be led elsewhere.
        if fetcher.web.check(url).origin != first:
            raise FetchRefused(f"{host} continues its list of files at another host")
    raise FetchRefused(f"the repository {repo} has too many files to list")


def _entries(answer: Answer) -> Iterator[HubFile]:
    host = answer.target.host
    answer.refuse_encoding()
    kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise FetchFailed(f"{host} answered something else than a list of files")
    try:
        entries = json.loads(answer.read(_PAGE_BYTES))
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, list):
        raise FetchFailed(f"{host} answered something else than a list of files")
    for entry in entries:
        if not isinstance(entry, dict):
            raise FetchFailed(f"{host} lists a file that is none")
        if entry.get("type") == "file":
            yield _entry(entry, host)


def _entry(entry: dict[str, Any], host: str) -> HubFile:
    path, size, large = entry.get("path"), entry.get("size"), entry.get("lfs")
    digest = None
    if isinstance(large, dict):
        digest, size = large.get("oid"), large.get("size")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise FetchFailed(f"{host} lists a large file without its SHA-256")
    if not isinstance(path, str) or not _safe_path(path):
        raise FetchRefused(f"{host} lists a file whose path is not safe")
    if type(size) is not int or size < 0:
        raise FetchFailed(f"{host} lists a file without its size")
    return HubFile(path, size, digest)


def _check_names(repo: str, revision: str) -> None:
    if not _REPO.fullmatch(repo) or any(part in {".", ".."} for part in repo.split("/")):
        raise InvalidValue("a repository is named owner/name", param="repo")
    if not _REVISION.fullmatch(revision) or not _safe_path(revision):
        raise InvalidValue("a revision is a branch, a tag or a commit", param="revision")


def _safe_path(path: str) -> bool:
    printable = path.isprintable() and "\\" not in path and len(path) <= 1000
    return printable and all(part not in {"", ".", ".."} for part in path.split("/"))
