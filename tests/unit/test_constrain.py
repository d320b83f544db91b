"""Answers under a constraint, written by chance from what is allowed, over a toy vocabulary."""

from __future__ import annotations

import ipaddress
import json
import random
import re
import subprocess
import sys
import threading
import uuid
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import jsonschema
import numpy as np
import pytest

from shimmy_jupyter.engine import constrain, json_schema
from shimmy_jupyter.engine.constrain import Matcher, Tables, check
from shimmy_jupyter.errors import InvalidValue, RequestError, UnsupportedParameter
from shimmy_jupyter.types import Constraint, Failure

MERGED = (b"ab", b'":', b'{"', b'","', b"true", b"\xc3\xa9a", b"\xe2\x82", b"12", b'"}', b"],")
PIECES = [*(bytes([b]) for b in range(256)), *MERGED, b"", b"</s>", b"<think>", b""]
ENDS = (len(PIECES) - 4, len(PIECES) - 3)
SPECIAL = frozenset({len(PIECES) - 2, len(PIECES) - 1})
CLOSING = {PIECES.index(piece) for piece in (b'"', b"}", b"]", b'":', b'"}', b"],")}
TABLES = Tables(PIECES, SPECIAL, ENDS)


def schema(value: Any) -> str:
    return check(Constraint("json_schema", value if isinstance(value, str) else json.dumps(value)))


def allowed(matcher: Matcher) -> list[int]:
    logits = np.zeros(len(PIECES) + 3, dtype=np.float32)
    matcher.apply(logits)
    found = np.flatnonzero(np.isfinite(logits)).tolist()
    assert not SPECIAL & set(found)
    return found


def write(
    grammar: str, seed: int, most: int = 3000, tables: Tables = TABLES, end: float = 0.5
) -> tuple[bytes, Failure | None]:
    """What comes of choosing by chance; long answers are led to their end.

    Where it may end and may go on, it does so with probability `end`.
    """
    chance = random.Random(seed)
    matcher, text, haste = Matcher(tables, grammar), b"", chance.choice([0.05, 0.3, 0.7])
    for n in range(most):
        tokens = allowed(matcher)
        if matcher.failed():
            return text, matcher.failed()
        ends = [token for token in tokens if token in ENDS]
        assert ends in ([], list(ENDS)), "all ends or none"
        closing = [token for token in tokens if token in CLOSING]
        if ends and (len(tokens) == len(ends) or chance.random() < end):
            token = chance.choice(ends)
        elif closing and chance.random() < (haste if n < 300 else 0.95):
            token = chance.choice(closing)
        else:
            token = chance.choice([token for token in tokens if token not in ENDS])
        failure = matcher.accept(token)
        if failure or token in ENDS:
            assert matcher.stopped
            return text, failure
        text += PIECES[token]
    return text, Failure("long", "")


def feed(grammar: str, text: str) -> bool:
    """Whether a grammar takes the text, byte by byte, and may end there.

    Its masks can be narrower: where no other text can follow they have the longest token only.
    """
    matcher = Matcher(TABLES, grammar)
    taken = all(matcher.accept(byte) is None for byte in text.encode())
    return taken and ENDS[0] in allowed(matcher)


