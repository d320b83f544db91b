"""Magics in JupyterLab, as a person sees them.

Cases: an answer by the bundled model; one that streams, in the whole window; the interrupt button; a mistake; an
answer that would run scripts and load images, beside the same as it would be without us; everything that
Markdown has, and a model's reasoning, in both themes; a saved notebook opened again, trusted and not, with a
kernel that has run nothing and without one; 8,000 tokens.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import nbformat
import pytest

from .conftest import HOSTILE, RICH
from .lab import Lab, until

LEN = "Return the number of items in a container."
LOAD = "%load_ext shimmy"
ACTIVE = ", ".join(
    "script img iframe svg style link object embed form input button video "
    "details:not(:has(summary>small)) [data-commandlinker-command]".split()
)
READABLE = 4.5
"""WCAG 2's least contrast of text, level AA."""


def waits(seen: dict[str, Any]) -> bool:
    """Whether this is not yet of the answer, but says what it waits for."""
    return re.match(r"(loading|waiting|reading)\b", seen["text"]) is not None


def plain(book: nbformat.NotebookNode, index: int) -> str:
    """A cell's saved answer, without its figures."""
    (output,) = (one for one in book.cells[index].outputs if one.output_type == "display_data")
    return str(output.data["text/plain"]).rpartition("\n[")[0]


def test_a_question_is_answered_below_its_cell(lab: Lab) -> None:
    ask = "%shimmy --model self-test --temperature 0 What does len do?"
    with lab.notebook("answer", [LOAD, ask]) as book:
        assert book.run(0) == ""
        said = book.run(1)
        assert said.startswith(LEN + "\n")
        assert re.search(r"^self-test · 11 tokens · [\d,]+ tokens/s · ", said, re.MULTILINE)
        assert book.failed(1) == ""
        assert plain(book.save(), 1) == LEN
        book.screenshot("answer")


def test_a_tour(lab: Lab) -> None:
    """What the documents show."""
    cells = [
        LOAD + "\n%config ShimmyMagics.temperature = 0",
        "%%shimmy self-test -o answer\nWhat does len do?",
        "%%shimmy self-test --logprobs 3 --max-tokens 24\nWhat does json.dumps do?",
        "%shimmy limits max_tokens_per_day=50000",
        "%shimmy replay answer",
    ]
    with lab.notebook("tour", cells, size=(1000, 740)) as book:
        said = [book.run(number) for number in range(len(cells))]
        assert said[1].startswith(LEN)
        assert "max_tokens_per_day" in said[3]
        assert said[4].startswith("identical: 11 tokens")
        assert not any(map(book.failed, range(len(cells))))
        book.screenshot("tour")


def test_an_answer_grows_as_it_is_made(lab: Lab) -> None:
    ask = "%%shimmy slow --temperature 0 --max-tokens 1200\nGo on"
    with lab.notebook("streams", [LOAD, ask], view="lab") as book:
        book.run(0)
        seen = book.watch(1)
        book.run(1)
        *growing, last = itertools.dropwhile(waits, seen())
        assert len(growing) >= 3
        whole = plain(book.save(), 1)
        assert sum(letter.isalpha() for letter in whole) == 1200
        assert last["text"].startswith(whole)
        for before, after in zip(growing, growing[1:], strict=False):
            assert after["text"].startswith(before["text"])
            # It is never taken away in between: what is below would jump.
            assert after["height"] >= before["height"]
        book.screenshot("streams")


def test_the_interrupt_button_stops_the_engine(lab: Lab) -> None:
    cells = [LOAD, "%%shimmy slow --temperature 0 --max-tokens 1900\nGo on", "%shimmy models"]
    with lab.notebook("stopped", cells) as book:
        book.run(0)
        book.start(1)
        book.expect(1, re.compile(r"[a-z]\d"))
        assert not lab.idle()
        book.interrupt()
        book.wait(1)
        answer = book.area(1).locator(".shimmy-answer")
        assert answer.inner_text().strip().endswith("\nstopped")
        assert "KeyboardInterrupt" in book.failed(1)
        until(lab.idle)
        letters = sum(letter.isalpha() for letter in plain(book.save(), 1))
        assert 0 < letters < 1900
        assert "self-test" in book.run(2)  # the kernel goes on
        book.screenshot("stopped", 1)


def test_a_mistake_fails_the_cell_with_its_code(lab: Lab) -> None:
    with lab.notebook("mistake", [LOAD, "%%shimmy ghost\nhello"]) as book:
        book.run(0)
        said = book.run(1)
        assert book.failed(1) == said
        assert "'ghost'" in said
        assert said.endswith("[model_not_found]")
        (error,) = book.save().cells[1].outputs
        assert (error.output_type, error.ename) == ("error", "ModelNotFound")
        book.screenshot("mistake", 1)


