"""`df.shimmy` on frames of pandas and polars, by narwhals: what comes in and goes out is of the same kind."""

from __future__ import annotations

import base64
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from ..errors import GenerationFailed, InvalidValue
from . import rows
from .cache import Reply
from .columns import VECTOR, Layout, holdable, label_columns, layout_of, one_column
from .fill import Options, Task, connected, fill
from .opened import Opened
from .rows import Failed
from .run import RowFailed

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
        have no error keep their values, which have to be of their columns' types. What else they were asked
        with, be it other words of the prompt or another model, does not count.

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

        async def call(named: str, texts: list[str]) -> list[Reply]:
            vectors = await wiring.embed(named)(texts)
            found = (base64.b64encode(array("f", vector).tobytes()) for vector in vectors)
            return [Reply(text.decode()) for text in found]

        def read(reply: Reply) -> tuple[Any, ...]:
            vector = array("f", base64.b64decode(reply.text))
            frame.check_width(vector)
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
