"""The checks, in the order in which they are read."""

from __future__ import annotations

import json
import traceback
from pathlib import Path

from traitlets import TraitError
from traitlets.config import Config

from ..config import CONFIGURABLES, Settings
from . import builds, folders, servers
from .look import Machine
from .verdict import Check


def checks(look: Machine) -> list[Check]:
    """What is as it should be on this machine, and what is not."""
    build = look.build()
    config, settings, loaded = _configuration(look)
    return [
        builds.packages(look),
        builds.engine(look, build),
        builds.processor(look, build),
        builds.gpu(look, build),
        builds.import_name(look),
        servers.extension(look, config),
        *loaded,
        folders.configuration_files(look),
        *folders.roots(look, settings),
        folders.state(look),
        folders.disk(look, settings),
        folders.memory(look, settings),
        *servers.running(look),
        servers.configured(config),
        builds.isolation(look, build, settings),
        _offline(settings),
    ]


def _configuration(look: Machine) -> tuple[Config | None, Settings | None, list[Check]]:
    """What Jupyter's files say, as far as it can be read, and the check that says how far that is."""
    name = "configuration"
    try:
        config = look.configuration()
    except Exception as error:  # noqa: BLE001  a configuration file is a program of somebody else's
        return (
            None,
            None,
            [Check(name, "fail", where(error), "jupyter server --show-config says more")],
        )
    try:
        settings = look.settings(config)
    except TraitError as error:
        return config, None, [Check(name, "fail", str(error), "correct that setting")]
    if unknown := _unknown(config):
        action = "correct its spelling: what nobody knows has no effect"
        return config, settings, [Check(name, "warn", f"no such setting: {unknown}", action)]
    return config, settings, [Check(name, "ok", "every setting can be used")]


def _unknown(config: Config) -> str:
    """Settings of ours that there are not."""
    ours = {cls.__name__: {*cls.class_trait_names(config=True)} for cls in CONFIGURABLES}
    ours |= {"ShimmyApp": {"offline"}, "ShimmyMagics": set()}
    wrong = []
    for section, settings in config.items():
        if section in ours and section != "ShimmyMagics":
            wrong += [f"{section}.{name}" for name in settings if name not in ours[section]]
        elif section.startswith("Shimmy") and section not in ours:
            wrong.append(section)
    return ", ".join(sorted(wrong)[:5])


def where(error: Exception) -> str:
    """What went wrong in which file, but not what that file was just working on."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}, line {error.lineno}: {error.msg}"
    if isinstance(error, json.JSONDecodeError):
        return f"a file is not JSON: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.endswith("_config.py")]
    place = f" in {Path(ours[-1].filename).name}, line {ours[-1].lineno}" if ours else ""
    return f"{type(error).__name__}{place}"


def _offline(settings: Settings | None) -> Check:
    if settings is None:
        return Check("offline", "skip", "the configuration cannot be read")
    if settings.offline:
        return Check("offline", "ok", "on: no model is fetched, whoever asks")
    return Check("offline", "ok", "off: a model is fetched when somebody asks for one")
