"""The models that are suggested: what the list says holds together, and what fits comes in order.

Cases, of the list: unique ids; sizes against parameters and quantisation; memory as the module says
that it is reckoned; a model for each task, and one to talk to in machines of 4, 8, 16 and 32 GB;
references; licences, the restricted ones last; architectures that the engine knows are not here to
be seen, so they are looked up when an entry is added.
Of reading: each key missing, unknown, of another type; zero, negative, true for a number; a task twice,
unknown, none; a path for a file; memory below size; an id twice; a restricted one too early; versions.
Of asking: no task, each task, one that there is not; nothing fits, exactly, one byte short; order.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimmy_jupyter.errors import InvalidValue
from shimmy_jupyter.models import suggest
from shimmy_jupyter.models.suggest import (
    PERMISSIVE,
    TASKS,
    Suggestion,
    first,
    fitting,
    parse,
    suggestions,
)

ALL = suggestions()
TEXT = Path(suggest.__file__).with_name("suggested.json").read_text(encoding="utf-8")
GB = 10**9
CONTEXT = 4096
COMPUTING = 300_000_000
BITS = {"Q4_K_M": (4.5, 6), "Q8_0": (8.4, 9), "MXFP4": (4.2, 5)}
SHAPES = {
    "qwen3-0.6b": (28, 8, 128),
    "qwen3-1.7b": (28, 8, 128),
    "qwen3-4b": (36, 8, 128),
    "qwen3-8b": (36, 8, 128),
    "qwen3-14b": (40, 8, 128),
    "smollm3-3b": (36, 4, 128),
    "ministral-3-3b": (26, 8, 128),
    "ministral-3-14b": (40, 8, 128),
    "qwen2.5-coder-1.5b": (28, 2, 128),
    "qwen2.5-coder-7b": (28, 4, 128),
    "qwen2.5-coder-14b": (48, 8, 128),
    "ministral-3-8b-reasoning": (34, 8, 128),
    "gpt-oss-20b": (24, 8, 64),
    "nomic-embed-text-v1.5": (0, 0, 0),
    "qwen3-embedding-0.6b": (28, 8, 128),
    "bge-reranker-v2-m3": (0, 0, 0),
    "embeddinggemma-300m": (0, 0, 0),
    "gemma-3-4b": (34, 4, 256),
}
"""Layers, KV heads and their width, as the models' configurations have them; none without a cache."""

each = pytest.mark.parametrize("one", ALL, ids=lambda one: one.id)


class TestTheList:
    def test_ids_are_unique_and_so_are_references(self) -> None:
        assert 14 <= len(ALL) <= 18
        assert len({one.id for one in ALL}) == len(ALL)
        assert len({one.reference for one in ALL}) == len(ALL)

    @each
    def test_a_reference_is_a_repository_and_a_file_or_a_quantisation(
        self, one: Suggestion
    ) -> None:
        owner_and_name, _, rest = one.reference.partition(":")
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", owner_and_name)
        assert rest == (one.file or one.quantisation)
        assert re.fullmatch(r"[\w.-]+\.gguf" if one.file else r"[A-Z][A-Z0-9_]+", rest)

    @each
    def test_a_file_says_its_quantisation(self, one: Suggestion) -> None:
        assert one.file is None or one.quantisation.lower() in one.file.lower()

    @each
    def test_bits_per_weight_are_those_of_the_quantisation(self, one: Suggestion) -> None:
        low, high = BITS[one.quantisation]
        assert 3 <= low < one.size_bytes * 8 / one.parameters < high <= 9

    @each
    def test_memory_is_reckoned_as_the_module_says(self, one: Suggestion) -> None:
        layers, heads, width = SHAPES[one.id]
        kv = 4 * layers * heads * width * CONTEXT
        also_generates = one.tasks == ("embedding",) and kv
        needed = one.size_bytes + kv * (1.5 if also_generates else 1) + COMPUTING
        assert one.memory_bytes >= one.size_bytes
        assert one.memory_bytes == math.ceil(needed / (GB / 10)) * GB // 10

    @each
    def test_numbers_say_that_they_are_rounded(self, one: Suggestion) -> None:
        for number in (one.parameters, one.size_bytes):
            assert float(f"{number:.3g}") == number

    @each
    def test_a_licence_and_a_line_of_advice(self, one: Suggestion) -> None:
        assert one.licence.strip()
        assert one.restricted == (one.licence not in PERMISSIVE)
        assert one.note.endswith(".")
        assert len(one.note) <= 100
        assert one.restricted == ("terms of use" in one.note)

    @pytest.mark.parametrize("task", TASKS)
    def test_each_task_has_one_with_a_permissive_licence(self, task: str) -> None:
        assert not suggestions(task)[0].restricted

    @pytest.mark.parametrize("machine", [4, 8, 16, 32])
    def test_each_machine_has_one_to_talk_to(self, machine: int) -> None:
        free = (machine - 2) * GB
        best = fitting(free, "chat")[0]
        assert best.memory_bytes <= free
        assert not best.restricted
        assert machine > 16 or best.memory_bytes >= free * 0.7

    @pytest.mark.parametrize("machine", [4, 8, 16, 32])
    @pytest.mark.parametrize("task", ["code", "reasoning", "embedding", "rerank"])
    def test_and_one_for_each_other_task(self, machine: int, task: str) -> None:
        assert fitting((machine - 2) * GB, task)


