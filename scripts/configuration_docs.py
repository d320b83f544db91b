"""docs/configuration.md, out of the settings themselves. A test compares the two; this writes it anew."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from traitlets import Bool, Dict, Enum, Float, Int, List, TraitType, Unicode

from shimmy_jupyter.config import CONFIGURABLES, AppTraits, Bytes
from shimmy_jupyter.config.files import OURS
from shimmy_jupyter.config.layers import STRICTER
from shimmy_jupyter.notebook.magics import ShimmyMagics
from shimmy_jupyter.server.gateway import JWTIdentityProvider

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"

CLASSES: dict[str, type[Any]] = {
    "ShimmyApp": AppTraits,
    **{cls.__name__: cls for cls in CONFIGURABLES},
    "ShimmyMagics": ShimmyMagics,
    "JWTIdentityProvider": JWTIdentityProvider,
}

RULES = {
    "_both": "True where both are",
    "_either": "True where either is",
    "_theirs": "the system's",
    "_common": "what both name",
    "_least": "the lesser; 0 is no limit",
    "max": "the greater",
    "min": "the lesser",
}
LAYERS = {
    ("ShimmyApp", "offline"): "True where either is",
    ("ShimmyApp", "bind_localhost_only"): "True where either is",
    ("ShimmyModels", "verify"): '"always" where either is',
    ("ShimmyEngine", "isolation"): '"process" where either is',
    ("ShimmyModels", "memory_reserve"): "the greater; the system's 0 stays",
    ("ShimmyModels", "hub"): "the system's, also where it sets pull_hosts",
    ("ShimmyPolicy", "admins"): "the system's, also where it sets another ruling value",
    ("ShimmyPolicy", "admin_groups"): "the system's, also where it sets another ruling value",
    ("ShimmyAudit", "path"): "the system's, also where it sets another of these",
    ("ShimmyAudit", "record_content"): "the system's, also where it sets another of these",
    ("ShimmyAudit", "retention"): "the system's, also where it sets another of these",
    ("ShimmyPolicy", "rules"): "both hold",
    ("ShimmyPolicy", "ceilings"): "both hold",
    ("ShimmyPolicy", "features"): "what both name",
    ("ShimmyLimits", "groups"): "both hold",
    ("ShimmyLimits", "shared"): "both hold",
}
"""What more than a rule of `STRICTER` decides, or one without a name."""

INTRODUCTION = """\
# Settings

This page is made by `scripts/configuration_docs.py` out of the settings themselves, and a test holds it to them.
Nothing has to be set. A value of the wrong type or out of its range is refused, by the setting's name.

## Where they go

In a Jupyter configuration file, as `c.ShimmyLimits.max_requests_per_minute = 60`, in any of the folders that
`jupyter --paths` lists under `config`:

| file | read by |
|---|---|
| `jupyter_config.py` | everything of Jupyter's |
| `jupyter_server_config.py` | servers |
| `jupyter_shimmy_jupyter_config.py` | this extension; wins over the two above |

Each may also be a `.json`. Kernels without a server, and the `shimmy` command, read the same files, so that they
keep to the same rules. Settings of `ShimmyMagics` are for kernels: in `ipython_config.py`, or in a notebook
`%config ShimmyMagics.temperature = 0`.

## The system's values are ceilings

Jupyter lets a user's file win over the system's. For SECTIONS the system's files (those
below the environment that Jupyter is installed in, `/usr/local/etc/jupyter` and `/etc/jupyter`) are read once
more on their own, and for each setting that they name the column "beside the system's" says what holds where
a user has set it, too. So a user can never loosen what is set there. All other settings are as usual: the user's wins.

That binds where users cannot choose what their server reads, on a Hub that starts servers with an environment of its own.
On a server that a user starts by themselves it is a courtesy: they can run anything as themselves.

## What is written

In `shimmy_jupyter` below Jupyter's data folder (`jupyter --data-dir`), readable to its owner alone:

