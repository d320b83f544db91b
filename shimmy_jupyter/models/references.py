"""What a person types to name a model that is not here yet, and which files of a repository are meant
by it. Pure: nothing is asked of any network.

`org/name`, `org/name:Q4_K_M` (in any case), `org/name:folder/file.gguf`, `org/name@revision:…`; `hf:`,
`hf.co/` or `https://huggingface.co/` may stand before each. A browser's address of a repository or of
one of its files means the same. Any other https address must end in a file's name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote

from ..errors import InvalidValue
from .addresses import check_url, decoded, plain_parts
from .fetch_errors import FetchRefused, in_words

if TYPE_CHECKING:  # it loads httpx
    from .fetch_hub import HubFile

PREFERRED = (
    "Q4_K_M", "Q5_K_M", "Q8_0", "Q4_0", "Q6_K", "Q4_K_S", "Q5_K_S", "Q5_0", "Q5_1", "Q4_1", "IQ4_NL",
    "IQ4_XS", "MXFP4", "Q4_K_XL", "Q3_K_L", "Q3_K_M", "F16", "BF16", "F32",
)  # fmt: skip
"""Which is taken where nobody says: the first of these that a repository has. Four to five bits first,
which are small and lose little; then more, then less, then what is not quantised at all.
"""

_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_HUB_PREFIX = re.compile(r"(?:(?:www\.)?huggingface|hf)\.co/", re.IGNORECASE)
_SCHEMES = frozenset({"http", "https", "file", "ftp", "ftps", "data", "s3", "gs", "git", "ssh"})
_PAGES = ("blob", "resolve", "raw", "tree")
_NAME = r"[A-Za-z0-9._-]{1,96}"
_TYPED = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[^:]*))?(?::(?P<what>.*))?")
_REVISION = re.compile(r"[A-Za-z0-9._/-]{1,200}")
_QUANTISATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_FILE_NAME = re.compile(r".*\.[A-Za-z0-9]{1,12}")
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.ASCII | re.IGNORECASE)
_KNOWN = re.compile(
    r"(?<![A-Z0-9])(?:(?:I?Q[1-8]|TQ[12])_\w*|MXFP4\w*|B?F16|F32)", re.IGNORECASE | re.ASCII
)
_UNUSUAL = re.compile(r"[^A-Za-z0-9._+@-]+")
_SUFFIX = ".gguf"
_LONGEST = 8192
_LISTED = 20
_COMPARED = 1000
_FORMS = (
    "name a repository as org/name, org/name:Q4_K_M or org/name:file.gguf, or give an https address"
)


@dataclass(frozen=True, slots=True)
class HubReference:
    """A model of a hub's. `file` is a path in the repository; `quantisation` is in upper case. At most
    one of the two is there.
    """

    repo: str
    revision: str = "main"
    file: str | None = None
    quantisation: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        what = self.file or self.quantisation
        return f"{self.repo}{revision}" + (f":{what}" if what else "")

    @property
    def names(self) -> tuple[str, ...]:
        """What it is judged by: all of them must be allowed."""
        return (str(self),)

    @property
    def also(self) -> tuple[str, ...]:
        """What denies it, too."""
        return (self.repo,)


@dataclass(frozen=True, slots=True)
class UrlReference:
    """A file at an https address, whose query may be secret, and the name that it gets here."""

    url: str = field(repr=False)
    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def names(self) -> tuple[str, ...]:
        """What it is judged by, as it is written and as servers read it: all of them must be allowed."""
        address = self.url.partition("?")[0]
        read = unquote(address)
        # Of a part some servers drop what comes after a semicolon, or dots and blanks at its end.
        bare = "/".join(part.partition(";")[0].rstrip(" .") for part in read.split("/"))
        return tuple(dict.fromkeys((address, read, bare)))

    @property
    def also(self) -> tuple[str, ...]:
        """What denies it, too: what it gets here, the repository where this is a mirror of a hub's, and with
        its query, by which some hosts choose a file.
        """
        path = self.names[-1].split("/", 3)[-1]
        return self.name, "/".join(path.split("/")[:2]), self.url, unquote(self.url)


def parse(text: str) -> HubReference | UrlReference:
    """What is meant. Raises `InvalidValue` that says what to type instead."""
    said = text.strip()
    if not said:
        raise _invalid(f"nothing is named: {_FORMS}")
    if len(said) > _LONGEST or not said.isprintable():
        raise _invalid(f"the name is too long or has control characters: {_FORMS}")
    scheme, colon, rest = said.partition(":")
    if colon and rest.startswith("//"):
        return _repository(rest[2:]) if scheme.lower() == "hf" else _address(said, rest[2:])
    if scheme.lower() in _SCHEMES and colon:
        raise _invalid(f"{scheme.lower()}: is not pulled from; {_FORMS}")
    if scheme.lower() == "hf" and colon:
        return _repository(rest)
    return _address(f"https://{said}", said) if _HUB_PREFIX.match(said) else _repository(said)


def _invalid(message: str) -> InvalidValue:
    return InvalidValue(message, param="model")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:79]}…")


def _relative(path: str) -> bool:
    plain = path.isprintable() and "\\" not in path and len(path) <= 1000
    return plain and all(part not in {"", ".", ".."} for part in path.split("/"))


# Repositories


def _repository(text: str) -> HubReference:
    match = _TYPED.fullmatch(text if ":" in text else text.rstrip("/"))
    if match is None or not _relative(match["repo"]):
        raise _invalid(_why_not(text))
    reference = _checked(match["repo"], match["revision"])
    what = match["what"]
    if what is None:
        return reference
    if "/" in what or _FILE_NAME.fullmatch(what):
        return _checked(match["repo"], match["revision"], what)
    if not _QUANTISATION.fullmatch(what):
        raise _invalid(
            f"{_shown(what)} is neither a file's name nor a quantisation, such as Q4_K_M"
        )
    return HubReference(reference.repo, reference.revision, quantisation=what.upper())


def _checked(repo: str, revision: str | None, file: str | None = None) -> HubReference:
    known = re.fullmatch(f"{_NAME}/{_NAME}", repo) and _relative(repo)
    if not known or _HUB_PREFIX.match(repo):  # which, typed by itself, would mean something else
        raise _invalid(f"{_shown(repo)} is no repository; {_FORMS}")
    if revision is None:
        revision = "main"
    if not _REVISION.fullmatch(revision) or not _relative(revision):
        raise _invalid("after @ comes a branch, a tag or a commit, as in org/name@main")
    if file is not None and not _relative(file):
        raise _invalid(
            "a file in a repository is named by a relative path, as in org/name:file.gguf"
        )
    return HubReference(repo, revision, file)


def _why_not(text: str) -> str:
    """Somebody who typed this probably wanted something that can be said differently."""
    first, *others = text.split("/")
    local = text.startswith((".", "/", "~", "\\")) or re.match(r"[A-Za-z]:[\\/]", text)
    if local or (not others and text.lower().endswith(_SUFFIX)):
        return "that is a file on this machine: put it into a folder of models, it needs no pull"
    if not others or "ollama" in first.lower():
        return (
            f"{_shown(text)} is neither a repository nor a suggestion (`shimmy models --suggest`): {_FORMS}. "
            "Ollama's registry is not pulled from; what Ollama has pulled is found by itself"
        )
    if len(others) > 1 and ":" not in text and text.lower().endswith(_SUFFIX):
        return f"after the repository comes a colon: {first}/{others[0]}:{'/'.join(others[1:])}"
    return f"{_shown(text)} names no model: {_FORMS}"


# Addresses


def _address(url: str, rest: str) -> HubReference | UrlReference:
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    try:
        target = check_url(url, (authority,))
        path, _, query = target.path.partition("?")
        of_hub = target.host in _HUB_HOSTS and target.port == 443
        parts = decoded(path.strip("/")) if of_hub else plain_parts(path)
    except FetchRefused as error:
        raise _invalid(error.message) from None
    if of_hub:
        return _page(parts, query)
    if f".{target.host}".endswith((".ollama.com", ".ollama.ai")):
        raise _invalid(f"Ollama's registry is not pulled from: {_FORMS}")
    return UrlReference(target.url, _plain(parts[-1], target.host))


def _page(parts: list[str], query: str) -> HubReference:
    """A page of the hub's that a browser shows, or where it downloads from."""
    if parts[0] in {"datasets", "spaces"}:
        raise _invalid(f"that is the address of one of the hub's {parts[0]}, not of a model")
    if re.search("[:@]", "".join(parts[1:2])):
        return _repository("/".join(parts))
    repo, (kind, *rest) = "/".join(parts[:2]), parts[2:] or [""]
    if len(parts) == 2:
        asked = parse_qs(query).get("show_file_info", [""])[-1]
        return _checked(repo, None, asked or None)
    if kind not in _PAGES or not rest:
        raise _invalid(f"that page of the hub's is no model's: {_FORMS}")
    # A pull request's revision has slashes of its own, which some pages leave as they are.
    count = 3 if rest[:2] == ["refs", "pr"] else 1
    revision, file = "/".join(rest[:count]), "/".join(rest[count:])
    if kind == "tree" and file:
        raise _invalid("that is the address of a folder; name one of its files")
    if kind != "tree" and not file:
        raise _invalid("that address ends before the file's name")
    return _checked(repo, revision, file or None)