def test_importing_loads_neither_llguidance_nor_numpy() -> None:
    code = (
        "import sys, shimmy_jupyter.engine.constrain\n"
        "print([m for m in ('llguidance', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Schemas


def leaf(chance: random.Random, names: list[str]) -> Any:
    low, high = chance.randint(-200, 0), chance.randint(0, 300)
    return chance.choice(
        [
            {"type": "string"},
            {"type": "string", "minLength": chance.randint(0, 3), "maxLength": 4},
            {"type": "string", "pattern": chance.choice(["^[a-c]{2,4}$", "x", "^a|b$", "[^a-z]"])},
            {"type": "string", "pattern": "^(foo|bar)*$", "minLength": chance.randint(0, 4)},
            {"type": "integer", "minimum": low, "maximum": high},
            {"type": "integer", "exclusiveMinimum": low - 1, "exclusiveMaximum": high + 1},
            {"type": "number", "minimum": low / 8, "maximum": high / 16},
            {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.25},
            {"type": "number", "exclusiveMinimum": -0.25, "exclusiveMaximum": 0},
            {"type": "number", "exclusiveMinimum": -0.1, "maximum": 0.001},
            {"type": "integer", "multipleOf": chance.choice([2, 3, 7, 10])},
            {"type": "number", "multipleOf": chance.choice([0.5, 0.25, 2])},
            {"enum": ["a", 'q"\\', "é€😀", 1, 2.5, None, True, [1, "x"], {"k": [None]}, 0, ""]},
            {"const": chance.choice(["yes", 0, -1.25, None, [], {}, {"a": 1}, 1e3, 0.1])},
            {"type": chance.sample(["null", "boolean", "integer", "number", "string"], 2)},
            {"minimum": 3, "type": ["integer", "string"], "maxLength": 3, "maximum": 12},
            {"$ref": f"#/$defs/{chance.choice(names)}"} if names else True,
        ]
    )


def random_schema(chance: random.Random, names: list[str], depth: int = 0) -> Any:
    kind = chance.random()
    if depth > 3 or kind < 0.45:
        return leaf(chance, names)

    def inner() -> Any:
        return random_schema(chance, names, depth + 1)

    if kind < 0.6:
        found = {"type": "array", "items": inner(), "minItems": chance.randint(0, 2)}
        first = {"prefixItems": [inner()]} if chance.random() < 0.3 else {}
        return found | first | ({"maxItems": 3} if chance.random() < 0.6 else {})
    if kind < 0.85:
        keys = chance.sample(["a", "b", "na me", 'q"t', "é", "x1"], chance.randint(0, 4))
        found = {"properties": {key: inner() for key in keys}, "type": "object"}
        found["required"] = [key for key in keys if chance.random() < 0.5]
        found["additionalProperties"] = chance.choice([False, inner()])
        return found | ({"patternProperties": {"^p_": inner()}} if chance.random() < 0.1 else {})
    if kind < 0.95:
        return {"title": "one of", "anyOf": [inner() for _ in range(chance.randint(1, 3))]}
    return {"allOf": [inner(), {"description": "no more"}]}


def merged_schema(chance: random.Random, depth: int = 0) -> Any:
    """Keywords put together without regard to what they make of each other."""
    parts: list[dict[str, Any]] = [
        {"type": chance.choice(["string", "integer", "object", "array", ["number", "null"]])},
        {"minLength": 1, "maxLength": 4, "pattern": chance.choice(["^a", "b$", "[xy]"])},
        {"minimum": chance.randint(-5, 3), "exclusiveMaximum": chance.choice([20, 7.5, 0.75])},
        {"exclusiveMinimum": 0, "maximum": chance.choice([0.5, 100])},
        {"enum": [1, 2, "a", "ab", "x", None, True, 0.5, -1, [2]]},
        {"properties": {"a": {"type": "integer"}, "b": {"minLength": 2}}, "required": ["b"]},
        {"additionalProperties": False, "properties": {"a": True, "b": True}},
        {"additionalProperties": {"type": ["string", "integer"]}, "maxProperties": 3},
        {"items": {"type": ["integer", "string"]}, "minItems": 1, "maxItems": 3},
        {"prefixItems": [True, {"type": "integer"}], "items": False},
    ]
    found: dict[str, Any] = {}
    for part in chance.sample(parts, chance.randint(1, 2)):
        found = part | found
    for key in ("anyOf", "allOf", "oneOf"):
        if depth < 2 and chance.random() < 0.3:
            found[key] = [merged_schema(chance, depth + 1) for _ in range(chance.randint(1, 3))]
    items = list(found.items())
    chance.shuffle(items)
    return dict(items)


def run(value: Any, seed: int) -> str:
    try:
        grammar = schema(value)
    except RequestError as e:
        assert e.param == "response_format"
        return "refused"
    text, failure = write(grammar, seed)
    if failure is not None and failure.code == "long":
        return "long"
    assert failure is None, (failure, value, text)
    errors = list(jsonschema.Draft202012Validator(value).iter_errors(json.loads(text)))
    assert not errors, (errors[0].message, value, text)
    return "right"


@pytest.mark.parametrize("hundred", range(4))
def test_answers_match_their_schemas(hundred: int) -> None:
    ends = []
    for seed in range(100 * hundred, 100 * hundred + 100):
        chance = random.Random(seed)
        names = ["one", "two"] if chance.random() < 0.4 else []
        value = random_schema(chance, names)
        if names and isinstance(value, dict):
            value["$defs"] = {name: random_schema(chance, names, 1) for name in names}
        ends.append(run(value, seed))
    assert ends.count("right") > 80


@pytest.mark.parametrize("hundred", range(3))
def test_answers_match_schemas_that_are_merged(hundred: int) -> None:
    seeds = range(100 * hundred, 100 * hundred + 100)
    ends = [run(merged_schema(random.Random(seed)), seed) for seed in seeds]
    assert ends.count("right") > 30


FORMS: dict[str, Any] = {
    "date": lambda text: datetime.strptime(text.replace("-02-29", "-02-28"), "%Y-%m-%d")
    .replace(tzinfo=UTC),
    "time": lambda text: re.fullmatch(r"[\d:]{8}(\.\d+)?([zZ]|[+-]\d\d:\d\d)", text),
    "date-time": lambda text: re.fullmatch(r"\d{4}-\d\d-\d\d[tT][\d:]{8}(\.\d+)?\S+", text),
    "duration": lambda text: re.fullmatch(r"P[\dYMDTHSW]+", text),
    "email": lambda text: re.fullmatch(r"[^@\s]+@[^@\s]+", text),
    "hostname": lambda text: re.fullmatch(r"[A-Za-z0-9.-]+", text),
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "uuid": uuid.UUID,
    "uri": lambda text: re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text),
}  # fmt: skip


@pytest.mark.parametrize("name", json_schema.FORMATS)
def test_formats(name: str) -> None:
    grammar = schema({"type": "string", "format": name})
    for seed in range(5):
        text, failure = write(grammar, seed)
        if not (name == "date" and text.startswith(b'"0000')):
            assert failure is None
            assert FORMS[name](json.loads(text))


