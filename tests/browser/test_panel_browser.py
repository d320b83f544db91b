"""The panel in JupyterLab, as a person uses it: pick a model, ask, stop, meet a limit, see the record, verify."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .lab import Lab, running_lab

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator

OPEN = "%load_ext shimmy\nimport shimmy\npanel = shimmy.panel()\npanel"
MOST = 3


@pytest.fixture(scope="module")
def few(browser: Browser, models: Path) -> Iterator[Lab]:
    """A server that answers `MOST` requests in a minute."""
    option = f"--ShimmyLimits.max_requests_per_minute={MOST}"
    with running_lab(browser, option, environment={"SHIMMY_MODEL_PATHS": str(models)}) as lab:
        yield lab


def press(panel: Locator, name: str) -> None:
    """By its name, and by the keyboard, as every control can be."""
    button = panel.get_by_role("button", name=re.compile(rf"^(✓ )?{name}$"))
    button.focus()
    button.press("Enter")


def test_a_person_at_the_panel(few: Lab) -> None:
    with few.notebook("panel", [OPEN], size=(1100, 1100)) as book:
        book.start(0)
        panel = book.area(0)
        choice = panel.get_by_label("Model", exact=True).first
        choice.locator("option", has_text="slow").wait_for(state="attached")

        choice.select_option("self-test")
        panel.get_by_role("textbox", name="Prompt").first.fill("What does len do?")
        press(panel, "Ask the model")
        panel.get_by_text("Return the number of items in a container.").wait_for()
        book.screenshot("panel-answer")

        choice.select_option("slow")
        panel.get_by_role("textbox", name="Prompt").first.fill("Go on")
        press(panel, "Ask the model")
        panel.get_by_text(re.compile("answering|tokens so far|written so far")).first.wait_for()
        press(panel, "Stop")
        panel.get_by_text(re.compile("stopped", re.IGNORECASE)).first.wait_for()

        choice.select_option("self-test")
        for _ in range(MOST - 2):
            press(panel, "Ask the model")
            panel.get_by_text("self-test has answered").first.wait_for()
        press(panel, "Ask the model")
        panel.get_by_text("rate_limit_exceeded").first.wait_for()
        book.screenshot("panel-limit")

        press(panel, "Limits")
        panel.get_by_role("rowheader", name="Requests per minute").first.wait_for()
        press(panel, "Audit")
        panel.get_by_role("cell", name=re.compile("limited")).first.wait_for()
        press(panel, "Verify the records")
        panel.get_by_text(re.compile("^Verified|verified")).first.wait_for()
        book.screenshot("panel-audit")