def test_an_answer_runs_and_loads_nothing(lab: Lab) -> None:
    raw = "".join(HOSTILE)
    control = f"display({{'text/html': {raw!r}}}, raw=True)\ndisplay({{'text/markdown': {raw!r}}}, raw=True)"
    fence = "display({'text/html': '<img src=\"http://fence.invalid/\">'}, raw=True)"
    ask = "%shimmy --model hostile --temperature 0 Hello"
    with lab.notebook("hostile", [LOAD, ask, fence, control]) as book:
        book.run(0)
        said = book.run(1)
        # What an answer asks for, it has asked for before what is shown after it.
        with book.page.expect_request(re.compile(r"fence\.invalid")):
            book.run(2)
        assert [url for url in book.strangers if "fence.invalid" not in url] == []
        assert book.page.evaluate("document.got") is None
        answer = book.area(1).locator(".shimmy-answer")
        answer.locator("mjx-container").nth(1).wait_for()
        assert answer.locator(ACTIVE).count() == 0
        targets = answer.locator("[href]").evaluate_all(
            "all => all.map(a => a.getAttribute('href'))"
        )
        assert targets == ["http://hostile.invalid/page"]
        handlers = "all => all.flatMap(e => [...e.attributes]).filter(a => a.name.startsWith('on'))"
        assert answer.locator("*").evaluate_all(handlers) == []
        # And it is shown for what it is.
        for text in ("<script>", "onload=", "[image: a picture]", "<iframe", "</code></pre><img"):
            assert text in said
        book.screenshot("hostile", 1)

        # Had it been shown as it came, all of this would have happened; or the above shows nothing.
        with book.page.expect_request(re.compile(r"hostile\.invalid/markdown\.png")):
            book.run(3)
        assert any(url.endswith("/html.png") for url in book.strangers)
        assert book.page.evaluate("document.got") is not None
        book.strangers.clear()
        book.errors.clear()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_an_answer_is_readable(lab: Lab, theme: str) -> None:
    cells = [LOAD, "%shimmy --model rich --temperature 0 Hello", "%%shimmy ghost\nhello"]
    with lab.notebook(f"readable-{theme}", cells, theme=theme) as book:
        book.run(0)
        book.run(1)
        book.run(2)
        answer = book.area(1).locator(".shimmy-answer")
        reasoning = answer.locator("details").first  # the other has the receipt
        assert not reasoning.evaluate("details => details.open")
        reasoning.locator("summary").click()
        assert reasoning.inner_text().split() == ["Reasoning", *"".join(RICH[1:3]).split()]
        kinds = ("h1", "p", "p code", "strong", "a", "pre code", "td", "li", "blockquote", "small")
        low = {}
        for kind in (*kinds, "summary", "details p"):
            found = book.contrast(answer.locator(kind).first)
            if found < READABLE:
                low[kind] = found
        assert low == {}
        assert book.contrast(book.area(2).locator("pre")) >= READABLE
        book.screenshot(f"readable-{theme}")


def test_a_saved_notebook_shows_what_it_showed(lab: Lab) -> None:
    ask = "%shimmy --model rich --temperature 0 Hello"
    with lab.notebook("saved", [LOAD, ask]) as book:
        book.run(0)
        shown = book.run(1)
        saved = book.save()
    with lab.notebook("saved") as again:
        again.area(1).locator(".jp-mod-trusted .shimmy-answer").wait_for()
        assert again.text(1) == shown
    # Somebody else's, which JupyterLab shows as it shows what nobody has vouched for.
    saved.metadata.clear()
    nbformat.write(saved, lab.folder / "received.ipynb")
    with lab.notebook("received", kernel=False) as received:
        received.area(1).locator(":not(.jp-mod-trusted) > .shimmy-answer").wait_for()
        assert received.text(1) == shown
        received.screenshot("received")
    assert lab.api("GET", "api/kernels") == []


def test_eight_thousand_tokens_are_all_there(lab: Lab) -> None:
    ask = "%%shimmy long --temperature 0 --max-tokens 8100\nGo on"
    with lab.notebook("long", [LOAD, ask]) as book:
        book.run(0)
        said = book.run(1, seconds=60)
        text, figures = said.split("\n\n")
        assert sum(letter.isalpha() for letter in text) == 8100
        assert figures.startswith("long · 8,100 tokens · ")
        assert plain(book.save(), 1) == text
