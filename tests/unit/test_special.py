"""Special tokens in a text are counted at the pace of the text, however many there are."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.engine.special import any_of

WORDS = st.text(alphabet="<|ab>\\.", max_size=5)


@given(tokens=st.lists(WORDS, max_size=12), text=st.text(alphabet="<|ab>\\.", max_size=40))
def test_finds_what_an_alternation_finds(tokens: list[str], text: str) -> None:
    real = sorted({t for t in tokens if t}, key=len, reverse=True)
    found = any_of(tuple(tokens))
    if not real:
        assert found is None
        return
    assert found is not None
    assert found.findall(text) == re.findall("|".join(map(re.escape, real)), text)


def test_thousands_that_begin_alike_are_tried_once() -> None:
    many = any_of(tuple(f"<unused{i}>" for i in range(6000)))
    assert many is not None
    assert many.pattern.startswith("<unused(?:")
    assert len(many.findall("<unused17>x<unused5999><unused6000>")) == 2


def test_depth_is_bounded() -> None:
    assert any_of(tuple("a" * n for n in range(1, 5000))) is not None
