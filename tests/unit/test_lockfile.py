"""shimmy.lock: what is refused, that what is written is read again, and that a pin means one thing.

Cases, of the text: the smallest lock; every key; each required key missing; unknown keys at each
depth; wrong types (true for 1, 1 for a text); ends of ranges, and falsy values (temperature 0, seed 0);
paths, `..`, hidden and turned-around characters in names; secrets in URLs; hashes that are too short,
too long, upper case; aliases twice; the files of split models; other versions; too large; not UTF-8;
nested, dotted and digits without end; any text at all; any value in the place of any other.
Of writing: round trip; one spelling whatever the order; comments; what cannot be read is not dumped.
Of the digest: stamps, order and spelling do not count, everything else does.
Of profiles: unknown aliases and targets, circles of one, two and a long tail; chains; contexts.
Of changes: taken names, missing ones, ones that profiles need; the old lock stays as it was.
Of finding: nested folders; home; another file system; shared folders; links on the way, and as the
file; a folder, a pipe, something large; what cannot be looked at; a start that is not there.
Of the file: modes; a link put there; failures before and after the bytes; a broken file there already.
Of drift: each key alone; all at once; what is not pinned; more context than is pinned.
Of the page: its example, its table against the schema, its severities.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shimmy_jupyter import errors
from shimmy_jupyter.models import drift as drifting
from shimmy_jupyter.models import lockfile, lockschema
from shimmy_jupyter.models.drift import Found, Severity, drift
from shimmy_jupyter.models.lockfile import (
    LARGEST,
    NAME,
    Adapter,
    Defaults,
    Lock,
    LockError,
    Override,
    Pin,
    Source,
    added,
    digest,
    dump,
    find,
    parse,
    read,
    removed,
    renamed,
    resolve,
    update_text,
    write,
)
from shimmy_jupyter.server.requests import _Common
from shimmy_jupyter.types import Sampling

PAGE = (Path(__file__).parent.parent.parent / "docs" / "lock.md").read_text()
A, B, C = ("0123456789abcdef" * 4, "b" * 64, "c" * 64)
PIN = Pin("m.gguf", 7, A)
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
FULL = Pin(
    file="big-00001-of-00003.gguf",
    size=30,
    sha256=A,
    parts=(B, C),
    source=Source(repo="me/models", revision="0" * 40, folder="UD-Q4/K"),
    chat_template=C,
    context_size=4096,
    sampling=Defaults(0.0, 0, 1.0, 0.0, 1.1, 0),
    adapters=(Adapter("zulu", B, 0.0), Adapter("french", C, -0.5)),
    engine="0.3.36",
    locked_at=NOON,
)
LOCK = Lock(
    {"tutor": FULL, "qwen3:4b@x.y": PIN, "small": replace(PIN, context_size=512)},
    {"hub": {}, "laptop": {"tutor": Override("small", 256), "small": Override(None, 128)}},
)


def model(**keys: str) -> str:
    """A lock of one model as text, each key as TOML; without those that are empty."""
    given = {"file": '"m.gguf"', "size": "7", "sha256": f'"{A}"'} | keys
    lines = [f"{key} = {value}" for key, value in given.items() if value]
    return "\n".join(["version = 1", "[models.m]", *lines])


def refusal(text: str) -> str:
    with pytest.raises(LockError) as caught:
        parse(text)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


class TestParse:
    def test_smallest_and_fullest(self) -> None:
        assert parse("version = 1") == Lock()
        assert parse(model()) == Lock({"m": PIN})
        assert parse(dump(LOCK)) == LOCK

    def test_falsy_values_are_values(self) -> None:
        sampling = (
            parse(model(sampling="{temperature = 0, top_k = 0, seed = 0}")).models["m"].sampling
        )
        assert sampling == Defaults(temperature=0.0, top_k=0, seed=0)
        assert resolve(parse(dump(LOCK)), "tutor").sampling.seed == 0

    @pytest.mark.parametrize("key", ["file", "size", "sha256"])
    def test_what_a_pin_needs(self, key: str) -> None:
        assert refusal(model(**{key: ""})) == f"models.m.{key}: is missing"

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("file", value)
            for value in (
                "1", '""', '"."', '".."', '"/m.gguf"', '"a/m.gguf"', '"../m.gguf"', '"C:m.gguf"',
                r'"a\\m.gguf"', '"~me"', r'"a\u0000"', r'"a\n"', r'"\u202Efugg.m"', f'"{"é" * 128}"',
                "'C:\\m.gguf'", '["m.gguf"]',
            )
        ]
        + [("size", value) for value in ("0", "-1", "true", "7.0", '"7"', "1e3", str(2**63), "0xg")]
        + [
            (key, value)
            for key in ("sha256", "chat_template")
            for value in ("1", '""', f'"{A[:-1]}"', f'"{A}0"', f'"{A.upper()}"', f'"{A[:-1]}g"',
                          f'"{A}\\n"', f'"sha256:{A}"', '"٣' + "0" * 63 + '"')
        ]
        + [("context_size", value) for value in ("0", "-1", "1.5", "true", str(2**31), "nan")]
        + [
            ("source", value)
            for value in (
                '"me/models"', "{}", '{repo = "me/m"}', f'{{revision = "{"0" * 40}"}}',
                '{repo = "me/m", revision = "main"}', f'{{repo = "m", revision = "{"0" * 40}"}}',
                f'{{repo = "me/../m", revision = "{"0" * 40}"}}',
                f'{{repo = "me/m/", revision = "{"0" * 40}"}}',
                f'{{repo = "me/a..b", revision = "{"0" * 40}"}}',
                f'{{repo = "me/m", revision = "{"0" * 40}", url = "https://h/m"}}',
                '{url = "https://h/m", folder = "a"}', '{folder = "a"}', "{url = 1}",
                f'{{repo = "me/m", revision = "{"0" * 40}", token = "x"}}',
                *(
                    f'{{repo = "me/m", revision = "{"0" * 40}", folder = {folder}}}'
                    for folder in ('""', '"/a"', '"a/"', '"a//b"', '"a/../b"', '".."', "1", r'"a\\b"')
                ),
            )
        ]
        + [
            ("sampling", value)
            for value in (
                "0.5", "{temperature = 2.1}", "{temperature = -0.1}", "{temperature = nan}",
                "{temperature = inf}", "{temperature = true}", "{top_k = -1}", "{top_k = 1.0}",
                "{top_p = 1.1}", "{min_p = -1}", "{repeat_penalty = 0}", "{repeat_penalty = 11}",
                f"{{seed = {2**63}}}", "{seed = false}", '{stop = "x"}', f"{{top_p = {10**400}}}",
            )
        ]
        + [
            ("adapters", value)
            for value in (
                "{}", "[1]", "[{}]", '[{name = "f"}]', f'[{{name = "a/f", sha256 = "{A}"}}]',
                f'[{{name = "f", sha256 = "{A}", scale = 101}}]',
                f'[{{name = "f", sha256 = "{A}", path = "/x"}}]',
                f'[{{name = "f", sha256 = "{A}"}}, {{name = "f", sha256 = "{B}"}}]',
            )
        ]
        + [("engine", value) for value in ("0.3", '""', '"a\\tb"', '"/usr/lib"')]
        + [
            ("locked_at", value)
            for value in ('"2026-01-31T12:00:00Z"', "2026-01-31", "2026-01-31T12:00:00", "12:00:00",
                          "2026-01-31T12:00:00+02:00", "2026-01-31T12:00:00.5Z", "1")
        ]
        + [("parts", value) for value in ("1", f'["{A}"]', "[1]")],
    )  # fmt: skip
    def test_values_that_are_refused(self, key: str, value: str) -> None:
        said = refusal(model(**{key: value}))
        assert said.startswith((f"models.m.{key}", "shimmy.lock is not TOML")), said

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("file", '"Mödel 漢 (1).gguf"'),
            ("size", str(2**63 - 1)),
            ("context_size", str(2**31 - 1)),
            ("source", '{url = "https://h:8443/a/@b/m%20n.gguf"}'),
            ("source", '{url = "https://[::1]/m"}'),
            ("sampling", f"{{seed = {-(2**63)}, temperature = 2, top_p = 0, repeat_penalty = 10}}"),
            ("sampling", "{}"),
            ("adapters", "[]"),
            ("adapters", f'[{{name = "_f", sha256 = "{A}"}}]'),
            ("locked_at", "2026-01-31 12:00:00+00:00"),
        ],
    )
    def test_values_that_are_taken(self, key: str, value: str) -> None:
        lock = parse(model(**{key: value}))
        assert parse(dump(lock)) == lock

    @pytest.mark.parametrize(
        "url",
        [
            "http://h/m", "file:///m", "https://me:hunter2@h/m", "https://hunter2@h/m", "https:///m",
            "https://h/m?token=hunter2", "https://h/m#hunter2", "https://h", "https://h/", "https://h/a/",
            "https://h/../m", "https://h/a b", "https://h\\\\@evil/m", "https://h/m\\n", " https://h/m",
            "HTTPS://h/m", "//h/m", "https://-h/m", "https://h:x/m", "https://h/" + "m" * 2048,
        ],
    )  # fmt: skip
    def test_urls_that_are_refused_and_not_repeated(self, url: str) -> None:
        said = refusal(model(source=f'{{url = "{url}"}}'))
        assert said.startswith("models.m.source.url: must be an https URL")
        assert "hunter2" not in said

    @pytest.mark.parametrize(
        ("text", "where"),
        [
            ("version = 1\nmodel = 1", "model"),
            ("version = 1\n[models.m]\nSHA256 = 1", "models.m.SHA256"),
            ("version = 1\n[profiles.p.m]\nuses = 1\n" + model()[12:], "profiles.p.m.uses"),
            ("version = 1\n'a b' = 1", '"a b"'),
            ("version = 1\n'\u202e' = 1", r'"\u202e"'),
            (f"version = 1\n{'k' * 5000} = 1", "k" * 128),
        ],
    )
    def test_unknown_keys_are_named(self, text: str, where: str) -> None:
        assert refusal(text).startswith(f"{where}: there is no such key; there are ")

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "version = 2",
            "version = true",
            "version = 1.0",
            'version = "1"',
            "[models]",
            model()[12:],
        ],
    )
    def test_other_versions(self, text: str) -> None:
        assert refusal(text) == "version: must be 1, which is what this release reads"

    @pytest.mark.parametrize(
        "alias", ["''", "'a b'", "'a/b'", "'.'", "'..'", "'/etc/passwd'", "'é'", "a" * 129, "'a\t'"]
    )
    def test_aliases_are_model_ids(self, alias: str) -> None:
        body = model().partition("[models.m]")[2]
        assert "must be a name" in refusal(f"version = 1\n[models.{alias}]{body}")
        assert "must be a name" in refusal(f"version = 1\n[profiles.{alias}]")

    def test_aliases_come_once(self) -> None:
        body = model().partition("[models.m]")[2]
        for again in ("m", "'m'", '"m"', r'"\u006d"'):
            assert "twice (at line" in refusal(f"{model()}\n[models.{again}]{body}")
        assert "not TOML" in refusal(f"{model()}\nsize = 7")
        assert len(parse(f"{model()}\n[models.M]{body}").models) == 2

    def test_split_models_pin_each_file(self) -> None:
        first = '"b-00001-of-00003.GGUF"'
        assert parse(model(file=first, parts=f'["{B}", "{C}"]')).models["m"].parts == (B, C)
        for parts in ("", "[]", f'["{B}"]', f'["{B}", "{B}", "{B}"]'):
            assert "models.m.parts: must have 2 hashes" in refusal(model(file=first, parts=parts))
        later = refusal(model(file='"b-00002-of-00003.gguf"', parts=f'["{B}", "{C}"]'))
        assert later == "models.m.file: must name the first file of the split model"
        assert parse(model(file='"b-00001-of-00001.gguf"'))
        assert parse(model(file='"b-00001-of-00000.gguf"'))

    @pytest.mark.parametrize(
        "table", ["models = 1", "models = [1]", "[[models]]", "[models]\nm = 1"]
    )
    def test_tables_are_tables(self, table: str) -> None:
        assert "must be a table" in refusal(f"version = 1\n{table}")

    def test_size_and_encoding(self) -> None:
        comment = "version = 1\n#"
        assert parse(comment + "x" * (LARGEST - len(comment))) == Lock()
        assert "are the most" in refusal(comment + "x" * (LARGEST - len(comment) + 1))
        assert "are the most" in refusal(comment + "é" * (LARGEST // 2))
        assert refusal("version = 1 # \ud800") == "shimmy.lock is not UTF-8"

    @pytest.mark.parametrize(
        "text",
        [
            "a." * 400_000 + "a = 1",  # tomllib alone would want terabytes
            "a . \ta\t.\t" * 100_000 + "a = 1",
            '"a".' * 200_000 + "a = 1",
            "'#'.'\"'.\"'\"." + "a." * 400_000 + "a = 1",
            "[" + "a." * 400_000 + "a]",
            "[" + "a." * 200_000 + "a]\n" + "\n".join(f"k{i} = 1" for i in range(50_000)),
            "x = {" + "a." * 400_000 + "a = 1}",
            'x = ["""\n # """, {' + "a." * 400_000 + "a = 1}]",
            "x = " + "[" * 500_000,
            "x = " + "{a = " * 200_000,
            "x = " + "9" * 500_000,
            "size = 0x" + "f" * 500_000,
            'x = "' + r"\"" * 500_000,
            "x = '" + "'" * 500_000,
            "\\" * 500_000,
            '"' * 500_000,
            " " * 1_000_000 + "x",
            "." * 1_000_000,
        ],
        ids=range(18),
    )
    def test_hostile_texts_cost_little(self, text: str) -> None:
        refusal(text)
        refusal("version = 1\n" + text)

    def test_a_circle_with_a_long_tail_costs_little(self) -> None:
        size = 4_000
        lock = Lock(
            {f"m{i}": PIN for i in range(size)},
            {"p": {f"m{i}": Override(f"m{i + 1}") for i in range(size - 1)}},
        )
        assert resolve(parse(dump(lock)), "m0", "p") == PIN
        closed = {**lock.profiles["p"], f"m{size - 1}": Override("m7")}
        with pytest.raises(LockError, match="goes in a circle"):
            replace(lock, profiles={"p": closed})

    @settings(deadline=None)
    @given(st.text() | st.text("versionmdlaps=[]{}.\"'#\n 1").map("version = 1\n".__add__))
    def test_any_text_is_a_lock_or_refused(self, text: str) -> None:
        try:
            lock = parse(text)
        except LockError:
            return
        assert parse(dump(lock)) == lock

    @settings(deadline=None)
    @given(st.data())
    def test_any_change_to_a_lock_is_a_lock_or_refused(self, data: st.DataObject) -> None:
        text = dump(LOCK)
        at = data.draw(st.integers(0, len(text)))
        gone = data.draw(st.integers(0, 20))
        text = text[:at] + data.draw(st.text(max_size=5)) + text[at + gone :]
        try:
            lock = parse(text)
        except LockError:
            return
        assert parse(dump(lock)) == lock
        assert parse(update_text(text, LOCK)) == LOCK

    def test_errors_are_of_the_tree(self) -> None:
        plain, keyed = LockError("wrong"), LockError("wrong", "a.b")
        assert (keyed.code, keyed.status) == ("invalid_value", 400)
        assert (str(plain), plain.key, plain.param) == ("wrong", "", None)
        assert (str(keyed), keyed.key, keyed.param) == ("a.b: wrong", "a.b", "a.b")
        assert keyed.to_json()["error"]["message"] == "wrong"
        assert keyed._render_traceback_() == ["LockError: wrong (field 'a.b') [invalid_value]"]
        # What comes over a wire under this code is about a request, and no lock's.
        assert not isinstance(errors.from_code("invalid_value", "x", param="y"), LockError)


