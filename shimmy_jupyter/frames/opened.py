"""A frame of pandas or polars as rows are read from it and columns put into it, by narwhals."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import InvalidValue
from ..notebook.values import python_value
from . import rows
from .columns import JSON, TEXT, VECTOR, Kind, Layout, fit
from .rows import Kept, Outcome, Prompts, Table

if TYPE_CHECKING:
    import narwhals.stable.v2 as nw


class Opened:
    """A frame of pandas or polars as it is filled. Raises `InvalidValue` for what cannot be."""

    def __init__(self, native: Any, param: str = "frame") -> None:
        import narwhals.stable.v2 as nw
        from narwhals.exceptions import NarwhalsError

        try:
            self._frame: nw.DataFrame[Any] = nw.from_native(native, eager_only=True)
        except (TypeError, NarwhalsError) as error:
            said = " ".join(str(error).split())[:200]
            raise InvalidValue(
                f"a frame that is there, of pandas or polars: {said}", param=param
            ) from None
        self._native = native
        self._width = 0
        """Of its vectors, once there is one."""
        self.columns: tuple[Any, ...] = tuple(self._frame.columns)

    @property
    def _is_pandas(self) -> bool:
        return bool(self._frame.implementation.is_pandas())

    def __len__(self) -> int:
        return len(self._frame)

    def cells(self, columns: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """Row by row, without a copy of the columns."""
        each = [iter(self._frame.get_column(name)) for name in columns]
        for _ in range(len(self)):
            yield tuple(python_value(next(one)) for one in each)

    def outcomes(
        self, prompts: Prompts, layout: Layout, resume: Any
    ) -> Iterator[tuple[int, Outcome]]:
        if resume is None:
            found = map(prompts.render, self.cells(prompts.columns))
            return enumerate(found)
        other = self._matching(prompts, layout, resume)
        # All of them before anything is asked: what does not fit would else be found at the end.
        return self._resumed(prompts, other, list(other.kept(layout)))

    def _matching(self, prompts: Prompts, layout: Layout, resume: Any) -> Opened:
        other = Opened(resume, "resume")
        if len(other) != len(self):
            raise InvalidValue(
                f"it has {len(other)} rows, and the frame {len(self)}", param="resume"
            )
        for name in (*prompts.columns, *layout.names, layout.error):
            if name not in other.columns:
                raise InvalidValue(f"it has no column {name!r}", param="resume")
        if both := [name for name in layout.names if name in prompts.columns]:
            raise InvalidValue(
                f"the column {both[0]!r} was replaced, so what was asked cannot be told",
                param="resume",
            )
        return other

    def kept(self, layout: Layout) -> Iterator[tuple[Any, ...] | None]:
        """Each row's values as their columns hold them, None for one that failed. Raises `InvalidValue`."""
        both = zip(self.cells(layout.names), self.cells([layout.error]), strict=True)
        for row, (had, (error,)) in enumerate(both):
            if not rows.is_null(error):
                yield None
                continue
            found = []
            for name, value, kind in zip(layout.names, had, layout.kinds, strict=True):
                try:
                    found.append(self._fitted(value, kind, never_text=name in layout.never_text))
                except (ValueError, OverflowError) as wrong:
                    raise InvalidValue(
                        f"row {row}, column {name!r}: {wrong}. A frame that was saved has to be read "
                        "with its types again, which a CSV file does not keep",
                        param="resume",
                    ) from None
            yield tuple(found)

    def _fitted(self, value: Any, kind: Kind, *, never_text: bool) -> Any:
        # In polars JSON is text; in pandas it is what a file has made of it.
        if kind == JSON and never_text and isinstance(value, str) and self._is_pandas:
            raise ValueError("str where the schema has no text")
        return None if rows.is_null(value) else fit(_deep(value), kind)

    def _resumed(
        self, prompts: Prompts, other: Opened, kept: list[tuple[Any, ...] | None]
    ) -> Iterator[tuple[int, Outcome]]:
        own, theirs = self.cells(prompts.columns), other.cells(prompts.columns)
        for row, (mine, its, had) in enumerate(zip(own, theirs, kept, strict=True)):
            outcome: Outcome = prompts.render(mine)
            if isinstance(outcome, str) and had is not None and prompts.render(its) == outcome:
                try:
                    self.check_width(had[0])
                except ValueError as wrong:
                    raise InvalidValue(f"row {row}: {wrong}", param="resume") from None
                outcome = Kept(outcome, had)
            yield row, outcome

    def check_width(self, value: Any) -> None:
        """Of vectors, which have one column. Raises `ValueError`."""
        if isinstance(value, array):
            self._width = self._width or len(value)
            if not value or len(value) != self._width:
                raise ValueError(
                    f"a vector of {len(value)} numbers, where others have {self._width}"
                )

    def filled(self, layout: Layout, table: Table, *, errors: bool) -> Any:
        made = dict(zip(layout.names, zip(table.columns, layout.kinds, strict=True), strict=True))
        # None is left of an earlier call, either.
        if errors or layout.error in self.columns:
            made[layout.error] = (list(table.said()), TEXT)
        if self._is_pandas:
            import narwhals.stable.v2 as nw

            pandas = nw.get_native_namespace(self._frame)
            native = self._native.copy(deep=False)
            for name, (values, kind) in made.items():
                native[name] = _pandas_series(pandas, values, kind, native.index)
            return native
        series = [_series(name, *one, self._frame) for name, one in made.items()]
        return self._frame.with_columns(*series).to_native()


def _deep(value: Any) -> Any:
    """What files give back has arrays within arrays."""
    value = python_value(value)
    if isinstance(value, dict):
        return {name: _deep(one) for name, one in value.items()}
    return [_deep(one) for one in value] if isinstance(value, list) else value


def _pandas_series(pandas: Any, values: list[Any], kind: Kind, index: Any) -> Any:
    dtypes = {"integer": "Int64", "boolean": "boolean", "number": "float64"}
    if kind == VECTOR:
        import numpy as np

        values = [None if one is None else np.frombuffer(one, np.float32) for one in values]
    # What this pandas makes of texts by itself.
    other = pandas.Series(["a"]).dtype if kind == TEXT else object
    return pandas.Series(values, index=index, dtype=dtypes.get(kind.name, other))


def _series(name: str, values: list[Any], kind: Kind, frame: nw.DataFrame[Any]) -> Any:
    import narwhals.stable.v2 as nw

    if kind == JSON:
        values = [
            v
            if v is None or isinstance(v, str)
            else json.dumps(v, ensure_ascii=False, default=list)
            for v in values
        ]
    if kind == VECTOR:
        width = next((len(one) for one in values if one is not None), 0)
        dtype: Any = nw.Array(nw.Float32, width) if width else nw.List(nw.Float32)
        values = [None if one is None else list(one) for one in values]
    else:
        dtype = _dtype(kind)
    return nw.new_series(name, values, dtype, backend=frame.implementation)


def _dtype(kind: Kind) -> Any:
    import narwhals.stable.v2 as nw

    if kind.name == "list":
        return nw.List(_dtype(kind.parts[0][1]))
    if kind.name == "record":
        return nw.Struct({name: _dtype(part) for name, part in kind.parts})
    simple = {"integer": nw.Int64, "number": nw.Float64, "boolean": nw.Boolean}
    return simple.get(kind.name, nw.String)
