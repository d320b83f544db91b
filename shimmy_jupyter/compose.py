"""Puts the house together from settings: for the server, for a kernel without one, for the
command line. The only place that names concrete parts of several rooms at once.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from .audit.ledger import Ledger
from .config import GuardSettings, Settings
from .engine.backend import Backend, LoadSpec, Sharing
from .engine.isolated import child_environment
from .engine.model import LoadedModel
from .errors import AccessDenied, Misconfigured
from .guard.guard import Guard, Rules
from .guard.spending import Spending
from .models.catalog import Catalog, HeaderFacts
from .models.hashes import Hashes
from .models.library import ModelLibrary
from .models.lifecycle import ModelPool
from .models.machine import this_machine
from .models.memory import available_memory, default_reserve, total_memory
from .models.probe import Prober, engine_build
from .models.sources import Found, Scanner
from .models.vetting import Needs, Vetting
from .service import CompletionService

if TYPE_CHECKING:  # it imports what opens connections
    from .models.pull import Puller

T = TypeVar("T")

log = logging.getLogger("shimmy_jupyter")

_SAVED_SHARE = 8
"""What is free may be used for copies of KV to one part in so many."""


def llama_backend() -> Backend:
    # Imported on first use: a server that nobody asks anything must not pay for it.
    from .engine.llama import LlamaBackend

    return LlamaBackend()


def isolated_backend() -> Backend:
    from .engine.isolated import IsolatedBackend

    return IsolatedBackend()


def build_service(settings: Settings) -> CompletionService:
    """The service on the real engine. Loads nothing until it is asked."""

    async def load(found: Found) -> LoadedModel:
        free = await asyncio.to_thread(available_memory)
        saved = min(settings.saved_kv_bytes, free // _SAVED_SHARE)
        sharing = Sharing(settings.weights, saved, settings.public_prefixes)
        spec = LoadSpec(
            path=str(found.path),
            parts=tuple(map(str, found.parts[1:])),
            context_size=settings.context_size,
            kv_tokens=settings.kv_tokens,
            kv_type=settings.kv_type,
            prompt_lookup=settings.prompt_lookup,
            sequences=settings.max_sequences,
            threads=settings.threads,
            gpu_layers=settings.gpu_layers,
            nice=settings.nice,
            free_bytes=free,
            aside_bytes=saved,
        )
        return await LoadedModel.load(backend, spec, queue_size=settings.max_queue, sharing=sharing)

    backend = isolated_backend if settings.isolation == "process" else llama_backend
    vetting = build_vetting(settings)
    pool = ModelPool(
        Catalog(Scanner(settings.places)),
        load,
        vetting=vetting,
        budget=settings.memory_budget,
        idle_unload=settings.idle_unload,
    )
    return CompletionService(
        pool,
        ModelLibrary(pool, vetting, lambda: build_puller(settings), this_machine()),
        guard=build_guard(settings.guard),
        default_max_tokens=settings.default_max_tokens,
    )


def build_guard(chosen: GuardSettings) -> Guard:
    """Policy, limits and ledger. No file is opened yet."""
    audit = chosen.audit
    rules = Rules(
        chosen.policies,
        chosen.limits,
        chosen.admins,
        chosen.admin_groups,
        chosen.locked,
        record_content=audit.record_content,
        fail_closed=audit.fail_closed,
        retention=audit.retention,
    )
    ledger = None if audit.path is None else Ledger(audit.path, durable=audit.durable)
    return Guard(rules, Spending(chosen.spending), ledger)


def build_vetting(settings: Settings) -> Vetting:
    """What models must pass before they are loaded. Nothing is looked at yet."""
    folder = settings.state_folder
    prober = None
    if settings.probe:
        prober = Prober(
            folder / "probes" if folder is not None else None,
            build=engine_build(),
            environment=child_environment(),
        )
    reserve = settings.memory_reserve
    needs = Needs(
        context_size=settings.context_size,
        kv_tokens=settings.kv_tokens,
        kv_type=settings.kv_type,
        reserve=default_reserve(total_memory()) if reserve is None else reserve,
        check=settings.memory_check,
    )
    hashes = Hashes(
        folder / "hashes" if folder is not None else None, always=settings.verify_always
    )
    return Vetting(HeaderFacts(), hashes, prober, available_memory, needs, capacity=total_memory())


def build_puller(settings: Settings) -> Puller:
    """What downloads models. Raises `AccessDenied` where nobody may."""
    if settings.offline:
        raise AccessDenied("ShimmyApp.offline or HF_HUB_OFFLINE is on: nothing is downloaded here")
    if not settings.allow_pull:
        raise AccessDenied("ShimmyModels.allow_pull is off: nothing is downloaded here")
    cache, downloads = settings.places.huggingface, settings.places.home_models
    if cache is None or downloads is None:
        raise Misconfigured(
            "downloads go to the Hugging Face cache and to ~/models, and ShimmyModels.search leaves out "
            "huggingface or home"
        )
    from .models.fetch import Fetcher
    from .models.fetch_hub import HUB, HUB_HOSTS
    from .models.pull import Puller

    hub = (settings.hub or HUB).rstrip("/")
    host = urlsplit(hub).hostname or ""
    fetcher = Fetcher(
        [*(HUB_HOSTS if hub == HUB else (host,)), *settings.pull_hosts],
        token_for=lambda asked: settings.hub_token if asked == host else None,
    )
    return Puller(fetcher, cache=cache.expanduser(), downloads=downloads.expanduser(), hub=hub)
