"""What a cell gives back: a completion from a body and from a stream, what it says of itself, how it is shown.

Cases: chat and text bodies; reasoning, log-probabilities, receipts, each there and not; every ending; a stream
whole, in single characters, with waiting, with usage and without, stopped before its end and before its beginning;
bodies that are none; the line of figures with everything and with nothing; each format; hostile names and texts;
JSON only where it is asked for; keeping, comparing, printing, formatting.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import nbformat
import pytest
from IPython.core.formatters import DisplayFormatter

from shimmy_jupyter.errors import InternalError, InvalidValue
from shimmy_jupyter.notebook.result import (
    OWN_JSON,
    Completion,
    Receipt,
    Stream,
    figures,
    from_body,
    receipt_line,
)
from shimmy_jupyter.types import Timings, Usage

from .test_display import ATTACKS, TURNS
from .test_formats import Outside

LEAF = "3fa94c01" * 8
SHIMMY = {
    "request_id": "0a" * 16,
    "receipt": {"request_id": "0a" * 16, "seq": 12, "leaf_hash": LEAF},
    "queue_ms": 1.5,
    "ttft_ms": 6.2,
    "tokens_per_second": 500.4,
    "cached_tokens": 30,
}
USAGE = {
    "prompt_tokens": 40,
    "completion_tokens": 3,
    "total_tokens": 43,
    "prompt_tokens_details": {"cached_tokens": 30},
    "completion_tokens_details": {"reasoning_tokens": 1},
}
SCORES = [{"token": "Hi", "logprob": -0.1, "bytes": [72, 105], "top_logprobs": []}]


def body(text: str = "Hi **you**", **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None, "reasoning_content": "hm"}
    choice = {"index": 0, "message": message, "finish_reason": "stop",
              "logprobs": {"content": SCORES, "refusal": None}}  # fmt: skip
    return {
        "id": "x",
        "model": "slow",
        "choices": [choice],
        "usage": USAGE,
        "shimmy": SHIMMY,
    } | more


WHOLE = Completion(
    "Hi **you**", "slow", "hm", "stop", Usage(40, 3, 30, 1), Timings(1.5, 6.2, 500.4), Receipt("0a" * 16, 12, LEAF),
    "0a" * 16, logprobs=tuple(SCORES), raw=body(),
)  # fmt: skip


class TestBody:
    def test_everything(self) -> None:
        assert from_body(body()) == WHOLE
        more = from_body(
            body(), format="json", provenance={"seed": 0}, parsed=[0], origin="o", logprobs=None
        )
        assert (more.format, more.provenance, more.parsed, more.origin) == (
            "json",
            {"seed": 0},
            [0],
            "o",
        )
        assert more.logprobs is None

    def test_nothing_more_than_there_must_be(self) -> None:
        choice = {"message": {"content": None}, "finish_reason": "length"}
        found = from_body({"choices": [choice]})
        assert found == Completion("", finish_reason="length", raw={"choices": [choice]})
        assert (found.usage, found.timings, found.receipt, found.logprobs) == (
            None,
            None,
            None,
            None,
        )

    def test_a_text_completion(self) -> None:
        scores = {"tokens": ["The", " cat"], "token_logprobs": [None, -0.5],
                  "top_logprobs": [None, {" cat": -0.5, " dog": -1.0}], "text_offset": [0, 3]}  # fmt: skip
        found = from_body(
            {"choices": [{"text": "The cat", "finish_reason": "stop", "logprobs": scores}]}
        )
        assert found.text == "The cat"
        assert found.logprobs is not None
        assert [one["token"] for one in found.logprobs] == [" cat"]
        assert [one["token"] for one in found.logprobs[0]["top_logprobs"]] == [" cat", " dog"]
        assert found.likely().perplexity == pytest.approx(2.718281828**0.5)

    @pytest.mark.parametrize(
        "wrong",
        [
            {},
            {"choices": []},
            {"choices": [{}]},
            {"choices": None},
            {"choices": [{"message": "x"}]},
        ],
    )
    def test_what_is_none(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(InternalError, match="no completion"):
            from_body(wrong)


def chunks(text: str, size: int = 1) -> list[dict[str, Any]]:
    head = {"model": "slow", "usage": None}

    def chunk(
        delta: dict[str, str], reason: str | None = None, scores: Any = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": scores}
        return head | {"choices": [choice]}

    found = [
        chunk({"role": "assistant", "content": ""}),
        chunk({"reasoning_content": "h"}),
        chunk({"reasoning_content": "m"}),
    ]
    found += [chunk({"content": text[at : at + size]}) for at in range(0, len(text), size)]
    found += [chunk({"content": ""}, scores={"content": SCORES, "refusal": None})]
    return [*found, chunk({}, "stop"), head | {"choices": [], "usage": USAGE, "shimmy": SHIMMY}]


class TestStream:
    @pytest.mark.parametrize("size", [1, 3, 100])
    def test_comes_to_the_same_as_a_body(self, size: int) -> None:
        stream = Stream()
        waiting = {"waiting": {"state": "queued"}, "choices": []}
        came = [stream.add(chunk) for chunk in [waiting, *chunks("Hi **you**", size)]]
        assert "".join(came) == stream.text == "Hi **you**"
        assert (stream.reasoning, stream.reason) == ("hm", "stop")
        assert "waiting" not in stream.last
        assert dataclasses.replace(stream.completion(), raw=body()) == WHOLE

    def test_of_a_text_completion_and_other_choices(self) -> None:
        stream = Stream()
        stream.add(
            {
                "choices": [
                    {"index": 0, "text": "a"},
                    {"index": 1, "text": "b", "finish_reason": "stop"},
                ]
            }
        )
        stream.add(
            {"choices": [{"index": 0, "text": "c", "finish_reason": "length"}], "model": "m"}
        )
        found = stream.completion(format="text")
        assert (found.text, found.finish_reason, found.model, found.format) == (
            "ac",
            "length",
            "m",
            "text",
        )

    def test_stopped(self) -> None:
        stream = Stream()
        assert stream.completion() == Completion("", finish_reason="stopped")
        assert stream.reason is None
        for chunk in chunks("Hi **you**")[:5]:
            stream.add(chunk)
        found = stream.completion()
        assert (found.text, found.finish_reason, found.usage, found.timings) == (
            "Hi",
            "stopped",
            None,
            None,
        )
        assert found.note == "slow · stopped"
        assert stream.completion("length").finish_reason == "length"

    def test_log_probabilities_add_up(self) -> None:
        stream = Stream()
        for _ in range(3):
            stream.add({"choices": [{"delta": {"content": "Hi"}, "logprobs": {"content": SCORES}}]})
        assert stream.completion().logprobs == tuple(SCORES * 3)


class TestFigures:
    def test_everything(self) -> None:
        assert figures(body(), "stop") == (
            "slow · 3 tokens · 500 tokens/s · first token after 6 ms · cached 30 of 40 prompt tokens"
        )
        assert figures(body(), "length", "tutor of shimmy.lock") == (
            "slow · tutor of shimmy.lock · 3 tokens · 500 tokens/s · first token after 6 ms"
            " · cached 30 of 40 prompt tokens · cut off at max_tokens"
        )

    @pytest.mark.parametrize(
        ("reason", "said"),
        [("stop", ""), (None, ""), ("length", " · cut off at max_tokens"), ("stopped", " · stopped"), ("cancelled", " · stopped")],
    )  # fmt: skip
    def test_endings(self, reason: str | None, said: str) -> None:
        assert (
            figures({"model": "m", "usage": {"completion_tokens": 1}}, reason)
            == f"m · 1 tokens{said}"
        )

    def test_what_is_not_known_is_left_out(self) -> None:
        assert figures({}, None) == ""
        assert figures({}, "stopped") == "stopped"
        none = SHIMMY | {"ttft_ms": None, "tokens_per_second": None}
        assert figures({"model": "m", "usage": USAGE | {"completion_tokens": 0, "prompt_tokens_details": {"cached_tokens": 0}},
                        "shimmy": none}, "stop") == "m · 0 tokens"  # fmt: skip

    def test_names_that_move_or_break_lines(self) -> None:
        assert figures({"model": "a\nb\u202e\x1b[2J"}, None, "c\r\nd") == "a b[2J · c d"

    def test_receipts(self) -> None:
        assert receipt_line(body()) == f"receipt 12 · leaf 3fa94c013fa9 · request {'0a' * 16}"
        assert receipt_line({}) == ""
        assert receipt_line({"shimmy": SHIMMY | {"receipt": None}}) == ""


class TestShown:
    def test_in_a_notebook(self) -> None:
        data, metadata = dataclasses.replace(WHOLE, provenance={"seed": 0})._repr_mimebundle_()
        assert set(data) == {"text/plain", "text/markdown", "text/html", OWN_JSON}
        assert data["text/plain"] == f"Hi **you**\n[{WHOLE.note}]"
        assert "<strong>you</strong>" in data["text/html"]
        assert "<summary>Reasoning</summary>" in data["text/html"]
        assert "receipt 12 · leaf 3fa94c013fa9" in data["text/html"]
        assert data[OWN_JSON] == WHOLE.to_json()
        assert metadata == {"shimmy": {"seed": 0}}
        output = nbformat.v4.new_output(
            "execute_result", data=data, metadata=metadata, execution_count=1
        )
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[output])])
        nbformat.validate(book)
        assert "Hi **you**" in nbformat.writes(book)

    def test_through_ipython(self) -> None:
        format = DisplayFormatter().format  # type: ignore[no-untyped-call]
        data, metadata = format(dataclasses.replace(WHOLE, provenance={"seed": 0}))
        assert (data["text/plain"], metadata["shimmy"]) == (
            f"Hi **you**\n[{WHOLE.note}]",
            {"seed": 0},
        )
        data, _ = format(WHOLE, include={"application/json"})
        assert data == {"application/json": WHOLE.to_json()}

    def test_json_in_its_own_name_only_where_it_is_asked_for(self) -> None:
        # JupyterLab would show it in the answer's stead.
        assert "application/json" not in WHOLE._repr_mimebundle_()[0]
        assert set(WHOLE._repr_mimebundle_(include=["text/plain"])[0]) == {"text/plain"}
        assert set(WHOLE._repr_mimebundle_(exclude=["text/html", OWN_JSON])[0]) == {
            "text/plain",
            "text/markdown",
        }
        data, metadata = Completion('{"a": 1}', "m", format="json")._repr_mimebundle_()
        assert data["application/json"] == {"a": 1}
        assert metadata["application/json"]["root"] == "m"
        _, metadata = Completion('{"a": 1}', format="json")._repr_mimebundle_(
            exclude=["application/json"]
        )
        assert metadata == {}

    @pytest.mark.parametrize(
        "format", ["code", "html", "image", "json", "markdown", "md", "math", "text"]
    )
    @pytest.mark.parametrize("text", ATTACKS)
    def test_hostile(self, text: str, format: str) -> None:
        hostile = Completion(text, text, text, "stopped", receipt=Receipt(text, 1, text), request_id=text,
                             format=format, origin=text)  # fmt: skip
        data, metadata = hostile._repr_mimebundle_()
        Outside(data.get("text/html", ""))
        for said in (*data.values(), metadata):
            assert not TURNS.search(json.dumps(said, ensure_ascii=False).replace("\\", ""))
        assert "\n" not in hostile.note

    def test_to_json_is_json_and_whole(self) -> None:
        found = json.loads(json.dumps(WHOLE.to_json()))
        assert found["usage"] == {
            "prompt_tokens": 40,
            "completion_tokens": 3,
            "cached_tokens": 30,
            "reasoning_tokens": 1,
        }
        assert found["receipt"]["seq"] == 12
        assert found["timings"]["ttft_ms"] == 6.2
        assert set(found) == {"text", "reasoning", "model", "finish_reason", "usage", "timings", "receipt",
                              "request_id", "format"}  # fmt: skip
        bare = Completion("x").to_json()
        assert (bare["usage"], bare["timings"], bare["receipt"]) == (None, None, None)


class TestValue:
    def test_as_a_text(self) -> None:
        assert str(WHOLE) == f"{WHOLE}" == "Hi **you**"
        assert f"{WHOLE:>12}" == "  Hi **you**"
        assert repr(WHOLE) == "Completion('Hi **you**', model='slow', finish_reason='stop')"
        assert len(repr(Completion("x" * 10_000))) < 120

    def test_cannot_be_changed(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            WHOLE.text = "x"  # type: ignore[misc]

    def test_equality_and_hash(self) -> None:
        assert from_body(body()) == WHOLE != from_body(body("Bye"))
        assert len({WHOLE, from_body(body()), from_body(body("Bye"))}) == 2

    def test_by_format(self) -> None:
        assert Completion("```py\nx\n```").value == "```py\nx\n```"
        assert Completion("```py\nx\n```", format="code").value == "x"
        assert Completion('{"a": 1}', format="json").value == {"a": 1}
        assert Completion('{"a":', format="json").value == '{"a":'
        assert Completion("x", format="json", parsed=0).value == 0

    def test_likely(self) -> None:
        assert WHOLE.likely().model == "slow"
        with pytest.raises(InvalidValue, match="no log-probabilities") as caught:
            Completion("x").likely()
        assert caught.value.param == "logprobs"
        assert Completion("x", logprobs=()).likely().tokens == ()
