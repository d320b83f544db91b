"""Real JupyterLab in the system's Chromium, as a person drives it: clicks, keys, and what is then to be seen.

Everything waits for what it waits for, with a bound. Nothing can reach another host than this machine, and
whatever a page tried to is recorded. Playwright's synchronous interface: tests that use it are no coroutines.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import nbformat
from kernel_session import RunningServer, running_server

from . import page_scripts

if TYPE_CHECKING:
    from playwright.sync_api import (
        Browser,
        ConsoleMessage,
        Dialog,
        Locator,
        Page,
        Request,
        WebSocket,
    )

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
"""Made anew by each run; git ignores it."""
SECONDS = 30.0
"""The most that anything but an answer may take."""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

_FLAGS = (
    # As root, and in most containers, there is no sandbox to be had. Only our own pages are opened.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # No name is looked up but this machine's: what a test proves to be refused cannot leave either.
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE localhost , EXCLUDE 127.0.0.1",
)
_OPTIONS = (
    "--LabApp.news_url=None",
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    "--LabApp.extension_manager=readonly",
    # For the theme, and to ask whether all is saved: the page's own application object.
    "--LabApp.expose_app_in_browser=True",
)
_SETTINGS: dict[str, dict[str, Any]] = {
    "apputils-extension/notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
    # Every cell is in the page, also those that are scrolled out of sight.
    "notebook-extension/tracker": {"windowingMode": "none"},
    # A test says when to save.
    "docmanager-extension/plugin": {"autosave": False},
}
_THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
_PANEL = ".jp-NotebookPanel:not(.lm-mod-hidden)"
_PROMPT = ".jp-InputArea-prompt"


@dataclass(frozen=True)
class Lab:
    """A Jupyter server with JupyterLab and our extension, and a browser."""

    server: RunningServer
    browser: Browser
    folder: Path
    """Where the notebooks are."""

    def api(self, method: str, path: str, body: Any = None) -> Any:
        """JSON from the server, with its token. Raises httpx's HTTPStatusError."""
        headers = {"Authorization": f"token {self.server.token}"}
        answer = httpx.request(
            method, self.server.url + path, json=body, headers=headers, timeout=60, trust_env=False
        )
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def idle(self) -> bool:
        """Whether the engine answers nobody."""
        return not self.api("GET", "shimmy/health")["active"]

    @contextlib.contextmanager
    def notebook(
        self,
        name: str,
        cells: Sequence[str] | None = None,
        *,
        theme: str = "light",
        view: str = "doc",
        size: tuple[int, int] = (1000, 700),
        kernel: bool = True,
    ) -> Iterator[Notebook]:
        """Open `name`.ipynb in a page of its own: a new one with these code cells, or as it lies there.

        `view` is "lab" for the whole window or "doc" for the one document. Without a `kernel` none is
        started; a notebook that lies there must then name none, nor a language. Afterwards its kernel is
        shut down. A test that has passed so far fails at the end for errors on the page's console, and
        for requests to other hosts, that it has not taken out of `errors` and `strangers`; of one that
        fails there is a screenshot, failed-NAME.png.
        """
        from playwright.sync_api import Error

        path = self.folder / f"{name}.ipynb"
        if cells is not None:
            write_notebook(path, cells, kernel=kernel)
        width, height = size
        context = self.browser.new_context(viewport={"width": width, "height": height})
        context.set_default_timeout(SECONDS * 1000)
        try:
            book = Notebook(self, context.new_page(), path)
            # A workspace of its own: what another test has had open is not opened again.
            place = f"{view}/workspaces/{uuid.uuid4().hex}/tree/{self.folder.name}/{path.name}"
            book.page.goto(f"{self.server.url}{place}?token={self.server.token}")
            try:
                book.ready(theme, kernel=kernel)
                yield book
                assert not book.errors, f"errors on the console: {book.errors}"
                assert not book.strangers, f"asked of other hosts: {book.strangers}"
            except BaseException:
                with contextlib.suppress(Error):  # the page may be gone
                    book.screenshot(f"failed-{name}")
                raise
        finally:
            context.close()
            for session in self.api("GET", "api/sessions"):
                self.api("DELETE", f"api/sessions/{session['id']}")


