"""Where models are: what was set, and where other programs keep theirs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from jupyter_core.paths import jupyter_path

from ..models.sources import Places


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