def _plain(name: str, host: str) -> str:
    """A name that a file can have here, as like as possible to the one there."""
    plain = plain_name(name)
    if not plain.lower().endswith(_SUFFIX) or plain.lower() == _SUFFIX:
        raise _invalid(f"the address at {host} ends in no name of a file with the suffix .gguf")
    if _SHARD.fullmatch(plain):
        raise _invalid(
            "that is one file of a model that is split into several, which is pulled by its "
            "repository's name only, as org/name:file.gguf"
        )
    return plain


def plain_name(name: str) -> str:
    """At most 200 of `A-Za-z0-9._+@-`, its end kept, and none of `.+@-` first."""
    return _UNUSUAL.sub("-", name)[-200:].lstrip(".+@-")


def model_name(path: str) -> str:
    """Of a file, or of the model that it is a part of: without folder, part's number and suffix."""
    name = path.rpartition("/")[2]
    match = _SHARD.fullmatch(name)
    return match[1] if match else name[: -len(_SUFFIX)]


# Which files


@dataclass(frozen=True, slots=True)
class _Model:
    """One file, or the parts of a model that is split, by number. `name` is the first one's path."""

    name: str
    parts: dict[int, HubFile]
    count: int = 1

    @property
    def shown(self) -> str:
        more = f" and {len(self.parts) - 1} more parts" if len(self.parts) > 1 else ""
        return f"{self.name}{more} ({in_words(sum(part.size for part in self.parts.values()))})"