class TestReading:
    def test_what_is_in_the_file_comes_out(self) -> None:
        entries = json.loads(TEXT)["models"]
        assert [one.id for one in ALL] == [entry["id"] for entry in entries]
        assert all(list(one.tasks) == e["tasks"] for one, e in zip(ALL, entries, strict=True))

    def test_it_is_read_once(self) -> None:
        assert suggestions("rerank")[0] is suggestions("rerank")[0]

    @pytest.mark.parametrize("key", sorted(json.loads(TEXT)["models"][0]))
    def test_a_key_that_is_missing(self, key: str) -> None:
        with pytest.raises(ValueError, match=r"models\[1\] must have the keys"):
            parse(changed(1, lambda entry: entry.pop(key)))

    def test_a_key_that_is_unknown(self) -> None:
        with pytest.raises(ValueError, match=r"models\[0\] must have the keys"):
            parse(changed(0, lambda entry: entry.update(sha256="0" * 64)))

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("id", "With Blank"), ("id", ""), ("id", 3), ("id", "../x"),
            ("tasks", []), ("tasks", "chat"), ("tasks", ["chat", "chat"]), ("tasks", ["poetry"]), ("tasks", [["chat"]]),
            ("repo", "name"), ("repo", "a/b/c"), ("repo", "https://a/b"), ("repo", None),
            ("file", "folder/m.gguf"), ("file", "m.bin"), ("file", ""), ("file", 1), ("file", "m.gguf\n"),
            ("quantisation", "q4_k_m"), ("quantisation", None), ("quantisation", ""),
            ("licence", ""), ("licence", " "), ("licence", None),
            ("parameters", 0), ("parameters", -1), ("parameters", True), ("parameters", 1.5), ("parameters", "4B"),
            ("size_bytes", 0), ("size_bytes", None), ("size_bytes", "2GB"),
            ("memory_bytes", 0), ("memory_bytes", 1), ("memory_bytes", None),
            ("note", ""), ("note", "two\nlines"), ("note", 5),
        ],
    )  # fmt: skip
    def test_a_value_that_is_wrong_is_named(self, key: str, value: object) -> None:
        with pytest.raises(ValueError, match=rf"models\[2\]\.{key} "):
            parse(changed(2, lambda entry: entry.update({key: value})))

    def test_no_file_is_a_value(self) -> None:
        found = parse(changed(0, lambda entry: entry.update(file=None)))
        assert found[0].reference == "Qwen/Qwen3-0.6B-GGUF:Q8_0"

    def test_an_id_that_is_there_twice(self) -> None:
        with pytest.raises(ValueError, match="twice"):
            parse(changed(1, lambda entry: entry.update(id=ALL[0].id)))

    def test_restricted_ones_come_after_the_others(self) -> None:
        with pytest.raises(ValueError, match="restricted"):
            parse(changed(0, lambda entry: entry.update(licence="Llama 3.2")))

    @pytest.mark.parametrize(
        "text",
        [
            "[]",
            '{"models": []}',
            '{"version": 1}',
            '{"version": 2, "models": []}',
            '{"version": 1, "models": {}}',
            '{"version": 1, "models": ["qwen"]}',
            '{"version": 1, "models": [], "more": 0}',
            "{",
        ],
    )
    def test_a_document_that_is_no_list(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"suggested\.json|Expecting"):
            parse(text)


