"""Reasoning apart from the answer, however it comes; and what templates say of it.

Cases: no text at all; no reasoning; reasoning alone, ended and not; empty reasoning; a prompt that
has opened it, and a model that opens it again; an end without a start; markers later in the answer;
markers that are only begun; white space on every side; an answer with an opening and a closing of
its own. Then any split of any text.
"""

from __future__ import annotations

import itertools

import jinja2
import jinja2.meta
import pytest
import vendored_templates
from hypothesis import given
from hypothesis import strategies as st
from jinja2.ext import loopcontrols

from shimmy_jupyter.core import reasoning
from shimmy_jupyter.core.reasoning import (
    MARKERS,
    THINK,
    Markers,
    ReasoningSplitter,
    Switch,
    find_markers,
    opens,
    switches,
)
from shimmy_jupyter.engine.template import ChatTemplate, _Generation
from shimmy_jupyter.types import Message

HARMONY = MARKERS[0][1]
TAGGED = Markers("<t>", "</t>", ("<a>",), "</a>")
VENDORED = vendored_templates.find()
FILES = sorted(VENDORED) or [
    pytest.param("", marks=pytest.mark.skip(f"{vendored_templates.VARIABLE} is not set"))
]


def split(
    pieces: list[str], markers: Markers = THINK, *, inside: bool = False
) -> tuple[str, str, bool]:
    """Reasoning, content, and whether reasoning was done before the end."""
    splitter = ReasoningSplitter(markers, inside=inside)
    parts = [part for piece in pieces for part in splitter.push(piece)]
    done = splitter.done
    parts += splitter.finish()
    assert all(text for _, text in parts)
    kinds = [kind for kind, _ in itertools.groupby(parts, key=lambda part: part[0])]
    assert kinds in ([], [True], [False], [True, False])
    thought, content = ("".join(t for kind, t in parts if kind is k) for k in (True, False))
    return thought, content, done


@pytest.mark.parametrize(
    ("text", "inside", "expected"),
    [
        ("", False, ("", "", False)),
        ("", True, ("", "", False)),
        (" \n", False, ("", " \n", False)),
        (" \n", True, ("", "", False)),
        ("Hello", False, ("", "Hello", True)),
        ("  Hello", False, ("", "  Hello", True)),
        ("<think>why</think>Hello", False, ("why", "Hello", True)),
        (
            "\n <think>\n why \n\nnot\n</think>\n\nHello \n",
            False,
            ("why \n\nnot", "Hello \n", True),
        ),
        ("<think>why", False, ("why", "", False)),
        ("<think>why\n", False, ("why\n", "", False)),
        ("<think>why\n</thin", False, ("why\n</thin", "", False)),
        ("<think>", False, ("", "", False)),
        ("<think>\n", False, ("", "", False)),
        ("<think>why</think>", False, ("why", "", True)),
        ("<think>\n\n</think>\n\nHello", False, ("", "Hello", True)),
        ("why\n</think>\nHello", True, ("why", "Hello", True)),
        ("\n</think>Hello", True, ("", "Hello", True)),
        ("why", True, ("why", "", False)),
        ("\n<think>\nwhy</think>Hello", True, ("why", "Hello", True)),
        ("</think>Hello", False, ("", "</think>Hello", True)),
        ("Hello</think>", False, ("", "Hello</think>", True)),
        ("Use <think>x</think>", False, ("", "Use <think>x</think>", True)),
        ("<think>a</think>b<think>c</think>", False, ("a", "b<think>c</think>", True)),
        ("<think>a</think> <think>c</think>", False, ("a", "<think>c</think>", True)),
        ("<think>a <think> b</think>c", False, ("a <think> b", "c", True)),
        ("<thin", False, ("", "<thin", False)),
        ("<thing>", False, ("", "<thing>", True)),
        ("<think>a</thin</think>b", False, ("a</thin", "b", True)),
        ("<think>a</</think>b", False, ("a</", "b", True)),
    ],
)
def test_what_is_reasoning(text: str, inside: bool, expected: tuple[str, str, bool]) -> None:
    assert split([text], inside=inside) == expected
    assert split(list(text), inside=inside) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<t>why</t>\n<a>\nHello</a>\n", ("why", "Hello")),
        ("<t>why</t>Hello", ("why", "Hello")),
        ("<a>Hello</a>", ("", "Hello")),
        ("<a> Hello", ("", "Hello")),
        ("Hello</a>", ("", "Hello")),
        ("Hello</a>\nand", ("", "Hello</a>\nand")),
        ("Hello</a></a>", ("", "Hello</a>")),
        ("Hello</a>\n</a>\n", ("", "Hello</a>\n")),
        ("Hello</", ("", "Hello</")),
        ("<t>why</t><a", ("why", "<a")),
        ("<a><a>", ("", "<a>")),
        ("<t>why</a>", ("why</a>", "")),
    ],
)
def test_an_answer_with_tags_of_its_own(text: str, expected: tuple[str, str]) -> None:
    assert split([text], TAGGED)[:2] == expected
    assert split(list(text), TAGGED)[:2] == expected


