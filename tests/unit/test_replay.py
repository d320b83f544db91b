"""Asking again, by a transport that plays the server; and what two answers have apart.

Cases: what is asked: parameters, messages, extras, what is dropped; the model by its bytes, by its name, not here; an
adapter; another model or seed in its stead. Identical; diverged in the middle, at the first and after the last
character, with characters of several bytes, tokens that are not the text, an answer that ended sooner
or later; by how much, and where that is not known. Each thing that can drift, alone and together; what is
not known, or had no effect, is none. Bytes that nobody has read: they are then, or may not be. Log-probabilities or tokens
that are not granted; other errors; interrupted; waiting; a server of another release. What is said, in one
line each. A kernel's own answers: bounds, and the last stays.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.errors import (
    AccessDenied,
    ContextLengthExceeded,
    InvalidValue,
    ModelNotFound,
    NotFound,
    QueueFull,
    ShimmyError,
)
from shimmy_jupyter.notebook.divergence import Score, divergence, first_difference
from shimmy_jupyter.notebook.provenance import Kept, Provenance, digest
from shimmy_jupyter.notebook.replay import Answers, Change, Outcome, Verdict, compare, replay

from .test_provenance import BODY, HEX, LAST, changed, made

OTHER = "f" * 64
PIECES = ("Be", "cause", ".")
TEXT = "Because."
WORDS = st.text(st.sampled_from("abé€\n"), max_size=30)


def model(id: str, sha256: str | None, kind: str = "model") -> dict[str, Any]:
    return {"id": id, "sha256": sha256, "kind": kind}


@dataclass
class Script:
    """A server: it has these models, and answers with these tokens, each with its rivals and their log-
    probabilities. `refusals` come first, one to a request.
    """

    pieces: tuple[str, ...] = PIECES
    rivals: dict[int, list[tuple[str, float]]] = field(default_factory=dict)
    models: list[dict[str, Any]] = field(default_factory=lambda: [model("course", HEX)])
    last: dict[str, Any] = field(default_factory=lambda: LAST)
    refusals: list[BaseException] = field(default_factory=list)
    read: list[str] | ShimmyError = field(default_factory=list)
    thought: str = ""
    reason: str = "stop"
    asked: list[dict[str, Any]] = field(default_factory=list)
    posted: list[str] = field(default_factory=list)
    left: int = 0

    def get(self, path: str) -> dict[str, Any]:
        if path == "shimmy/api/models":
            return {"models": self.models, "default": None, "engine": ""}
        assert path == "shimmy/api/jobs/j"
        return {"state": "done", "error": None, "result": {"sha256": self.read}}

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        assert body == {}
        self.posted.append(path)
        if isinstance(self.read, ShimmyError):
            raise self.read
        return {"job": "j"}

    def delete(self, path: str) -> dict[str, Any]:
        raise AssertionError(path)

    @contextlib.contextmanager
    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Iterable[bytes]]:
        assert path == "shimmy/v1/chat/completions"
        self.asked.append(dict(body))
        try:
            if self.refusals:
                raise self.refusals.pop(0)
            yield self._chunks(body)
        finally:
            self.left += 1

    def _chunks(self, body: dict[str, Any]) -> Iterator[bytes]:
        yield b': {"state": "loading", "message": "hashing", "done": 1, "total": 2}\n\n'
        delta: dict[str, Any] = {"role": "assistant", "content": ""}
        yield self._event(delta, None, None)
        if self.thought:
            yield self._event({"reasoning_content": self.thought}, None, None)
        for i, piece in enumerate(self.pieces):
            top = self.rivals.get(i, [(piece, -0.5)])
            own = dict(top).get(piece, -1.0)
            one = {
                **_token(piece, own),
                "top_logprobs": [_token(*rival) for rival in top],
            }
            scores = {"content": [one], "refusal": None} if body.get("logprobs") else None
            yield self._event({"content": piece}, scores, None)
        yield self._event({}, None, self.reason)
        figures = self.last.get("shimmy")
        last = {**self.last, "model": body["model"]}
        if figures is not None:
            sent = {name: body[name] for name in figures["parameters"].keys() & body.keys()}
            last["shimmy"] = {**figures, "parameters": figures["parameters"] | sent}
        yield b"data: " + json.dumps(last).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    @staticmethod
    def _event(delta: dict[str, Any], scores: Any, reason: str | None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": scores, "finish_reason": reason}
        return b"data: " + json.dumps({"choices": [choice], "usage": None}).encode() + b"\n\n"


def _token(piece: str, logprob: float) -> dict[str, Any]:
    return {"token": piece, "logprob": logprob, "bytes": list(piece.encode())}


def by(path: str, value: Any) -> dict[str, Any]:
    return changed(LAST, f"shimmy.{path}", value)


REPRODUCIBLE = by("parameters.reproducible", True)


def saved(text: str = TEXT, last: dict[str, Any] = REPRODUCIBLE, **more: Any) -> Provenance:
    return made(text, last=last, **more)


class TestWhatIsAsked:
    def test_the_same_reproducibly(self) -> None:
        server = Script()
        replay(server, saved(), TEXT)
        (asked,) = server.asked
        assert asked == {
            "model": "course", "messages": BODY["messages"], "stop": ["\n\n"], "temperature": 0.5,
            "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0, "repeat_last_n": 64,
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "seed": 7, "min_tokens": 0,
            "ignore_eos": False, "max_tokens": 1024, "reproducible": True, "logprobs": True,
            "top_logprobs": 20, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        assert server.left == 1

    def test_a_seed_of_chance_is_not_sent(self) -> None:
        server = Script()
        replay(server, saved(last=by("parameters.seed", None)), TEXT)
        assert "seed" not in server.asked[0]

    @pytest.mark.parametrize(
        ("models", "asked"),
        [
            ([model("course", None)], "course"),
            ([model("course", OTHER)], "course"),
            ([model("course", OTHER), model("renamed", HEX)], "renamed"),
            ([model("first", HEX), model("course", HEX)], "course"),
            ([model("renamed", HEX)], "renamed"),
            ([model("sight", HEX, "projector"), model("course", None)], "course"),
        ],
        ids=["unread", "other bytes", "renamed", "twice", "renamed alone", "no model"],
    )
    def test_the_model(self, models: list[dict[str, Any]], asked: str) -> None:
        server = Script(models=models)
        found = replay(server, saved(), TEXT)
        assert server.asked[0]["model"] == asked
        assert (f"the model is called {asked} here; it was course" in found.notes) is (
            asked != "course"
        )

    @pytest.mark.parametrize(
        "models", [[], [model("other", OTHER)], [model("course", HEX, "lora")]]
    )
    def test_no_model(self, models: list[dict[str, Any]]) -> None:
        with pytest.raises(
            ModelNotFound, match=r"course .sha256 0123456789ab….* is not here"
        ) as caught:
            replay(Script(models=models), saved(), TEXT)
        assert caught.value.param == "model"
        unknown = saved(last=by("made_by.sha256", None))
        with pytest.raises(ModelNotFound, match="course is not here"):
            replay(Script(models=models), unknown, TEXT)

    def test_an_adapter(self) -> None:
        body, last = {**BODY, "adapter": "style"}, by("made_by.adapter", OTHER)
        before = made(TEXT, body, last)
        server = Script(models=[model("course", HEX), model("tone", OTHER, "lora")], last=last)
        found = replay(server, before, TEXT)
        assert server.asked[0]["adapter"] == "tone"
        assert found.verdict is Verdict.IDENTICAL
        with pytest.raises(ModelNotFound) as caught:
            replay(Script(), before, TEXT)
        assert caught.value.param == "adapter"

    def test_others_in_their_stead(self) -> None:
        server = Script(models=[])
        found = replay(server, saved(), TEXT, instead={"model": "new", "seed": 8})
        assert (server.asked[0]["model"], server.asked[0]["seed"]) == ("new", 8)
        assert found.changes == (Change("seed", "7", "8"),)
        assert found.verdict is Verdict.DRIFTED

    def test_a_request_that_was_too_long(self) -> None:
        server = Script()
        with pytest.raises(InvalidValue, match="run the cell again"):
            replay(server, replace(saved(), request=None), TEXT)
        assert not server.asked

    def test_who_watches_hears_all(self) -> None:
        heard: list[dict[str, Any]] = []
        replay(Script(), saved(), TEXT, watch=heard.append)
        assert "waiting" in heard[0]
        assert "".join(
            c["delta"].get("content", "") for item in heard for c in item["choices"]
        ) == TEXT  # fmt: skip

    def test_interrupting_ends_it(self) -> None:
        def interrupt(item: dict[str, Any]) -> None:
            if item["choices"]:
                raise KeyboardInterrupt

        server = Script()
        with pytest.raises(KeyboardInterrupt):
            replay(server, saved(), TEXT, watch=interrupt)
        assert (server.left, len(server.asked)) == (1, 1)


class TestWhatComesOfIt:
    def test_identical(self) -> None:
        found = replay(Script(), saved(), TEXT)
        assert (found.verdict, found.same, found.changes, found.notes) == (
            "identical",
            True,
            (),
            (),
        )
        assert (found.text, found.divergence) == (TEXT, None)
        assert found.after.answer_sha256 == digest(TEXT)
        assert found.lines() == [f"identical: 4 tokens, sha256 {digest(TEXT)[:12]}…"]

    def test_identical_by_its_digest_alone(self) -> None:
        assert replay(Script(), saved(), None).verdict == "identical"

    def test_diverged(self) -> None:
        server = Script(("Be", "ware", "!"), {1: [("ware", -0.25), ("c", -0.75), ("cause", -1.5)]})
        found = replay(server, saved(), TEXT)
        assert (found.verdict, found.same, found.changes) == ("diverged", False, ())
        assert found.lines() == [
            "diverged at character 2, token 1, after 'Be': it was 'cause.', and is 'ware!'",
            "'ware' has log-probability -0.250, 'c' -0.750 (rank 2): 0.500 apart",
        ]

    def test_diverged_where_the_text_is_not_known(self) -> None:
        found = replay(Script(("No",)), saved(), None)
        assert (found.verdict, found.divergence) == ("diverged", None)
        assert found.lines() == ["diverged: the text is another one, and where is not known"]

    def test_drifted_and_the_same(self) -> None:
        found = replay(Script(last=by("made_by.engine", "0.3.40")), saved(), TEXT)
        assert (found.verdict, found.same) == ("drifted", True)
        assert found.lines()[0] == "drifted: engine version: 0.3.36 → 0.3.40"
        assert found.lines()[1].startswith("nevertheless the text is identical: 4 tokens")

    def test_drifted_and_diverged(self) -> None:
        found = replay(Script(("No",), last=by("made_by.sha256", [OTHER])), saved(), TEXT)
        assert found.verdict == "drifted"
        first, second, third = found.lines()
        assert first == "drifted: model's bytes: 0123456789ab…, fedcba987654… → ffffffffffff…"
        assert second.startswith("diverged at character 0, token 0, after '': it was 'Because.'")
        assert (
            third
            == "'No' has log-probability -0.500; what was there before is not among the 1 likeliest"
        )

    def test_other_reasoning_before_the_same_answer(self) -> None:
        found = replay(Script(thought="Hmm"), saved(reasoning="Hm"), TEXT)
        assert found.verdict == "identical"
        assert found.notes == ("the reasoning before the answer is another one",)
        assert replay(Script(thought="Hm"), saved(reasoning="Hm"), TEXT).notes == ()

    def test_it_was_chance(self) -> None:
        before = saved(last=by("parameters.seed", None))
        server = Script(("No",), last=by("parameters.seed", 0))
        found = replay(server, before, TEXT)
        assert (found.verdict, found.changes) == ("diverged", ())
        assert found.notes == ("it was not reproducible: it had no seed, so chance chose it",)

    def test_it_had_company(self) -> None:
        found = replay(Script(("No",)), saved(last=LAST), TEXT)
        assert found.verdict == "diverged"
        assert "not asked for reproducibly" in found.notes[0]
        assert replay(Script(), saved(last=LAST), TEXT).notes == ()

    def test_nothing_said_moves_a_cursor(self) -> None:
        server = Script(("\x1b[2J\u202e",), last=by("made_by.cpu", "fast\n\x1b[31mred"))
        lines = replay(server, saved(), TEXT).lines()
        assert len(lines) == 3
        assert all(c.isprintable() for line in lines for c in line)

    @pytest.mark.parametrize(
        "last",
        [changed(LAST, "shimmy", ...), by("made_by", None), by("made_by.prompt", ...)],
        ids=["another's", "nothing known", "another release"],
    )
    def test_a_server_that_does_not_say_what_makes_an_answer(self, last: dict[str, Any]) -> None:
        with pytest.raises(NotFound, match="cannot be compared"):
            replay(Script(last=last), saved(), TEXT)


class TestBytesThatNobodyHasRead:
    UNREAD = by("made_by.sha256", None)

    def test_they_are_read(self) -> None:
        server = Script(last=self.UNREAD, read=[HEX, HEX[::-1]])
        found = replay(server, saved(), TEXT)
        assert server.posted == ["shimmy/api/models/course/verify"]
        assert (found.verdict, found.notes) == ("identical", ())
        assert found.after.made_by.sha256 == (HEX, HEX[::-1])

    def test_and_are_others(self) -> None:
        found = replay(Script(last=self.UNREAD, read=[HEX]), saved(), TEXT)
        assert [change.name for change in found.changes] == ["model's bytes"]

    def test_or_may_not_be(self) -> None:
        server = Script(last=self.UNREAD, read=AccessDenied("not for you"))
        found = replay(server, saved(), TEXT)
        assert found.verdict == "identical"
        assert found.notes == (
            "the model's bytes cannot be read: not for you",
            "nobody had read the model's bytes now, so they are not compared",
        )

    def test_or_were_not_then(self) -> None:
        server = Script()
        found = replay(server, saved(last=self.UNREAD), TEXT)
        assert not server.posted
        assert found.notes == ("nobody had read the model's bytes then, so they are not compared",)

    def test_nor_then_nor_now(self) -> None:
        server = Script(last=self.UNREAD)
        found = replay(server, saved(last=self.UNREAD), TEXT)
        assert not server.posted  # there is nothing to compare them with
        assert (found.verdict, len(found.notes)) == ("identical", 1)


class TestWhatIsNotGranted:
    @pytest.mark.parametrize("param", ["logprobs", "top_logprobs"])
    def test_log_probabilities(self, param: str) -> None:
        server = Script(("No",), refusals=[AccessDenied("switched off", param=param)])
        found = replay(server, saved(), TEXT)
        assert [("logprobs" in asked, "top_logprobs" in asked) for asked in server.asked] == [
            (True, True),
            (False, False),
        ]
        assert found.notes == ("by how much is not known: switched off",)
        assert found.divergence is not None
        assert (found.divergence.character, found.divergence.token) == (0, None)
        assert len(found.lines()) == 2

    def test_as_many_tokens(self) -> None:
        refusal = ContextLengthExceeded("3 too many", param="max_tokens")
        last = by("parameters.max_tokens", 500)
        server = Script(last=last, refusals=[refusal])
        found = replay(server, saved(), TEXT)
        assert ["max_tokens" in asked for asked in server.asked] == [True, False]
        assert found.notes == ("as many tokens as then are not to be had: 3 too many",)
        assert found.verdict == "identical"  # nothing was cut off
        assert replay(
            Script(last=last, refusals=[refusal], reason="length"), saved(), TEXT
        ).changes == (Change("max_tokens", "1024", "500"),)

    def test_both(self) -> None:
        denied = [AccessDenied("a", param="max_tokens"), AccessDenied("b", param="logprobs")]
        assert len(replay(Script(refusals=denied), saved(), TEXT).notes) == 2

    @pytest.mark.parametrize(
        "refusals",
        [
            [QueueFull("later")],
            [AccessDenied("no", param="model")],
            [AccessDenied("no", param="reproducible")],
            [AccessDenied("a", param="logprobs"), AccessDenied("b", param="logprobs")],
            [AccessDenied("a", param="max_tokens"), AccessDenied("b", param="max_tokens")],
        ],
        ids=["full", "model", "reproducible", "twice", "twice the tokens"],
    )
    def test_what_it_cannot_do_without(self, refusals: list[ShimmyError]) -> None:
        last = refusals[-1]
        with pytest.raises(type(last)) as caught:
            replay(Script(refusals=list(refusals)), saved(), TEXT)
        assert caught.value is last


DRIFTS: list[tuple[str, Any, str, str, str]] = [
    ("made_by.sha256", [OTHER, HEX[::-1]], "model's bytes", "0123456789ab…, fedcba987654…",
     "ffffffffffff…, fedcba987654…"),
    ("made_by.sha256", [HEX, OTHER], "model's bytes", "0123456789ab…, fedcba987654…",
     "0123456789ab…, ffffffffffff…"),
    ("made_by.quantization", "Q8_0", "quantisation", "Q4_K_M", "Q8_0"),
    ("made_by.chat_template", OTHER, "chat template", "0123456789ab…", "ffffffffffff…"),
    ("made_by.chat_template", None, "chat template", "0123456789ab…", "none"),
    ("made_by.adapter", OTHER, "adapter", "none", "ffffffffffff…"),
    ("made_by.engine", "0.4", "engine version", "0.3.36", "0.4"),
    ("made_by.build", OTHER, "engine build", "0123456789ab…", "ffffffffffff…"),
    ("made_by.cpu", "x86_64 Pencil", "processor", "x86_64 Abacus", "x86_64 Pencil"),
    ("made_by.cpu_features", [], "processor's instructions", "avx2 fma", "none"),
    ("made_by.context_size", 2048, "context size", "4096", "2048"),
    ("made_by.kv_type", "q8_0", "KV cache type", "f16", "q8_0"),
    ("made_by.threads", 1, "threads", "2", "1"),
    ("made_by.gpu_layers", 9, "layers on a GPU", "0", "9"),
    ("made_by.prompt", OTHER, "tokens of the prompt", "0123456789ab…", "ffffffffffff…"),
    ("parameters.temperature", 0, "temperature", "0.5", "0"),
    ("parameters.top_k", 1, "top_k", "40", "1"),
    ("parameters.seed", 8, "seed", "7", "8"),
    ("parameters.seed", None, "seed", "7", "none"),
    ("parameters.ignore_eos", True, "ignore_eos", "False", "True"),
]  # fmt: skip


class TestDrift:
    @pytest.mark.parametrize(
        ("path", "value", "name", "before", "after"), DRIFTS, ids=lambda v: str(v)[:20]
    )
    def test_each_alone(self, path: str, value: Any, name: str, before: str, after: str) -> None:
        assert compare(made(), made(last=by(path, value))) == (Change(name, before, after),)

    def test_all_together_but_what_follows_from_others(self) -> None:
        last = LAST
        for path, value, *_ in DRIFTS[1:]:
            last = changed(last, f"shimmy.{path}", value)
        names = [change.name for change in compare(made(), made(last=last))]
        expected = list(dict.fromkeys(name for _, _, name, _, _ in DRIFTS))
        expected.remove("tokens of the prompt")
        assert sorted(names) == sorted(expected)

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("made_by.sha256", None),
            ("made_by.quantization", None),
            ("made_by.build", None),
            ("made_by.cpu", None),
            ("parameters.reproducible", True),
            ("parameters.max_tokens", 9),
            ("receipt", None),
            ("ttft_ms", 99.0),
        ],
    )
    def test_what_is_not_known_or_has_no_effect(self, path: str, value: Any) -> None:
        assert compare(made(), made(last=by(path, value))) == ()
        assert compare(made(last=by(path, value)), made()) == ()

    def test_seeds(self) -> None:
        greedy = changed(by("parameters.temperature", 0), "shimmy.parameters.seed", None)
        other = changed(greedy, "shimmy.parameters.seed", 0)
        assert compare(made(last=greedy), made(last=other)) == ()
        chance = by("parameters.seed", None)
        assert compare(made(last=chance), made(last=by("parameters.seed", 0))) == ()

    @pytest.mark.parametrize(("before", "after"), [("stop", "length"), ("length", "stop")])
    def test_how_many_tokens_where_one_was_cut_off(self, before: str, after: str) -> None:
        one = replace(made(), finish_reason=before)
        other = replace(made(last=by("parameters.max_tokens", 9)), finish_reason=after)
        assert compare(one, other) == (Change("max_tokens", "1024", "9"),)

    def test_what_was_asked(self) -> None:
        body = changed(BODY, "stop", ["."])
        body["messages"] = [*BODY["messages"], {"role": "user", "content": "And?"}]
        other = made(body={**body, "thinking": True}, last=by("made_by.prompt", OTHER))
        messages, stop, thinking = compare(made(), other)
        assert (messages.name, stop.name) == ("messages", "stop")
        assert messages.before.startswith("list of 2, sha256 ")
        assert messages.after.startswith("list of 3, sha256 ")
        assert thinking == Change("thinking", "none", "True")
        bare = replace(other, request=None)
        short = (made().request_sha256[:12] + "…", other.request_sha256[:12] + "…")
        assert compare(made(), bare) == (Change("request", *short),)
        assert compare(bare, bare) == ()

    def test_an_adapter_goes_by_its_bytes(self) -> None:
        last = by("made_by.adapter", OTHER)
        one, two = (made(body={**BODY, "adapter": name}, last=last) for name in ("a", "b"))
        assert compare(one, two) == ()


def scored(
    *pieces: str | bytes, top: dict[int, list[tuple[str, float]]] | None = None
) -> list[Score]:
    return [
        Score(
            piece.encode() if isinstance(piece, str) else piece,
            -0.5,
            tuple((rival.encode(), logprob) for rival, logprob in (top or {}).get(i, [])),
        )
        for i, piece in enumerate(pieces)
    ]


class TestDivergence:
    @given(WORDS, WORDS, WORDS)
    def test_the_first_difference(self, same: str, one: str, other: str) -> None:
        one, other = same + one, same + other
        at = first_difference(one, other)
        if one == other:
            assert at is None
        else:
            assert at is not None
            assert one[:at] == other[:at]
            assert one[at : at + 1] != other[at : at + 1]

    @given(st.lists(st.text("abé€", min_size=1, max_size=4), max_size=8), WORDS, st.data())
    def test_the_token(self, pieces: list[str], other: str, data: st.DataObject) -> None:
        """Of any cutting into tokens, also amid a character."""
        text = "".join(pieces)
        raw = text.encode()
        cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=6)))
        tokens = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
        found = divergence(other, text, scored(*tokens))
        if found is None:
            assert other == text
            return
        assert found.token is not None
        # Up to this token the bytes are the same, and with it they are not.
        start = b"".join(tokens[: found.token])
        assert other.encode().startswith(start)
        if found.token < len(tokens):
            assert not other.encode().startswith(start + tokens[found.token])
            assert found.chosen == scored(*tokens)[found.token]
        else:
            assert start == raw
            assert found.chosen is None

    def test_shortened_on_all_sides(self) -> None:
        found = divergence("x" * 100 + "a" * 100, "x" * 100 + "b" * 100)
        assert found is not None
        assert (found.lead, found.before, found.after) == ("x" * 24, "a" * 40, "b" * 40)
        assert (found.character, found.token, found.gap) == (100, None, None)

    @pytest.mark.parametrize(
        ("top", "other", "rank", "gap"),
        [
            ([("then", -0.5), ("there", -0.6)], "there", 2, 0.1),
            ([("then", -0.5), ("thin", -0.6)], None, None, None),
            ([("th", -0.1), ("then", -0.5), ("there", -2.0)], "th", 1, -0.4),
            ([("then", -0.5), ("", -0.6), ("there", -1.5)], "there", 3, 1.0),
            ([], None, None, None),
        ],
        ids=["next", "none", "likelier", "one without bytes", "unknown"],
    )
    def test_the_other_way(
        self, top: list[tuple[str, float]], other: str | None, rank: int | None, gap: float | None
    ) -> None:
        found = divergence("in there", "in then", scored("in ", "then", top={1: top}))
        assert found is not None
        assert (found.character, found.token) == (6, 1)
        assert (found.other and found.other.piece.decode()) == other
        assert found.rank == rank
        assert found.gap == (None if gap is None else pytest.approx(gap))

    def test_ended_sooner_or_later(self) -> None:
        sooner = divergence("one two", "one", scored("one"))
        assert sooner is not None
        assert (sooner.token, sooner.chosen) == (1, None)
        assert [*sooner.lines()] == [
            "diverged at character 3, token 1, after 'one': it was ' two', and is ''"
        ]
        later = divergence("one", "one two", scored("one", " two", top={1: [(" two", -0.5)]}))
        assert later is not None
        assert [*later.lines()][
            1
        ] == "' two' has log-probability -0.500; before, the answer ended here"
        empty = divergence("x", "", [])
        assert empty is not None
        assert (empty.character, empty.token) == (0, None)

    def test_amid_a_character(self) -> None:
        scores = scored("x", b"\xc3", b"\xa9")
        scores[2] = replace(scores[2], top=((b"\xa9", -0.5), (b"\xa8", -0.7)))
        found = divergence("xè", "xé", scores)
        assert found is not None
        assert (found.character, found.before, found.after) == (1, "è", "é")
        assert (found.token, found.rank, found.gap) == (2, 2, pytest.approx(0.2))

    def test_tokens_around_the_text(self) -> None:
        top = {2: [("b", -0.5), ("a", -1.0)]}
        found = divergence("a", "b", scored("<mark>", "\n", "b", "STOP", top=top))
        assert found is not None
        assert (found.token, found.rank) == (2, 2)

    def test_tokens_that_are_not_the_text(self) -> None:
        found = divergence("a", "\ufffd", scored(b"\xff"))
        assert found is not None
        assert (found.token, found.chosen) == (None, None)

    def test_half_of_a_surrogate_pair(self) -> None:
        assert divergence("\ud800", "\udfff", scored("x")) is not None


class TestAnswers:
    def kept(self, text: str, cell: int = 1, variable: str = "") -> Kept:
        return Kept(made(text, variable=variable), text, cell, f"id{cell}")

    def test_which(self) -> None:
        answers = Answers()
        assert answers.get() is None
        kept = [self.kept("a", 1, "x"), self.kept("b", 2), self.kept("c", 2)]
        for one in kept:
            answers.add(one)
        assert answers.get() is answers.get("2") is answers.get("id2") is kept[2]
        assert answers.get("1") is answers.get("x") is kept[0]
        assert answers.get("3") is None

    def test_as_many_as_are_kept(self) -> None:
        answers = Answers(most=3)
        for number in range(5):
            answers.add(self.kept("t", number))
        assert len(answers) == 3
        assert [answers.get(str(n)) is not None for n in range(5)] == [
            False,
            False,
            True,
            True,
            True,
        ]

    @given(st.lists(st.integers(0, 3000), max_size=20))
    def test_as_long_as_are_kept(self, sizes: list[int]) -> None:
        answers, room = Answers(most=10, characters=5000), 5000
        for number, size in enumerate(sizes):
            answers.add(self.kept("t" * size, number))
            assert answers.get() is not None
            assert answers._held == sum(held for _, held in answers._kept)
            assert answers._held <= room or len(answers) == 1
            assert len(answers) <= 10

    def test_the_last_stays_whatever_its_size(self) -> None:
        answers = Answers(characters=10)
        answers.add(self.kept("long" * 100, 1))
        assert answers.get("1") is not None
        answers.add(self.kept("long" * 100, 2))
        assert answers.get("1") is None
        assert answers.get("2") is not None


def test_lines_of_an_outcome_are_a_line_each() -> None:
    found = Outcome(
        same=False, changes=(), divergence=None, notes=("a\nb\x1b[1m",), text="", after=made()
    )
    assert found.lines()[1] == "a b[1m"
