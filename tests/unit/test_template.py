"""Chat templates: what real ones need works; what reaches out or runs away is refused quickly.

Each hostile template below hung, ballooned or escaped in stock Jinja, or could. No message is left
out silently. The templates that llama.cpp's source brings along are tried where there are any.
"""

from __future__ import annotations

from typing import Any

import pytest
import vendored_templates

from shimmy_jupyter.engine.template import MAX_TEMPLATE_BYTES, ChatTemplate
from shimmy_jupyter.errors import InvalidValue
from shimmy_jupyter.types import Message

CHAT = (Message("system", "Be brief."), Message("user", "hi"))


VENDORED = vendored_templates.find()
FILES = sorted(VENDORED) or [
    pytest.param("", marks=pytest.mark.skip(f"{vendored_templates.VARIABLE} is not set"))
]


def render(source: str, *messages: Message, **special: str) -> str:
    """Without asking whether all of them are shown, as few of the templates here show any."""
    return ChatTemplate(source, special)._rendered(messages or CHAT, {})


def test_chatml() -> None:
    source = (
        "{% for m in messages %}\n"
        "{{ '<|im_start|>' ~ m.role + '\\n' + m['content'] | trim + '<|im_end|>' }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert render(source) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[-1].content }}", "<s>hi"),
        ("{% for m in messages %}{{ loop.index }}/{{ loop.length }} {% endfor %}", "1/2 2/2 "),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "hi"),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}x{% endfor %}", "x"),
        ("{% generation %}a{{ messages[0].role }}{% endgeneration %}", "asystem"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
         "{% endfor %}{{ ns.n }}", "2"),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[1].content) }}", "[hi]"),
        ("{{ messages | tojson }}", '[{"role": "system", "content": "Be brief."}, '
         '{"role": "user", "content": "hi"}]'),
        ("{{ {'a': 'é<'} | tojson(indent=1) }}", '{\n "a": "é<"\n}'),
        ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') "
         "| join(',') }}", "hi"),
        ("{{ messages[1:] | length }}{{ 'a-b'.split('-')[1] }}{{ 'x' * 3 }}{{ '%s!' % 'y' }}",
         "1bxxxy!"),
        ("{{ tools is none }}{{ unknown is defined }}", "TrueFalse"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ 'a\nb' | indent(2) }}", "a\n  b"),
        ("{{ '{} {}'.format(1, 2) }}", "1 2"),
        ("{% for tool in tools %}x{% endfor %}{{ tools | length if tools else 0 }}", "0"),
        ("{{ 'a' + unknown + 'b' }}{{ unknown + 'c' }}", "abc"),
        ("{{ 'a<' | safe + messages[1].content + '<b>' }}{{ '<' | e + '>' }}", "a<hi<b>&lt;>"),
        ("{{ [{'a': 1}, {'a': 2}] | map(attribute='a') | tojson }}", "[1, 2]"),
        ("{{ date_string | length }}{{ datetime | length }}", "1111"),
    ],
)  # fmt: skip
def test_what_templates_use(source: str, expected: str) -> None:
    assert render(source, bos_token="<s>") == expected


def test_its_own_refusal_is_passed_on() -> None:
    with pytest.raises(InvalidValue, match="System role not supported") as caught:
        render("{{ raise_exception('System role not supported') }}")
    assert caught.value.param == "messages"


ESCAPES = [
    "{{ messages.__class__.__globals__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{% include 'other' %}",
    "{% import 'os' as os %}",
    "{% extends 'other' %}",
    "{{ lipsum.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
]


def NEST(first: str, then: str) -> str:  # noqa: N802  a template's beginning
    return (
        f"{{% set n = namespace(x={first}) %}}"
        f"{{% for i in range(40) %}}{{% set n.x = {then} %}}{{% endfor %}}"
    )


