"""Every setting, as a trait with its help; and the only reader of the environment.

Traits become one frozen `Settings`, which is passed in where it is needed and fetched nowhere.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jupyter_core.paths import jupyter_data_dir
from traitlets import TraitError
from traitlets.config import Config

from ..core.limits import LimitTable
from ..core.policy import Policy
from ..models.sources import Places
from .files import load_config, load_system_config
from .folders import places
from .layers import bounded, limit_table, locked, policy
from .traits import (
    CONFIGURABLES,
    AppTraits,
    Bytes,
    ShimmyAudit,
    ShimmyEngine,
    ShimmyLimits,
    ShimmyModels,
    ShimmyPolicy,
    WithoutServer,
)

__all__ = [
    "CONFIGURABLES",
    "AppTraits",
    "AuditSettings",
    "Bytes",
    "GuardSettings",
    "KernelEnvironment",
    "Settings",
    "home",
    "kernel_environment",
    "load_config",
    "load_system_config",
    "places",
    "settings",
]


@dataclass(frozen=True, slots=True)
class AuditSettings:
    """`path` None: nothing is recorded. `retention` is in days, None for ever."""

    path: Path | None = None
    record_content: bool = False
    fail_closed: bool = False
    durable: bool = False
    retention: int | None = None


@dataclass(frozen=True, slots=True)
class GuardSettings:
    """Policies and tables of limits hold all together: the administrator's beside the user's."""

    policies: tuple[Policy, ...] = ()
    limits: tuple[LimitTable, ...] = ()
    admins: frozenset[str] = frozenset()
    admin_groups: frozenset[str] = frozenset()
    allow_in_kernel: bool = True
    locked: Mapping[str, str] = field(default_factory=dict)
    """Limits that users cannot raise, and why."""
    spending: Path | None = None
    """Where it is kept what has been used of limits; None: in memory."""
    audit: AuditSettings = field(default_factory=AuditSettings)


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
    saved_kv_bytes: int = 1 << 30
    weights: Mapping[str, float] = field(default_factory=dict)
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
    bind_localhost_only: bool = False
    guard: GuardSettings = field(default_factory=GuardSettings)


def settings(
    config: Config,
    environment: Mapping[str, str] = os.environ,
    *,
    system: Config | None = None,
    kernel: bool = False,
) -> Settings:
    """Read the traits out of a Jupyter configuration. `system` is what the administrator has set, which
    bounds it. `kernel`: for a process that is no server. Raises TraitError naming the bad one.
    """
    ceiling = Config() if system is None else system
    engine = bounded(ShimmyEngine, config, ceiling)
    models = bounded(ShimmyModels, config, ceiling)
    limits = bounded(ShimmyLimits, config, ceiling)
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
    app, app_ceiling = (
        WithoutServer(config=Config({"WithoutServer": one.get("ShimmyApp", {})}))
        for one in (config, ceiling)
    )
    folder = Path(jupyter_data_dir()) / "shimmy_jupyter"
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
        places=places(models.roots, models.search, environment),
        state_folder=folder,
        probe=models.probe,
        verify_always=models.verify == "always",
        memory_check=models.memory_check,
        memory_reserve=models.memory_reserve or None,
        memory_budget=models.memory_budget,
        idle_unload=models.idle_unload,
        offline=app.offline or app_ceiling.offline or switched_off,
        allow_pull=models.allow_pull,
        hub=hub,
        hub_token=environment.get("HF_TOKEN") or environment.get("HUGGING_FACE_HUB_TOKEN"),
        pull_hosts=tuple(models.pull_hosts),
        max_request_bytes=limits.max_request_size,
        bind_localhost_only=app.bind_localhost_only or app_ceiling.bind_localhost_only,
        guard=_guard(config, ceiling, folder, "kernel-" if kernel else ""),
    )


def _guard(config: Config, system: Config, folder: Path, prefix: str) -> GuardSettings:
    """Of a user's configuration, and of the system's again: both hold."""
    chosen = bounded(ShimmyPolicy, config, system)
    audit = bounded(ShimmyAudit, config, system)
    layers = [config, *([system] if system else [])]
    path = Path(audit.path).expanduser() if audit.path else folder / "audit" / "ledger.sqlite"
    return GuardSettings(
        policies=tuple(policy(ShimmyPolicy(config=one)) for one in layers),
        limits=tuple(limit_table(ShimmyLimits(config=one)) for one in layers),
        admins=frozenset(chosen.admins),
        admin_groups=frozenset(chosen.admin_groups),
        allow_in_kernel=chosen.allow_in_kernel,
        locked=locked(system),
        spending=folder / f"{prefix}limits.sqlite",
        audit=AuditSettings(
            path=path.with_name(prefix + path.name) if audit.enabled else None,
            record_content=audit.record_content,
            fail_closed=audit.fail_closed,
            durable=audit.durable,
            retention=audit.retention,
        ),
    )


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
    session: str | None = None
    """The path of the notebook that the kernel is of, where it is a file's."""


def kernel_environment(environment: Mapping[str, str] = os.environ) -> KernelEnvironment:
    pid = environment.get("JPY_PARENT_PID", "")
    return KernelEnvironment(
        server_url=environment.get("SHIMMY_SERVER_URL"),
        token=environment.get("SHIMMY_KERNEL_TOKEN"),
        server_pid=int(pid) if pid.isdigit() else None,
        profile=environment.get("SHIMMY_PROFILE") or None,
        session=environment.get("JPY_SESSION_NAME") or None,
    )


def home() -> Path | None:
    """The user's home folder; None where nothing says which it is."""
    with contextlib.suppress(RuntimeError):
        return Path.home()
    return None
