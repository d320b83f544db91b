"""When a constraint begins after reasoning, token by token.

Cases: the prompt has opened the reasoning; the model opens it; it answers at once; an end marker of one
token, of many, and one that ends amid a token; white space after it, once; what opens the answer, after
the reasoning and in its stead; a marker that has no tokens.
"""

from __future__ import annotations

from shimmy_jupyter.engine.gate import Choice, Gate
from shimmy_jupyter.types import Markers, Reasoning

THINK = Markers("<think>", "</think>")
OPENED = Markers("<t>", "</t>", ("<a>",))
FREE = Choice(constrained=False, free=True)
BLANK = frozenset([ord("\n")])


def encode(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


def gate(markers: Markers = THINK, *, inside: bool = False) -> Gate:
    return Gate(Reasoning(markers, inside), encode, BLANK)


def say(gate: Gate, text: str) -> None:
    for byte in text.encode():
        gate.accept(byte, bytes([byte]), constrained=False)


def test_the_prompt_has_opened_it() -> None:
    it = gate(inside=True)
    assert it.choice() == FREE
    say(it, "well</think")
    assert it.choice() == FREE
    assert not it.open
    say(it, ">")
    assert it.choice() == Choice(extra=BLANK)
    it.accept(ord("{"), b"{", constrained=True)
    assert it.open


def test_white_space_after_it_once() -> None:
    it = gate(inside=True)
    say(it, "</think>\n")
    assert it.open


def test_the_model_opens_it() -> None:
    it = gate()
    assert it.choice() == Choice(extra=frozenset([ord("<")]))
    say(it, "<")
    assert it.choice() == Choice(constrained=False, extra=frozenset([ord("t")]))
    say(it, "think>")
    assert it.choice() == FREE
    say(it, "\nx</think>")
    assert it.choice() == Choice(extra=BLANK)


def test_it_answers_at_once() -> None:
    it = gate()
    it.accept(ord("{"), b"{", constrained=True)
    assert it.open


def test_a_token_in_which_the_answer_would_begin() -> None:
    it = gate(inside=True)
    say(it, "x</thi")
    assert it.overshoots(b"nk>{")
    assert it.overshoots(b"nk>\n\n {")
    assert not it.overshoots(b"nk>")
    assert not it.overshoots(b"nk>\n\n")
    assert not it.overshoots(b"s</think")
    assert it.overshoots(b"s</think>5")
    it.accept(300, b"nk>\n\n", constrained=False)
    assert it.choice() == Choice(extra=BLANK)
    assert not gate().overshoots(b"<think></think>x")


def test_what_opens_the_answer() -> None:
    it = gate(OPENED)
    say(it, "<")
    assert it.choice() == Choice(constrained=False, extra=frozenset(b"ta"))
    say(it, "a>")
    assert it.open

    it = gate(OPENED)
    say(it, "<t>why</t>")
    assert it.choice() == Choice(extra=BLANK | frozenset(b"<"))
    say(it, "<a")
    assert it.choice() == Choice(constrained=False, extra=frozenset(b">"))
    say(it, ">")
    assert it.open


def test_half_characters_in_the_reasoning() -> None:
    it = gate(inside=True)
    for byte in "é</think>".encode():
        it.accept(byte, bytes([byte]), constrained=False)
    assert it.choice() == Choice(extra=BLANK)


def test_a_marker_that_cannot_be_written() -> None:
    it = Gate(Reasoning(THINK), lambda _: (), frozenset())
    assert it.choice() == Choice()
    it.accept(5, b"x", constrained=True)
    assert it.open


def test_half_a_character_amid_the_end_marker() -> None:
    it = gate(Markers("◁think▷", "◁/think▷"), inside=True)
    it.accept(1, "why◁/think".encode() + b"\xe2\x96", constrained=False)
    assert it.overshoots(b"\xb7Hello")
    assert not it.overshoots(b"\xb7")
    it.accept(2, b"\xb7", constrained=False)
    assert it.choice() == Choice(extra=BLANK)
