"""Tab on the magic's lines, by itself and in a real shell.

Cases: commands, their words, models and options; options that are there already; values after a space and
after `=`, within quotes; variables after options and in braces; prompts, where nothing is offered but in
braces; other cells; a server that fails, or is slow, or is not needed; in the shell: nothing lost, nothing
added by files and Python's names, other lines as they were, `\\alpha` still there, the word replaced from
its first character on; put in twice, taken out.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.completer import provisionalcompleter, rectify_completions
from IPython.core.interactiveshell import InteractiveShell
from IPython.testing.globalipapp import start_ipython

from shimmy_jupyter.errors import ServerUnreachable
from shimmy_jupyter.notebook.arguments import FLAGS, FORMATS, LIMITS, TASKS
from shimmy_jupyter.notebook.completer import Remembered, install, matches, uninstall
from shimmy_jupyter.notebook.verbs import COMMANDS, VERBS

MODELS = ["qwen3-1.7b", "Gemma-3", "org/name:Q4_K", "my model"]
SHOWN = ["qwen3-1.7b", "Gemma-3", "org/name:Q4_K", '"my model"']
VARIABLES = ["answer", "df", "größe"]
LONG = [flag.names[0] for flag in FLAGS]
WITHOUT_MODEL = LONG[1:]
HISTORY = ["In[", "Out[", "Err["]


def tab(text: str) -> list[str]:
    return matches(text, lambda: MODELS, lambda: VARIABLES)


class TestMatches:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            # commands
            ("%shimmy ", [verb.name for verb in VERBS]),
            ("%shimmy l", ["list", "load", "limits", "lock"]),
            ("x = %shimmy mod", ["models"]),
            ("a.b, c[1] = %shimmy mod", ["models"]),
            ("for x in y:\n    %shimmy mod", ["models"]),
            ("%shimmy Models", ["models"]),
            ("%shimmy xyz", []),
            ("%shimmy mod ", []),
            # their arguments
            ("%shimmy load ", SHOWN),
            ("%shimmy load g", ["Gemma-3"]),
            ("%shimmy load org/", ["org/name:Q4_K"]),
            ("%shimmy load qwen3-1.7b ", []),
            ("%shimmy use ", SHOWN),
            ("%shimmy alias fast ", SHOWN),
            ("%shimmy alias ", []),
            ("%shimmy dealias ", SHOWN),
            ("%shimmy compare qwen3-1.7b ", SHOWN[1:]),
            ("%shimmy compare qwen3-1.7b Gemma-3 o", ["org/name:Q4_K"]),
            ("%shimmy pull ", ["--sha256"]),
            ("%shimmy lock qwen3-1.7b ", ["--alias"]),
            ("%shimmy lock --alias x ", SHOWN),
            ("%shimmy audit ", ["show", "usage", "verify", "receipt", "export"]),
            ("%shimmy audit r", ["receipt"]),
            ("%shimmy audit show ", ["--limit"]),
            ("%shimmy audit --limit 3 ", ["show", "usage", "verify", "receipt", "export"]),
            ("%shimmy audit usage ", ["--since"]),
            ("%shimmy audit usage --", ["--since"]),
            ("%shimmy audit receipt ", []),
            ("%shimmy limits ", [f"{limit}=" for limit in LIMITS]),
            ("%shimmy limits max_queued=3 max-t", ["max_tokens_per_minute=", "max_tokens_per_day="]),
            ("%shimmy limits max_queued=", ["max_queued="]),
            ("%shimmy replay ", VARIABLES),
            ("%shimmy help a", ["audit", "alias"]),
            ("%shimmy compat ", ["ai"]),
            ("%shimmy models ", ["--suggest"]),
            ("%shimmy models --", ["--suggest"]),
            ("%shimmy models --suggest ", ["--task"]),
            ("%shimmy models --suggest --task ", list(TASKS)),
            ("%shimmy models --suggest --task=c", ["chat", "code"]),
            ("%shimmy fix ", SHOWN),
            # the first line of a cell
            ("%%shimmy ", SHOWN),
            ("\n\n%%shimmy ", SHOWN),
            ("%%shimmy q", ["qwen3-1.7b"]),
            ("%%shimmy q ", WITHOUT_MODEL),
            ("%%shimmy -", LONG),
            ("%%shimmy --", LONG),
            ("%%shimmy -- ", SHOWN),
            ("%%shimmy -- q ", []),
            ("%%shimmy q --no", ["--no-interp", "--no-stream"]),
            ("%%shimmy --max_", ["--max-tokens"]),
            ("%%shimmy --seed 3 --se", []),
            ("%%shimmy --stop x --st", ["--stop"]),
            ("%%shimmy --dry-run q", ["qwen3-1.7b"]),
            ("%%shimmy --logprobs q", ["qwen3-1.7b"]),
            ("%%shimmy --logprobs 5", []),
            ("%%shimmy --nonsense=", []),
            ("%%shimmy", []),
            # values
            ("%%shimmy -f ", list(FORMATS)),
            ("%%shimmy -f ma", ["markdown", "math"]),
            ("%%shimmy --format=j", ["json"]),
            ("%%shimmy q -f json ", [name for name in WITHOUT_MODEL if name != "--format"]),
            ("%%shimmy -o ", VARIABLES),
            ("%%shimmy --schema=a", ["answer"]),
            ("%%shimmy --model ", SHOWN),
            ("%%shimmy --model=q", ["qwen3-1.7b"]),
            ("%%shimmy --model x q", []),
            ("%%shimmy --seed ", []),
            ("%%shimmy --seed= q", ["qwen3-1.7b"]),
            ("%shimmy --x= mod", []),
            ('%%shimmy --system "a ', []),
            ('%%shimmy --system "a --se', []),
            ('%%shimmy --system="a b" --se', ["--seed"]),
            ("%%shimmy -m {", []),
            ("%%shimmy --system --se", ["--seed"]),
            # options of a prompt
            ("%shimmy -", LONG),
            ("%shimmy --temp", ["--temperature"]),
            ("%shimmy --model ", SHOWN),
            ("%shimmy --seed 3 -f ma", ["markdown", "math"]),
            ("%shimmy --seed 3 mod", []),
            # prompts
            ("%shimmy list the pla", []),
            ("%shimmy What is -", []),
            ("%shimmy -- load ", []),
            ("%shimmy Sum {d", ["df"]),
            ("%shimmy Sum {", [*VARIABLES, *HISTORY]),
            ("%shimmy {a", ["answer"]),
            ("%shimmy list {len(d", ["df"]),
            ("%shimmy --seed 3 {an", ["answer"]),
            ("%shimmy -- {a", ["answer"]),
            ("%shimmy compare a b -- {a", ["answer"]),
            ("%shimmy {df} and {g", ["größe"]),
            ("%shimmy {df} an", []),
            ("%shimmy {df ", []),
            ("%shimmy {df + ", [*VARIABLES, *HISTORY]),
            ("%shimmy {I", ["In["]),
            ('%shimmy {"a', []),
            ("%shimmy {df.a", []),
            ("%%shimmy q\nSum {d", ["df"]),
            ("%%shimmy q\nf() {\n  a", []),
            ("%%shimmy q\n%shimmy mod", []),
            # not ours
            ("print(a", []),
            ("%time a", []),
            ("%%bash\nls a", []),
            ("x == %shimmy mod", []),
            ("%shimmying mod", []),
            ("", []),
        ],
    )  # fmt: skip
    def test_words(self, text: str, words: list[str]) -> None:
        assert tab(text) == words

    def test_every_command_is_offered_whatever_its_name(self) -> None:
        for name in COMMANDS:
            assert name in tab(f"%shimmy {name[0]}")

    def test_names_are_only_asked_for_where_they_are_wanted(self) -> None:
        def never() -> Sequence[str]:
            raise AssertionError("asked")

        for text in (
            "%shimmy mo",
            "%%shimmy --fo",
            "%shimmy reset ",
            "%shimmy Why",
            "%%shimmy x ",
            "print(",
        ):
            matches(text, never, never)
        matches("%shimmy load ", lambda: MODELS, never)
        matches("%shimmy {", never, lambda: VARIABLES)

    def test_a_server_that_fails_has_no_models(self) -> None:
        def models() -> Sequence[str]:
            raise ServerUnreachable("it did not answer")

        assert matches("%shimmy load ", models, list) == []
        assert matches("%%shimmy ", models, list) == LONG

    @settings(deadline=None)
    @given(
        st.sampled_from(["%shimmy ", "%%shimmy ", "%%shimmy x\n", "x = %shimmy audit ", ""]),
        st.text()
        | st.lists(
            st.tuples(
                st.sampled_from([*COMMANDS, *LONG, "-f", "--x", "--", "-", "{", "3", "x", '"a b"']),
                st.sampled_from([" ", "=", "= ", "", '"', "'", "}", "\\", "\n"]),
            ).map("".join),
            max_size=6,
        ).map("".join),
    )
    def test_any_text_has_words_that_begin_like_its_last(self, first: str, rest: str) -> None:
        text = first + rest
        for word in tab(text):
            plain = word.replace("_", "-").lower()
            assert any(
                text.replace("_", "-").lower().endswith(plain[:n]) for n in range(len(plain) + 1)
            )


class TestRemembered:
    def test_nobody_waits(self) -> None:
        answer, asked = threading.Event(), []

        def ask() -> list[str]:
            asked.append(1)
            assert answer.wait(30)
            return ["a"]

        now = 0.0
        names = Remembered(ask, wait=0, keep=5, clock=lambda: now)
        assert names() == ()
        assert names() == ()
        assert len(asked) == 1
        answer.set()
        (thread,) = [one for one in threading.enumerate() if one.name == "shimmy-names"]
        thread.join(30)
        assert names() == ("a",)
        assert len(asked) == 1
        now = 5.0
        answer.clear()
        assert names() == ("a",)
        answer.set()
        assert len(asked) == 2
        for thread in [one for one in threading.enumerate() if one.name == "shimmy-names"]:
            thread.join(30)

    def test_a_quick_answer_is_there_at_once(self) -> None:
        answers: list[Callable[[], list[str]]] = []

        def fails() -> list[str]:
            raise ServerUnreachable("x")

        now = 0.0

        def ask() -> list[str]:
            return answers.pop(0)()

        names = Remembered(ask, wait=30, keep=1, clock=lambda: now)
        answers += [lambda: ["a"], fails, lambda: ["b"]]
        assert names() == ("a",)
        now = 0.9
        assert names() == ("a",)
        now = 1.0
        assert names() == ()
        now = 2.0
        assert names() == ("b",)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    start_ipython()
    from IPython import get_ipython

    shell = get_ipython()
    monkeypatch.chdir(tmp_path)
    # What files and Python's names would add.
    for name in ("models.txt", "qwen.gguf", "Sum.txt", "plan.txt", "answer.txt"):
        (tmp_path / name).touch()
    names = {"answer": [1], "_hidden": 1, "models_of_mine": 1, "planets": 1, "Summe": 1, "--x": 1}
    shell.user_ns.update(names)
    magics = shell.magics_manager.magics
    before = {kind: dict(table) for kind, table in magics.items()}
    shell.register_magic_function(lambda line, cell="": None, "line_cell", "shimmy")
    install(shell, lambda: MODELS)
    yield shell
    uninstall(shell)
    for kind, table in before.items():
        magics[kind].clear()
        magics[kind].update(table)
    for name in names:
        shell.user_ns.pop(name, None)


def ours(shell: InteractiveShell) -> list[Any]:
    there = shell.Completer.custom_matchers
    return [one for one in there if getattr(one, "matcher_identifier", "") == "shimmy"]


def completed(shell: InteractiveShell, text: str, cursor: int | None = None) -> list[str]:
    """The cell's text with each completion in its place, as the kernel answers a front end."""
    at = len(text) if cursor is None else cursor
    with provisionalcompleter():
        found = list(rectify_completions(text, shell.Completer.completions(text, at)))
    assert len({(one.start, one.end) for one in found}) <= 1
    return [text[: one.start] + one.text + text[one.end :] for one in found]