def test_any_object() -> None:
    grammar = check(Constraint("json_object"))
    for seed in range(10):
        text, failure = write(grammar, seed)
        assert failure is None
        assert isinstance(json.loads(text), dict)
    for text in ("[]", "1", '{"a": 1}', "{} ", ""):
        assert not feed(grammar, text)


@pytest.mark.parametrize(
    ("value", "right", "wrong"),
    [
        (True, ["1", '[{"a":null}]'], ["", "{"]),
        ({}, ["null"], [" null"]),
        ({"title": "T", "default": 3, "x-own": 1, "$comment": "c"}, ["3", "null"], []),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "$id": "a:b"}, ["1"], []),
        ({"type": "integer"}, ["0", "-12"], ["1.5", "01", "1e2"]),
        ({"type": "integer", "format": "int64"}, ["5"], ["5.5"]),
        ({"const": "é"}, ['"é"'], [r'"\u00e9"']),
        ({"type": "string", "maxLength": 2}, ['"é€"', r'"\n\""'], ['"abc"', '"\t"']),
        ({"enum": [1, "a"], "type": "string"}, ['"a"'], ["1"]),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, ["0.5", "0.01"], ["0", "0.0"]),
        ({"type": "array", "prefixItems": [True], "items": False}, ["[]", "[1]"], ["[1,1]"]),
        (
            {"properties": {"a": {"type": "integer"}}, "type": "object"},
            ['{"a":1,"b":true}', '{"b":1}', "{}"],
            ['{"a":true}', r'{"\u0061":true}', '{"b":1,"a":1}', '{"a":1,"a":2}'],
        ),
        (
            {"patternProperties": {"^a": {"type": "integer"}}, "type": "object"},
            ['{"a":1,"b":true}'],
            ['{"a":true}', r'{"\u0061":true}'],
        ),
        (
            {"additionalProperties": False, "properties": {"a": True}, "required": ["a"]},
            ['{"a":1}', "3"],
            ["{}", '{"a":1,"b":1}'],
        ),
        (
            {"oneOf": [{"const": i, "title": str(i)} for i in range(3)]},
            ["0", "2"],
            ["3", "true"],
        ),
        ({"type": "array", "uniqueItems": False}, ["[1,1]"], []),
    ],
)  # fmt: skip
def test_what_schemas_take(value: Any, right: list[str], wrong: list[str]) -> None:
    grammar = schema(value)
    assert [text for text in right if not feed(grammar, text)] == []
    assert [text for text in wrong if feed(grammar, text)] == []


def test_references() -> None:
    value = {
        "$ref": "#/$defs/a~1b%25",
        "$defs": {
            "a/b%": {"type": "array", "items": {"$ref": "#/$defs/a~1b%25/maxItems/.."}},
        },
    }  # fmt: skip
    with pytest.raises(InvalidValue, match="leads nowhere"):
        schema(value)
    value["$defs"]["a/b%"] = {"type": "array", "items": {"$ref": "#"}}
    assert feed(schema(value), "[[],[[]]]")
    value = {"properties": {"t": {"$ref": "#/definitions/tree"}}, "required": ["t"], "type": "object",
             "definitions": {"tree": {"type": "object", "additionalProperties": False, "properties":
                             {"l": {"$ref": "#/definitions/tree"}, "v": {"type": "integer"}}}}}  # fmt: skip
    assert feed(schema(value), '{"t":{"l":{"l":{"v":1}},"v":2}}')
    assert not feed(schema(value), '{"t":{"l":1}}')


def test_a_tagged_union_through_references() -> None:
    def option(tag: str, other: str) -> dict[str, Any]:
        properties = {"kind": {"const": tag}, other: {"type": "integer"}}
        return {"type": "object", "properties": properties, "required": ["kind", other]}

    value = {
        "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
        "discriminator": {"propertyName": "kind"},
        "$defs": {"cat": option("cat", "lives"), "dog": option("dog", "age")},
    }
    grammar = schema(value)
    assert feed(grammar, '{"kind":"cat","lives":9}')
    assert not feed(grammar, '{"kind":"cat","age":9}')
    value["$defs"]["dog"]["properties"]["kind"]["const"] = "cat"
    with pytest.raises(RequestError, match="oneOf constraints are not supported"):
        schema(value)


def test_patterns_as_python_reads_them() -> None:
    texts = ["", "a", "b", "ab", "xa", "bx", "aab", "1", "1.25", "é", "foo bar"]
    for pattern in (
        "^a|b$",
        "a",
        "^$",
        "(^a|b)x?$",
        r"^\d+(\.\d{2})?$",
        r"\w",
        r"^\S+$",
        "^[^a]*$",
    ):
        grammar = schema({"type": "string", "pattern": pattern})
        for text in texts:
            if text != "é":  # \w is ASCII here, as in ECMAScript
                quoted = json.dumps(text)
                assert feed(grammar, quoted) == bool(re.search(pattern, text)), (pattern, text)


