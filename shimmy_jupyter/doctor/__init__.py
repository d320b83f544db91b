"""`shimmy doctor`: what a deployment should have, looked at here and now.

Nothing is changed, loaded or connected to. The engine is imported in a process of its own, as a
build for another processor ends the process that imports it.
"""

from __future__ import annotations

from .checks import checks
from .look import Build, Level, Machine, Process, this_machine
from .verdict import Check

__all__ = ["Build", "Check", "Level", "Machine", "Process", "checks", "this_machine"]
