"""Every setting, as a trait with its help."""

from __future__ import annotations

import math
import re
from typing import Any

from traitlets import Bool, Dict, Enum, Float, HasTraits, Int, List, TraitError, TraitType, Unicode
from traitlets.config import Configurable

from ..core.policy import CEILINGS, FEATURES

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMG]?)i?B?\s*$", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Bytes(TraitType[int, "int | str"]):
    """A size in bytes: an integer, or a text such as "8MB" (1 MB is 1,048,576 bytes)."""

    info_text = 'a size in bytes, such as 1048576 or "1MB"'

    def __init__(self, default: int, *, allow_zero: bool = False, **metadata: Any) -> None:
        super().__init__(default, **metadata)
        self._least = 0 if allow_zero else 1

    def validate(self, obj: Any, value: Any) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and value >= self._least:
            return value
        match = _SIZE.match(value) if isinstance(value, str) else None
        if match is None or (self._least and not float(match[1])):
            raise TraitError(f"{self.name} must be {self.info_text}, not {value!r}")
        return int(float(match[1]) * _UNITS[match[2].upper()])


class Finite(Float):  # type: ignore[type-arg]
    """A number that can be reckoned with."""

    def validate(self, obj: Any, value: Any) -> Any:
        found = super().validate(obj, value)
        if found is not None and not math.isfinite(found):
            raise TraitError(f"{self.name or 'a share'} must be a finite number, not {value!r}")
        return found


class ShimmyEngine(Configurable):
    """How loaded models compute."""

    context_size = Int(
        0,
        min=0,
        help="Most tokens, prompt and answer together, of one request. "
        "0: what the model was trained on, up to 8192.",
    ).tag(config=True)
    kv_tokens = Int(
        0,
        min=0,
        help="Tokens of KV cache that all requests to a model share. A request reserves its prompt "
        "and max_tokens before it starts, and waits while they are not free. 0: a whole context for "
        "each of max_sequences where that takes at most 256 MiB; else 16384, or as many as take a "
        "quarter of the free memory when the model loads, but never less than one context.",
    ).tag(config=True)
    kv_type = Enum(
        ["f16", "q8_0", "q4_0"],
        "f16",
        help="How the KV cache holds its numbers. q8_0 takes about half of the memory, q4_0 about a "
        "quarter, at some cost in quality; the heads of a model must be a multiple of 32 wide.",
    ).tag(config=True)
    prompt_lookup = Bool(
        True,
        help="Guess the next tokens of an answer that copies from its prompt, or repeats itself, while it "
        "is the only one. The answer stays the same; it comes sooner.",
    ).tag(config=True)
    default_max_tokens = Int(
        1024, min=1, help="Tokens a request may generate that does not say max_tokens."
    ).tag(config=True)
    max_sequences = Int(
        32,
        min=1,
        max=128,
        help="Requests of one user that a model decodes together; further ones wait. A quarter more "
        "is for others.",
    ).tag(config=True)
    max_queue = Int(
        256, min=1, help="Requests that may wait for a model; further ones get queue_full."
    ).tag(config=True)
    threads = Int(
        0,
        min=0,
        max=512,
        help="Threads that decode, always. 0: as many as the process may use processors, and fewer "
        "while others are busy on them.",
    ).tag(config=True)
    nice = Int(
        0,
        min=0,
        max=19,
        help="Added to the scheduling priority number of the threads that decode (Linux). With 10 "
        "a single busy process can starve the engine.",
    ).tag(config=True)
    gpu_layers = Int(
        -1, min=-1, help="Layers to offload, where the build can. -1: as many as fit."
    ).tag(config=True)
    isolation = Enum(
        ["none", "process"],
        "none",
        help='"none": the model runs in this server\'s process. "process": in a child process, whose '
        "crash, or death for want of memory, the server survives.",
    ).tag(config=True)
    public_prefixes = List(
        Unicode(),
        maxlen=64,
        help="Texts with which prompts begin, or system messages, whose computed KV everybody may "
        "share. Otherwise nobody finds what another's prompt has left in the cache.",
    ).tag(config=True)
    saved_kv = Bytes(
        1 << 30,
        allow_zero=True,
        help="Host memory for KV of earlier prompts that the cache has no room for, or that others would have "
        "to look past; what is short is copied there while nobody asks for anything. At most an eighth of "
        "what is free when the model is loaded. As much again holds a long prompt for as long as it is read "
        "beside others' answers. 0: none of either.",
    ).tag(config=True)
    weights = Dict(
        value_trait=Finite(min=0.01, max=1e6),
        key_trait=Unicode(),
        help="Users' shares of the engine when they compete for it. 1 for whoever is not named.",
    ).tag(config=True)


