"""Bounds of numbers that llguidance does not keep to: a whole number that is excluded passes where the other
bound is less than 1 from it.

Put a billionth beyond it, a bound also refuses some that are valid: what is nearer, and below 10, for one,
9.9 and 9.99, which have fewer digits than the bound 9.999999999.
"""

from __future__ import annotations

from typing import Any

_LEAST = 1e-9
_LARGEST = 1 << 20
"""Beyond, there is hardly a decimal between a number and what is next to it."""
_SIDES = (
    ("exclusiveMinimum", "minimum", 1, max, ("maximum", "exclusiveMaximum")),
    ("exclusiveMaximum", "maximum", -1, min, ("minimum", "exclusiveMinimum")),
)


def excludes(schema: dict[str, Any]) -> bool:
    """Whether it excludes a whole number and is not about integers alone, with which nothing is wrong."""
    if schema.get("type") == "integer":
        return False
    return any(excluded in schema and schema[excluded] % 1 == 0 for excluded, *_ in _SIDES)


def put_beyond(schema: dict[str, Any], *, merged: bool) -> bool:
    """Put a bound that is included and next to the number in its place, where it is needed: also where the other
    bound may be in a schema that is `merged` with it. False where there is none.
    """
    before = dict(schema)
    for excluded, bound, way, tighter, others in _SIDES:
        number = before.get(excluded)
        if number is None or number % 1:
            continue
        if not (merged or any(abs(before[o] - number) < 1 for o in others if o in before)):
            continue
        if abs(number) > _LARGEST:
            return False
        del schema[excluded]
        beyond = number + way * _LEAST
        schema[bound] = tighter(beyond, schema.get(bound, beyond))
    return True