REFUSED: list[tuple[Any, type[RequestError], str]] = [
    ({"properties": {"a": {"not": {}}}}, UnsupportedParameter, "properties.a.not: "),
    ({"items": {"anyOf": [{}, {"if": {}}]}}, UnsupportedParameter, "items.anyOf.1.if: "),
    ({"$ref": "#/$defs/d", "$defs": {"d": {"contains": {}}}}, UnsupportedParameter, "$defs.d.cont"),
    ({"minimun": 1}, UnsupportedParameter, "minimun: "),
    ({"nullable": True}, UnsupportedParameter, "nullable: "),
    ({"items": {"$id": "a:b"}}, UnsupportedParameter, "items.$id: "),
    ({"$ref": "http://localhost/x"}, UnsupportedParameter, "$ref: "),
    ({"$ref": "file:///etc/passwd"}, UnsupportedParameter, "$ref: "),
    ({"$ref": "#anchor"}, UnsupportedParameter, "$ref: "),
    ({"$ref": "#/$defs/none"}, InvalidValue, "$ref: "),
    ({"type": "string", "format": "phone"}, UnsupportedParameter, "format: "),
    ({"format": "unknown"}, UnsupportedParameter, "format: "),
    ({"pattern": "(?=a)b"}, InvalidValue, "look-around"),
    ({"pattern": r"(a)\1"}, InvalidValue, "backreference"),
    ({"pattern": "a^b"}, InvalidValue, "lookarounds"),
    ({"pattern": "("}, InvalidValue, "regex parse error"),
    ({"multipleOf": 0}, InvalidValue, "multipleOf: "),
    ({"multipleOf": -2}, InvalidValue, "multipleOf: "),
    ({"multipleOf": 0.07}, InvalidValue, "digits"),
    ({"multipleOf": 65536}, InvalidValue, "multipleOf: "),
    ({"minimum": 1e300}, InvalidValue, "minimum: "),
    ({"const": 2**53 + 1}, InvalidValue, "const: "),
    ({"const": "\0"}, UnsupportedParameter, "const: "),
    ({"enum": ["\ud800"]}, InvalidValue, "enum: "),
    ({"maxItems": 10**9}, InvalidValue, "maxItems: "),
    ({"items": [{}]}, InvalidValue, "items: "),
    ({"additionalItems": False}, UnsupportedParameter, "additionalItems: "),
    ({"exclusiveMinimum": True, "minimum": 1}, InvalidValue, "exclusiveMinimum: "),
    ({"type": "object", "minProperties": 2}, UnsupportedParameter, "minProperties: "),
    ({"type": "string", "minLength": 3, "maxLength": 2}, InvalidValue, "minLength"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, InvalidValue, "Unsatisfiable"),
    ({"type": "string", "enum": [1, 2]}, InvalidValue, "incompatible types"),
    ({"type": "string", "pattern": "^a$", "minLength": 2}, InvalidValue, "Unsatisfiable"),
    (False, InvalidValue, "schema is false"),
    ({"allOf": [{"type": "string"}, {"type": "null"}]}, InvalidValue, "incompatible types"),
    ({"$ref": "#"}, InvalidValue, "requires itself"),
    (
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        InvalidValue, "$defs.a: it requires itself",
    ),
    (
        {"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]},
        InvalidValue, "requires itself",
    ),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, InvalidValue, "requires itself"),
    (
        {"type": "object", "additionalProperties": {"$ref": "#"}, "minProperties": 1},
        InvalidValue, "requires itself",
    ),
    (
        {"properties": {"z": {"$ref": "#/$defs/a"}},
         "$defs": {"a": {"type": "array", "prefixItems": [{"$ref": "#/$defs/a"}], "minItems": 1}}},
        InvalidValue, "$defs.a: it requires itself",
    ),
    (
        {"allOf": [{"multipleOf": 3}, {"multipleOf": 5}]}, UnsupportedParameter, "multipleOf",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("value", "error", "said"), REFUSED)
def test_refused(value: Any, error: type[RequestError], said: str) -> None:
    with pytest.raises(error) as refused:
        schema(value)
    assert type(refused.value) is error
    assert said in refused.value.message
    assert refused.value.param == "response_format"


@pytest.mark.parametrize("key", json_schema.UNSUPPORTED)
def test_unsupported_keywords_are_named_with_their_place(key: str) -> None:
    with pytest.raises(UnsupportedParameter, match=rf"^items\.properties\.a\.{re.escape(key)}: "):
        schema({"items": {"properties": {"a": {key: {}}}}})


def test_every_keyword_is_in_one_list() -> None:
    lists = (json_schema.SUPPORTED, json_schema.ANNOTATIONS, json_schema.UNSUPPORTED)
    assert sum(map(len, lists)) == len({key for keys in lists for key in keys})
    known = jsonschema.Draft202012Validator.VALIDATORS.keys() - {"$ref", "$dynamicRef"}
    assert known <= {key for keys in lists for key in keys}


JUNK = [
    None,
    True,
    -1,
    1.5,
    "x",
    "\ud800",
    [],
    [[]],
    [None],
    {},
    {"a": 1},
    {"": {}},
    1e308,
    10**400,
]


def test_wrong_types_everywhere() -> None:
    keys = (*json_schema.SUPPORTED, *json_schema.ANNOTATIONS, *json_schema.UNSUPPORTED)
    for key in keys:
        for junk in JUNK:
            for value in ({key: junk}, {"type": "object", "properties": {"p": {key: junk}}}):
                try:
                    write(schema(value), 1, 5)
                except RequestError as e:
                    assert e.param == "response_format"


@pytest.mark.parametrize(
    "source",
    ["", "{", "nul", "[]", '"x"', "3", "null", '{"minimum": NaN}', '{"maximum": 1e999}', "\ud800",
     '{"a": 1} 2', "[" * 60_000, '{"items":' * 7000, "9" * 5000, "\0", 5, None, b"{}"],
)  # fmt: skip
def test_sources_that_are_no_schema(source: Any) -> None:
    with pytest.raises(RequestError) as refused:
        check(Constraint("json_schema", source))
    assert refused.value.param == "response_format"


# Grammars


def lark(source: str) -> str:
    return check(Constraint("lark", source))


ARITHMETIC = """
start: sum
sum: product (("+" | "-") product)*
product: atom ("*" atom)*
atom: NUMBER | "(" sum ")"   // parentheses
NUMBER: /[1-9][0-9]{0,3}/    # no zeros
"""
ARITHMETIC_GBNF = r"""
root ::= product (("+" | "-") product)*
product ::= atom ("*" atom)*
atom ::= num-ber | "(" root ")" # parentheses
num-ber ::= [1-9] [0-9]{0,3}
"""


@pytest.mark.parametrize(("kind", "source"), [("lark", ARITHMETIC), ("gbnf", ARITHMETIC_GBNF)])
def test_arithmetic(kind: str, source: str) -> None:
    grammar = check(Constraint(kind, source))
    for text in ("1", "12*(3+4)-5", "((9))"):
        assert feed(grammar, text)
    for text in ("", "0", "1+", "(1", "1 + 1", "12345"):
        assert not feed(grammar, text)
    for seed in range(5):
        text, failure = write(grammar, seed, 400)
        assert failure is None or failure.code == "long"
        if not failure:
            assert isinstance(eval(text), int)


def test_regular_expressions() -> None:
    grammar = check(Constraint("regex", r'(yes|no), [a-z]{2}/"é"\\'))
    assert feed(grammar, r'yes, ab/"é"' + "\\")
    assert not feed(grammar, "yes")
    anchored = check(Constraint("regex", r"^\d{2}$"))
    assert feed(anchored, "42")
    multiline = check(Constraint("regex", 'a\n/ | "x'))
    assert feed(multiline, "a\n/ ")


def test_schemas_in_lark() -> None:
    value = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    source = 'start: "call " body "%" # not %ignored\nbody: %json ' + json.dumps(value, indent=1)
    grammar = lark(f'{source}\n_OTHER: /"%[j]son"/\n')
    assert feed(grammar, 'call {"n":1}%')
    assert not feed(grammar, 'call {"n": 1}%')
    assert not feed(grammar, r'call {"n":1,"\u006e":true}%')


@pytest.mark.parametrize(
    ("kind", "source", "said"),
    [
        ("lark", "start: foo", "unknown name"),
        ("lark", "start", "Expected"),
        ("lark", "a: /x/", "no start rule"),
        ("lark", '{"grammars": [{"json_schema": {"not": {}}}]}', ""),
        ("lark", "start: start /a/", "nothing can match it"),
        ("lark", 'start: x\nx: x | x "a"', "nothing can match it"),
        ("lark", "start: A\nA: /[a-z]+/ & /[0-9]+/", "nothing can match it"),
        ("lark", "start: A\nA: A /a/", "circular reference"),
        ("lark", 'start: "a" <|eot|>', "special tokens"),
        ("lark", "start: <[0-9]>", "special tokens"),
        ("lark", 'start: A\nA: %regex {"substring_chars": "abc"}', "%regex"),
        ("lark", 'start: %lark {\nstart: "a"\n}', "%lark"),
        ("lark", 'start: %json {"x-guidance": {"lenient": true}, "not": {}}', "not: "),
        ("lark", 'start: %json {"maxItems": 1000000000}', "maxItems: "),
        ("lark", "start: %json", "%json without a schema"),
        ("lark", 'start: "%json"', "%json without a schema"),
        ("lark", "start: %json " + '{"items":' * 1500, "%json without a schema"),
        ("lark", "%import .secrets.X\nstart: X", "Unknown common regex"),
        ("lark", "start: @other", "unknown grammar"),
        ("lark", "start: /(?=a)b/", "look-around"),
        ("lark", "\0", ""),
        ("gbnf", "root ::= foo", "Rule 'foo' not found"),
        ("gbnf", 'a ::= "x"', "No 'root' rule"),
        ("gbnf", 'root ::= fooBar foo-bar\nfooBar ::= root\nfoo-bar ::= root "a"', "already exists"),
        ("gbnf", "root ::= " + "(" * 8000 + '"a"' + ")" * 8000, "nested too deeply"),
        ("gbnf", 'root ::= "a', "Unexpected end"),
        ("gbnf", r'root ::= "\u00e9"', "not supported"),
        ("gbnf", "root ::= [a&&b]", "not supported"),
        ("gbnf", "root", "Expected ::="),
        ("regex", "(", "unclosed group"),
        ("regex", "a\\", "backslash"),
        ("regex", "a$b", "lookarounds"),
        ("regex", "a{99999999999}", "invalid regex"),
        ("regex", "(" * 900 + "a" + ")" * 900, "invalid regex"),
        ("tea leaves", "a", "unknown kind"),
    ],
)  # fmt: skip
def test_refused_grammars(kind: str, source: str, said: str) -> None:
    with pytest.raises(RequestError) as refused:
        check(Constraint(kind, source))
    assert said in refused.value.message
    assert refused.value.param == "grammar"
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("kind", ["lark", "gbnf", "regex", "json_schema"])
@pytest.mark.parametrize("source", ["", "\ud800", "x" * 1_000_000, 7, None])
def test_sources_of_any_kind(kind: str, source: Any) -> None:
    with pytest.raises(InvalidValue):
        check(Constraint(kind, source))


# What is too much


def rules(count: int, body: str) -> str:
    """A chain of rules or terminals, each made of the next."""
    lines = [f"{body[0]}{i}: {body.replace('$', str(i + 1))}" for i in range(count)]
    return "\n".join([f"start: {body[0]}0", *lines, f'{body[0]}{count}: "z"'])


def chain(count: int, link: Any) -> dict[str, Any]:
    """Definitions that refer to the next."""
    defs = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": defs | {f"d{count}": {"type": "string"}}}


def nested(depth: int, value: Any, around: Any) -> Any:
    for _ in range(depth):
        value = around(value)
    return value


MONSTER = "(a{1,3000}){1,3000}"
HOSTILE: dict[str, tuple[str, Any]] = {
    "monstrous pattern": ("json_schema", {"type": "string", "pattern": MONSTER}),
    "monstrous regex": ("regex", MONSTER),
    "monstrous repetition": ("lark", "start: " + "(" * 9 + '"a" "b"' + "){1,100000}" * 9),
    "ambiguous": ("lark", 'start: s\ns: s s | s s s | "a" | "b"'),
    "ambiguous terminals": (
        "lark", f"start: ({'|'.join(f'/[a-z]*{c}[a-z]{{{i}}}/' for i, c in enumerate('abcdefghijklmnopqrstuvwxyz'))})*",
    ),
    "endless": ("lark", 'start: "a" start'),
    "left recursion": ("lark", 'start: start "a" | "b"'),
    "all may be missing": ("lark", "start: " + "a? " * 400 + "\na: /[a-z]/ | /x/"),
    "backtracking": ("regex", "(.*a.{12}){3}b"),
    "excluded": ("lark", "start: A\nA: /(?s:.*)/ & ~/(?s:.*)a.{5}b.{7}c(?s:.*)/"),
    "many optional parts": ("regex", "a?" * 500 + "a" * 500),
    "doubled optional parts": ("lark", rules(12, "T$ T$") + "?"),
    "ignored optional parts": ("lark", r"%ignore " + "A " * 5000 + '\nA: /\\w?/\nstart: "a"'),
    "doubled": ("lark", rules(60, "T$ T$")),
    "deep parentheses": ("lark", "start: " + "(" * 10_000 + '"a"' + ")" * 10_000),
    "chain of rules": ("lark", rules(2000, "r$")),
    "longest chain of rules": ("lark", rules(495, '"x"? r$'[5:])),
    "longest chain of brackets": ("lark", rules(245, "r$ [r$]")),
    "longest chain of terminals": ("lark", rules(495, "T$")),
    "many alternatives": ("lark", "start: " + " | ".join(f'"{i}"' for i in range(1500))),
    "huge enum": ("json_schema", {"enum": [f"value {i * 7919 % 100_003}" for i in range(3000)]}),
    "enum of objects": ("json_schema", {"enum": [{"a": i} for i in range(1900)]}),
    "many options": ("json_schema", {"anyOf": [{"const": i} for i in range(1900)]}),
    "too many options": ("json_schema", {"anyOf": [{"const": i} for i in range(2100)]}),
    "many keys": ("json_schema", {"properties": {f"k{i}": {} for i in range(490)}}),
    "too many keys": ("json_schema", {"properties": {f"k{i}": {} for i in range(600)}}),
    "many patterns": (
        "json_schema", {"properties": {f"k{i}": {"pattern": f"a.{{{i % 30}}}b"} for i in range(300)}},
    ),
    "many key patterns": (
        "json_schema", {"patternProperties": {f"^a{i}[a-f]*$": {} for i in range(16)}},
    ),
    "choices times choices": (
        "json_schema", {"allOf": [{"anyOf": [{"minimum": i * j} for i in range(20)]} for j in range(9)]},
    ),
    "references that double": (
        "json_schema", chain(40, lambda ref: {"allOf": [ref, ref], "type": "string"}),
    ),
    "too long a chain": ("json_schema", chain(500, lambda ref: {"anyOf": [ref, {"type": "null"}]})),
    "longest chain": ("json_schema", chain(130, lambda ref: {"properties": {"p": ref}})),
    "longest chain of references": ("json_schema", chain(390, lambda ref: ref)),
    "deep chain": (
        "json_schema", chain(8, lambda ref: nested(45, ref, lambda inner: {"items": inner})),
    ),
    "deep": ("json_schema", nested(200, {}, lambda inner: {"items": inner})),
    "big numbers": ("json_schema", {"maxLength": 100_000, "minItems": 100_000, "minLength": 99_999}),
    "million characters": ("json_schema", {"const": "x" * 1_000_000}),
    "million descriptions": ("json_schema", {"description": "x" * 60_000}),
    "rules in a row": ("gbnf", rules(900, "r$ r$").replace(": ", " ::= ").replace("start", "root")),
    "open quotes": ("lark", 'start: "' + r"\"" * 8000),
    "open slashes": ("lark", "start: /" + r"\/" * 8000),
    "open brackets": ("gbnf", "root ::= " + "[" * 16_000),
    "open angles": ("lark", "start: " + "<" * 16_000),
    "fractions": ("json_schema", {"anyOf": [{"maxItems": 1.5}] * 1900}),
    "emoji": ("regex", "[😀-🙏]{1,50}|é*"),
}  # fmt: skip


def suffer(kind: str, source: Any) -> str:
    """What becomes of it. Only its own matcher may fail."""
    text = source if isinstance(source, str) else json.dumps(source)
    try:
        grammar = check(Constraint(kind, text))
    except RequestError:
        return "refused"
    failure = write(grammar, 3, 120, end=0)[1]
    assert failure is None or failure.code in {"constraint_too_complex", "long"}
    return failure.code if failure else "right"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name: str) -> None:
    assert suffer(*HOSTILE[name])
    assert feed(check(Constraint("regex", "still|here")), "here")


