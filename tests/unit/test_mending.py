"""`%shimmy fix`: what is asked, which code is found in an answer, and how it is offered.

Cases: the prompt with fences in the cell; answers with one block, several, other languages, no language, tildes, longer
fences, fences within, in lists, cut off, empty, none; line ends; characters that hide what code does; a front
end, a terminal, a cell that stays as it was; nothing is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell

from shimmy_jupyter.notebook.context import fenced
from shimmy_jupyter.notebook.mending import Offered, corrected, difference, offer, prompt_for
from shimmy_jupyter.notebook.remembered import LastError, Remembered
from tests.unit.test_remembered import ipython, run


class TestPrompt:
    def test_says_what_happened(self) -> None:
        error = LastError(3, "NameError", "Traceback:\nNameError: nope", 's = """\n```\n"""\nnope')
        system, user = prompt_for(error)
        assert (system["role"], user["role"]) == ("system", "user")
        assert "exactly one code block that begins with ```python" in system["content"]
        assert user["content"] == (
            'Cell In[3] raised NameError:\n\n````python\ns = """\n```\n"""\nnope\n````\n\n'
            "The traceback:\n\n```\nTraceback:\nNameError: nope\n```"
        )


ANSWERS: list[tuple[str, str | None]] = [
    ("", None),
    ("No code here, `x = 1` only.", None),
    ("It is a typo.\n\n```python\nx = 1\n```\nDone.", "x = 1"),
    ("```py\nx = 1\n```", "x = 1"),
    ("```Python3\nx = 1\n```", "x = 1"),
    ("```ipython\n%time x\n```", "%time x"),
    ("```\nx = 1\n```", "x = 1"),
    ("``` python\nx = 1\n```", "x = 1"),
    ('```python title="a cell"\nx = 1\n```', "x = 1"),
    ("```{python}\nx = 1\n```", "x = 1"),
    ("```{.python .numberLines}\nx = 1\n```", "x = 1"),
    ("~~~python\nx = 1\n~~~", "x = 1"),
    ("~~~ python `really`\nx = 1\n~~~", "x = 1"),
    ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''"),
    ("~~~python\n```\n~~~", "```"),
    ("```python\n~~~\n```", "~~~"),
    ("```python\nx = 1\n`````", "x = 1"),
    ("```python\nx = 1\n```  \nafter", "x = 1"),
    ("```python\nx = 1\n``` not the end\n```", "x = 1\n``` not the end"),
    ("```python\nx = 1\ny = 2", "x = 1\ny = 2"),
    ("```python", None),
    ("```python\n\n \n```", None),
    ("```python\n\n  x = 1\n\n```", "  x = 1"),
    ("Wrong:\n```python\nx = = 1\n```\nRight:\n```python\nx = 1\n```", "x = 1"),
    ("```python\nx = 1\n```\nIt prints\n```\n1\n```", "x = 1"),
    ("```python\nx = 1\n```\n```text\n1\n```\n```python\n```", "x = 1"),
    ("```bash\npip install x\n```", None),
    ("```bash\npip install x\n```\n```\nx = 1\n```", "x = 1"),
    ("```pycon\n>>> x\n```", None),
    ("1. Fix it:\n\n   ```python\n   if x:\n       y\n   ```\n2. Run it.", "if x:\n    y"),
    ("- a\n    ```python\n    x\n\n  y\n    ```", "x\n\ny"),
    ('```python\ns = """\n        ```\n"""\n```', 's = """\n        ```\n"""'),
    ("```python\r\nx = 1\r\ny = 2\r\n```\r\n", "x = 1\ny = 2"),
    ("Use ```x``` here\n```python\ny\n```", "y"),
    ("```python\nif x:\n\ty\n```", "if x:\n\ty"),
]