RUNAWAYS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(9999999) %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% continue %}{% endfor %}{% endfor %}",
    "{{ 'a' * 2000000000 }}",
    "{{ [1] * 2000000000 }}",
    "{% set x = 'a' * 9999999 %}{% for i in range(1000) %}{{ x }}{% endfor %}",
    "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=10) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{{ 10 ** 100000000 }}",
    "{{ 1 | round(300000000, 'floor') }}",
    "{{ 1 | round(-300000000) }}",
    "{% set n = namespace(x=1) %}{% for i in range(99999) %}"
    "{% set n.x = n.x * 4611686018427387904 %}{% endfor %}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ 'a'.ljust(2000000000) }}",
    "{{ 'a' | center(2000000000) }}",
    "{{ 'a' | indent(2000000000) }}",
    "{{ '{:>2000000000}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 2000000000) }}",
    "{{ messages | tojson(indent=2000000000) }}",
    "{% set x = 'a' * 1000000 %}{{ x.replace('a', x) }}",
    "{% set x = 'a' * 1000000 %}{{ x | replace('a', x) }}",
    "{% set x = 'a' * 1000000 %}{{ x.join(x) }}",
    "{% set x = 'a' * 1000000 %}{{ range(99999) | join(x) }}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f(n) %}{{ f(n+1) }}{% endmacro %}{{ f(0) }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% set x = range(99999)|list %}{% for i in range(99999) %}{% if -1 in x %}{% endif %}"
    "{% endfor %}",
    "{% set x = range(99999)|list %}{% for i in range(99999) %}{% set y = x.count(-1) %}"
    "{% endfor %}",
    "{% for i in range(99999) %}{% set y = range(99999)|select('undefined')|list %}{% endfor %}",
    "{% set x = 'a' * 9999999 %}{% for i in range(99999) %}{% set y = x[::-1] %}{% endfor %}",
    "{% set b = 'a' * 9999999 %}{% set x %}{% for i in range(99999) %}{{ b }}{% endfor %}"
    "{% endset %}{{ x }}",
    "{% set x %}{% for i in range(99999) %}" + "x" * 200_000 + "{% endfor %}{% endset %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x | tojson }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}"
    "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "{% macro charged(x) %}{% endmacro %}{% macro each(x) %}{% endmacro %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    NEST("(1,)", "(n.x, n.x)") + "{% set d = {n.x: 1} %}",
    NEST("(1,)", "(n.x, n.x)") + "{{ messages[0].get(n.x) }}",
    NEST("1", "namespace(a=n.x, b=n.x)") + "{{ n.x }}" * 2 + "{{ 'a' * 9999999 }}",
    NEST("[1]", "[n.x, n.x]") + "{{ {'a': n.x}.values() }}",
    NEST("[1]", "[n.x, n.x]") + "{{ raise_exception(n.x) }}",
    NEST("[1]", "[n.x, n.x]") + "{{ messages[0][n.x].foo }}",
    NEST("[1]", "[n.x, n.x]") + "{% for m in messages %}{{ loop.changed(n.x) }}{% endfor %}",
    "{% set n = namespace(x=(1,)) %}{% for j in range(4) %}{% for i in range(97000) %}"
    "{% set n.x = (n.x,) %}{% endfor %}{% endfor %}{% set d = {n.x: 1} %}",
    "{{ ('{' ~ ':' * 400000).format(1) }}",
    "{{ ('{0}' * 99999).format('x' * 999999) }}",
    "{{ ('{0}' * 500).format('x' * 999999) }}",
    "{{ ('%(a)s' * 500) % {'a': 'x' * 999999} }}",
    "{% set h = 'a' * 2000000 %}{{ h.rfind('ab' ~ 'a' * 1000000) }}",
    "{{ ('a' * 400000).rsplit('ab' ~ 'a' * 200000) }}",
    "{{ ('a' * 2000000).strip('b' * 1000000 ~ 'a') }}",
    "{{ ('f' * 2000000) | int(0, 16) // 3 }}",
    "{{ range(99999) | map(attribute='real.' * 40000 ~ 'real') | list | length }}",
    "{% set n = namespace(x=[]) %}{% for i in range(200) %}"
    "{% set n.x = [n.x, range(99999) | map(attribute='zz') | list] %}{% endfor %}",
    "{{ ('a' * 999999).join(range(400) | map('string')) }}",
    "{% set n = namespace(x=1) %}{% for i in range(200) %}"
    "{% set n.x = [n.x, dict.fromkeys(range(99999))] %}{% endfor %}",
    "{% set x = ('é' * 2000000) | list %}",
    "{{ ('\n' * 1000000) | indent(64, true, true) }}",
    NEST("[1]", "[n.x, n.x]") + "{{ n.x | string }}",
    NEST("[1]", "[n.x, n.x]") + "{{ n.x | safe }}",
    NEST("[1]", "[n.x, n.x]") + "{{ 'a'.replace('a', n.x) }}",
    NEST("[1]", "[n.x, n.x]") + "{{ messages | map(n.x) | list }}",
    NEST("[1]", "[n.x, n.x]") + "{{ messages | selectattr('role', n.x) | list }}",
    "{% set n = namespace(x=[0] * 9999) %}{% for i in range(300) %}{% set n.x = [n.x] %}{% endfor %}"
    "{{ n.x | tojson(indent=16) }}",
    "{%if a%}{%set x=1%}{%endif%}" * 7000,
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "x" * (MAX_TEMPLATE_BYTES + 1),
]


