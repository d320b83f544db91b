"""Which lines of `%shimmy` are commands, and what they ask for.

Cases: every command by each of its names, in each of its forms, its options in any order; sentences that
begin with a command's name; words that are meant as models, as names are written or by being nearly one;
commands that are nearly right, and mistyped; numbers at their ends; whether the server is asked when it need not be, and
what it raises; help by the tables; anything at all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shimmy_jupyter.errors import InvalidValue, ServerUnreachable
from shimmy_jupyter.notebook.arguments import FLAGS, FORMATS, LIMITS, Options, parse_prompt
from shimmy_jupyter.notebook.grammar import Command, Prompt, parse_line
from shimmy_jupyter.notebook.helptext import about, table_markdown, usage, usages, written
from shimmy_jupyter.notebook.verbs import COMMANDS, NAMED, VERBS

MODELS = ["qwen3-1.7b", "qwen3-4b", "gemma-3-4b", "org/llama:Q4_K_M", "tutor", "my model"]
VARIABLES = ["answer", "reply_2", "df"]
SHA = "0123456789abcdefABCDEF" + "0" * 42
ID = "0123456789abcdef" * 2


def read(line: str) -> Command | Prompt:
    return parse_line(line, lambda: MODELS, lambda: VARIABLES)


def never() -> Collection[str]:
    raise AssertionError("asked")


LINES: list[tuple[str, str, dict[str, Any]]] = [
    ("models", "models", {"suggest": False, "task": None}),
    ("  models  ", "models", {"suggest": False, "task": None}),
    ("list", "models", {"suggest": False, "task": None}),
    ("models --suggest", "models", {"suggest": True, "task": None}),
    ("list --suggest --task chat", "models", {"suggest": True, "task": "chat"}),
    ("models --task=code --suggest", "models", {"suggest": True, "task": "code"}),
    ("use", "use", {"model": None}),
    ("use qwen3-4b", "use", {"model": "qwen3-4b"}),
    ("use tutor", "use", {"model": "tutor"}),
    ("load qwen3-1.7b", "load", {"model": "qwen3-1.7b"}),
    ("load\torg/llama:Q4_K_M ", "load", {"model": "org/llama:Q4_K_M"}),
    ('load "my model"', "load", {"model": "my model"}),
    ("unload 'qwen3-1.7b'", "unload", {"model": "qwen3-1.7b"}),
    ("pull qwen3-8b", "pull", {"model": "qwen3-8b", "sha256": None}),
    ("pull tutor", "pull", {"model": "tutor", "sha256": None}),
    ("pull org/name", "pull", {"model": "org/name", "sha256": None}),
    ("pull org/name:Q4_K_M", "pull", {"model": "org/name:Q4_K_M", "sha256": None}),
    ("pull org/name@main:a/b.gguf", "pull", {"model": "org/name@main:a/b.gguf", "sha256": None}),
    ("pull https://x.example/m.gguf?a=b&c", "pull",
     {"model": "https://x.example/m.gguf?a=b&c", "sha256": None}),
    (f"pull org/name --sha256 {SHA}", "pull", {"model": "org/name", "sha256": SHA.lower()}),
    (f"pull --sha256={SHA} org/name", "pull", {"model": "org/name", "sha256": SHA.lower()}),
    ("probe qwen3-1.7b", "probe", {"model": "qwen3-1.7b"}),
    ("verify tutor", "verify", {"model": "tutor"}),
    ("bench", "bench", {"model": None}),
    ("bench gemma-3-4b", "bench", {"model": "gemma-3-4b"}),
    ("limits", "limits", {"limits": {}}),
    ("limits max_tokens_per_day=0", "limits", {"limits": {"max_tokens_per_day": 0}}),
    ("limits max-queued=3 max_seconds=2.5 max_concurrent=None", "limits",
     {"limits": {"max_queued": 3, "max_seconds": 2.5, "max_concurrent": None}}),
    ("audit", "audit", {"action": "show", "id": None, "file": None, "limit": None, "since": None}),
    ("audit show", "audit", {"action": "show", "id": None, "file": None, "limit": None, "since": None}),
    ("audit --limit 5", "audit", {"action": "show", "id": None, "file": None, "limit": 5, "since": None}),
    ("audit --limit 1000 show", "audit", {"action": "show", "id": None, "file": None, "limit": 1000, "since": None}),
    ("audit usage", "audit", {"action": "usage", "id": None, "file": None, "limit": None, "since": None}),
    ("audit usage --since 2026-11-01", "audit",
     {"action": "usage", "id": None, "file": None, "limit": None, "since": "2026-11-01"}),
    ("audit verify", "audit", {"action": "verify", "id": None, "file": None, "limit": None, "since": None}),
    (f"audit receipt {ID}", "audit", {"action": "receipt", "id": ID, "file": None, "limit": None, "since": None}),
    ("audit export usage.csv", "audit",
     {"action": "export", "id": None, "file": "usage.csv", "limit": None, "since": None}),
    ("audit export 'my records/all'", "audit",
     {"action": "export", "id": None, "file": "my records/all", "limit": None, "since": None}),
    ("replay", "replay", {"variable": None}),
    ("replay answer", "replay", {"variable": "answer"}),
    ("replay 12", "replay", {"variable": "12"}),
    ("lock", "lock", {"model": None, "alias": None}),
    ("lock qwen3-1.7b", "lock", {"model": "qwen3-1.7b", "alias": None}),
    ("lock --alias teacher qwen3-1.7b", "lock", {"model": "qwen3-1.7b", "alias": "teacher"}),
    ("lock --alias teacher", "lock", {"model": None, "alias": "teacher"}),
    ("alias fast qwen3-1.7b", "alias", {"alias": "fast", "model": "qwen3-1.7b"}),
    ("register a.b:c@d-e_f tutor", "alias", {"alias": "a.b:c@d-e_f", "model": "tutor"}),
    ("dealias fast", "dealias", {"alias": "fast"}),
    ("delete tutor", "dealias", {"alias": "tutor"}),
    ("update tutor qwen3-4b", "update", {"alias": "tutor", "model": "qwen3-4b"}),
    ("fix", "fix", {"model": None}),
    ("error", "fix", {"model": None}),
    ("fix qwen3-4b", "fix", {"model": "qwen3-4b"}),
    ("reset", "reset", {}),
    ("history", "history", {"count": None}),
    ("history 1984", "history", {"count": 1984}),
    ("panel", "panel", {}),
    ("doctor", "doctor", {}),
    ("compat", "compat", {"action": None}),
    ("compat ai", "compat", {"action": "ai"}),
    ("version", "version", {}),
    ("help", "help", {"command": None}),
    ("help audit", "help", {"command": "audit"}),
    ("help list", "help", {"command": "models"}),
    ("compare tutor qwen3-4b -- Why?", "compare", {"models": ("tutor", "qwen3-4b"), "prompt": "Why?"}),
    ("compare tutor tutor gemma-3-4b --  a -- {b} ", "compare",
     {"models": ("tutor", "tutor", "gemma-3-4b"), "prompt": " a -- {b} "}),
]  # fmt: skip


class TestCommands:
    @pytest.mark.parametrize(
        ("line", "name", "arguments"), LINES, ids=lambda v: v if isinstance(v, str) else ""
    )
    def test_line(self, line: str, name: str, arguments: dict[str, Any]) -> None:
        assert read(line) == Command(name, arguments)

    def test_every_one_is_tried(self) -> None:
        assert {name for _, name, _ in LINES} == {verb.name for verb in VERBS}
        assert {line.split()[0] for line, _, _ in LINES} == set(COMMANDS)
        assert len(LINES) >= 60

    @pytest.mark.parametrize("line", [line for line, _, _ in LINES])
    def test_written_and_read_again(self, line: str) -> None:
        said = read(line)
        assert read(written(said)) == said
        assert written(read(written(said))) == written(said)

    @pytest.mark.parametrize("line", [line for line, _, _ in LINES])
    def test_is_a_prompt_where_that_is_said(self, line: str) -> None:
        assert read(f"-- {line}") == Prompt(Options(), line)
        assert read(f"--seed 1 {line}") == Prompt(Options(seed=1), line.strip())

    @pytest.mark.parametrize("verb", VERBS, ids=lambda verb: str(verb.name))
    def test_examples_are_commands(self, verb: Any) -> None:
        assert isinstance(said := read(verb.example), Command)
        assert said.name == verb.name

    def test_capitals_begin_a_sentence(self) -> None:
        assert read("Models") == Prompt(Options(), "Models")


SENTENCES = """
list three colours
list the planets in order
list of everything
models of the atom
models trained on code, and how they differ
use of commas
use commas
use recursion to reverse a list
use "whom"
use and explain a for loop
load balancing
load the CSV file and plot it
load and resistance
load?
unload the dishwasher
unload trucks
pull requests
pull the last column out of df
pull yourself together
probe Mars.
probe further
verify emails
verify that 7 is prime
verify this proof
bench press
bench pressing 100 kg, is that safe?
limits of growth
limits x=0
limits of f(x) as x=0
limits at infinity
audit the following function
audit trails
audit usage patterns in a log
audit receipt templates for a small shop
audit show me
replay attacks
replay the tape in your mind
replay buffers in reinforcement learning
lock picking
lock free queues explained
lock the door
alias grep in bash
alias bash commands
register variables
register for the course
dealiasing filters
delete everything
delete the first row of df
update windows drivers
update df so that x is 3
update everyone politely
fix the bug in my loop
fix it's broken
fix my grammar: he go home
error handling in Python
error bars?
errors and how to avoid them
reset my password
reset.
history of France
history books
history 19th century
panel data
panel methods for aerofoils
doctor who?
doctor who
version control
version 2 of HTTP
help me
help me with this loop
help! it crashes
help, please
compare apples and oranges
compare cats and dogs -- which are better?
compare a list with a tuple
compare and swap
compatible types in C
""".strip().splitlines()


class TestSentences:
    @pytest.mark.parametrize("line", SENTENCES)
    def test_are_prompts(self, line: str) -> None:
        assert read(line) == Prompt(Options(), line)

    def test_begin_with_commands(self) -> None:
        begun = {line.split()[0].strip(".,!?") for line in SENTENCES}
        assert begun >= COMMANDS.keys() - NAMED
        assert len(SENTENCES) >= 60

    def test_are_commands_where_a_model_is_called_so(self) -> None:
        said = parse_line("load balancing", lambda: ["balancing"])
        assert said == Command("load", {"model": "balancing"})
        assert parse_line("replay attacks", tuple, lambda: ["attacks"]) == Command(
            "replay", {"variable": "attacks"}
        )


MISTAKES = [
    # what is written as a name is
    ("load qwen3-1.7", "model", "did you mean qwen3-1.7b"),
    ("load Qwen3-1.7B", "model", "did you mean qwen3-1.7b"),
    ("use qwen", "model", "did you mean qwen3-1.7b or qwen3-4b?"),
    ("use llama", "model", "did you mean org/llama:Q4_K_M?"),
    ("use tutr", "model", "did you mean tutor?"),
    ("load python3", "model", "there is no model 'python3'"),
    ("load no/such", "model", "there is no model"),
    ("bench x:latest", "model", "there is no model"),
    ("alias fast nope-2", "model", "there is no model 'nope-2'"),
    ("delete nope_2", "alias", "there is no alias 'nope_2'"),
    ("replay answr", "variable", "did you mean answer?"),
    ("replay reply_3", "variable", "did you mean reply_2?"),
    ("replay out_7", "variable", "there is no variable"),
    # alone, without what it needs
    ("load", "model", "MODEL is missing"),
    ("pull", "model", "MODEL is missing"),
    ("alias", "alias", "NAME is missing"),
    ("delete", "alias", "NAME is missing"),
    ("compare", "models", "MODEL is missing"),
    ("audit receipt", "id", "ID is missing"),
    ("audit export", "file", "FILE is missing"),
    ("compare tutor", "models", "MODEL is missing"),
    ("compare tutor qwen3-4b", "prompt", "-- PROMPT is missing"),
    ("compare tutor qwen3-4b --  ", "prompt", "-- PROMPT is missing"),
    # one argument is certain, another wrong
    ("compare tutor and -- Why?", "models", "there is no model 'and'"),
    ("compare tutor nope-2 -- Why?", "model", "there is no model 'nope-2'"),
    ('alias "my own" tutor', "alias", "'my own' is not a name"),
    ("limits max_queued=3 please", "limits", "'please' is not NAME=VALUE"),
    (f"pull requests --sha256 {SHA}", "model", "OWNER/NAME"),
    ("lock picking --alias x", "model", "there is no model 'picking'"),
    ("audit export controls", "file", "such as usage.csv"),
    ("audit receipt templates", "id", "32 hexadecimal digits"),
    # words that are nearly right
    ("audit verfy", "action", "did you mean verify?"),
    ("help modles", "command", "did you mean models?"),
    # values
    ("limits max_tokens_per_dya=3", "limits", "did you mean max_tokens_per_day"),
    ("limits my_limit=3", "limits", "there is no limit"),
    ("limits max_queued=-1", "max_queued", "a whole number, 0 or more, or none"),
    ("limits max_queued=1.5", "max_queued", "a whole number"),
    ("limits max_queued=", "max_queued", "a whole number"),
    ("limits max_seconds=long", "max_seconds", "a number of seconds"),
    ("limits max_queued=1 max-queued=2", "limits", "twice"),
    ("history 0", "count", "from 1 to 9999"),
    ("history -3", "count", "from 1 to 9999"),
    ("history 10000", "count", "from 1 to 9999"),
    # options
    ("audit --limit 0", "--limit", "from 1 to 1000"),
    ("audit --limit 1001", "--limit", "from 1 to 1000"),
    ("audit --limit", "--limit", "needs a value"),
    ("audit --limit 1 --limit 2", "--limit", "twice"),
    ("audit usage --since yesterday", "--since", "such as 2026-11-01"),
    ("audit show --since 2026-11-01", "--since", "does not go with the rest"),
    ("audit usage --limit 3", "--limit", "does not go with the rest"),
    ("models --task chat", "--task", "does not go with the rest"),
    ("models --suggest=yes", "--suggest", "no value"),
    ("models --sugest", "--sugest", "did you mean --suggest?"),
    ("pull org/name --sha256 abc", "--sha256", "64 hexadecimal digits"),
    ("pull --sha256 abc org/name", "--sha256", "64 hexadecimal digits"),
    ("load qwen3-1.7b --context 4096", "--context", "no such option"),
    ("load --context 4096 qwen3-1.7b", "--context", "no such option"),
    ("fix --dry-run", "--dry-run", "no such option"),
    # no sentence begins with these
    ("dealias a b", "dealias", "no arguments of it"),
    ("dealias 'a", "dealias", "no arguments of it"),
    ("dealias f(x)", "alias", "not a name"),
    ("compat layers", "action", "none of ai"),
    ("compat -- x", "compat", "no arguments of it"),
]


class TestMistakes:
    @pytest.mark.parametrize(("line", "param", "says"), MISTAKES)
    def test_are_no_silent_prompts(self, line: str, param: str, says: str) -> None:
        with pytest.raises(InvalidValue) as caught:
            read(line)
        assert caught.value.param == param
        assert says in caught.value.message
        name = COMMANDS[line.split(maxsplit=1)[0]].name
        if says != "twice" or "--" in param:
            assert f"%shimmy help {name}; with -- in front" in caught.value.message

    def test_options_that_are_wrong_do_not_make_a_sentence_a_command(self) -> None:
        for line in ("models of the --suggest flag", "fix the --verbose flag of my script",
                     "load balancing --verbose", "list what --help prints"):  # fmt: skip
            assert read(line) == Prompt(Options(), line)


class TestNearlyAModel:
    """What is close to a name, and what is only a word that names have in them."""

    @pytest.mark.parametrize(
        ("line", "known"),
        [
            ("use code", "codellama"),
            ("load a", "a-1"),
            ("load test", "contest"),
            ("use chat", "qwen3-chat"),
        ],
    )
    def test_is_a_word(self, line: str, known: str) -> None:
        assert parse_line(line, lambda: [known]) == Prompt(Options(), line)

    @pytest.mark.parametrize(
        ("line", "known"),
        [
            ("use code", "code-7b"),
            ("load phi", "phi4"),
            ("load LLAMA", "org/llama"),
            ("load tests", "test"),
        ],
    )
    def test_is_meant(self, line: str, known: str) -> None:
        with pytest.raises(InvalidValue, match=f"did you mean {known}"):
            parse_line(line, lambda: [known])


class TestMistyped:
    @pytest.mark.parametrize(
        ("line", "meant"),
        [
            ("modles", "models"),
            ("modles --suggest", "models"),
            ("loadd qwen3-4b", "load"),
            ("replya 3", "replay"),
            ("relpay answer", "replay"),
            ("unlaod tutor", "unload"),
            ("versoin", "version"),
        ],
    )
    def test_is_a_prompt_that_knows_its_command(self, line: str, meant: str) -> None:
        assert read(line) == Prompt(*parse_prompt(line), meant)

    @pytest.mark.parametrize(
        "line",
        ["used cars", "Models", "reset.", "loads of ore", "hello", "What does len do?", "models of the atom", "-- modles",
         "loadd qwen3-5b", "modles --nonsense", "--seed 1 modles", ""],
    )  # fmt: skip
    def test_is_not_what_would_be_a_prompt_anyway(self, line: str) -> None:
        found = read(line)
        assert isinstance(found, Prompt)
        assert not found.meant


class TestTheServer:
    @pytest.mark.parametrize(
        "line", ["list three colours", "models", "pull org/name", "help me", "dealias fast", "audit verify",
                 "load the dishwasher", "history 3", "-- load balancing", "fix", "reset my password",
                     "modles", "replay 3", "replya 3"],
    )  # fmt: skip
    def test_is_not_asked_without_need(self, line: str) -> None:
        parse_line(line, never, never)

    def test_is_asked_once(self) -> None:
        asked: list[int] = []

        def known() -> list[str]:
            asked.append(1)
            return MODELS

        parse_line("compare tutor qwen3-4b gemma-3-4b -- x", known)
        assert len(asked) == 1

    def test_what_it_raises_is_raised(self) -> None:
        def known() -> Collection[str]:
            raise ServerUnreachable("it did not answer")

        with pytest.raises(ServerUnreachable):
            parse_line("load balancing", known)


class TestHelp:
    def test_all_is_in_it(self) -> None:
        text, table = usage(), table_markdown()
        for flag in FLAGS:
            for name in flag.names:
                assert name in text
                assert name in table
            assert flag.help in table
        for verb in VERBS:
            for form, what in usages(verb):
                assert form in text
                assert f"`{form.replace('|', chr(92) + '|')}`" in table
                assert form in about(verb.name)
                assert what in table
            assert verb.example in about(verb.name)
        for synonym in COMMANDS.keys() - {verb.name for verb in VERBS}:
            assert f"Also: {synonym}." in text
            assert about(synonym) == about(COMMANDS[synonym].name)
        assert all(name in text for name in FORMATS)
        assert max(map(len, text.splitlines())) <= 98

    def test_tables_have_as_many_cells_everywhere(self) -> None:
        options, commands = table_markdown().strip().split("\n\n")
        for table, bars in ((options, 3), (commands, 4)):
            for row in table.splitlines():
                assert row.replace("\\|", "").count("|") == bars, row

    def test_forms(self) -> None:
        forms = {form for verb in VERBS for form, _ in usages(verb)}
        assert forms >= {
            "models [--suggest [--task TASK]]", "use [MODEL]", "pull MODEL [--sha256 HEX64]",
            "limits [NAME=VALUE …]", "audit [show] [--limit N]", "audit receipt ID", "alias NAME MODEL",
            "compare MODEL MODEL [MODEL …] -- PROMPT", "fix [MODEL]",
        }  # fmt: skip

    def test_of_no_command(self) -> None:
        with pytest.raises(InvalidValue, match="did you mean models"):
            about("modles")


WORDS = st.sampled_from([
    *COMMANDS, *MODELS, *VARIABLES, "show", "usage", "verify", "receipt", "export", "ai", ID, "a.csv", "3", "-1",
    "--", "---", "-", "--limit", "--limit=3", "--suggest", "--task", "chat", "--sha256", SHA, "--alias", "--x",
    "max_queued=3", "max_queued=none", "x=1", "'", '"', "'a b'", "balancing", "the", "{x}", "é", "-f", "--seed",
    *[f"{limit}=1" for limit in LIMITS],
])  # fmt: skip


class TestAnything:
    @settings(deadline=None)
    @given(
        st.builds(
            "{} {}".format,
            st.sampled_from(list(COMMANDS)),
            st.lists(WORDS, max_size=5).map(" ".join),
        )
        | st.lists(WORDS, max_size=6).map("  ".join)
        | st.text()
    )
    def test_is_a_command_or_a_prompt_or_an_invalid_value(self, line: str) -> None:
        try:
            said = read(line)
        except InvalidValue as error:
            assert error.param
            return
        assert read(written(said)) == said
        if isinstance(said, Prompt):
            assert said.text in line
        else:
            assert COMMANDS[line.split(maxsplit=1)[0]].name == said.name

    @settings(deadline=None)
    @given(st.text())
    def test_what_follows_two_dashes_comes_back_as_it_stood(self, text: str) -> None:
        assert read(f"-- {text}") == Prompt(Options(), text)
        said = read(f"compare tutor qwen3-4b -- x{text}")
        assert isinstance(said, Command)
        assert said.arguments["prompt"] == f"x{text}"

    @settings(deadline=None)
    @given(
        st.sampled_from(sorted(COMMANDS.keys() - NAMED)),
        st.text(alphabet="abcdefghij ", min_size=24),
    )
    def test_long_plain_texts_are_prompts(self, first: str, rest: str) -> None:
        if len(rest.split()) > 2:
            known: Callable[[], Collection[str]] = lambda: MODELS  # noqa: E731
            assert isinstance(parse_line(f"{first} {rest}", known), Prompt)