class TestAsking:
    @pytest.mark.parametrize("task", TASKS)
    def test_by_task(self, task: str) -> None:
        assert suggestions(task) == tuple(one for one in ALL if task in one.tasks)
        assert suggestions(task)

    @pytest.mark.parametrize("task", ["poetry", "", "Chat", "chat "])
    def test_a_task_that_there_is_not_names_those_there_are(self, task: str) -> None:
        for ask in (suggestions, lambda wrong: fitting(10**12, wrong)):
            with pytest.raises(InvalidValue) as refused:
                ask(task)
            assert refused.value.param == "task"
            assert all(known in refused.value.message for known in TASKS)

    def test_exactly_and_one_byte_short(self) -> None:
        one = min(ALL, key=lambda one: one.memory_bytes)
        assert fitting(one.memory_bytes) == (one,)
        assert fitting(one.memory_bytes - 1) == ()
        assert fitting(0) == ()

    def test_what_is_restricted_is_last_and_before_that_the_largest_first(self) -> None:
        assert [one.id for one in fitting(4 * GB, "chat")] == [
            "qwen3-4b", "ministral-3-3b", "qwen3-1.7b", "smollm3-3b", "qwen3-0.6b", "gemma-3-4b",
        ]  # fmt: skip

    @given(
        available=st.integers(min_value=-1, max_value=20 * GB),
        task=st.none() | st.sampled_from(TASKS),
    )
    def test_what_fits(self, available: int, task: str | None) -> None:
        found = fitting(available, task)
        assert set(found) == {one for one in suggestions(task) if one.memory_bytes <= available}
        assert len(found) == len(set(found))
        for before, after in zip(found, found[1:], strict=False):
            if task is None and before.tasks[0] != after.tasks[0]:
                assert TASKS.index(before.tasks[0]) < TASKS.index(after.tasks[0])
            elif before.restricted == after.restricted:
                assert before.memory_bytes >= after.memory_bytes
            else:
                assert after.restricted


def changed(place: int, change: Callable[[dict[str, Any]], object]) -> str:
    document = json.loads(TEXT)
    change(document["models"][place])
    return json.dumps(document)


class TestFirst:
    def test_the_largest_that_is_easy(self) -> None:
        chosen = fitting(32 * GB)
        begin = first(chosen, (), 32 * GB)
        assert begin is not None
        easy = [one.memory_bytes for one in chosen if one.memory_bytes <= 4e9]
        assert begin.memory_bytes == max(easy)

    def test_half_of_the_memory_stays(self) -> None:
        begin = first(fitting(4 * GB, "chat"), (), 4 * GB)
        assert begin is not None
        assert begin.memory_bytes <= 2 * GB

    def test_the_smallest_where_none_is_easy(self) -> None:
        chosen = fitting(2 * GB, "chat")
        begin = first(chosen, (), 2 * GB)
        assert begin is not None
        assert begin.memory_bytes == min(one.memory_bytes for one in chosen)

    def test_not_what_is_here(self) -> None:
        chosen = fitting(32 * GB, "code")
        begin = first(chosen, (), 32 * GB)
        assert begin is not None
        other = first(chosen, {begin.repo}, 32 * GB)
        assert other is not None
        assert other.repo != begin.repo
        assert first(chosen, {one.repo for one in chosen}, 32 * GB) is None
        assert first((), (), 32 * GB) is None
