"""The codec between the server and the engine's process.

Cases: every message comes back as it was, whatever its bytes, floats and texts; whatever else comes
is one typed error; each field of the wrong type, missing, or one too many; sizes, times and ids that
none can be; a frame in pieces, two at once, one too long, a deadline that bytes drip past; a
frame that cannot wait goes out while another thread is sending, and after it.
"""

from __future__ import annotations

import json
import math
import socket
import threading
import time
import typing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shimmy_jupyter import errors
from shimmy_jupyter.core.messages import (
    Aside,
    AsideRead,
    OpenSlot,
    PromptScores,
    Row,
    Sampled,
    SlotChange,
    Step,
)
from shimmy_jupyter.engine import calls, wire
from shimmy_jupyter.engine.backend import Embedded, LoadSpec, StepResult
from shimmy_jupyter.engine.channel import Channel, Frames, WireError
from shimmy_jupyter.types import EmbeddingFacts, Failure, ModelFacts, Sampling, Scored

ids = st.integers(-(2**31), 2**31 - 1)
sizes = st.integers(0, 2**53 - 1)
slots = st.integers(0, 2**16)
id_tuples = st.lists(ids, max_size=20).map(tuple)
texts = st.text(max_size=20)
failures = st.none() | st.builds(Failure, texts, texts)

opened = st.builds(
    OpenSlot, slot=ids, sampling=st.from_type(Sampling), recent=id_tuples, private_tokens=sizes
)
changes = st.one_of(
    opened,
    *[st.from_type(kind) for kind in typing.get_args(SlotChange) if kind is not OpenSlot],
)
steps = st.builds(
    Step,
    st.lists(st.builds(Row, ids, ids, id_tuples, st.booleans()), max_size=5).map(tuple),
    aside=st.none() | st.builds(Aside, ids, ids, id_tuples, st.floats(0, 1e9), ids),
)
works = st.builds(
    calls.Work,
    number=st.integers(),
    changes=st.lists(changes, max_size=3).map(tuple),
    step=st.none() | steps,
    threads=st.integers(),
    limit=st.none() | st.floats(),
)
results = st.builds(
    StepResult,
    st.lists(
        st.builds(Sampled, ids, ids, st.binary(max_size=20), st.booleans(), failures), max_size=5
    ).map(tuple),
    st.floats(0, 1e9),
    st.booleans(),
    aside=st.none() | st.builds(AsideRead, st.floats(0, 1e9), st.booleans()),
)
some = sizes.map(lambda size: size or 1)
facts = st.builds(
    ModelFacts,
    architecture=texts,
    description=texts,
    parameters=sizes,
    size_bytes=sizes,
    context_size=some,
    kv_tokens=sizes,
    vocabulary=st.integers(0, 2**31 - 1),
    chat_template=st.none() | texts,
    special=st.dictionaries(texts, texts, max_size=3),
    longest_token=sizes,
    special_tokens=st.lists(texts, max_size=3).map(tuple),
    slots=slots.map(lambda size: size or 1),
    can_copy=st.booleans(),
    can_trim=st.booleans(),
    can_read_aside=st.booleans(),
    row_block=st.sampled_from([1, 32]),
    kv_bytes_per_token=some,
    threads=some,
    offloaded_layers=sizes,
    notes=st.lists(texts, max_size=3).map(tuple),
)
replies = st.one_of(
    results,
    facts,
    st.builds(calls.Tokens, id_tuples),
    st.just(calls.Done()),
    st.from_type(calls.Failed),
)
everything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(texts, inner, max_size=4),
)
KINDS: tuple[type, ...] = (ModelFacts, StepResult, calls.Tokens, calls.Done)


def payload(message: Any) -> bytes:
    frames = Frames()
    frames.feed(wire.encode(message))
    found = frames.next(wire.MAX_REQUEST)
    assert found is not None
    return found


def same(found: Any, sent: Any) -> bool:
    """NaN equals NaN here, and 0 is not False."""
    return type(found) is type(sent) and repr(found) == repr(sent)


@given(works | st.builds(calls.Load, st.from_type(LoadSpec)) | st.just(calls.Unload()))
def test_requests_come_back(message: Any) -> None:
    assert same(wire.work_request(payload(message)), message)


@given(st.from_type(calls.Abort) | st.from_type(calls.Tokenize))
def test_side_requests_come_back(message: Any) -> None:
    assert same(wire.side_request(payload(message)), message)


@given(replies)
def test_replies_come_back(message: Any) -> None:
    assert same(wire.reply(payload(message), type(message)), message)


@pytest.mark.parametrize(
    "cls", [cls for cls in errors.all_errors() if cls is not errors.ShimmyError]
)
def test_errors_come_back(cls: type[errors.ShimmyError]) -> None:
    reply = wire.reply(payload(calls.Failed.of(cls("why"))), calls.Done)
    assert isinstance(reply, calls.Failed)
    found = reply.error()
    assert (found.code, found.message) == (cls.code, "why")
    assert isinstance(found, errors.EngineLost) == issubclass(cls, errors.EngineLost)