class Notebook:
    """A notebook that is open in a page. Cells are counted from 0; those at the end from -1."""

    def __init__(self, lab: Lab, page: Page, path: Path) -> None:
        self.lab, self.page, self.path = lab, page, path
        self.errors: list[str] = []
        """What the page's console has had of errors, and what scripts threw."""
        self.strangers: list[str] = []
        """Addresses that the page asked for, and that are not this server's."""
        self._prompts: dict[int, str] = {}
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.context.on("request", self._asked)  # of windows that it opens, too
        page.on("websocket", self._asked)
        page.on("dialog", self._dialog)

    def _said(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} ({message.location.get('url', '')})")

    def _asked(self, request: Request | WebSocket) -> None:
        address = urlsplit(request.url)
        here = urlsplit(self.lab.server.url).netloc
        if address.scheme not in ("data", "blob", "about") and address.netloc != here:
            self.strangers.append(request.url)

    def _dialog(self, dialog: Dialog) -> None:
        if dialog.type == "beforeunload":  # of JupyterLab, where not all is saved
            dialog.accept()
            return
        self.errors.append(f"a dialog of the browser: {dialog.message}")
        dialog.dismiss()

    def reload(self, theme: str = "light") -> None:
        """Load the page again; its kernel goes on."""
        self.page.reload()
        self.ready(theme, kernel=True)

    def ready(self, theme: str, *, kernel: bool) -> None:
        """Wait until what was opened can be used."""
        if not kernel:
            # It asks which one to start where the notebook names neither a kernel nor a language.
            self.page.locator(".jp-Dialog").get_by_role("button", name="No Kernel").click()
        self.page.locator(f"{_PANEL} .jp-Cell").first.wait_for()
        # While it is there the keys are its own, and it gives them up whenever it goes.
        self.page.locator(f"{_PANEL} .jp-Spinner").wait_for(state="detached")
        if kernel:
            self.page.wait_for_function(page_scripts.KERNEL)
        self.theme(theme)

    def theme(self, name: str) -> None:
        """Change to the "light" or the "dark" theme."""
        self.page.evaluate(
            "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})",
            _THEMES[name],
        )
        wanted = "true" if name == "light" else "false"
        self.page.locator(f"body[data-jp-theme-light='{wanted}']").wait_for(state="attached")
        self.page.locator("#jupyterlab-splash").wait_for(state="detached")

    def cell(self, index: int) -> Locator:
        return self.page.locator(f"{_PANEL} .jp-Notebook-cell").nth(index)

    def area(self, index: int) -> Locator:
        """All that a cell has put out."""
        return self.cell(index).locator(".jp-Cell-outputArea")

    def add(self, source: str) -> int:
        """Write a new cell at the end. Returns its index."""
        cells = self.page.locator(f"{_PANEL} .jp-Notebook-cell")
        index = cells.count()
        self._select(index - 1)
        self.page.keyboard.press("b")
        cells.nth(index).wait_for()
        self.write(index, source)
        return index

    def write(self, index: int, source: str) -> None:
        """Replace what a cell says."""
        self.cell(index).locator(".cm-content").click()
        self.page.keyboard.press("ControlOrMeta+a")
        self.page.keyboard.insert_text(source)

    def _select(self, index: int) -> None:
        """As a command takes it: not to write in, and with the keyboard's focus."""
        from playwright.sync_api import expect

        self.cell(index).locator(_PROMPT).click()
        expect(self.cell(index)).to_be_focused()

    def start(self, index: int) -> None:
        """Run a cell, and do not wait for its end."""
        self._prompts[index] = self.cell(index).locator(_PROMPT).inner_text()
        self._select(index)
        self.page.keyboard.press("ControlOrMeta+Enter")

    def wait(self, index: int, seconds: float = SECONDS) -> None:
        """Until a cell that was started has ended, whichever way."""
        from playwright.sync_api import expect

        before = self._prompts.pop(index)
        prompt = self.cell(index).locator(_PROMPT)
        expect(prompt).not_to_have_text(before, timeout=seconds * 1000)
        expect(prompt).to_have_text(re.compile(r"^\[\d+\]:$"), timeout=seconds * 1000)

    def run(self, index: int, seconds: float = SECONDS) -> str:
        """Run a cell to its end. Returns what is then to be read below it."""
        self.start(index)
        self.wait(index, seconds)
        return self.text(index)

    def ask(self, source: str, seconds: float = SECONDS) -> str:
        """Write a new cell at the end and run it. Returns what is then to be read below it."""
        return self.run(self.add(source), seconds)

    def text(self, index: int) -> str:
        """What a person reads below a cell; "" where there is nothing."""
        outputs = self.area(index).locator(":scope > .jp-OutputArea-child > .jp-OutputArea-output")
        return "\n".join(outputs.all_inner_texts()).strip()

    def expect(self, index: int, text: str | re.Pattern[str], seconds: float = SECONDS) -> None:
        """Wait until the text, or what matches, is to be read below a cell."""
        from playwright.sync_api import expect

        expect(self.area(index)).to_contain_text(text, timeout=seconds * 1000)

    def failed(self, index: int) -> str:
        """The error that ended a cell, or ""."""
        error = self.area(index).locator("[data-mime-type='application/vnd.jupyter.stderr']")
        return error.last.inner_text() if error.count() else ""

    def watch(self, index: int) -> Callable[[], list[dict[str, Any]]]:
        """From now on note each `text` that is below a cell, and its `height` in pixels. What is
        returned returns them, without those equal to the one before.
        """
        area = self.area(index).element_handle()
        area.evaluate(page_scripts.WATCH)
        return lambda: list(area.evaluate("area => area.seen"))

    def interrupt(self) -> None:
        """By the toolbar's button."""
        self.page.locator(f"{_PANEL} [data-command='notebook:interrupt-kernel']").first.click()

    def save(self) -> nbformat.NotebookNode:
        """Save with the keyboard. Returns what then lies in the file."""
        self._select(-1)
        self.page.keyboard.press("ControlOrMeta+s")
        self.page.wait_for_function(
            "() => !window.jupyterapp.shell.currentWidget.context.model.dirty"
        )
        return nbformat.read(self.path, as_version=4)

    def contrast(self, where: Locator) -> float:
        """Of the first of these elements' text to what is behind it, as WCAG computes it: 1 to 21."""
        return float(where.first.evaluate(page_scripts.CONTRAST))

    def screenshot(self, name: str, index: int | None = None) -> Path:
        """Of the page, or of one cell."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        self.page.mouse.move(0, 0)  # what it is over would look different
        target: Any = self.page if index is None else self.cell(index)
        target.screenshot(path=path)
        return path


def write_notebook(path: Path, cells: Sequence[str], *, kernel: bool = True) -> None:
    """Code cells; without a `kernel` it names none, and JupyterLab asks."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(one) for one in cells])
    if kernel:
        book.metadata.kernelspec = {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
    nbformat.write(book, path)


def until(holds: Callable[[], bool], seconds: float = SECONDS) -> None:
    """Ask until it holds; each asking is expected to take its time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s"


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The browser, which several labs can use. While it is there no event loop of another's runs in this
    thread: that is Playwright's.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def running_lab(
    browser: Browser,
    *options: str,
    environment: dict[str, str] | None = None,
    config: dict[str, dict[str, Any]] | None = None,
) -> Iterator[Lab]:
    """Start a server with JupyterLab; end it afterwards.

    `options` are added to its command line, `config` is what a file of the user's may say, such as
    {"ShimmyLimits": {"max_tokens_per_day": 100}}.
    """
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder)
        for name, said in _SETTINGS.items():
            file = own / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(said))
        (own / "config").mkdir()
        (own / "config" / "jupyter_server_config.json").write_text(json.dumps(config or {}))
        folders = {
            "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
            "JUPYTER_CONFIG_PATH": str(own / "config"),
            "IPYTHONDIR": str(own / "ipython"),
        }
        with running_server(
            *_OPTIONS, *options, environment=folders | (environment or {})
        ) as server:
            # The server's root holds its log and its settings too, which are no part of the picture.
            notebooks = server.log.parent / "notebooks"
            notebooks.mkdir()
            yield Lab(server, browser, notebooks)