def terminal(shell: InteractiveShell, line: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        fragment, words = shell.complete("", line, len(line))
    return [line[: len(line) - len(fragment)] + word for word in words]


class TestShell:
    @pytest.mark.parametrize(
        ("text", "after"),
        [
            ("%shimmy mo", ["%shimmy models"]),
            ("x = %shimmy mo", ["x = %shimmy models"]),
            ("%shimmy load q", ["%shimmy load qwen3-1.7b"]),
            ("%shimmy load org/name:Q", ["%shimmy load org/name:Q4_K"]),
            ("%shimmy load ", [f"%shimmy load {name}" for name in SHOWN]),
            ("%%shimmy q", ["%%shimmy qwen3-1.7b"]),
            ("%%shimmy qwen3-1.7b --max-t", ["%%shimmy qwen3-1.7b --max-tokens"]),
            ("%%shimmy -f ma", ["%%shimmy -f markdown", "%%shimmy -f math"]),
            ("%%shimmy --format=te", ["%%shimmy --format=text"]),
            ("%shimmy Sum up {ans", ["%shimmy Sum up {answer"]),
            ("%shimmy limits max_q", ["%shimmy limits max_queued="]),
            ("%shimmy replay ans", ["%shimmy replay answer"]),
            ("%shimmy -o pl", ["%shimmy -o planets"]),
            # Nothing of ours, and nobody else's either.
            ("%shimmy list the plan", []),
            ("%shimmy What does the pri", []),
            ("%shimmy load x.y.z", []),
            ("%shimmy audit receipt Sum", []),
            ("%%shimmy --system 'Su", []),
        ],
    )
    def test_line(self, shell: InteractiveShell, text: str, after: list[str]) -> None:
        assert completed(shell, text) == after
        assert terminal(shell, text) == after

    def test_in_the_middle_of_a_cell(self, shell: InteractiveShell) -> None:
        text = "planets = 1\n%shimmy loa qwen\nprint()"
        assert completed(shell, text, text.index(" qwen")) == [text.replace("loa", "load")]
        text = "%%shimmy --form\nSum up {ans} now"
        assert completed(shell, text, text.index("\n")) == [text.replace("--form", "--format")]
        assert completed(shell, text, text.index("}")) == [text.replace("{ans", "{answer")]
        assert completed(shell, text, text.index(" up")) == []

    def test_ipython_completes_attributes_in_braces(self, shell: InteractiveShell) -> None:
        assert "%shimmy {answer.append" in completed(shell, "%shimmy {answer.app")
        assert "%shimmy {len" in completed(shell, "%shimmy {le")

    @pytest.mark.parametrize("text", ["%shimmy What is \\alp", "%%shimmy x\nWhat is \\alp"])
    def test_greek_is_still_there(self, shell: InteractiveShell, text: str) -> None:
        assert text.replace("\\alp", "\\alpha") in completed(shell, text)
        full = text.replace("\\alp", "\\alpha")
        assert text.replace("\\alp", "α") in completed(shell, full)
        last = full.rpartition("\n")[2]
        assert any(one.endswith("α") for one in terminal(shell, last))

    def test_greek_is_there_where_a_model_could_be(self, shell: InteractiveShell) -> None:
        assert terminal(shell, "%shimmy load x\\alpha") == ["%shimmy load xα"]

    @pytest.mark.parametrize("text", ["answer.app", "plane", "%shimm", "open('plan"])
    def test_other_lines_are_as_they_were(self, shell: InteractiveShell, text: str) -> None:
        there = completed(shell, text)
        assert there
        uninstall(shell)
        assert completed(shell, text) == there

    def test_own_variables_are_offered_without_hidden_ones(self, shell: InteractiveShell) -> None:
        words = completed(shell, "%shimmy replay ")
        assert "%shimmy replay answer" in words
        assert not [word for word in words if "_hidden" in word or "get_ipython" in word]

    def test_other_names_of_the_magic(self, shell: InteractiveShell) -> None:
        install(shell, lambda: MODELS, magics=("shimmy", "ai"))
        assert completed(shell, "%ai load q") == ["%ai load qwen3-1.7b"]
        assert completed(shell, "%%ai q") == ["%%ai qwen3-1.7b"]
        assert completed(shell, "%shimmy load q") == ["%shimmy load qwen3-1.7b"]

    def test_installed_again_there_is_one(self, shell: InteractiveShell) -> None:
        other = lambda text: []  # noqa: E731
        shell.Completer.custom_matchers.append(other)
        for models in (["old-1"], ["new-1"]):
            install(shell, lambda models=models: models, lambda: ["v"])
        assert len(ours(shell)) == 1
        assert completed(shell, "%shimmy load ") == ["%shimmy load new-1"]
        assert completed(shell, "%shimmy replay ") == ["%shimmy replay v"]
        uninstall(shell)
        uninstall(shell)
        assert ours(shell) == []
        assert other in shell.Completer.custom_matchers
        shell.Completer.custom_matchers.remove(other)

    def test_a_server_that_fails_is_no_trouble(
        self, shell: InteractiveShell, capfd: pytest.CaptureFixture[str]
    ) -> None:
        def models() -> Sequence[str]:
            raise ServerUnreachable("it did not answer")

        install(shell, models)
        assert completed(shell, "%shimmy load q") == []
        assert capfd.readouterr() == ("", "")
