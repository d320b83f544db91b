"""Which notebook and cell a request comes from, as far as the kernel knows; and whether that notebook
has switched the assistant off.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from IPython.core.interactiveshell import InteractiveShell

from ..errors import AccessDenied

_LARGEST = 64 << 20
"""Bytes of a notebook that is looked into."""


class Origin:
    """`session` is the notebook's path, as Jupyter gives it to a kernel; None where it does not."""

    def __init__(self, shell: InteractiveShell | None, session: str | None) -> None:
        self._shell, self._session = shell, session

    def headers(self) -> dict[str, str]:
        """For the record only: whoever asks can write what they like here. Percent-encoded UTF-8."""
        found = {"x-shimmy-notebook": self._session, "x-shimmy-cell": self.cell}
        return {name: quote(value[:1000], safe="/ ") for name, value in found.items() if value}

    @property
    def path(self) -> Path | None:
        """The notebook's file, where it is known."""
        return Path(self._session) if self._session else None

    @property
    def cell(self) -> str | None:
        """What the front end calls the cell that runs, if it says."""
        cell = self._parent().get("metadata", {}).get("cellId")
        return cell if isinstance(cell, str) else None

    @property
    def run(self) -> str | None:
        """What tells this execution of a cell from its others. Its number does not: `%reset` begins at 1
        again.
        """
        run = self._parent().get("header", {}).get("msg_id")
        return run if isinstance(run, str) else None

    def _parent(self) -> Mapping[str, Any]:
        """The message that the kernel is at."""
        kernel = getattr(self._shell, "kernel", None)
        found: Mapping[str, Any] = {} if kernel is None else kernel.get_parent("shell") or {}
        return found

    def check(self) -> None:
        """Raises `AccessDenied` where the saved notebook's metadata say `{"shimmy": {"enabled": false}}`.
        A courtesy of the notebook's author to the reader: who can edit it can take it out.
        """
        if self._session is not None and _switched_off(Path(self._session)):
            raise AccessDenied(
                "this notebook's metadata switch shimmy off: shimmy.enabled is false there"
            )


def _switched_off(path: Path) -> bool:
    if path.suffix != ".ipynb":
        return False
    try:
        if path.stat().st_size > _LARGEST:
            return False
        metadata = json.loads(path.read_bytes()).get("metadata", {})
    except (OSError, ValueError, AttributeError):
        return False  # not saved yet, or no notebook
    said = metadata.get("shimmy") if isinstance(metadata, dict) else None
    return isinstance(said, dict) and said.get("enabled") is False