def choose(files: Sequence[HubFile], reference: HubReference) -> tuple[HubFile, ...]:
    """The files of a repository that are meant; of a model that is split all, in order.

    The one that is named, whatever it is. Otherwise one model: that of the quantisation that is named,
    which must stand in its path as a word of its own; or the only one; or that of the first of
    `PREFERRED` there is. Raises `InvalidValue` that lists what there is where none or several would be
    right, and where a part is missing.
    """
    groups = _groups(files)
    if reference.file is not None:
        for group in groups:
            if any(part.path == reference.file for part in group.parts.values()):
                return _complete(group, reference)
        raise _invalid(_no_file(files, groups, reference))
    models = [group for group in groups if _is_model(group.name)]
    if not models:
        raise _invalid(_no_model(groups, reference))
    wanted = reference.quantisation
    if wanted is not None:
        found = _of(wanted, models)
        if not found:
            raise _invalid(f"{reference.repo} has no {wanted} model; {_has(models)}")
        models = found
    elif len(models) > 1:
        models = next(filter(None, (_of(one, models) for one in PREFERRED)), models)
    if len(models) > 1:
        raise _invalid(
            f"{reference.repo} has several models that this could mean: name a file, as in "
            f"{reference.repo}:{models[0].name}; {_has(models)}"
        )
    return _complete(models[0], reference)