NAMES = st.from_regex(r"[A-Za-z0-9._:@-]{1,128}", fullmatch=True).filter(lambda n: n.strip("."))
HASHES = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
TOKENS = st.none() | st.integers(1, 2**31 - 1)
FOLDERS = ["a", "a/b.c", "漢 字/x", None]


def real(low: float, high: float, **options: Any) -> st.SearchStrategy[float | None]:
    return st.none() | st.floats(low, high, **options) | st.integers(int(low) + 1, int(high))


FILES = st.text(min_size=1, max_size=60).filter(
    lambda n: (
        n.isprintable()
        and n not in {".", ".."}
        and not re.search(r"[/\\]|^~|^[A-Za-z]:|-[0-9]{5}-of-[0-9]{5}\.gguf$", n, re.IGNORECASE)
    )
)
PINS = st.builds(
    Pin,
    file=FILES,
    size=st.integers(1, 2**63 - 1),
    sha256=HASHES,
    source=st.none()
    | st.builds(
        Source,
        repo=st.just("me/some.models"),
        revision=st.from_regex(r"[0-9a-f]{40}", fullmatch=True),
        folder=st.sampled_from(FOLDERS),
    )
    | st.builds(Source, url=st.just("https://h.example:1/a/~b/m.gguf")),
    chat_template=st.none() | HASHES,
    context_size=TOKENS,
    sampling=st.builds(
        Defaults,
        temperature=real(0, 2),
        top_k=st.none() | st.integers(0, 2**31 - 1),
        top_p=real(0, 1),
        min_p=real(0, 1),
        repeat_penalty=real(0, 10, exclude_min=True),
        seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    ),
    adapters=st.lists(
        st.builds(Adapter, NAMES, HASHES, st.floats(-100, 100)),
        max_size=3,
        unique_by=lambda adapter: adapter.name,
    ).map(tuple),
    engine=st.none() | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+ -]{0,63}", fullmatch=True),
    locked_at=st.none()
    | st.datetimes(timezones=st.just(UTC)).map(lambda time: time.replace(microsecond=0)),
)


