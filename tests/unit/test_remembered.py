"""What is known of cells that ran, by a real IPython shell.

Cases: results, none, several errors, mistakes in the syntax, interrupts, chains and groups of exceptions, deep and long
tracebacks, escape sequences, our own errors; the running cell, cells within cells and without a number, blank
ones, `%reset`; numbers that are not there, from the end, slices; the user's own In, Out and Err; loaded by a
cell, closed, closed twice; the bound on errors; which cells are prompts.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from shimmy_jupyter.errors import QueueFull
from shimmy_jupyter.notebook.interpolate import interpolate
from shimmy_jupyter.notebook.remembered import LastError, NoSuchCell, Remembered, is_prompt, plain


@contextlib.contextmanager
def ipython(folder: Path) -> Iterator[InteractiveShell]:
    """A shell of its own, beside whichever the process has."""
    config = Config()
    config.HistoryManager.enabled = False
    before = list(sys.path)
    module = types.ModuleType("__notebook__")
    shell = InteractiveShell(config=config, ipython_dir=str(folder), user_module=module)
    try:
        yield shell
    finally:
        shell.atexit_operations()
        atexit.unregister(shell.atexit_operations)
        sys.path[:] = before
        sys.modules.pop("__notebook__", None)


@pytest.fixture(scope="module")
def one_shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InteractiveShell]:
    with ipython(tmp_path_factory.mktemp("ipython")) as shell:
        yield shell


@pytest.fixture
def shell(one_shell: InteractiveShell) -> Iterator[InteractiveShell]:
    yield one_shell
    one_shell.reset()


@pytest.fixture
def remembered(shell: InteractiveShell) -> Iterator[Remembered]:
    remembered = Remembered(shell)
    yield remembered
    remembered.close()


def run(shell: InteractiveShell, *cells: str) -> Any:
    for cell in cells:
        result = shell.run_cell(cell, store_history=True)
    return result


@pytest.mark.usefixtures("capsys")
class TestInAndOut:
    def test_by_number(self, shell: InteractiveShell, remembered: Remembered) -> None:
        run(shell, "x = 1", "x + 1", "x * 10;", "%time x\n")
        assert remembered.inputs[1] == "x = 1"
        assert remembered.inputs[4] == "%time x"  # as it was written, not as IPython rewrites it
        assert remembered.outputs[2] == 2
        assert dict(remembered.outputs) == {2: 2, 4: 1}
        assert repr(remembered.outputs) == "{2: 2, 4: 1}"

    def test_from_the_end(self, shell: InteractiveShell, remembered: Remembered) -> None:
        run(shell, "1", "x = 2", "3")
        assert [remembered.inputs[-1], remembered.inputs[-3]] == ["3", "1"]
        assert [remembered.outputs[-1], remembered.outputs[-2]] == [3, 1]

    def test_the_running_cell_is_not_there_yet(
        self, shell: InteractiveShell, remembered: Remembered
    ) -> None:
        shell.push({"of": remembered})
        run(shell, "'first'", "n = of.running, of.inputs[-1], list(of.inputs), of.completed")
        assert shell.user_ns["n"] == (2, "'first'", ["", "'first'"], 1)
        assert (remembered.running, remembered.completed) == (None, 2)
        failed = run(shell, "of.inputs[3]").error_in_exec
        assert str(failed) == "there is no In[3]: that cell is running; there are 1, 2"

    def test_as_a_list(self, shell: InteractiveShell, remembered: Remembered) -> None:
        run(shell, "a = 1", "b = 2", "c = 3")
        assert remembered.inputs[2:] == ["b = 2", "c = 3"]
        assert remembered.inputs[-2:] == ["b = 2", "c = 3"]
        assert len(remembered.inputs) == 4
        assert "b = 2" in remembered.inputs

    def test_as_a_dictionary(self, shell: InteractiveShell, remembered: Remembered) -> None:
        run(shell, "1", "x = 2")
        assert remembered.outputs.get(1) == 1
        assert remembered.outputs.get(2) is None
        assert remembered.outputs.get(2, "none") == "none"
        assert (1 in remembered.outputs, -1 in remembered.outputs) == (True, False)
        assert list(remembered.outputs.items()) == [(1, 1)]

    @pytest.mark.parametrize(
        ("expression", "said"),
        [
            ("In[0]", "there is no In[0]; there are 1, 2, 3"),
            ("In[4]", "there is no In[4]; there are 1, 2, 3"),
            ("In[-4]", "there is no In[-4]; there are 1, 2, 3"),
            ("Out[2]", "there is no Out[2]; there are 1, 3"),
            ("Out[-3]", "there is no Out[-3]; there are 1, 3"),
            ("Out['x']", "there is no Out['x']; there are 1, 3"),
            ("Err[1]", "there is no Err[1]; there are none so far"),
        ],
    )
    def test_what_is_missing(
        self, shell: InteractiveShell, remembered: Remembered, expression: str, said: str
    ) -> None:
        run(shell, "1", "x = 2", "3")
        with pytest.raises(NoSuchCell) as caught:
            remembered.evaluate(expression)
        assert str(caught.value) == said
        assert isinstance(caught.value, LookupError)

    def test_of_many_the_last_are_named(
        self, shell: InteractiveShell, remembered: Remembered
    ) -> None:
        run(shell, *map(str, range(12)))
        with pytest.raises(NoSuchCell, match=r"there are 5, 6, 7, 8, 9, 10, 11, 12 and 4 before"):
            remembered.outputs[99]


@pytest.mark.usefixtures("capsys")
class TestErrors:
    def test_from_the_cell_on(self, shell: InteractiveShell, remembered: Remembered) -> None:
        run(shell, "def f(x):\n    return 1 / x", "f(0)")
        assert remembered.errors[2].splitlines()[:4] == [
            "Traceback (most recent call last):",
            "  Cell In[2], line 1, in <module>",
            "    f(0)",
            "  Cell In[1], line 2, in f",
        ]
        assert remembered.errors[2].endswith("\nZeroDivisionError: division by zero")
        assert remembered.errors[-1] == remembered.errors[2]
        assert remembered.last_error == LastError(
            2, "ZeroDivisionError", remembered.errors[2], "f(0)"
        )

    def test_syntax(self, shell: InteractiveShell, remembered: Remembered) -> None:
        run(shell, "x = 1", "x = = 2")
        assert remembered.errors[2].startswith("  Cell In[2], line 1\n    x = = 2\n")
        assert remembered.errors[2].endswith("SyntaxError: invalid syntax")
        assert remembered.last_error is not None
        assert remembered.last_error.kind == "SyntaxError"

    def test_one_that_no_transformer_can_read(
        self, shell: InteractiveShell, remembered: Remembered
    ) -> None:
        def refuse(lines: list[str]) -> list[str]:
            raise SyntaxError("not this")

        shell.input_transformers_cleanup.append(refuse)
        run(shell, "x")
        shell.input_transformers_cleanup.remove(refuse)
        assert remembered.errors[1].startswith("SyntaxError: not this")

    def test_a_mistake_with_a_magic(self, shell: InteractiveShell, remembered: Remembered) -> None:
        run(shell, "x = 1\n%nowhere x")
        assert remembered.errors[1] == (
            "IPython.core.error.UsageError: Line magic function `%nowhere` not found."
        )

    def test_chains_and_notes(self, shell: InteractiveShell, remembered: Remembered) -> None:
        cell = "try:\n    {}['k']\nexcept KeyError as e:\n    e.add_note('look'); raise ValueError('no') from e"
        run(shell, cell)
        text = remembered.errors[1]
        assert text.index("KeyError: 'k'\nlook") < text.index("direct cause") < text.index("no")
        assert text.count("Cell In[1], line") == 2

    def test_groups(self, shell: InteractiveShell, remembered: Remembered) -> None:
        run(shell, "raise ExceptionGroup('both', [ValueError('a'), TypeError('b')])")
        assert "ValueError: a" in remembered.errors[1]
        assert "TypeError: b" in remembered.errors[1]

    def test_without_escapes_and_controls(
        self, shell: InteractiveShell, remembered: Remembered
    ) -> None:
        run(
            shell,
            r"raise ValueError('\x1b[1;31mred\x1b[0m \x1b]8;;http://x\x07link \u202eback \x07')",
        )
        assert remembered.errors[1].endswith("ValueError: red link back ")

    def test_long_ones_keep_both_ends(
        self, shell: InteractiveShell, remembered: Remembered
    ) -> None:
        run(shell, "raise ValueError('x' * 100_000 + 'the end')")
        text = remembered.errors[1]
        assert len(text) < Remembered.LONGEST + 50
        assert text.startswith("Traceback (most")
        assert text.endswith("the end")
        assert "characters left out" in text

    def test_one_without_a_text(self, shell: InteractiveShell, remembered: Remembered) -> None:
        run(shell, "class E(Exception):\n    def __str__(self): raise ValueError\nraise E")
        assert 1 in remembered.errors
        assert remembered._traceback(shell.user_ns["E"]()).endswith("<exception str() failed>")

    def test_our_own_are_a_line(self, shell: InteractiveShell, remembered: Remembered) -> None:
        shell.push({"error": QueueFull("try later")})
        run(shell, "raise error")
        assert remembered.errors[1] == "QueueFull: try later [queue_full]"

    def test_only_the_last(
        self, shell: InteractiveShell, remembered: Remembered, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert Remembered.MOST == 100
        monkeypatch.setattr(Remembered, "MOST", 3)
        run(shell, *["nope"] * 5)
        assert list(remembered.errors) == [3, 4, 5]

    def test_what_works_changes_nothing(
        self, shell: InteractiveShell, remembered: Remembered
    ) -> None:
        assert remembered.last_error is None
        run(shell, "nope", "x = 1")
        assert remembered.last_error is not None
        assert remembered.last_error.number == 1

    @pytest.mark.parametrize("cell", ["raise KeyboardInterrupt", "%shimmy what", "%%shimmy\nwhat"])
    def test_neither_interrupts_nor_prompts_are_the_last(
        self, shell: InteractiveShell, remembered: Remembered, cell: str
    ) -> None:
        def shimmy(line: str, cell: str = "") -> None:
            raise QueueFull("try later")

        shell.register_magic_function(shimmy, "line_cell")
        run(shell, "nope", cell)
        for table in shell.magics_manager.magics.values():
            table.pop("shimmy", None)
        assert set(remembered.errors) == {1, 2}
        assert remembered.last_error is not None
        assert remembered.last_error.number == 1

    def test_a_magic_among_code_is_code(
        self, shell: InteractiveShell, remembered: Remembered
    ) -> None:
        run(shell, "%shimmy what")
        assert remembered.last_error is None
        run(shell, "%shimmy what\nnope")
        assert remembered.last_error is not None


@pytest.mark.usefixtures("capsys")
class TestCells:
    def test_cells_within_cells(self, shell: InteractiveShell, remembered: Remembered) -> None:
        shell.push({"of": remembered, "shell": shell})
        run(shell, "'first'", "shell.run_cell('nope'); n = of.running, of.inputs[-1]")
        assert shell.user_ns["n"] == (2, "'first'")
        assert dict(remembered.errors) == {}  # it has no number
        assert remembered.last_error is None

    def test_blank_cells_and_silent_ones(
        self, shell: InteractiveShell, remembered: Remembered
    ) -> None:
        shell.push({"of": remembered, "shell": shell})
        run(
            shell,
            "",
            "  \n",
            "shell.run_cell(' '); shell.run_cell('1', silent=True); n = of.running",
        )
        assert shell.user_ns["n"] == 1
        assert remembered.running is None

    def test_loaded_by_a_cell(self, shell: InteractiveShell) -> None:
        shell.push({"load": lambda: Remembered(shell)})
        run(shell, "'first'", "of = load(); n = of.running, of.inputs[-1]")
        assert shell.user_ns["n"] == (2, "'first'")
        assert shell.user_ns["of"].running is None

    def test_an_interrupted_wait_leaves_nothing_running(
        self, shell: InteractiveShell, remembered: Remembered
    ) -> None:
        """As a kernel does it where a cell awaits: the result is not there."""
        run(shell, "1")
        shell.events.trigger("pre_run_cell", shell.last_execution_result.info)
        assert remembered.running == 1
        shell.events.trigger("post_run_cell", None)
        assert remembered.running is None

    def test_reset_begins_anew(self, shell: InteractiveShell, remembered: Remembered) -> None:
        run(shell, "x = 1", "nope", "nope")
        shell.reset()
        run(shell, "nope")
        assert list(remembered.errors) == [1]
        assert remembered.inputs[-1] == "nope"
        assert len(remembered.inputs) == 2

    def test_closed_it_follows_no_more(self, shell: InteractiveShell) -> None:
        before = {event: list(known) for event, known in shell.events.callbacks.items()}
        remembered = Remembered(shell)
        run(shell, "nope")
        remembered.close()
        remembered.close()
        assert shell.events.callbacks == before
        run(shell, "nope")
        assert list(remembered.errors) == [1]


@pytest.mark.usefixtures("capsys")
class TestEvaluate:
    def test_the_users_names(self, shell: InteractiveShell, remembered: Remembered) -> None:
        run(shell, "x = 20", "x + 1", "nope")
        assert remembered.evaluate(" x + 1 ") == 21
        assert remembered.evaluate("In[1] + str(Out[2])") == "x = 2021"
        assert str(remembered.evaluate("Err[3]")).endswith("name 'nope' is not defined")
        assert remembered.evaluate("[x + k for k in (1, 2) if In[1]]") == [21, 22]
        assert remembered.evaluate("get_ipython()") is shell
        with pytest.raises(NameError):
            remembered.evaluate("nope")

    def test_the_users_own_come_first(
        self, shell: InteractiveShell, remembered: Remembered
    ) -> None:
        run(shell, "In = ['mine']; Out = {1: 'mine'}; Err = 'mine'")
        assert remembered.evaluate("In[0], Out[1], Err") == ("mine", "mine", "mine")

    def test_nothing_is_left_behind(self, shell: InteractiveShell, remembered: Remembered) -> None:
        before = dict(shell.user_ns)
        remembered.evaluate("[k for k in (1, 2)]")
        assert shell.user_ns == before
        assert "Err" not in shell.user_ns

    def test_no_future_of_ours(self, remembered: Remembered, monkeypatch: Any) -> None:
        flags: list[Any] = []

        def watch(*args: Any, **more: Any) -> Any:
            flags.append(more.get("dont_inherit"))
            return compile(*args, **more)

        monkeypatch.setattr("shimmy_jupyter.notebook.remembered.compile", watch, raising=False)
        remembered.evaluate("1")
        assert flags == [True]

    def test_in_a_prompt(self, shell: InteractiveShell, remembered: Remembered) -> None:
        run(shell, "x = {'a': 1}", "x", "x['b']")
        text = "Why does {In[3]} fail, as {Out[2]} is there? {Err[3]} {Out[3]} {x['b']} {\"x\": 1}"
        found = interpolate(text, remembered.evaluate)
        assert found.text.startswith("Why does x['b'] fail, as {'a': 1} is there? Traceback")
        assert found.text.endswith("KeyError: 'b' {Out[3]} {x['b']} {\"x\": 1}")
        assert found.expressions == ("In[3]", "Out[2]", "Err[3]")
        assert found.failed == (
            ("Out[3]", "NoSuchCell: there is no Out[3]; there is 2"),
            ("x['b']", "KeyError: 'b'"),
        )


@pytest.mark.parametrize(
    ("source", "asks"),
    [
        ("%%shimmy\nhi", True), ("\n  %%shimmy m\nx = 1", True), ("%%ai x\nhi", True), ("%shimmy hi", True),
        ("%ai list", True), ("# ask\n%shimmy hi\n\n%shimmy more\n", True), ("answer = %shimmy hi", True),
        ("x = 1\n%shimmy hi", False), ("%shimmy hi\nprint(1)", False), ("%%time\n%shimmy hi", False),
        ("%shimmyx", False), ("%%aid\nx", False), ("", False), ("# %shimmy", False), ("shimmy.chat('x')", False),
        ("x = 5 % shimmy", False), ("%load_ext shimmy", False),
    ],
)  # fmt: skip
def test_what_a_prompt_is(source: str, asks: bool) -> None:
    assert is_prompt(source) is asks


@pytest.mark.parametrize(
    ("text", "longest", "becomes"),
    [
        ("", 5, ""),
        ("12345", 5, "12345"),
        ("123456", 5, "1\n… 1 characters left out …\n3456"),
        ("a\tb\nc\r\n\x1b[31mred\x1b[0m\x1b(B\x9bx", 50, "a\tb\nc\nredx"),
    ],
)
def test_plain(text: str, longest: int, becomes: str) -> None:
    assert plain(text, longest) == becomes