@pytest.mark.parametrize("source", ESCAPES, ids=lambda s: s[:60])
def test_nothing_gets_out_of_the_sandbox(source: str) -> None:
    try:
        shown = render(source)
    except InvalidValue:
        return
    assert shown == ""  # the sandbox answers some forbidden names with an empty value


@pytest.mark.parametrize("source", RUNAWAYS, ids=lambda s: s[:60])
def test_runaway_templates_are_refused(source: str) -> None:
    with pytest.raises(InvalidValue, match="chat template"):
        render(source)


@pytest.mark.parametrize(
    "source", ["{{ dict.update(messages[0], {'role': 'x'}) }}", "{{ dict(a=1).update({'b': 2}) }}"]
)
def test_the_messages_stay_as_they_are(source: str) -> None:
    with pytest.raises(InvalidValue):
        render(source)


def test_a_long_honest_chat_renders() -> None:
    source = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content | trim ~ '\n' }}{% endfor %}"
    chat = tuple(Message("user", "word " * 200) for _ in range(900))
    assert len(render(source, *chat)) > 900_000


FOLDED = "{% for m in messages %}{{ m.content }}|{% endfor %}"
SOME = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}"
    "<{{ m.content.split('</think>')[-1] | trim | upper }}>{% endif %}{% endfor %}"
)
LONG = "a sentence that stands in no template "


def test_a_long_chat_may_be_looked_back_upon() -> None:
    """Some templates do, from each message: up to a point."""
    source = (
        "{% for m in messages %}{% for before in messages[:loop.index0] %}{% endfor %}"
        "{{ m.content }}{% endfor %}"
    )

    def chat(count: int) -> tuple[Message, ...]:
        return tuple(Message("user", str(i)) for i in range(count))

    assert ChatTemplate(source, {}).render(chat(700)) == "".join(map(str, range(700)))
    with pytest.raises(InvalidValue, match="fewer messages may do") as caught:
        ChatTemplate(source, {}).render(chat(3000))
    assert caught.value.param == "messages"


class TestVariables:
    def test_they_reach_the_template(self) -> None:
        source = FOLDED + "{{ enable_thinking }}{{ thinking_budget }}{{ documents[0].text }}"
        variables: dict[str, Any] = {
            "enable_thinking": False, "thinking_budget": 0, "documents": ({"text": "d"},),
        }  # fmt: skip
        assert ChatTemplate(source, {}).render(CHAT, variables=variables).endswith("|False0d")

    def test_the_prompt_for_an_answer_can_be_left_out(self) -> None:
        template = ChatTemplate(FOLDED + "{% if add_generation_prompt %}AI:{% endif %}", {})
        assert template.render(CHAT).endswith("AI:")
        assert template.render(CHAT, variables={"add_generation_prompt": False}).endswith("hi|")

    @pytest.mark.parametrize(
        "name", ["messages", "bos_token", "eos_token", "pad_token", "raise_exception", "range"]
    )
    def test_what_is_not_theirs_stays(self, name: str) -> None:
        template = ChatTemplate(FOLDED, {"pad_token": "<pad>"})
        with pytest.raises(InvalidValue, match=name) as caught:
            template.render(CHAT, variables={name: "x"})
        assert caught.value.param == "chat_template_kwargs"

    @pytest.mark.parametrize("value", [b"x", {1}, object(), [print], {"a": {"b": len}}, {1: 2}])
    def test_they_are_plain(self, value: object) -> None:
        with pytest.raises(InvalidValue, match="JSON") as caught:
            ChatTemplate(FOLDED, {}).render(CHAT, variables={"x": value})
        assert caught.value.param == "chat_template_kwargs"

    @pytest.mark.parametrize("value", ["x" * 3_000_000, ["x"] * 500_000, 1 << 99])
    def test_they_are_paid_for(self, value: object) -> None:
        with pytest.raises(InvalidValue, match="chat template"):
            ChatTemplate(FOLDED, {}).render(CHAT, variables={"x": value})

    def test_what_holds_itself_ends(self) -> None:
        ring: list[object] = []
        ring.append(ring)
        with pytest.raises(InvalidValue, match="chat template"):
            ChatTemplate(FOLDED, {}).render(CHAT, variables={"x": ring})


