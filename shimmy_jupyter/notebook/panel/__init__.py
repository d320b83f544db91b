"""`shimmy.panel()`: the service as widgets in a notebook."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ...errors import Misconfigured

if TYPE_CHECKING:  # both are heavy
    from .reach import Transport
    from .widgets import Panel

_WANTED = "the panel needs ipywidgets 8 where the kernel runs: pip install 'ipywidgets>=8'"


def panel(transport: Callable[[], Transport]) -> Panel:
    """A widget to choose and load models, ask and compare them, see limits and the audit. `transport` is
    called in the panel's own thread whenever something is to be asked. Each call makes a panel of its own.

    Raises `Misconfigured` where ipywidgets is missing or older than 8.
    """
    try:
        import ipywidgets  # type: ignore[import-untyped]
    except ImportError as error:
        raise Misconfigured(_WANTED) from error
    major = str(ipywidgets.__version__).partition(".")[0]
    if not (major.isdigit() and int(major) >= 8):
        raise Misconfigured(f"{_WANTED}; there is {ipywidgets.__version__}")
    from .widgets import Panel

    return Panel(transport)