def test_some_must_not_pass_and_some_must() -> None:
    ends = {name: suffer(*HOSTILE[name]) for name in ("ambiguous", "endless")}
    assert set(ends.values()) == {"constraint_too_complex"}
    for name in ("too many keys", "too many options", "too long a chain", "deep", "doubled",
                 "ignored optional parts", "doubled optional parts", "million characters"):  # fmt: skip
        assert suffer(*HOSTILE[name]) == "refused", name
    for name in ("longest chain", "longest chain of rules", "longest chain of references",
                 "longest chain of terminals", "deep chain", "many keys", "huge enum",
                 "million descriptions", "emoji"):  # fmt: skip
        assert suffer(*HOSTILE[name]) != "refused", name


def test_the_longest_chains_fit_a_small_stack() -> None:
    """Two megabytes are what threads have where stacks are unlimited. More would kill the process."""
    names = [name for name in HOSTILE if "longest" in name or "deep chain" in name]
    found: list[str] = []
    before = threading.stack_size(2 << 20)
    try:
        thread = threading.Thread(
            target=lambda: found.extend(suffer(*HOSTILE[name]) for name in names)
        )
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert len(found) == len(names)


# Matchers


def test_a_token_may_end_within_a_character() -> None:
    matcher = Matcher(TABLES, schema({"const": "€"}))
    quote, begun = PIECES.index(b'"'), PIECES.index(b"\xe2\x82")
    assert matcher.accept(quote) is None
    assert begun in allowed(matcher)
    assert matcher.accept(begun) is None
    assert allowed(matcher) == [0xAC]
    assert matcher.accept(0xAC) is None
    assert matcher.accept(quote) is None
    assert matcher.stopped
    assert allowed(matcher) == list(ENDS)