class TestNothingIsLeftOut:
    @pytest.mark.parametrize(
        "messages",
        [
            [("user", "")],
            [("narrator", " \n")],
            [("user", "a"), ("assistant", "b"), ("user", "a")],
            [("user", "a"), ("assistant", "<think>why</think>"), ("user", "x")],
            [("user", LONG), ("assistant", f"<think>{LONG}</think> b"), ("user", LONG)],
            [("user", "<b>&\\"), ("user", LONG)],
        ],
    )
    def test_changed_is_not_left_out(self, messages: list[tuple[str, str]]) -> None:
        ChatTemplate(SOME, {}).render(tuple(Message(*m) for m in messages))

    @pytest.mark.parametrize(
        ("messages", "wrong"),
        [
            ([("narrator", "a")], 0),
            ([("user", "Night falls."), ("narrator", "Night falls."), ("user", "b")], 1),
            ([("user", "the user says"), ("narrator", "user")], 1),
            ([("user", LONG), ("narrator", LONG), ("user", LONG)], 1),
            ([("user", LONG), ("narrator", LONG + "2")], 1),
            ([("narrator", LONG), ("user", LONG)], 0),
            ([*[("user", LONG)] * 50, ("tool", "x")], 50),
        ],
    )
    @pytest.mark.parametrize("source", [SOME, SOME.replace(" | upper", "")])
    def test_left_out_is_refused(
        self, source: str, messages: list[tuple[str, str]], wrong: int
    ) -> None:
        with pytest.raises(InvalidValue, match="leaves this message out") as caught:
            ChatTemplate(source, {}).render(tuple(Message(*m) for m in messages))
        assert caught.value.param == f"messages.{wrong}"

    def test_a_message_may_be_shown_elsewhere(self) -> None:
        source = "{% for m in messages[1:] %}{{ m.content }}{% endfor %}{{ messages[0].content }}"
        chat = (Message("system", LONG), Message("user", LONG + "2"))
        assert ChatTemplate(source, {}).render(chat) == LONG + "2" + LONG

    def test_a_template_that_minds_what_is_said(self) -> None:
        source = "{% if messages[0].content != 'hi' %}{{ raise_exception('?') }}{% endif %}x"
        assert ChatTemplate(source, {}).render((Message("user", "hi"),)) == "x"

    def test_the_own_refusal_comes_first(self) -> None:
        source = "{% for m in messages %}{{ raise_exception('no ' + m.role) }}{% endfor %}"
        with pytest.raises(InvalidValue, match="no narrator") as caught:
            ChatTemplate(source, {}).render((Message("narrator", "a"),))
        assert caught.value.param == "messages"


NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = (Message("user", "Is it?"), Message("assistant", "It is."), Message("user", "So be it."))


@pytest.mark.parametrize("name", FILES)
def test_vendored_templates_render(name: str) -> None:
    template = ChatTemplate(VENDORED[name].read_text(), NAMES)
    for chat in ((Message("system", "Be brief."), *TALK), TALK):
        try:
            text = template.render(chat)
        except InvalidValue as error:
            assert "System role not supported" in error.message
            assert chat is not TALK
            continue
        assert all(message.content in text for message in chat)


@pytest.mark.parametrize("name", FILES)
def test_vendored_templates_leave_no_message_out(name: str) -> None:
    template = ChatTemplate(VENDORED[name].read_text(), NAMES)
    for role in ("narrator", "developer", "system"):
        chat = (*TALK, Message(role, "Night falls."), Message("user", "?"))
        try:
            text = template.render(chat)
        except InvalidValue as error:
            assert error.param in {"messages", "messages.3"}
            continue
        assert "Night falls." in text
