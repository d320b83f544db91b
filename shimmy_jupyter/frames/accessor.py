"""`df.shimmy` on frames of pandas and polars, by narwhals: what comes in and goes out is of the same kind."""

from __future__ import annotations

import base64
import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from ..errors import GenerationFailed, InvalidValue
from . import rows
from .cache import Reply
from .columns import (
    JSON,
    TEXT,
    VECTOR,
    Kind,
    Layout,
    holdable,
    label_columns,
    layout_of,
    one_column,
)
from .fill import Options, Task, connected, fill
from .rows import Failed, Kept, Outcome, Prompts, Table
from .run import RowFailed

if TYPE_CHECKING:
    import narwhals.stable.v2 as nw

Prompt = str | Callable[[dict[Any, Any]], str | None]
_BATCH = 64
"""Texts that are embedded in one request."""


class FrameAccessor:
    """Ask a local model about every row."""

    def __init__(self, frame: Any) -> None:
        self._frame = frame

    def map(
        self,
        prompt: Prompt,
        *,
        schema: Any = None,
        into: str | Mapping[str, str] | None = None,
        model: str | None = None,
        system: str | None = None,
        concurrency: int = 32,
        max_tokens: int | None = None,
        temperature: float | None = 0,
        seed: int | None = None,
        cache: bool = True,
        progress: bool = True,
        errors: Literal["column", "raise"] = "column",
        resume: Any = None,
        max_wait: float = 300.0,
        **parameters: Any,
    ) -> Any:
        """The frame with the answers to a prompt for each row, in the same order and with the same index.

        `prompt` is a text, in which `{column}` stands for the row's value and every other brace for itself,
        or a function of the row as a dict, which gives a text, or None to leave the row out. What stands
        before the first column is computed once for all rows, so the instruction is best put there.

        Without `schema` the answer's text goes into the column `into`, "answer" by default. With one (a
        pydantic model, dataclass, TypedDict or JSON schema) each field becomes a column: of the field's
        name, behind `into` and "_" where it is a text, or as a mapping says (fields that it lacks are left
        out). Every answer is held to the schema, and told it before the prompt. Columns of the same
        name are replaced.

        A row that fails has nulls, and the reason in the column `<into>_error` ("answer_error"); with
        `errors="raise"` the first one ends it. A null in a column that the prompt names is such a failure.
        What would fail for each row (a model that is denied, or not there) is raised at once.

        `temperature` is 0, so the same prompt is asked once; so it is with `seed`. Else each row gets
        an answer of its own. `cache` keeps them all, sampled ones too, until the model's bytes or anything
        that is asked changes: call it again, and only what has no answer yet is asked. `cache=False`
        asks anew. Interrupting raises `Interrupted`; its `partial`, or `frames.last()`, is the frame so far,
        which can also be given to `resume`: rows in which nothing that the prompt takes has changed and that
        have no error keep their values. What else they were asked with, be it other words of the prompt or
        another model, does not count.

        `concurrency` rows are asked at once, fewer while the server's queue or a limit is full: that
        is waited for, `max_wait` seconds at most without any answer. `parameters` are fields of a chat
        request, as `top_p` or `stop`. Raises `InvalidValue` for what cannot be asked.
        """
        wiring, frame = connected(), Opened(self._frame)
        options = Options(model, concurrency, cache, progress, errors, resume, max_wait)
        given = {**parameters, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        wanted, validate = wiring.structure(schema) if schema is not None else (None, None)
        layout = layout_of(wanted, into)
        asked = rows.body(system, wanted, given)
        before = rows.instruction(wanted)

        async def call(named: str, texts: list[str]) -> list[Reply]:
            turns = rows.messages(system, before + texts[0])
            return [_reply(await wiring.ask({**asked, "model": named, "messages": turns}))]

        task = Task(
            "chat",
            rows.prompts(prompt, frame.columns),
            layout,
            {**asked, "system": system},
            call,
            partial(_values, layout, validate),
            rows.is_repeatable(given),
        )
        return fill(frame, wiring, options, task)

    def embed(
        self,
        column: Any,
        into: str = "embedding",
        *,
        model: str | None = None,
        concurrency: int = 4,
        cache: bool = True,
        progress: bool = True,
        errors: Literal["column", "raise"] = "column",
        resume: Any = None,
        max_wait: float = 300.0,
    ) -> Any:
        """The frame with a vector for each text of a column: float32 arrays of NumPy in pandas, a column of
        `Array(Float32, width)` in polars. 64 texts go into a request, and `concurrency` of these at once;
        the rest is as with `map`.
        """
        wiring, frame = connected(), Opened(self._frame)
        options = Options(model, concurrency, cache, progress, errors, resume, max_wait)
        layout = one_column(into, VECTOR)
        width = 0

        async def call(named: str, texts: list[str]) -> list[Reply]:
            vectors = await wiring.embed(named)(texts)
            found = (base64.b64encode(array("f", vector).tobytes()) for vector in vectors)
            return [Reply(text.decode()) for text in found]

        def read(reply: Reply) -> tuple[Any, ...]:
            nonlocal width
            vector = array("f", base64.b64decode(reply.text))
            width = width or len(vector)
            if not vector or len(vector) != width:
                raise ValueError(f"a vector of {len(vector)} numbers, where others have {width}")
            return (vector,)

        prompts = rows.column(column, frame.columns)
        task = Task("embed", prompts, layout, {}, call, read, batch=_BATCH)
        return fill(frame, wiring, options, task)

    def classify(
        self,
        column: Any,
        labels: Sequence[str],
        into: str = "label",
        *,
        model: str | None = None,
        concurrency: int = 32,
        cache: bool = True,
        progress: bool = True,
        errors: Literal["column", "raise"] = "column",
        resume: Any = None,
        max_wait: float = 300.0,
    ) -> Any:
        """The frame with the likeliest of `labels` for each text of a column, and beside it the probability
        of each label, in a column `<into>_<label>`. The rest is as with `map`.
        """
        wiring, frame = connected(), Opened(self._frame)
        options = Options(model, concurrency, cache, progress, errors, resume, max_wait)
        layout = label_columns(into, labels)
        named = list(labels)

        async def call(model: str, texts: list[str]) -> list[Reply]:
            found = await wiring.classify(model)(texts[0], named)
            return [Reply(json.dumps({name: float(p) for name, p in found.items()}))]

        def read(reply: Reply) -> tuple[Any, ...]:
            found = json.loads(reply.text)
            if set(found) != set(named):
                raise ValueError("it has other labels than were asked for")
            return (max(named, key=found.__getitem__), *(found[name] for name in named))

        prompts = rows.column(column, frame.columns)
        task = Task("classify", prompts, layout, {"labels": named}, call, read)
        return fill(frame, wiring, options, task)


class SeriesAccessor:
    """Ask a local model about every value of a column."""

    def __init__(self, series: Any) -> None:
        self._series = series

    def map(self, prompt: Prompt, **options: Any) -> Any:
        """The answers, as a column. `{value}` in the prompt, or the column's name, is the value. Takes what
        a frame's `map` takes but `errors` and `into`: the first row that fails is raised.
        """
        import narwhals.stable.v2 as nw

        for name in ("errors", "into"):
            if name in options:
                raise InvalidValue("a column has no place for it: map the frame", param=name)
        schema = options.get("schema")
        if schema is not None and layout_of(connected().structure(schema)[0], None).fields:
            raise InvalidValue("the answer has several fields: map the frame", param="schema")
        series = nw.from_native(self._series, series_only=True)
        own = str(series.name or "value")
        name = own if isinstance(prompt, str) and f"{{{own}}}" in prompt else "value"
        frame = series.alias(name).to_frame().to_native()
        answer = "answer" if name != "answer" else "answer_"
        filled = FrameAccessor(frame).map(prompt, into=answer, errors="raise", **options)
        return nw.from_native(filled, eager_only=True).get_column(answer).to_native()


def _reply(answer: Mapping[str, Any]) -> Reply:
    try:
        (choice,) = answer["choices"]
        text, finish = choice["message"]["content"], choice["finish_reason"]
        return Reply(text, int(answer["usage"]["completion_tokens"]), str(finish))
    except (KeyError, TypeError, ValueError) as error:
        raise GenerationFailed("the answer is not that of a chat request") from error


def _values(layout: Layout, validate: Callable[[str], Any] | None, reply: Reply) -> tuple[Any, ...]:
    if validate is None:
        return (reply.text,)
    if reply.finish == "length":
        raise RowFailed(
            Failed(
                "generation_failed",
                f"the answer was cut off after {reply.tokens} tokens: allow more by max_tokens",
            )
        )
    found, written = holdable(validate(reply.text)), json.loads(reply.text)
    # What has been read counts; what an instance does not keep is as it was written.
    both = isinstance(found, dict) and isinstance(written, dict)
    return layout.values({**written, **found} if both else found)


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
        self.columns: tuple[Any, ...] = tuple(self._frame.columns)

    def __len__(self) -> int:
        return len(self._frame)

    def cells(self, columns: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """Row by row, without a copy of the columns."""
        each = [iter(self._frame.get_column(name)) for name in columns]
        for _ in range(len(self)):
            yield tuple(_python(next(one)) for one in each)

    def outcomes(
        self, prompts: Prompts, layout: Layout, resume: Any
    ) -> Iterator[tuple[int, Outcome]]:
        if resume is None:
            found = map(prompts.render, self.cells(prompts.columns))
            return enumerate(found)
        return self._resumed(prompts, layout, self._matching(prompts, layout, resume))

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

    def _resumed(
        self, prompts: Prompts, layout: Layout, other: Opened
    ) -> Iterator[tuple[int, Outcome]]:
        own, theirs = self.cells(prompts.columns), other.cells(prompts.columns)
        values, errors = other.cells(layout.names), other.cells([layout.error])
        for row, (mine, its, had, (error,)) in enumerate(
            zip(own, theirs, values, errors, strict=True)
        ):
            outcome: Outcome = prompts.render(mine)
            same = (
                isinstance(outcome, str) and rows.is_null(error) and prompts.render(its) == outcome
            )
            if same and isinstance(outcome, str):
                outcome = Kept(outcome, tuple(map(_stored, had, layout.kinds)))
            yield row, outcome

    def filled(self, layout: Layout, table: Table, *, errors: bool) -> Any:
        made = dict(zip(layout.names, zip(table.columns, layout.kinds, strict=True), strict=True))
        # None is left of an earlier call, either.
        if errors or layout.error in self.columns:
            made[layout.error] = (list(table.said()), TEXT)
        if self._frame.implementation.is_pandas():
            import narwhals.stable.v2 as nw

            pandas = nw.get_native_namespace(self._frame)
            native = self._native.copy(deep=False)
            for name, (values, kind) in made.items():
                native[name] = _pandas_series(pandas, values, kind, native.index)
            return native
        series = [_series(name, *one, self._frame) for name, one in made.items()]
        return self._frame.with_columns(*series).to_native()


def _python(value: Any) -> Any:
    """Lists of polars and arrays of NumPy as lists."""
    for convert in ("to_list", "tolist"):
        if hasattr(value, convert):
            return getattr(value, convert)()
    return value


def _stored(value: Any, kind: Kind) -> Any:
    if rows.is_null(value):
        return None
    return array("f", value) if kind == VECTOR else value


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
            v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False)
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