@pytest.mark.parametrize("end", ENDS)
def test_every_end_ends(end: int) -> None:
    matcher = Matcher(TABLES, check(Constraint("regex", "[a-z]+")))
    assert end not in allowed(matcher)
    assert matcher.accept(97) is None
    assert not matcher.stopped
    assert end in allowed(matcher)
    assert matcher.accept(end) is None
    assert matcher.stopped
    assert matcher.failed() is None


def test_an_end_too_early_is_no_answer() -> None:
    matcher = Matcher(TABLES, check(Constraint("regex", "ab")))
    failure = matcher.accept(ENDS[0])
    assert failure is not None
    assert (failure.code, matcher.stopped) == ("generation_failed", True)
    lazy = Matcher(TABLES, lark('start: a "x"\na[stop=""]: /[a-c]*/'))
    assert lazy.accept(97) is None
    assert ENDS[0] in allowed(lazy)
    ended = lazy.accept(ENDS[0])
    assert ended is not None
    assert "ended" in ended.message


def test_a_failure_stays() -> None:
    matcher = Matcher(TABLES, check(Constraint("regex", "[a-z]+")))
    allowed(matcher)
    failure = matcher.accept(48)
    assert failure is not None
    assert failure.code == "generation_failed"
    assert matcher.accept(97) is failure is matcher.failed()
    assert matcher.stopped
    assert allowed(matcher) == list(ENDS)