def test_channels() -> None:
    head, tail = "<|channel|>analysis<|message|>", "<|start|>assistant<|channel|>final<|message|>"
    assert split([f"{head}why<|end|>{tail}Hello"], HARMONY) == ("why", "Hello", True)
    assert split(["<|channel|>final<|message|>Hello"], HARMONY) == ("", "Hello", True)


def test_it_is_shown_as_soon_as_it_is_clear() -> None:
    splitter = ReasoningSplitter(THINK, inside=False)
    pieces = ["\n<th", "ink>\n", "so ", "be", "</t", "he", "\n", "</think>", "\n", "A ", "</think>"]
    shown = [[], [], [(True, "so")], [(True, " be")], [], [(True, "</the")], [], [], []]
    shown += [[(False, "A ")], [(False, "</think>")]]
    assert [splitter.push(piece) for piece in pieces] == shown
    assert splitter.finish() == []


def test_white_space_without_end_costs_no_more_than_its_length() -> None:
    splitter = ReasoningSplitter(THINK, inside=True)
    assert all(splitter.push(piece) == [] for piece in [" \n"] * 100_000)
    assert splitter.push("x") == [(True, "x")]
    assert all(splitter.push(piece) == [] for piece in [" \n"] * 100_000)
    assert splitter.push("y") == [(True, " \n" * 100_000 + "y")]


fragments = st.lists(
    st.sampled_from(["<t>", "</t>", "<a>", "</a>", "<", "</", "t>", "a", "/a>", " ", "\n", "xy"])
)


@given(fragments.map("".join), st.lists(st.integers(0, 1000)), st.booleans())
def test_any_split_gives_the_same_as_the_whole(text: str, cuts: list[int], inside: bool) -> None:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    for markers in (TAGGED, Markers("<t>", "</t>")):
        assert split(pieces, markers, inside=inside) == split([text], markers, inside=inside)


words = st.text("ab </>t\n").map(str.strip)
spaces = st.text(" \n")


@given(words, words, spaces, spaces, spaces, spaces, st.booleans())
def test_what_was_put_together_comes_apart(
    why: str, answer: str, a: str, b: str, c: str, d: str, inside: bool
) -> None:
    why, answer = why.replace("</t>", "").strip(), answer.strip()
    if why.startswith("<t>"):
        return
    start = "" if inside else a + "<t>"
    shown = split([f"{start}{b}{why}{c}</t>{d}{answer}"], Markers("<t>", "</t>"), inside=inside)
    assert shown[:2] == (why, answer)