@st.composite
def locks(draw: st.DrawFn) -> Lock:
    models = draw(st.dictionaries(NAMES, PINS, max_size=4))
    aliases = sorted(models)

    def override(i: int) -> st.SearchStrategy[Override]:
        # To later ones only: no circles.
        use = st.sampled_from([None, *aliases[i + 1 :]])
        return st.builds(Override, use, TOKENS).filter(Override().__ne__)

    profile = st.fixed_dictionaries({}, optional={a: override(i) for i, a in enumerate(aliases)})
    return Lock(models, draw(st.dictionaries(NAMES, profile, max_size=3)))


def shuffled(draw: Any, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: shuffled(draw, value[key]) for key in draw(st.permutations(sorted(value)))}


class TestDump:
    @settings(deadline=None)
    @given(locks())
    def test_round_trip(self, lock: Lock) -> None:
        text = dump(lock)
        assert parse(text) == lock
        assert dump(parse(text)) == text
        assert not re.search(r"[ \t]\n", text)

    @settings(deadline=None)
    @given(locks(), st.data())
    def test_digest_ignores_stamps_and_order(self, lock: Lock, data: st.DataObject) -> None:
        other = Lock(shuffled(data.draw, lock.models), shuffled(data.draw, lock.profiles))
        assert dump(other) == dump(lock)
        changed = {
            alias: replace(pin, engine="9", locked_at=NOON, adapters=tuple(reversed(pin.adapters)))
            for alias, pin in other.models.items()
        }
        assert digest(replace(other, models=changed)) == digest(lock)
        assert re.fullmatch("[0-9a-f]{64}", digest(lock))

    @pytest.mark.parametrize(
        "change",
        [
            {"file": "big-00001-of-00003.GGUF"}, {"size": 31}, {"sha256": B}, {"parts": (C, B)},
            {"source": None}, {"source": replace(FULL.source, folder=None)}, {"chat_template": None},
            {"context_size": 4095}, {"sampling": replace(FULL.sampling, seed=None)},
            {"adapters": ()}, {"adapters": (Adapter("zulu", B, 0.1), Adapter("french", C, -0.5))},
        ],
        ids=str,
    )  # fmt: skip
    def test_digest_counts_all_else(self, change: dict[str, Any]) -> None:
        pinned = Lock({"tutor": FULL})
        assert digest(Lock({"tutor": replace(FULL, **change)})) != digest(pinned)
        assert digest(Lock({"tutor2": FULL})) != digest(pinned)
        assert digest(replace(pinned, profiles={"hub": {}})) != digest(pinned)

    def test_equal_locks_have_equal_digests(self) -> None:
        one = Lock({"m": replace(PIN, sampling=Defaults(temperature=0, top_p=1))})
        two = Lock({"m": replace(PIN, sampling=Defaults(temperature=-0.0, top_p=1.0))})
        assert one == two
        assert digest(one) == digest(two)

    @pytest.mark.parametrize(
        "lock",
        [
            Lock({"a" * 129: PIN}), Lock({"a b": PIN}), Lock({"\U0001f600": PIN}), Lock({"\ud800": PIN}),
            Lock({"m": replace(PIN, file="/m")}), Lock({"m": replace(PIN, file='"\n[x]')}),
            Lock({"m": replace(PIN, file="\ud800")}), Lock({"m": replace(PIN, size=True)}),
            Lock({"m": replace(PIN, sampling=Defaults(float("nan")))}),
            Lock({"m": replace(PIN, locked_at=NOON.replace(tzinfo=None))}),
            Lock({"m": replace(PIN, locked_at=NOON.replace(microsecond=1))}),
            Lock({"m": PIN}, {"p": {"m": Override()}}),
            Lock({f"m{i}": PIN for i in range(10_000)}),
        ],
        ids=range(13),
    )  # fmt: skip
    def test_what_cannot_be_read_is_not_dumped(self, lock: Lock) -> None:
        with pytest.raises(LockError):
            dump(lock)

    def test_comments_at_the_top_stay(self) -> None:
        old = f"\n# Ask Ann before\r\n#  you change this.\n\n# 漢  \nversion = 1 # gone\n{model()[12:]}\n# gone"
        text = update_text(old, LOCK)
        assert text == f"# Ask Ann before\n#  you change this.\n\n# 漢\n\n{dump(LOCK)}"
        assert update_text(text, LOCK) == text
        assert update_text("version = 1", LOCK) == dump(LOCK)
        for broken in ("", "<<<<<<< HEAD\nversion = 1", "version = 2"):
            with pytest.raises(LockError):
                update_text(broken, LOCK)
        with pytest.raises(LockError, match="are the most"):
            update_text("#" * (LARGEST - 20) + "\nversion = 1", LOCK)


