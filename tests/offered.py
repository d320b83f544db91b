"""Models as the catalogue lists them, for tests that need some."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shimmy_jupyter.models.catalog import Catalog
from shimmy_jupyter.models.scan import never
from shimmy_jupyter.models.sources import Found, Places, Scan, Scanner


def found(id: str, path: Path, **more: Any) -> Found:
    path = path.absolute()
    given = {"source": "root", "size_bytes": 1, "created": 1_700_000_000, "kind": "model"}
    return Found(id=id, path=path, **(given | {"parts": (path,), "root": path.parent} | more))


class Listed:
    """Finds always the same, and counts how often it is asked."""

    def __init__(self, *models: Found) -> None:
        self.models = models
        self.looks = 0

    def scan(self, stop: Callable[[], bool] = never) -> Scan:
        self.looks += 1
        return Scan(self.models, ())


def catalog(*models: Found) -> Catalog:
    return Catalog(Listed(*models))


def on_disk(*roots: Path) -> tuple[Found, ...]:
    """What is really there, the bundled model last."""
    return Scanner(Places(roots=roots)).scan().found