@pytest.mark.parametrize(
    ("end", "inside"),
    [
        ("", False),
        ("<|im_start|>assistant\n", False),
        ("<|im_start|>assistant\n<think>\n", True),
        ("<｜Assistant｜><think>", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<｜Assistant｜></think>", False),
        ("<|user|>what is <think>?<|assistant|>", False),
    ],
)
def test_whether_the_prompt_has_opened_it(end: str, inside: bool) -> None:
    assert opens(end, THINK) is inside


def test_no_marker_hides_another() -> None:
    for _, m in MARKERS:
        for markers in ((m.start, *m.opening), (m.start, m.end)):
            for one, other in itertools.permutations(markers, 2):
                assert not one.startswith(other)
        for text in (m.start, m.end, *m.opening):
            assert text
            assert text == text.strip()
    for i, (text, _) in enumerate(MARKERS):
        assert not any(earlier in text for earlier, _ in MARKERS[:i])


@pytest.mark.parametrize(
    ("template", "start"),
    [
        ("{{ messages[0].content }}", None),
        ("{{ 'assistant\n<think>\n' }}{{ content.split('</think>') }}", "<think>"),
        ("{{ content.split('</think>')[-1] }}", "<think>"),
        ("{{ '<|start|>assistant<|channel|>analysis<|message|>' }}", HARMONY.start),
        ("{{ '[THINK]' + block + '[/THINK]' }}", "[THINK]"),
        ("{{ '<seed:think>' }}{{ '</seed:think>' }}", "<seed:think>"),
        ("{{ '<|channel>thought\n<channel|>' }}{{ '<|think|>' }}", "<|channel>thought"),
    ],
)
def test_markers_are_found(template: str, start: str | None) -> None:
    markers = find_markers(template)
    assert (markers and markers.start) == start


EFFORT = {level: {"reasoning_effort": level} for level in ("low", "medium", "high")}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("", None),
        ("{{ messages }}", None),
        ("{% if enable_thinking is defined and not enable_thinking %}x{% endif %}",
         Switch({"enable_thinking": False}, {"enable_thinking": True})),
        ("{%- if not thinking -%}x{%- endif -%}", Switch({"thinking": False}, {"thinking": True})),
        ("{% if thinking_budget == 0 %}x{% endif %}",
         Switch({"thinking_budget": 0}, {"thinking_budget": -1}, "thinking_budget")),
        ('{{ "Reasoning: " + reasoning_effort }}', Switch(effort=EFFORT)),
        ("{% if thinking and reasoning_effort == 'max' %}x{% endif %}",
         Switch({"thinking": False}, {"thinking": True},
                effort={"max": {"thinking": True, "reasoning_effort": "max"}})),
        # Its own, or somebody else's.
        ("{% set enable_thinking = true %}{% if enable_thinking %}x{% endif %}", None),
        ("{% set ns = namespace(enable_thinking=true) %}{{ ns.enable_thinking }}", None),
        ("{{ message.thinking }}{{ 'thinking' }}{# thinking #}thinking", None),
        ("{{ m['thinking'] }}{{ \"a 'thinking\" }}", None),
        # Read all the same.
        ("{% set thinking = thinking | default(false) %}",
         Switch({"thinking": False}, {"thinking": True})),
        ("{% if x %}{% set thinking = 1 %}{% endif %}{{ thinking }}",
         Switch({"thinking": False}, {"thinking": True})),
        ("{% set ns.thinking = 1 %}{{ {'a': {'b': 1}} }}{{ f(a=thinking) }}",
         Switch({"thinking": False}, {"thinking": True})),
        ("{{ 'it\\'s' }}{{ thinking }}", Switch({"thinking": False}, {"thinking": True})),
    ],
)  # fmt: skip
def test_switches_are_found(template: str, expected: Switch | None) -> None:
    assert switches(template) == expected


@pytest.mark.parametrize(
    "template", ["{{ 'a", "{# x", "{%", "{{ ' x }}" * 20_000, "'{" * 999, "{{ a '" + "\\'" * 30_000]
)
def test_broken_templates_are_survived(template: str) -> None:
    assert switches(template) is None