class TestProfiles:
    def test_resolve(self) -> None:
        assert resolve(LOCK, "tutor") == resolve(LOCK, "tutor", "hub") == FULL
        assert resolve(LOCK, "tutor", "laptop") == replace(PIN, context_size=256)
        assert resolve(LOCK, "small", "laptop") == replace(PIN, context_size=128)
        assert resolve(LOCK, "qwen3:4b@x.y", "laptop") == PIN

    def test_a_chain_and_its_first_context(self) -> None:
        models = {name: replace(PIN, size=i) for i, name in enumerate("abc", 1)}
        profile = {"a": Override("b"), "b": Override("c", 20), "c": Override(None, 30)}
        lock = parse(dump(Lock(models, {"p": profile})))
        assert resolve(lock, "a", "p") == replace(models["c"], context_size=20)
        assert resolve(lock, "c", "p") == replace(models["c"], context_size=30)

    def test_unknown_names_are_told_the_known(self) -> None:
        for name in ("Tutor", "tutor ", "", "self-test", "x" * 10_000):
            with pytest.raises(
                LockError, match=r"there are: qwen3:4b@x\.y, small, tutor$"
            ) as caught:
                resolve(LOCK, name)
            assert len(str(caught.value)) < 300
        with pytest.raises(
            LockError, match="no profile 'desk' in the lock; there are: hub, laptop"
        ):
            resolve(LOCK, "tutor", "desk")
        with pytest.raises(LockError, match="there are: none"):
            resolve(Lock(), "tutor")

    @pytest.mark.parametrize(
        ("profile", "said"),
        [
            ("x = {use = 'm'}", "profiles.p.x: there is no model 'x' in the lock; there are: m"),
            (
                "m = {use = 'x'}",
                "profiles.p.m.use: there is no model 'x' in the lock; there are: m",
            ),
            ("m = {use = 'm'}", "profiles.p.m.use: goes in a circle: m"),
            ("m = {}", "profiles.p.m: must have use, context_size or both"),
            ("m = 'x'", "profiles.p.m: must be a table"),
            ("m = {context_size = 0}", "profiles.p.m.context_size: must be a whole number from 1"),
            ("m = {sha256 = 'x'}", "profiles.p.m.sha256: there is no such key"),
        ],
    )
    def test_what_is_refused(self, profile: str, said: str) -> None:
        assert refusal(f"{model()}\n[profiles.p]\n{profile}").startswith(said)

    def test_a_circle_of_two(self) -> None:
        profile = {"a": Override("b"), "b": Override("a", 5)}
        with pytest.raises(LockError, match=r"profiles\.p\.a\.use: goes in a circle: a → b → …"):
            Lock({"a": PIN, "b": PIN}, {"p": profile})