def _groups(files: Iterable[HubFile]) -> list[_Model]:
    found: dict[tuple[str, ...], _Model] = {}
    for file in sorted(files, key=lambda file: file.path):
        match = _SHARD.fullmatch(file.path)
        number, count = (int(match[2]), int(match[3])) if match else (1, 1)
        if match is None or not 1 <= number <= count:
            found[(file.path,)] = _Model(file.path, {1: file})
        else:
            key = match[1], match[3], match[4]
            found.setdefault(key, _Model(file.path, {}, count)).parts[number] = file
    return list(found.values())


def _complete(model: _Model, reference: HubReference) -> tuple[HubFile, ...]:
    if len(model.parts) < model.count:
        number = next(n for n in range(1, model.count + 1) if n not in model.parts)
        lost = _SHARD.sub(rf"\g<1>-{number:05}-of-\g<3>\g<4>", model.name)
        raise _invalid(
            f"{reference.repo} lacks {model.count - len(model.parts)} of the {model.count} files that "
            f"this model is split into, the first of them {lost}"
        )
    return tuple(model.parts[number] for number in sorted(model.parts))


def _is_model(path: str) -> bool:
    """By its name: neither a projector, nor an adapter, nor what was measured for quantising."""
    name = path.rpartition("/")[2]
    if not name.lower().endswith(_SUFFIX) or "mmproj" in name.lower():
        return False
    if _word("imatrix", name) and not _KNOWN.search(name):
        return False
    adapter = _word("lora", name) or _word("qlora", name) or _word("adapter", name)
    return not adapter or _word("merged", name)


def _word(word: str, path: str) -> bool:
    """Neither Q4_K nor K_M is a word of Q4_K_M, and Q8_0 is none of IQ8_0; m_Q8_0 has it."""
    pattern = rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9_])"
    starts = {match.start() for match in re.finditer(pattern, path, re.IGNORECASE)}
    within = (range(match.start() + 1, match.end()) for match in _KNOWN.finditer(path))
    return bool(starts.difference(*within))


def _of(quantisation: str, models: Sequence[_Model]) -> list[_Model]:
    """UD-Q4_K_M, which is another recipe, is meant by Q4_K_M only where there is no other."""
    found = [model for model in models if _word(quantisation, model.name)]
    plain = [model for model in found if not _word(f"UD-{quantisation}", model.name)]
    return plain or found


def _has(groups: Sequence[_Model]) -> str:
    more = f", and {len(groups) - _LISTED} more" if len(groups) > _LISTED else ""
    return f"it has {', '.join(group.shown for group in groups[:_LISTED])}{more}"


def _ggufs(groups: Iterable[_Model]) -> list[_Model]:
    return [group for group in groups if group.name.lower().endswith(_SUFFIX)]


def _no_model(groups: Sequence[_Model], reference: HubReference) -> str:
    others = _ggufs(groups)
    if others:
        return f"{reference.repo} has no model, unless one of its files is named; {_has(others)}"
    return (
        f"{reference.repo} has no GGUF file; models in this format are often in a repository whose "
        f"name ends in -GGUF"
    )


def _no_file(files: Sequence[HubFile], groups: Sequence[_Model], reference: HubReference) -> str:
    asked = str(reference.file)
    paths = [file.path for file in files][:_COMPARED]
    same = [path for path in paths if _last(path) == _last(asked)]
    near = same or difflib.get_close_matches(asked[:200], [path[:200] for path in paths], 1)
    meant = f"; did you mean {near[0]}?" if near else ""
    there = _ggufs(groups)
    said = _has(there) if there else "it has no GGUF file at all"
    return f"{reference.repo} has no file {_shown(asked)}{meant}; {said}"


def _last(path: str) -> str:
    return path.rpartition("/")[2].lower()