NONE = (
    "CohereForAI-c4ai-command-r-plus-tool_use GigaChat3-10B-A1.8B GigaChat3.1-10B-A1.8B "
    "Kimi-K2-Instruct LFM2-8B-A1B MiMo-VL MiniMax-M1 Mistral-Small-3.2-24B-Instruct-2506 "
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use NousResearch-Hermes-3-Llama-3.1-8B-tool_use "
    "Qwen-Qwen2.5-7B-Instruct Qwen3-Coder fireworks-ai-llama-3-firefunction-v2 "
    "google-gemma-2-2b-it ibm-granite-granite-4.0 ibm-granite-granite-4.1 "
    "meetkai-functionary-medium-v3.1 meetkai-functionary-medium-v3.2 "
    "meta-llama-Llama-3.1-8B-Instruct meta-llama-Llama-3.2-3B-Instruct "
    "meta-llama-Llama-3.3-70B-Instruct microsoft-Phi-3.5-mini-instruct "
    "mistralai-Mistral-Nemo-Instruct-2407 moonshotai-Kimi-K2 "
    "unsloth-mistral-Devstral-Small-2507"
).split()
"""Templates of models that do not reason, or (MiMo-VL) that do not say how."""
OTHERS = {
    "Apertus-8B-Instruct": "<|inner_prefix|>",
    "Apriel-1.6-15b-Thinker-fixed": "Here are my reasoning steps:",
    "ByteDance-Seed-OSS": "<seed:think>",
    "Cohere2MoE": "<|START_THINKING|>",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "<|START_THINKING|>",
    "Kimi-K3": "<|open|>think<|sep|>",
    "MiniMax-M3": "<mm:think>",
    "google-gemma-4-31B-it": "<|channel>thought",
    "google-gemma-4-31B-it-interleaved": "<|channel>thought",
    "mistralai-Ministral-3-14B-Reasoning-2512": "[THINK]",
    "muse-glimmer": "to=self<|message|>",
    "openai-gpt-oss-120b": "<|channel|>analysis<|message|>",
    "tencent-Hy3": "<think:opensource>",
    "unsloth-Apriel-1.5": "Here are my reasoning steps:",
    "upstage-Solar-Open-100B": "<|think|>",
}
"""All the rest write `<think>`."""


@pytest.mark.parametrize("name", FILES)
def test_vendored_templates_are_known(name: str) -> None:
    markers = find_markers(VENDORED[name].read_text())
    expected = None if name in NONE else OTHERS.get(name, "<think>")
    assert (markers and markers.start) == expected


@pytest.mark.parametrize("name", FILES)
def test_vendored_templates_are_read_as_jinja_reads_them(name: str) -> None:
    source = VENDORED[name].read_text()
    environment = jinja2.Environment(extensions=[loopcontrols, _Generation])
    read = jinja2.meta.find_undeclared_variables(environment.parse(source))
    statements = list(reasoning._statements(source))
    for variable in {row[0] for row in (*reasoning.ON_OR_OFF, *reasoning.LEVELS)}:
        assert reasoning._reads(statements, variable) is (variable in read)


@pytest.mark.parametrize("name", FILES)
def test_vendored_templates_can_be_switched(name: str) -> None:
    source = VENDORED[name].read_text()
    switch, markers = switches(source), find_markers(source)
    if switch is None:
        return
    assert markers is not None
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    chat = (Message("user", "hi"),)
    prompts = [template.render(chat, variables=v) for v in switch.effort.values()]
    if switch.on is not None and switch.off is not None:
        off = template.render(chat, variables=switch.off)
        assert not opens(off, markers)
        prompts += [off, template.render(chat, variables=switch.on)]
    # Each says something else, but that the highest level of effort may be what "on" means.
    assert len(set(prompts)) >= len(prompts) - bool(switch.effort and switch.on)