class TestChanges:
    def test_added(self) -> None:
        lock = added(Lock(), "m", PIN)
        assert lock == Lock({"m": PIN})
        with pytest.raises(LockError, match=r"^models\.m: is pinned already"):
            added(lock, "m", FULL)
        assert added(lock, "m", FULL, replacing=True).models == {"m": FULL}
        assert added(Lock(), "m", FULL, replacing=True).models == {"m": FULL}
        for alias, pin in (("a/b", PIN), ("m", replace(PIN, sha256="x"))):
            with pytest.raises(LockError):
                added(Lock(), alias, pin)
        assert lock == Lock({"m": PIN})

    def test_removed(self) -> None:
        assert removed(LOCK, "qwen3:4b@x.y").models.keys() == {"tutor", "small"}
        assert len(LOCK.models) == 3
        for alias in ("tutor", "small"):
            with pytest.raises(LockError, match=f"models.{alias}: is named by the profile laptop"):
                removed(LOCK, alias)
        with pytest.raises(LockError, match="there is no model 'x'"):
            removed(LOCK, "x")

    def test_renamed(self) -> None:
        lock = renamed(LOCK, "small", "tiny")
        assert lock.models.keys() == {"tutor", "tiny", "qwen3:4b@x.y"}
        assert lock.profiles["laptop"] == {
            "tutor": Override("tiny", 256),
            "tiny": Override(None, 128),
        }
        assert renamed(lock, "tiny", "small") == LOCK
        for old, new in (("small", "tutor"), ("small", "small"), ("x", "y"), ("small", "a/b")):
            with pytest.raises(LockError):
                renamed(LOCK, old, new)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home" / "a" / "b").mkdir(parents=True)
    return tmp_path / "home"