def test_every_byte_and_odd_float_survives() -> None:
    piece = bytes(range(256))
    result = StepResult((Sampled(1, 2, piece, True, Failure("a", "\x00\uffff")),), 0)
    assert wire.reply(payload(result), StepResult) == result
    sampling = Sampling(temperature=math.inf, top_p=0, logit_bias=((1, -math.inf), (2, -0.0)))
    work = calls.Work(1, (OpenSlot(0, sampling, ()),))
    assert same(wire.work_request(payload(work)), work)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (StepResult((Sampled(1, 2, b"", True, Failure("a", "\ud800")),), 0), StepResult),
        (ModelFacts("\udfff", "", 0, 0, 1, 0, 0, None), ModelFacts),
        (ModelFacts("", "", 0, 0, 1, 0, 0, None, infill=("a", "b")), ModelFacts),
        (
            ModelFacts(
                "", "", 0, 0, 1, 0, 0, None, embedding=EmbeddingFacts("mean", 4, 4, 4, 2**52)
            ),
            ModelFacts,
        ),
        (
            ModelFacts("", "", 0, 0, 1, 0, 0, None, embedding=EmbeddingFacts("mean", 0, 4, 4, 4)),
            ModelFacts,
        ),
        (Embedded((), 10**400), Embedded),
        (Embedded((), math.nan), Embedded),
        (StepResult((), 10**400), StepResult),
        (StepResult((), 0, aside=AsideRead(10**400)), StepResult),
        (StepResult((), 0, aside=AsideRead(0.1, done=True, refused=True)), StepResult),
        (
            StepResult((), 0, prompts=(PromptScores(0, (Scored(1, b"", -math.inf),)),)),
            StepResult,
        ),
        (
            StepResult(
                (), 0, prompts=(PromptScores(0, (Scored(1, b"", 0, ((1, b"", 0),) * 99),)),)
            ),
            StepResult,
        ),
    ],
)
def test_what_could_do_harm_later(message: Any, kind: Any) -> None:
    with pytest.raises(WireError):
        wire.reply(payload(message), kind)


def understood(data: bytes) -> list[Any]:
    """What is made of a payload by each reader; only `WireError` may be raised."""
    found: list[Any] = []
    readers = [wire.work_request, wire.side_request]
    for read in [*readers, *[lambda data, kind=kind: wire.reply(data, kind) for kind in KINDS]]:
        try:
            found.append(read(data))
        except WireError as error:
            assert len(str(error)) < 100
    return found


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_typed_error(data: bytes) -> None:
    assert understood(data) == []


@given(st.sampled_from(["Work", "StepResult", "ModelFacts", "Tokens", "Failed", "x"]), everything)
def test_arbitrary_json_is_a_typed_error(tag: str, value: Any) -> None:
    understood(json.dumps(value).encode())
    understood(json.dumps([tag, *value] if isinstance(value, list) else [tag, value]).encode())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        "1" * 5000,
        '["Tokens",[' + "1" * 4000 + "]]",
        '"\\ud800"',
        "[[]]",
        '[["Done"]]',
        '["Done"] 1',
        "\ufeff[]",
    ],
)
def test_what_trips_json_is_a_typed_error(text: str) -> None:
    assert understood(text.encode()) == []


FACTS = ModelFacts("a", "d", 1, 2, 3, 4, 5, None, {"k": "v"}, special_tokens=("x",))
RESULT = StepResult(
    (Sampled(1, 2, b"x", True, Failure("c", "m")),), 0.5, aside=AsideRead(0.1, done=True)
)
ASIDE = Aside(2, 0, (4, 5), 0.1, 9)
WORK = calls.Work(
    3, (OpenSlot(1, Sampling(), (1,)),), Step((Row(1, 2, (3,), True),), aside=ASIDE), 2, 0.5
)
WRONG: list[Any] = [None, True, 0.5, "\u0100", [None], {"a": 1}, ["Done"], -1]


def places(value: Any) -> list[tuple[list[Any], int]]:
    """Every place within nested lists, tags left out."""
    if not isinstance(value, list):
        return []
    own = [(value, i) for i in range(len(value)) if i or not isinstance(value[0], str)]
    return own + [place for item in value for place in places(item)]


@pytest.mark.parametrize(
    "message", [FACTS, RESULT, WORK, calls.Tokens((1,)), calls.Failed("a", "b")]
)
def test_each_field_has_its_type(message: Any) -> None:
    """Put anything anywhere: it is refused, or it is a message that comes back as itself."""
    text = payload(message)
    for at in range(len(places(json.loads(text)))):
        for wrong in WRONG:
            tree = json.loads(text)
            where, index = places(tree)[at]
            where[index] = wrong
            for found in understood(json.dumps(tree).encode()):
                assert same(found, understood(payload(found))[0])


