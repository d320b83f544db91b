"""Jupyter's configuration files, as a server with this extension reads them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from jupyter_core.paths import ENV_CONFIG_PATH, SYSTEM_CONFIG_PATH, jupyter_config_path
from traitlets.config import Config
from traitlets.config.loader import ConfigFileNotFound, JSONFileConfigLoader, PyFileConfigLoader

_NAMES = ("jupyter_config", "jupyter_server_config", "jupyter_shimmy_jupyter_config")
OURS = ("ShimmyApp", "ShimmyEngine", "ShimmyModels", "ShimmyLimits", "ShimmyPolicy", "ShimmyAudit")
"""Sections of which the system's values are ceilings."""


def load_config() -> Config:
    """Merged in the server's order: by name first, and within a name the user's over the system's. Not
    from the working directory, which a server reads too: a kernel's is wherever the notebook came from.
    """
    return _merged(jupyter_config_path())


def load_system_config() -> Config:
    """What the administrator has set, whatever the user's files say: of the sections that bind."""
    found = _merged([*ENV_CONFIG_PATH, *SYSTEM_CONFIG_PATH])
    return Config({name: found[name] for name in OURS if name in found})


def _merged(folders: Iterable[str]) -> Config:
    merged = Config()
    for name in _NAMES:
        for folder in reversed([*folders]):
            for loader, suffix in ((PyFileConfigLoader, "py"), (JSONFileConfigLoader, "json")):
                with contextlib.suppress(ConfigFileNotFound):
                    merged.merge(loader(f"{name}.{suffix}", path=folder).load_config())
    return merged