def lay(folder: Path) -> Path:
    path = folder / NAME
    path.write_text(dump(LOCK))
    return path


class TestFind:
    def test_the_nearest_upwards_to_home(self, home: Path) -> None:
        start = home / "a" / "b"
        above = lay(home.parent)
        assert find(start, home) is None
        assert (
            find(start, None) == find(start, home.parent) == find(start, start / "other") == above
        )
        for folder in (home, home / "a", start):
            path = lay(folder)
            assert find(start, home) == path
            assert read(path) == LOCK
        assert find(home, home) == home / NAME
        assert find(Path("/"), None) is None

    def test_a_relative_start(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = lay(home)
        monkeypatch.chdir(home / "a" / "b")
        assert find(Path(), home) == find(Path("../b"), home) == path

    def test_links_on_the_way_are_resolved_first(self, home: Path, tmp_path: Path) -> None:
        (tmp_path / "elsewhere" / "in").mkdir(parents=True)
        (home / "a" / "link").symlink_to(tmp_path / "elsewhere" / "in")
        lay(home)
        assert find(home / "a" / "link", tmp_path) is None
        there = lay(tmp_path / "elsewhere")
        assert find(home / "a" / "link", tmp_path) == there
        (tmp_path / "my home").symlink_to(home)
        assert find(tmp_path / "my home" / "a", tmp_path / "my home") == home / NAME
        lay(tmp_path)
        (home / NAME).unlink()
        assert find(home / "a", tmp_path / "my home") is None

    @pytest.mark.parametrize("kind", ["link", "dangling", "self", "folder", "pipe", "large"])
    def test_odd_ones_are_refused_and_not_passed_over(self, home: Path, kind: str) -> None:
        lay(home)
        odd = home / "a" / NAME
        if kind == "folder":
            odd.mkdir()
        elif kind == "pipe":
            os.mkfifo(odd)
        elif kind == "large":
            odd.write_bytes(b"#" * (LARGEST + 1))
        else:
            odd.symlink_to({"link": home / NAME, "dangling": home / "x", "self": odd}[kind])
        with pytest.raises(LockError, match=r"^shimmy\.lock, 1 folder up, (is|has) ") as caught:
            find(home / "a" / "b", home)
        assert str(home) not in str(caught.value)
        for careless in (read, lambda path: write(path, LOCK)):
            with pytest.raises(LockError) as caught:
                careless(odd)
            assert str(home) not in str(caught.value)
        assert read(home / NAME) == LOCK

    def test_another_file_system(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lay(home)
        plain = Path.stat

        def mounted(path: Path, **options: Any) -> os.stat_result:
            status = plain(path, **options)
            if path == home:
                return os.stat_result((*status[:2], status.st_dev + 1, *status[3:]))
            return status

        assert find(home / "a" / "b", None) == home / NAME
        monkeypatch.setattr(Path, "stat", mounted)
        assert find(home / "a" / "b", None) is None
        assert find(home, None) == home / NAME

    def test_a_folder_that_anybody_may_write_to(self, home: Path) -> None:
        path = lay(home)
        home.chmod(0o777)
        assert find(home / "a", None) == path  # as in containers: everybody is one and the same
        home.chmod(0o1777)
        assert find(home / "a", None) is None
        assert find(home, None) == path

    def test_what_cannot_be_looked_at(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lay(home)
        plain = Path.lstat

        def denied(path: Path) -> os.stat_result:
            if path == home / "a" / NAME:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return plain(path)

        monkeypatch.setattr(Path, "lstat", denied)  # tests may run as root, whom no mode stops
        with pytest.raises(
            LockError, match=r"1 folder up, cannot be looked at: Permission denied$"
        ):
            find(home / "a" / "b", home)
        assert find(home, home) == home / NAME

    def test_a_start_that_is_none(self, home: Path) -> None:
        (home / "loop").symlink_to(home / "loop")
        for start in (home / "x", home / "loop", Path("nul\0l")):
            with pytest.raises(LockError, match="the folder to look from"):
                find(start, home)
        book = home / "book.ipynb"
        book.touch()
        with pytest.raises(LockError, match="Not a directory"):
            find(book, home)


class TestFile:
    def test_unreadable(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(LockError, match="cannot be read: No such file"):
            read(home / NAME)
        (home / NAME).write_bytes(b"version = 1 # \xff")
        with pytest.raises(LockError, match="is not UTF-8"):
            read(home / NAME)

        def denied(*_: object) -> int:
            raise PermissionError(errno.EACCES, "Permission denied", "/secret")

        monkeypatch.setattr(os, "open", denied)
        with pytest.raises(LockError, match=r"cannot be read: Permission denied$"):
            read(home / NAME)

    def test_one_that_grows_while_it_is_read(
        self, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (home / NAME).write_bytes(b"#" * (LARGEST + 1))
        monkeypatch.setattr(lockfile, "_refuse_odd", lambda *_: None)
        with pytest.raises(LockError, match="has more than"):
            read(home / NAME)

    def test_write(self, home: Path) -> None:
        path = home / NAME
        before = os.umask(0o077)
        try:
            write(path, LOCK)
        finally:
            os.umask(before)
        assert read(path) == LOCK
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        path.write_text(f"# mine\n{dump(Lock())}")
        write(path, LOCK)
        assert path.read_text() == f"# mine\n\n{dump(LOCK)}"
        assert sorted(entry.name for entry in home.iterdir()) == ["a", NAME]

    def test_a_broken_file_is_not_written_over(self, home: Path) -> None:
        (home / NAME).write_text("<<<<<<< HEAD\n")
        with pytest.raises(LockError, match="not TOML"):
            write(home / NAME, LOCK)
        assert (home / NAME).read_text() == "<<<<<<< HEAD\n"

    def test_a_link_that_comes_meanwhile_is_replaced(
        self, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, victim = home / NAME, home / "victim"
        victim.write_text("precious")
        plain = Path.replace

        def late(temporary: Path, target: Path) -> Path:
            target.symlink_to(victim)
            return plain(temporary, target)

        monkeypatch.setattr(Path, "replace", late)
        write(path, LOCK)
        assert not path.is_symlink()
        assert victim.read_text() == "precious"

    @pytest.mark.parametrize("call", ["os.fsync", "os.fchmod", "pathlib.Path.replace"])
    @pytest.mark.parametrize("there", [True, False])
    def test_a_failure_leaves_what_was_there(
        self, home: Path, monkeypatch: pytest.MonkeyPatch, call: str, there: bool
    ) -> None:
        path = home / NAME
        old = "# mine\nversion = 1\n"
        if there:
            path.write_text(old)

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(call, full)
        with pytest.raises(OSError, match="No space left"):
            write(path, LOCK)
        assert [entry.name for entry in home.iterdir() if entry.name != "a"] == [NAME] * there
        assert not there or path.read_text() == old

    def test_a_bad_lock_is_not_written(self, home: Path) -> None:
        with pytest.raises(LockError):
            write(home / NAME, Lock({"a/b": PIN}))
        assert not (home / NAME).exists()

    def test_a_folder_that_cannot_be_synced(
        self, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = os.fsync

        def picky(handle: int) -> None:
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                raise OSError(errno.EINVAL, "Invalid argument")
            plain(handle)

        monkeypatch.setattr(os, "fsync", picky)
        write(home / NAME, LOCK)
        assert read(home / NAME) == LOCK


SAME = Found(
    size=30,
    sha256=A,
    parts=(B, C),
    chat_template=C,
    context_size=4096,
    adapters={"zulu": B, "french": C, "more": A},
    engine="0.3.36",
)


class TestDrift:
    def test_none(self) -> None:
        assert drift(FULL, SAME) == drift(FULL, replace(SAME, context_size=9999)) == []

    @pytest.mark.parametrize(
        ("change", "keys"),
        [
            ({"size": 31}, ["size"]),
            ({"sha256": C}, ["sha256"]),
            ({"parts": (B, A)}, ["parts[1]"]),
            ({"parts": (B,)}, ["parts[1]"]),
            ({"parts": ()}, ["parts[0]", "parts[1]"]),
            ({"parts": (B, C, A)}, ["parts[2]"]),
            ({"chat_template": A}, ["chat_template"]),
            ({"chat_template": None}, ["chat_template"]),
            ({"context_size": 4095}, ["context_size"]),
            ({"adapters": {"zulu": B}}, ["adapters.french"]),
            ({"adapters": {"zulu": A, "french": C}}, ["adapters.zulu"]),
            ({"engine": "0.3.37"}, ["engine"]),
            (
                {"engine": "9", "context_size": 1, "sha256": B, "size": 1},
                ["size", "sha256", "context_size", "engine"],
            ),
        ],
    )
    def test_each_alone_and_several(self, change: dict[str, Any], keys: list[str]) -> None:
        found = drift(FULL, replace(SAME, **change))
        assert [each.key for each in found] == keys
        for each in found:
            engine = each.key == "engine"
            assert each.severity is (Severity.WARN if engine else Severity.REFUSE)
            assert each.expected != each.found
            assert str(each).startswith(f"{each.key}: ")
            assert f"{each.expected} is pinned, {each.found} was found" in str(each)

    def test_what_is_not_pinned_does_not_drift(self) -> None:
        other = Found(
            size=7, sha256=A, context_size=1, engine="9", chat_template=B, adapters={"x": A}
        )
        assert drift(PIN, other) == []


def keys(rule: Any, path: str = "", *names: str) -> Iterator[tuple[str, bool]]:
    """Each key of the schema as the page writes it, and whether it must be given."""
    if isinstance(rule, lockschema._Array):
        yield from keys(rule.rule, path, *names)
    elif isinstance(rule, lockschema._Named):
        yield from keys(rule.rule, f"{path}.{names[0]}", *names[1:])
    elif isinstance(rule, lockschema._Table):
        assert rule.rules.keys() == {f.name for f in fields(rule.kind)}
        for name, inner in rule.rules.items():
            users = {"models": ("ALIAS",), "profiles": ("PROFILE", "ALIAS")}.get(name, names)
            deeper = list(keys(inner, f"{path}.{name}".strip("."), *users))
            yield from deeper or [(f"{path}.{name}", name in rule.required())]


class TestPage:
    def test_the_example(self) -> None:
        example = PAGE[PAGE.index("```toml\n") + 8 :].partition("```")[0]
        lock = parse(example)
        assert update_text(example, lock) == example
        assert resolve(lock, "tutor", "laptop").context_size == 4096
        assert resolve(lock, "tutor", "laptop").file == lock.models["tutor-small"].file
        assert resolve(lock, "tutor", "hub") == lock.models["tutor"]
        used = set(re.findall(r"\b([a-z_0-9]+) = ", example))
        assert used >= {key.rpartition(".")[2] for key, _ in keys(lockschema.SCHEMA)} - {
            "parts", "folder", "top_k", "top_p", "min_p", "repeat_penalty",
        }  # fmt: skip

    def test_every_key_is_in_the_table(self) -> None:
        rows = re.findall(r"^\| `(\S+)` \| (.+?) \| .+ \|$", PAGE, re.MULTILINE)
        table = {key: needed == "yes" for key, needed in rows}
        assert list(table.items()) == [
            ("version", True),
            *((key, needed) for key, needed in keys(lockschema.SCHEMA)),
        ]

    def test_every_drift_is_in_the_other(self) -> None:
        table = PAGE[PAGE.index("| what differs | then |") :]
        for each in drift(
            replace(FULL, size=1, sha256=B, context_size=9999, engine="1"),
            replace(SAME, parts=(), chat_template=None, adapters={}),
        ):
            row = next(
                line
                for line in table.split("\n")
                if f"`{re.match('[a-z0-9_]+', each.key)[0]}`" in line
            )
            assert {"refuse": "refused", "warn": "a warning"}[each.severity] in row
        assert set(drifting.Severity) == {"refuse", "warn"}


class TestSampling:
    """A lock's defaults are what a request may set, within the same bounds."""

    @pytest.mark.parametrize("name", [f.name for f in fields(Defaults)])
    def test_same_fields_and_bounds(self, name: str) -> None:
        assert name in {f.name for f in fields(Sampling)}
        for value in (-(2**63) - 1, -(2**63), -1, -0.1, 0, 0.1, 1, 1.1, 2, 2.1, 10, 10.1, 2**31 - 1,
                      2**31, 2**63 - 1, 2**63, True, "1"):  # fmt: skip
            try:
                _Common.model_validate({"model": "m", name: value})
            except ValueError:
                with pytest.raises(LockError):
                    parse(model(sampling=f"{{{name} = {json.dumps(value)}}}"))
            else:
                assert parse(model(sampling=f"{{{name} = {value}}}"))