@pytest.mark.parametrize(
    "message", [FACTS, RESULT, WORK, calls.Tokens((1,)), calls.Failed("a", "b")]
)
def test_fields_are_neither_missing_nor_added(message: Any) -> None:
    tree = json.loads(payload(message))
    assert understood(json.dumps(tree[:-1]).encode()) == []
    assert understood(json.dumps([*tree, 1]).encode()) == []


@pytest.mark.parametrize(
    "message",
    [
        StepResult((), math.nan),
        StepResult((), math.inf),
        StepResult((), -1.0),
        StepResult((), 0.0, aside=AsideRead(math.nan)),
        StepResult((), 0.0, aside=AsideRead(-1.0)),
        StepResult((Sampled(2**31, 0, b"", False),), 0.0),
        StepResult((Sampled(0, -(2**31) - 1, b"", False),), 0.0),
        calls.Tokens((2**31,)),
        ModelFacts("", "", -1, 0, 0, 0, 0, None),
        ModelFacts("", "", 0, 0, 2**53, 0, 0, None),
        ModelFacts("", "", 0, 0, 1, 0, 0, None, threads=0),
        ModelFacts("", "", 0, 0, 1, 0, 0, None, kv_bytes_per_token=0),
        ModelFacts("", "", 0, 0, 0, 0, 2**31, None),
        ModelFacts("", "", 0, 0, 0, 0, 0, None, slots=2**16 + 1),
    ],
)
def test_numbers_that_none_can_be(message: Any) -> None:
    with pytest.raises(WireError):
        wire.reply(payload(message), type(message))


@pytest.mark.parametrize(
    ("aside", "read", "answers"),
    [
        (None, None, True),
        (ASIDE, AsideRead(0.1), True),
        (ASIDE, None, False),
        (None, AsideRead(0.1), False),
    ],
)
def test_an_answer_says_what_was_read_aside(
    aside: Aside | None, read: AsideRead | None, answers: bool
) -> None:
    assert wire.answers(Step((), aside=aside), StepResult((), 0.1, aside=read)) == answers


def test_what_has_no_form_is_not_sent() -> None:
    with pytest.raises(TypeError, match="object does not cross"):
        wire.encode(object())


# Frames


@given(st.lists(st.binary(max_size=30), max_size=5), st.integers(1, 20))
def test_frames_come_whole_however_they_are_cut(payloads: list[bytes], cut: int) -> None:
    stream = b"".join(len(p).to_bytes(4) + p for p in payloads)
    frames, found = Frames(), []
    for at in range(0, len(stream), cut):
        frames.feed(stream[at : at + cut])
        while (one := frames.next(30)) is not None:
            found.append(one)
    assert found == payloads


@given(st.integers(101, 2**32 - 1))
def test_a_frame_that_is_too_long_is_refused_by_its_length(size: int) -> None:
    frames = Frames()
    frames.feed(size.to_bytes(4))
    with pytest.raises(WireError, match=f"{size} bytes"):
        frames.next(100)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with theirs:
        channel = Channel(ours)
        yield channel, theirs
        channel.close()


@settings(max_examples=30)
@given(st.binary(max_size=50))
def test_any_bytes_on_a_socket_end_in_a_typed_error(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    theirs.sendall(data)
    theirs.close()
    with pytest.raises((WireError, EOFError)):
        while True:
            wire.reply(channel.receive(1000), calls.Done)
    channel.close()


def test_a_deadline_holds_although_bytes_come(pair) -> None:
    channel, theirs = pair
    theirs.sendall((10).to_bytes(4) + b"x")
    with pytest.raises(TimeoutError):
        channel.receive(100, time.monotonic() - 1)
    with pytest.raises(TimeoutError):
        channel.receive(100, time.monotonic() + 0.01)
    with pytest.raises(TimeoutError):
        channel.send(bytes(10_000_000), time.monotonic() + 0.01)


def test_an_urgent_frame_follows_what_is_being_sent(pair) -> None:
    channel, theirs = pair
    large = wire.encode(calls.Tokenize("x" * 4_000_000))
    sender = threading.Thread(target=channel.send, args=(large,))
    sender.start()
    with theirs:
        start = theirs.recv(1, socket.MSG_PEEK)  # so it is being sent, and cannot end yet
        channel.send_now(wire.encode(calls.Abort(7)))
        frames, found = Frames(), []
        assert start
        while len(found) < 2:
            frames.feed(theirs.recv(1 << 16))
            while (one := frames.next(wire.MAX_REQUEST)) is not None:
                found.append(wire.side_request(one))
    sender.join()
    assert [type(one).__name__ for one in found] == ["Tokenize", "Abort"]


def test_an_urgent_frame_is_dropped_rather_than_waited_for(pair) -> None:
    channel, theirs = pair
    with pytest.raises(TimeoutError):
        channel.send(bytes(10_000_000), time.monotonic())
    channel.send_now(b"never")
    theirs.close()
    channel.send_now(b"nobody")