SEARCHED = ("ollama", "huggingface", "lmstudio", "home", "system")


class ShimmyModels(Configurable):
    """Where models are found, what is asked of them, and how long they stay in memory."""

    roots = List(
        Unicode(),
        help="Folders searched, at any depth, for *.gguf files; before those of the environment "
        "variable SHIMMY_MODEL_PATHS. {username} stands for the user's name.",
    ).tag(config=True)
    search = List(
        Enum(SEARCHED),
        list(SEARCHED),
        help="Where else to look: what Ollama, the Hugging Face cache and LM Studio have downloaded, "
        "~/models, and shimmy/models in Jupyter's data folders.",
    ).tag(config=True)
    probe = Bool(
        True,
        help="Try out a model in a process of its own, within limits, the first time that its bytes "
        "are seen. Remembered for each build of the engine and each kind of processor.",
    ).tag(config=True)
    verify = Enum(
        ["changed", "always"],
        "changed",
        help="When a model's bytes are read to compute their SHA-256: when the file has changed since "
        "the last time (device, inode, size, both times), or always when it is loaded.",
    ).tag(config=True)
    memory_check = Bool(
        True,
        help="Refuse a model that does not fit into the memory that is available, before it is loaded. "
        "Counts the machine's memory, not a GPU's.",
    ).tag(config=True)
    memory_reserve = Bytes(
        0,
        allow_zero=True,
        help="Memory that stays free for notebooks. 0: a tenth of the machine's, at least 512 MiB and at "
        "most 4 GiB.",
    ).tag(config=True)
    memory_budget = Bytes(
        0,
        allow_zero=True,
        help="Most memory of all models together; the one that was not used for longest is unloaded for "
        "another. 0: what the machine has.",
    ).tag(config=True)
    idle_unload = Finite(
        0.0,
        min=0,
        help="Seconds without a request after which a model is unloaded. 0: not until its memory is "
        "needed for another.",
    ).tag(config=True)
    allow_pull = Bool(True, help="Whether models may be downloaded.").tag(config=True)
    hub = Unicode(
        "",
        help="Where models are downloaded from by name. Empty: what the environment variable HF_ENDPOINT "
        "says, else https://huggingface.co.",
    ).tag(config=True)
    pull_hosts = List(
        Unicode(),
        help='Further hosts that models may be downloaded from by address, such as "models.example.org" '
        'or "*.example.org".',
    ).tag(config=True)


_COUNT = "None: no limit."


def _limit(help: str) -> Any:
    return Int(None, min=0, allow_none=True, help=f"{help} {_COUNT}").tag(config=True)


class ShimmyLimits(Configurable):
    """What one user may ask for. Values in the system's configuration are ceilings."""

    max_request_size = Bytes(
        8 << 20, help='Most bytes in the body of a request, such as "8MB".'
    ).tag(config=True)
    max_requests_per_minute = _limit("Most requests of a user in any 60 seconds.")
    max_tokens_per_minute = _limit(
        "Most tokens of a user, prompts and answers together, in any 60 seconds."
    )
    max_tokens_per_day = _limit("Most tokens of a user in a day, which begins at midnight UTC.")
    max_concurrent = _limit("Most requests of a user in progress at once; further ones wait.")
    max_queued = _limit(
        "Most requests of a user that wait for their first token; further ones are refused."
    )
    max_prompt_tokens = _limit("Most tokens of a prompt.")
    max_completion_tokens = _limit("Most tokens of an answer, all its choices together.")
    max_seconds = Finite(
        None,
        min=0.001,
        allow_none=True,
        help="Most seconds that a request may take, waiting included. None: as long as it takes.",
    ).tag(config=True)
    groups = Dict(
        value_trait=Dict(),
        key_trait=Unicode(),
        help="Other limits for each member of a group, such as "
        '{"staff": {"max_tokens_per_day": 1000000}}. Of several groups the most generous.',
    ).tag(config=True)
    shared = Dict(
        value_trait=Dict(),
        key_trait=Unicode(),
        help="Limits that all members of a group have together, such as "
        '{"course-101": {"max_tokens_per_day": 5000000}}; per minute, per day, concurrent and queued.',
    ).tag(config=True)


