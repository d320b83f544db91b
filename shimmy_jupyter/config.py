"""Every setting, as a trait with its help; and the only reader of the environment.

Traits become one frozen `Settings`, which is passed in where it is needed and fetched nowhere.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jupyter_core.paths import jupyter_config_path, jupyter_data_dir, jupyter_path
from traitlets import Bool, Dict, Enum, Float, HasTraits, Int, List, TraitError, TraitType, Unicode
from traitlets.config import Config, Configurable
from traitlets.config.loader import ConfigFileNotFound, JSONFileConfigLoader, PyFileConfigLoader

from .models.sources import Places

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
        256 << 20,
        allow_zero=True,
        help="Host memory for KV of earlier prompts that the cache has no room for. 0: none.",
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


class ShimmyLimits(Configurable):
    """What a request may cost."""

    max_request_size = Bytes(
        8 << 20, help='Most bytes in the body of a request, such as "8MB".'
    ).tag(config=True)
    max_seconds = Finite(
        None,
        min=0.001,
        allow_none=True,
        help="Most seconds that a request may take, waiting included. None: as long as it takes.",
    ).tag(config=True)


class AppTraits(HasTraits):
    """What is the extension's own; a mixin of `ShimmyApp`."""

    offline = Bool(False, help="Open no outbound connection, whatever else is set.").tag(
        config=True
    )


class WithoutServer(AppTraits, Configurable):
    """The same where there is no server, under a name that a section can have."""


CONFIGURABLES: tuple[type[Configurable], ...] = (ShimmyEngine, ShimmyModels, ShimmyLimits)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the rooms need to know. Sizes are in tokens, or bytes where the name says so."""

    context_size: int = 0
    kv_tokens: int = 0
    kv_type: str = "f16"
    prompt_lookup: bool = True
    default_max_tokens: int = 1024
    max_sequences: int = 32
    max_queue: int = 256
    threads: int = 0
    gpu_layers: int = -1
    nice: int = 0
    isolation: str = "none"
    public_prefixes: tuple[str, ...] = ()
    saved_kv_bytes: int = 256 << 20
    weights: Mapping[str, float] = field(default_factory=dict)
    max_seconds: float | None = None
    places: Places = field(default_factory=Places)
    state_folder: Path | None = None
    """Where what is known of files is kept; None: in memory."""
    probe: bool = True
    verify_always: bool = False
    memory_check: bool = True
    memory_reserve: int | None = None
    memory_budget: int = 0
    idle_unload: float = 0.0
    offline: bool = False
    allow_pull: bool = True
    hub: str = ""
    hub_token: str | None = field(default=None, repr=False)
    pull_hosts: tuple[str, ...] = ()
    max_request_bytes: int = 8 << 20


def settings(config: Config, environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the traits out of a Jupyter configuration. Raises TraitError naming the bad one."""
    engine = ShimmyEngine(config=config)
    models = ShimmyModels(config=config)
    limits = ShimmyLimits(config=config)
    for text in engine.public_prefixes:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TraitError(f"ShimmyEngine.public_prefixes is no text: {error}") from None
    hub = models.hub or environment.get("HF_ENDPOINT", "")
    if hub and not re.fullmatch(r"https://[^/@?#\s]+(/[^@?#\s]*)?", hub):
        raise TraitError(
            "ShimmyModels.hub or HF_ENDPOINT must be an https address without user or query"
        )
    app = WithoutServer(config=Config({"WithoutServer": config.get("ShimmyApp", {})}))
    switched_off = environment.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}
    return Settings(
        context_size=engine.context_size,
        kv_tokens=engine.kv_tokens,
        kv_type=engine.kv_type,
        prompt_lookup=engine.prompt_lookup,
        default_max_tokens=engine.default_max_tokens,
        max_sequences=engine.max_sequences,
        max_queue=engine.max_queue,
        threads=engine.threads,
        gpu_layers=engine.gpu_layers,
        nice=engine.nice,
        isolation=engine.isolation,
        public_prefixes=tuple(engine.public_prefixes),
        saved_kv_bytes=engine.saved_kv,
        weights=dict(engine.weights),
        max_seconds=limits.max_seconds,
        places=places(models.roots, models.search, environment),
        state_folder=Path(jupyter_data_dir()) / "shimmy_jupyter",
        probe=models.probe,
        verify_always=models.verify == "always",
        memory_check=models.memory_check,
        memory_reserve=models.memory_reserve or None,
        memory_budget=models.memory_budget,
        idle_unload=models.idle_unload,
        offline=app.offline or switched_off,
        allow_pull=models.allow_pull,
        hub=hub,
        hub_token=environment.get("HF_TOKEN") or environment.get("HUGGING_FACE_HUB_TOKEN"),
        pull_hosts=tuple(models.pull_hosts),
        max_request_bytes=limits.max_request_size,
    )