def test_a_dead_end_is_a_failure() -> None:
    grammar = lark('start: "a" x | "b"\nx: x "c"')
    matcher = Matcher(TABLES, grammar)
    assert matcher.accept(97) is None
    assert allowed(matcher) == list(ENDS)
    failure = matcher.failed()
    assert failure is not None
    assert failure.code == "generation_failed"


def test_too_much_says_so_and_no_more() -> None:
    text, failure = write(lark('start: s\ns: s s | s s s | "a" | "b"'), 1, end=0)
    assert text
    assert failure is not None
    assert failure.code == "constraint_too_complex"
    assert "Too many items" in failure.message
    assert "\n" not in failure.message


def test_preparing_changes_nothing() -> None:
    grammar = schema({"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3})
    plain, prepared = Matcher(TABLES, grammar), Matcher(TABLES, grammar)
    chance = random.Random(1)
    while not plain.stopped:
        thread = threading.Thread(target=prepared.prepare)
        thread.start()
        tokens = allowed(plain)
        assert allowed(prepared) == tokens == allowed(prepared)
        thread.join()
        token = chance.choice(tokens)
        assert plain.accept(token) == prepared.accept(token) == None  # noqa: E711
    assert prepared.stopped


def test_the_mask_is_put_over_what_is_there() -> None:
    matcher = Matcher(TABLES, check(Constraint("regex", "a|b")))
    logits = np.arange(len(PIECES), dtype=np.float32)
    matcher.apply(logits[:])
    assert np.flatnonzero(np.isfinite(logits)).tolist() == [97, 98]
    assert logits[98] == 98


def test_special_tokens_never_come() -> None:
    """Not even where bytes are allowed that are no UTF-8."""
    anything = Matcher(TABLES, lark('start: A\nA: ~"x"'))
    tokens = allowed(anything)
    assert set(ENDS) <= set(tokens)
    assert 0xFF not in tokens
    written = Matcher(TABLES, schema({"type": "string"}))
    for byte in b'"</s>':
        assert not SPECIAL & set(allowed(written))
        assert written.accept(byte) is None


def test_a_grammar_that_llguidance_refuses() -> None:
    for grammar in ("start: (", json.dumps({"grammars": [{"lark_grammar": 'start: "x" <|y|>'}]})):
        with pytest.raises(InvalidValue) as refused:
            Matcher(TABLES, grammar)
        assert "/" not in refused.value.message.replace("'/'", "")


def longest_first(text: str) -> tuple[int, ...]:
    tokens = {piece: token for token, piece in enumerate(PIECES[: ENDS[0]])}
    data, found, at = text.encode(), [], 0
    while at < len(data):
        size = next(n for n in (4, 3, 2, 1) if data[at : at + n] in tokens)
        found.append(tokens[data[at : at + size]])
        at += size
    return tuple(found)


@pytest.mark.parametrize(
    "tokenize",
    [
        longest_first,
        lambda text: tuple(text.encode()),
        lambda text: (32, *text.encode()),
        lambda text: (),
        None,
    ],
)
def test_forced_text_is_split_as_the_model_splits(tokenize: Any) -> None:
    asked: list[int] = []

    def ask(text: str) -> tuple[int, ...]:
        asked.append(len(text))
        return tokenize(text)

    tables = Tables(PIECES, SPECIAL, ENDS, ask if tokenize else None)
    forced = "ab true é{" * 60
    assert write(schema({"const": forced}), 1, tables=tables) == (f'"{forced}"'.encode(), None)
    assert max(asked, default=0) <= constrain.MAX_FORCED


def test_tokens_of_equal_bytes_may_both_come() -> None:
    tables = Tables([b"a", b"b", b"a", b""], frozenset(), (3,))
    matcher = Matcher(tables, lark("start: /[ab]*/"))
    logits = np.zeros(4, dtype=np.float32)
    matcher.apply(logits)
    assert np.isfinite(logits).tolist() == [True, True, True, True]
    assert matcher.accept(2) is None


def test_a_vocabulary_without_some_bytes() -> None:
    tables = Tables([b"a", b"b", b""], frozenset(), (2,))
    matcher = Matcher(tables, lark('start: "axb"'))
    for token in (0, 1):
        matcher.prepare()
        matcher.accept(token)
    failure = matcher.failed()
    assert failure is not None
    assert failure.code == "generation_failed"


def test_many_at_once_do_not_mix() -> None:
    grammars = [schema({"const": f"{'x' * i}{i}"}) for i in range(20)]
    matchers = [Matcher(TABLES, grammar) for grammar in grammars]
    texts = [b""] * len(matchers)
    while not all(matcher.stopped for matcher in matchers):
        for i, matcher in enumerate(matchers):
            if not matcher.stopped:
                token = allowed(matcher)[0]
                assert matcher.accept(token) is None
                texts[i] += PIECES[token]
    assert [json.loads(text) for text in texts] == [f"{'x' * i}{i}" for i in range(20)]
    assert all(a != b for a, b in pairwise(texts))


def test_a_fork_goes_its_own_way() -> None:
    begin = Matcher(TABLES, check(Constraint("regex", "a[bc]d")))
    one, other = begin.fork(), begin.fork()
    for matcher, text in ((one, b"abd"), (other, b"acd")):
        for byte in text:
            matcher.prepare()
            assert byte in allowed(matcher)
            assert matcher.accept(byte) is None
        assert matcher.stopped
    assert ord("a") in allowed(begin)
    assert ord("b") not in allowed(begin)
    assert not begin.stopped
