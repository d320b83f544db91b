"""Numbers, arrays and columns of other libraries, as Python has them. None of these libraries is imported."""

from __future__ import annotations

from typing import Any


def python_value(value: Any) -> Any:
    """What is no such thing stays as it is, and so does what is within lists."""
    for convert in ("to_list", "tolist"):
        if hasattr(value, convert) and not isinstance(value, type):
            return getattr(value, convert)()
    return value


def json_value(value: Any) -> Any:
    """For what JSON does not know. Raises `TypeError` where it is no such thing."""
    found = python_value(value)
    if found is value:
        raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
    return found