| file | |
|---|---|
| `audit/ledger.sqlite` | [the ledger](audit.md), unless `ShimmyAudit.path` says where; `audit/kernel-ledger.sqlite` that of kernels without a server |
| `audit/ledger.key` | the key of its digests, beside the ledger wherever that is |
| `limits.sqlite` | what has been used of limits; `kernel-limits.sqlite` for kernels without a server |
| `hashes/`, `probes/` | SHA-256 of model files, and how it went when they were tried out; can be removed |
| `rows/` | answers to rows of data frames, [as texts](notebook.md#data-frames); can be removed |

## Examples

A laptop: nothing is downloaded any more, and a model leaves the memory after ten minutes.

```python
c.ShimmyApp.offline = True
c.ShimmyModels.idle_unload = 600
```

A course, in the system's configuration: students have the course's models, staff all but the largest, nobody else any.
Only administrators download and unload.

```python
c.ShimmyPolicy.admins = ["ann"]
c.ShimmyPolicy.rules = [
    {"allow": "course-*", "actions": "use", "groups": ["students"]},
    {"allow": "*", "actions": "use", "groups": "staff"},
    {"deny": "*-70b*"},
    {"deny": "*", "actions": ["pull", "unload"], "admin": False},
]
c.ShimmyPolicy.ceilings = {"max_tokens": 2048, "n": 4}
```

Limits of each user, other ones of each member of a group, and one budget that a whole group has together.

```python
c.ShimmyLimits.max_request_size = "1MB"
c.ShimmyLimits.max_requests_per_minute = 60
c.ShimmyLimits.max_tokens_per_day = 200_000
c.ShimmyLimits.max_seconds = 120
c.ShimmyLimits.groups = {"staff": {"max_tokens_per_day": 1_000_000}}
c.ShimmyLimits.shared = {"course-101": {"max_tokens_per_day": 5_000_000, "max_concurrent": 8}}
```

Nothing without a record, which survives a power cut and is kept for 90 days.

```python
c.ShimmyAudit.fail_closed = True
c.ShimmyAudit.durable = True
c.ShimmyAudit.retention = 90
```

Models of a shared folder and nothing else, in a process of their own.

```python
c.ShimmyEngine.isolation = "process"
c.ShimmyModels.roots = ["/srv/models"]
c.ShimmyModels.search = []
c.ShimmyModels.allow_pull = False
c.ShimmyModels.memory_budget = "24G"
```

Behind a gateway that sends JWTs: [gateway.md](gateway.md).
"""


def page() -> str:
    sections = ", ".join(f"`{name}`" for name in OURS[:-1]) + f" and `{OURS[-1]}`"
    parts = [INTRODUCTION.replace("SECTIONS", sections)]
    parts += ["\n".join(_section(name, cls)) for name, cls in CLASSES.items()]
    return "\n".join(parts)


def traits(cls: type[Any]) -> dict[str, TraitType[Any, Any]]:
    """A class's own settings, in the order in which they are written down."""
    return {
        name: one
        for name, one in vars(cls).items()
        if isinstance(one, TraitType) and one.metadata.get("config")
    }


def beside(owner: str, name: str) -> str:
    """What holds where the system's configuration has a value, too. Raises KeyError for a rule that has
    no words here.
    """
    if (owner, name) in LAYERS:
        return LAYERS[owner, name]
    rule = STRICTER.get(CLASSES[owner], {}).get(name)
    if rule is not None:
        return RULES[rule.__name__]
    if owner == "ShimmyLimits":
        return "the lesser"
    if owner == "ShimmyEngine":
        return "the user's"
    raise KeyError(f"{owner}.{name}")


def _section(owner: str, cls: type[Any]) -> Iterator[str]:
    bound = owner in OURS
    yield f"## {owner}\n"
    yield f"{_words(cls)}\n"
    yield f"| setting | type | default | |{' beside the system’s |' if bound else ''}"
    yield f"|---|---|---|---|{'---|' if bound else ''}"
    for name, trait in traits(cls).items():
        cells = [f"`{name}`", kind(trait), _default(trait), _escaped(str(trait.help))]
        yield f"| {' | '.join([*cells, *([beside(owner, name)] if bound else [])])} |"
    yield ""


def _words(cls: type[Any]) -> str:
    if cls is AppTraits:
        return "The extension as a whole."
    return _escaped(" ".join(str(cls.__doc__).split()))


def kind(trait: TraitType[Any, Any]) -> str:
    text = next(words(trait) for cls, words in _KINDS.items() if isinstance(trait, cls))
    return f"{text}, or None" if trait.allow_none else text


def _number(what: str, trait: Any) -> str:
    least, most = (
        bound if bound is not None and math.isfinite(bound) else None
        for bound in (trait.min, trait.max)
    )
    if least is None:
        return what
    return f"{what}, at least {least:g}" if most is None else f"{what}, {least:g} to {most:,.10g}"


def _list(trait: Any) -> str:
    inner = trait._trait  # noqa: SLF001  traitlets has no other way to ask
    if isinstance(inner, Enum):
        return f"list of {_among(inner)}"
    return "list of tables" if isinstance(inner, Dict) else "list of texts"


def _table(trait: Any) -> str:
    value, key = trait._value_trait, trait._key_trait  # noqa: SLF001  as above
    keys = f"of {_among(key)}" if isinstance(key, Enum) else "by name"
    return f"tables {keys}" if isinstance(value, Dict) else f"table {keys}: {kind(value)}"


def _among(trait: Any) -> str:
    return ", ".join(f"`{value}`" for value in trait.values)


_KINDS: dict[type[Any], Any] = {
    Bytes: lambda trait: "size",
    Bool: lambda trait: "True or False",
    Int: lambda trait: _number("whole number", trait),
    Float: lambda trait: _number("number", trait),
    Enum: _among,
    Unicode: lambda trait: "text",
    List: _list,
    Dict: _table,
}


def _default(trait: TraitType[Any, Any]) -> str:
    value: Any = trait.default()
    if isinstance(trait, Bytes):
        return f'`"{value >> 20}MB"`'
    return f"`{value!r}`".replace("'", '"')


def _escaped(text: str) -> str:
    return re.sub(r"([*|<])", r"\\\1", text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