class TestCorrected:
    @pytest.mark.parametrize(("answer", "code"), ANSWERS)
    def test_found(self, answer: str, code: str | None) -> None:
        assert corrected(answer) == code

    @given(st.text(alphabet="`~ ab\n\t=", max_size=60))
    def test_what_is_fenced_is_found(self, code: str) -> None:
        expected = code.strip("\n") if code.strip() else None
        assert corrected(f"Because.\n\n{fenced(code, 'python')}\n\nBye.") == expected

    @given(st.text(alphabet="`~python \n{}.", max_size=80))
    def test_any_answer_can_be_read(self, answer: str) -> None:
        code = corrected(answer)
        assert code is None or code.strip()

    def test_many_fences(self) -> None:
        assert corrected("```\n~~~\n" * 20_000 + "```python\nx\n```") is not None


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InteractiveShell]:
    with ipython(tmp_path_factory.mktemp("ipython")) as shell:
        yield shell


class FrontEnd:
    def __init__(self) -> None:
        self.cells: list[tuple[str, bool]] = []

    def set_next_input(self, text: str, replace: bool = False) -> None:
        self.cells.append((text, replace))

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"used {name}")


class TestOffer:
    def test_below_and_not_run(self) -> None:
        front: Any = FrontEnd()
        offered = offer("x = 1\ny = 2", front, "x = = 1\ny = 2\n")
        assert front.cells == [("x = 1\ny = 2", False)]
        assert offered == Offered(
            "x = 1\ny = 2",
            "--- the cell\n+++ corrected\n@@ -1,2 +1,2 @@\n-x = = 1\n+x = 1\n y = 2",
            0,
        )

    def test_in_a_terminal_it_waits_in_the_next_prompt(
        self, shell: InteractiveShell, capsys: Any
    ) -> None:
        remembered = Remembered(shell)
        run(shell, "ran = []", "ran.append(1); nope")
        error = remembered.last_error
        remembered.close()
        assert error is not None
        assert "name 'nope' is not defined" in prompt_for(error)[1]["content"]
        code = corrected("```python\nran.append(2)\n```")
        assert code is not None
        assert offer(code, shell, error.source).diff
        assert shell.rl_next_input == "ran.append(2)"
        assert shell.user_ns["ran"] == [1]
        shell.rl_next_input = None

    @pytest.mark.parametrize(
        "hidden", ["\u202e", "\u2066", "\u200f", "\x1b[8m", "\x08", "\x9b", "\u2028", "\r"]
    )
    def test_nothing_hides_what_it_does(self, hidden: str) -> None:
        front: Any = FrontEnd()
        offered = offer(f"access = 'user{hidden}'", front, "access = 'user'\n")
        ((code, _),) = front.cells or [(offered.code, False)]
        assert hidden[0] not in code
        assert offered.removed == 1
        assert hidden[0] not in offered.diff

    def test_one_that_the_cell_had_is_seen_to_go(self) -> None:
        front: Any = FrontEnd()
        offered = offer("x = ''", front, "x = '\u202e'")
        assert "-x = '\\u202e'\n+x = ''" in offered.diff
        assert front.cells == [("x = ''", False)]

    @pytest.mark.parametrize("original", ["x = 1", "x = 1\n", "\nx = 1"])
    def test_the_same_again_is_not_offered(self, original: str) -> None:
        front: Any = FrontEnd()
        assert offer("x = 1", front, original) == Offered("x = 1", "", 0)
        assert front.cells == []

    def test_without_the_cell_all_of_it_is_new(self) -> None:
        front: Any = FrontEnd()
        assert offer("x", front).diff.endswith("-\n+x")

    @given(st.text(max_size=30), st.text(max_size=30))
    def test_a_difference_has_nothing_that_acts(self, one: str, other: str) -> None:
        diff = difference(one, other)
        assert not {"\r", "\x1b", "\u202e", "\x0c"} & set(diff)
        assert (diff == "") is (one.strip("\n") == other.strip("\n")) or "\\u" in one + other