class ShimmyPolicy(Configurable):
    """Who may do what. What the system's configuration says holds beside what a user's says."""

    rules = List(
        Dict(),
        help='Such as {"deny": "*-70b*"}, {"deny": "*", "actions": ["pull", "unload"], "admin": False} or '
        '{"allow": "course-*", "groups": ["students"]}: allow or deny is a pattern of model names, or a '
        "list of them; actions are use, load, unload, pull, probe and verify, all of them where none is "
        "named; users and groups say whom it is for, everybody where neither is there; admin whether it "
        "is for administrators only (True) or for all others (False). Deny wins. Where any rule allows an "
        "action, what no rule allows is denied.",
    ).tag(config=True)
    admins = List(
        Unicode(),
        help="Names of users who administer, beside those whom the Hub says to.",
    ).tag(config=True)
    admin_groups = List(Unicode(), help="Groups whose members administer.").tag(config=True)
    ceilings = Dict(
        value_trait=Finite(min=0),
        key_trait=Enum(tuple(CEILINGS)),
        help='Most that a request may ask for, by field, such as {"n": 4, "max_tokens": 2048}. Fields: '
        + ", ".join(CEILINGS)
        + ".",
    ).tag(config=True)
    features = List(
        Enum(FEATURES),
        list(FEATURES),
        help="What requests may use. Leave one out to switch it off.",
    ).tag(config=True)
    allow_in_kernel = Bool(
        True,
        help="Whether a kernel without a server may run a model in its own process.",
    ).tag(config=True)


class ShimmyAudit(Configurable):
    """The ledger of what was asked, and what became of it."""

    enabled = Bool(True, help="Whether requests and administrative acts are recorded.").tag(
        config=True
    )
    path = Unicode(
        "",
        help="The ledger's file. Empty: shimmy_jupyter/audit/ledger.sqlite in Jupyter's data folder, and "
        "kernel-ledger.sqlite there for kernels without a server.",
    ).tag(config=True)
    record_content = Bool(
        False,
        help="Whether prompts and answers themselves are recorded, not only their keyed digests.",
    ).tag(config=True)
    fail_closed = Bool(
        False,
        help="Whether requests are refused, with audit_unavailable, where they cannot be recorded. "
        "Otherwise shimmy/health is degraded and the log says so.",
    ).tag(config=True)
    durable = Bool(
        False,
        help="Whether a record survives a power cut, not only the end of the process. Costs a sync of the "
        "disk for each group of requests.",
    ).tag(config=True)
    retention = Int(
        None,
        min=1,
        allow_none=True,
        help="Days for which records are kept readable; then their bodies go, and hashes stay. None: for "
        "ever.",
    ).tag(config=True)


class AppTraits(HasTraits):
    """What is the extension's own; a mixin of `ShimmyApp`."""

    offline = Bool(False, help="Open no outbound connection, whatever else is set.").tag(
        config=True
    )
    bind_localhost_only = Bool(
        False, help="Refuse every request while the server listens on more than this machine."
    ).tag(config=True)


class WithoutServer(AppTraits, Configurable):
    """The same where there is no server, under a name that a section can have."""


CONFIGURABLES: tuple[type[Configurable], ...] = (
    ShimmyEngine,
    ShimmyModels,
    ShimmyLimits,
    ShimmyPolicy,
    ShimmyAudit,
)
