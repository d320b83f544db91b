"""The cells that go along with a prompt, and which of them to leave out.

Cases: none, fewer than wanted, all kinds of cells, prompts among them, the running cell, results that are long, in
escape sequences, changed since, from before a reset; fences within; names to leave out, also wrong ones; budgets at
each edge; one long output, many small ones, the last cell too long, nothing that helps; that plans fit, are no larger
than need be, and cost few counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell
from markdown_it import MarkdownIt

from shimmy_jupyter.errors import InvalidValue
from shimmy_jupyter.notebook.context import (
    LONGEST,
    Choice,
    Item,
    as_message,
    fenced,
    recent,
    what_to_leave_out,
    without,
)
from shimmy_jupyter.notebook.remembered import Remembered
from tests.unit.test_remembered import ipython, run


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


@pytest.mark.usefixtures("capsys")
class TestRecent:
    def test_the_last_ones_in_their_order(
        self, shell: InteractiveShell, remembered: Remembered
    ) -> None:
        run(shell, "x = 1", "x + 1", "nope", "print('said')")
        found = recent(shell, 3, remembered)
        assert [item.number for item in found] == [2, 3, 4]
        assert found[0] == Item(2, "x + 1", "2", None)
        assert found[1].error is not None
        assert found[1].error.endswith("name 'nope' is not defined")
        assert found[2] == Item(4, "print('said')")

    def test_fewer_than_wanted(self, shell: InteractiveShell, remembered: Remembered) -> None:
        assert recent(shell, 3, remembered) == []
        run(shell, "1")
        assert recent(shell, 3, remembered) == [Item(1, "1", "1")]
        assert recent(shell, 0, remembered) == []
        with pytest.raises(InvalidValue) as caught:
            recent(shell, -1, remembered)
        assert caught.value.param == "--context"

    def test_neither_prompts_nor_the_running_cell(
        self, shell: InteractiveShell, remembered: Remembered, tmp_path: Path
    ) -> None:
        shell.register_magic_function(lambda line, cell="": "an answer", "line_cell", "shimmy")
        shell.push({"look": lambda n: recent(shell, n, remembered)})
        run(shell, "1", "%%shimmy\nwhat?", "%shimmy what", "", "  ", "2", "found = look(9)")
        for table in shell.magics_manager.magics.values():
            table.pop("shimmy", None)
        assert [item.source for item in shell.user_ns["found"]] == ["1", "2"]
        assert [item.source for item in recent(shell, 1, remembered)] == ["found = look(9)"]

    def test_long_outputs_are_cut_and_say_so(
        self, shell: InteractiveShell, remembered: Remembered
    ) -> None:
        source = "'" + "x" * 20_000 + "'"
        run(shell, source, "raise ValueError(" + source + ")")
        one, two = recent(shell, 2, remembered)
        assert one.source == source
        for text in (one.output, two.error):
            assert text is not None
            assert len(text) < LONGEST + 50
            assert "characters left out" in text

    def test_as_they_were_shown(self, shell: InteractiveShell, remembered: Remembered) -> None:
        run(
            shell,
            "xs = [1]",
            "xs",
            "xs.append(2)",
            "class R:\n    def __repr__(self): return '\\x1b[1mR'",
            "R()",
        )
        assert [item.output for item in recent(shell, 5, remembered)] == [
            None,
            "[1]",
            None,
            None,
            "R",
        ]

    def test_nothing_from_before_a_reset(
        self, shell: InteractiveShell, remembered: Remembered
    ) -> None:
        run(shell, "'secret'", "nope")
        shell.reset()
        run(shell, "x = 1", "y = 1")
        assert recent(shell, 9, remembered) == [Item(1, "x = 1"), Item(2, "y = 1")]


class TestMessage:
    def test_numbers_and_fences(self) -> None:
        items = [Item(2, "x + 1", "2"), Item(3, "nope", None, "NameError: nope")]
        assert as_message(items) == (
            "The cells of this notebook that ran last, the oldest first. Numbers are the order they ran in.\n\n"
            "In[2]:\n```python\nx + 1\n```\n\nOut[2]:\n```\n2\n```\n\n"
            "In[3]:\n```python\nnope\n```\n\nErr[3]:\n```\nNameError: nope\n```"
        )

    def test_without_cells_there_is_none(self) -> None:
        assert as_message([]) == ""

    @given(st.text(alphabet="`~ a\n", max_size=40))
    def test_nothing_ends_a_fence_from_within(self, text: str) -> None:
        tokens = MarkdownIt("commonmark").parse(fenced(text, "python") + "\n\nafter")
        assert tokens[0].type == "fence"
        assert tokens[0].content == text + "\n"
        assert tokens[-2].content == "after"


ITEMS = [
    Item(1, "s" * 50, "o" * 20),
    Item(2, "s" * 30),
    Item(4, "s" * 10, "o" * 600),
    Item(7, "s" * 40, "o" * 10, "e" * 30),
]


def size(item: Item) -> int:
    return len(item.source) + len(item.output or "") + len(item.error or "")


def count(items: list[Item]) -> int:
    return 100 + sum(map(size, items))


class TestWithout:
    @pytest.mark.parametrize(
        ("names", "left"),
        [
            ([], [70, 30, 610, 80]),
            (["Out[4]"], [70, 30, 10, 80]),
            (["Err[7]", " Out[7] "], [70, 30, 610, 40]),
            (["In[1]"], [30, 610, 80]),
            (["1", "4", "Out[4]"], [30, 80]),
            (["Out[2]"], [70, 30, 610, 80]),
            (["1", "2", "4", "7"], []),
        ],
    )
    def test_parts(self, names: list[str], left: list[int]) -> None:
        assert [size(item) for item in without(ITEMS, names)] == left

    @pytest.mark.parametrize("name", ["3", "In[3]", "out[4]", "Out4", "", "-1", "In[1", "x"])
    def test_wrong_ones_are_named(self, name: str) -> None:
        with pytest.raises(InvalidValue) as caught:
            without(ITEMS, [name])
        assert caught.value.param == "--leave-out"
        assert "In[1], In[2], In[4], In[7]" in caught.value.message


class TestChoice:
    def names(self, budget: int, items: list[Item] = ITEMS) -> list[str]:
        return [name for name, _ in what_to_leave_out(items, count, budget).left_out]

    def test_all_fits(self) -> None:
        choice = what_to_leave_out(ITEMS, count, 890)
        assert choice == Choice(tuple(ITEMS), (), 890, 890, 0, 4)
        assert (choice.fits, str(choice)) == (True, "")

    @pytest.mark.parametrize(
        ("budget", "names"),
        [
            (889, ["Out[1]"]),  # the smallest that is enough
            (870, ["Out[1]"]),
            (869, ["In[2]"]),
            (820, ["In[1]"]),
            (819, ["Out[4]"]),
            (290, ["Out[4]"]),
            (289, ["In[4]"]),  # a little more, with its output
            (280, ["In[4]"]),
            (279, ["In[4]", "Out[1]"]),
            (210, ["In[4]", "In[1]"]),
            (180, ["In[4]", "In[1]", "In[2]"]),  # all but the last
            (179, ["In[4]", "In[7]", "In[2]"]),  # not enough without it
            (100, ["In[4]", "In[7]", "In[1]", "In[2]"]),
        ],
    )
    def test_as_little_as_need_be(self, budget: int, names: list[str]) -> None:
        assert self.names(budget) == names
        choice = what_to_leave_out(ITEMS, count, budget)
        assert choice.fits
        assert choice.tokens == count(list(choice.items)) <= budget

    def test_the_last_cell_goes_where_the_others_are_not_enough(self) -> None:
        items = [Item(1, "s" * 10), Item(2, "s" * 10), Item(3, "s" * 10, "o" * 900)]
        assert self.names(1030, items) == []
        assert self.names(1029, items) == ["In[1]"]
        assert self.names(1010, items) == ["In[1]", "In[2]"]
        assert self.names(1009, items) == ["Out[3]"]
        assert self.names(900, items) == ["Out[3]"]  # and not the others, too

    @pytest.mark.parametrize(
        ("budget", "last"), [(179, 0), (180, 1), (789, 1), (790, 2), (820, 3), (889, 3), (890, 4)]
    )
    def test_how_many_of_the_last_fit_whole(self, budget: int, last: int) -> None:
        assert what_to_leave_out(ITEMS, count, budget).last == last

    def test_of_equals_the_oldest(self) -> None:
        assert self.names(125, [Item(n, "s" * 10) for n in range(1, 4)]) == ["In[1]"]

    def test_the_offer(self) -> None:
        choice = what_to_leave_out(ITEMS, count, 210)
        assert str(choice) == (
            "too long by 680 tokens; without In[4] (610 tokens) and In[1] (70 tokens) it fits: "
            "--leave-out In[4],In[1]; or --context 1"
        )
        assert "--context" not in str(what_to_leave_out(ITEMS, count, 179))
        three = what_to_leave_out(ITEMS, count, 180)
        assert "without In[4] (610 tokens), In[1] (70 tokens) and In[2] (30 tokens) it" in str(
            three
        )

    @pytest.mark.parametrize("items", [[], ITEMS])
    def test_nothing_helps(self, items: list[Item]) -> None:
        choice = what_to_leave_out(items, count, 99)
        assert (choice.fits, choice.items, choice.last) == (False, (), 0)
        assert str(choice) == "the prompt alone is too long by 1 tokens, without any cell"

    PARTS = st.none() | st.integers(0, 50).map("x".__mul__)
    CELLS = st.lists(st.tuples(st.integers(1, 50), PARTS, PARTS), max_size=6).map(
        lambda rows: [Item(n, "s" * s, o, e) for n, (s, o, e) in enumerate(rows, 1)]
    )

    @given(CELLS, st.integers(90, 400))
    def test_plans_fit_and_nothing_in_them_is_for_nothing(
        self, items: list[Item], budget: int
    ) -> None:
        asked: list[int] = []

        def counted(some: list[Item]) -> int:
            asked.append(1)
            return count(some)

        choice = what_to_leave_out(items, counted, budget)
        names = [name for name, _ in choice.left_out]
        assert without(items, names) == list(choice.items)
        assert choice.fits is (budget >= 100)
        assert (count(items[-choice.last :]) if choice.last else 100) <= max(budget, 100)
        assert len(asked) <= 5 * 3 * len(items) + 8
        if choice.fits and names:
            for name in names:
                assert count(without(items, [n for n in names if n != name])) > budget

    @given(CELLS.filter(bool), st.integers(100, 400))
    def test_no_plan_with_fewer_parts(self, items: list[Item], budget: int) -> None:
        """The last cell aside, which is spared."""
        names = self.names(budget, items)
        parts = [f"{kind}[{item.number}]" for item in items[:-1] for kind in ("Out", "Err", "In")]
        if any(name.endswith(f"[{items[-1].number}]") for name in names):
            return
        for fewer in itertools.combinations(parts, max(0, len(names) - 1)):
            assert not names or count(without(items, fewer)) > budget

    def test_counts_that_do_not_add_up(self) -> None:
        def joined(items: list[Item]) -> int:
            return count(items) + (300 if len(items) > 1 else 0)

        choice = what_to_leave_out(ITEMS, joined, 180)
        assert choice.fits
        assert choice.tokens == joined(list(choice.items))