def places(roots: Sequence[str], search: Sequence[str], environment: Mapping[str, str]) -> Places:
    """Where to look for models: what was set, and where other programs keep theirs."""
    paths = environment.get("SHIMMY_MODEL_PATHS", "").split(os.pathsep)
    caches = Path(environment.get("XDG_CACHE_HOME") or "~/.cache")
    hugging = Path(environment.get("HF_HOME") or caches / "huggingface")
    lmstudio = ("~/.lmstudio/models", "~/.cache/lm-studio/models")
    return Places(
        roots=tuple(Path(root) for root in roots if root),
        model_paths=tuple(Path(path) for path in paths if path),
        ollama=_ollama(environment) if "ollama" in search else None,
        huggingface=Path(environment.get("HF_HUB_CACHE") or hugging / "hub")
        if "huggingface" in search
        else None,
        lmstudio=tuple(map(Path, lmstudio)) if "lmstudio" in search else (),
        home_models=Path("~/models") if "home" in search else None,
        system=tuple(map(Path, jupyter_path("shimmy", "models"))) if "system" in search else (),
        username=next(filter(None, map(environment.get, _USERS)), ""),
    )


_USERS = ("JUPYTERHUB_USER", "USER", "LOGNAME")
_OLLAMA_SERVICE = Path("/usr/share/ollama/.ollama/models")


def _ollama(environment: Mapping[str, str]) -> Path:
    """Of the user's own, else of the service that its installer sets up."""
    own = Path(environment.get("OLLAMA_MODELS") or "~/.ollama/models")
    if "OLLAMA_MODELS" in environment:
        return own
    with contextlib.suppress(OSError, RuntimeError):
        if own.expanduser().is_dir():
            return own
    return _OLLAMA_SERVICE


def load_config() -> Config:
    """Jupyter's configuration files for a server with this extension, merged in the same order: by
    name first, and within a name the user's over the system's. Not from the working directory,
    which a server reads too: a kernel's is wherever the notebook came from.
    """
    merged = Config()
    for name in ("jupyter_config", "jupyter_server_config", "jupyter_shimmy_jupyter_config"):
        for folder in reversed(jupyter_config_path()):
            for loader, suffix in ((PyFileConfigLoader, "py"), (JSONFileConfigLoader, "json")):
                with contextlib.suppress(ConfigFileNotFound):
                    merged.merge(loader(f"{name}.{suffix}", path=folder).load_config())
    return merged


@dataclass(frozen=True, slots=True)
class KernelEnvironment:
    """How a kernel's environment says which server it belongs to, and in which profile names of a lock
    are resolved. `token` is never shown.
    """

    server_url: str | None
    token: str | None
    server_pid: int | None
    profile: str | None = None
    """Of a `shimmy.lock`."""


def kernel_environment(environment: Mapping[str, str] = os.environ) -> KernelEnvironment:
    pid = environment.get("JPY_PARENT_PID", "")
    return KernelEnvironment(
        server_url=environment.get("SHIMMY_SERVER_URL"),
        token=environment.get("SHIMMY_KERNEL_TOKEN"),
        server_pid=int(pid) if pid.isdigit() else None,
        profile=environment.get("SHIMMY_PROFILE") or None,
    )


def home() -> Path | None:
    """The user's home folder; None where nothing says which it is."""
    with contextlib.suppress(RuntimeError):
        return Path.home()
    return None
