"""Whatever a server and its clients can do, in any order: what must hold after every step.

The machine keeps what a backend would: the cells of each slot, with the token in each and whose
prompt and with which adapter it was computed. So a row at a wrong position, a cell with a wrong token, a
slot changed that is not open, and KV of one principal, or adapter, under another's sequence are all found
out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from shimmy_jupyter.core import messages as m
from shimmy_jupyter.core.fairness import COMPLETION_COST
from shimmy_jupyter.core.scheduler import Scheduler
from shimmy_jupyter.types import Failure, FinishReason, Sampling, Scored

GREEDY = Sampling(temperature=0)
SCORING = Sampling(temperature=0, prompt_logprobs=0)
WEIGHTS = {"b": 2.0}
PUBLIC = tuple(range(40))
Cell = tuple[int, tuple[str, str]]

CAPACITIES = [
    m.Capacity(
        slots=slots, kv_tokens=400, context_size=160, batch_tokens=48, queue=12, sequences=3,
        can_copy=copy, can_trim=trim, saved_tokens=saved, weights=WEIGHTS, lookup=lookup,
        idle_rows=idle, aside_tokens=aside,
    )
    for slots, copy, trim, saved, lookup, idle, aside in (
        (8, True, True, 150, True, 0, 40), (8, True, True, 150, True, 20, 20),
        (5, True, True, 0, True, 20, 0), (4, False, True, 120, False, 20, 0),
        (6, True, False, 200, True, 20, 0),
    )
]  # fmt: skip


class Machine(RuleBasedStateMachine):
    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.count = 0
        self.asked: dict[int, m.Submitted] = {}
        self.text: dict[int, str] = {}
        self.ends: dict[int, m.Finish] = {}
        self.open: set[int] = set()
        self.cells: dict[int, list[Cell]] = {}
        self.saved: dict[int, list[Cell]] = {}
        self.served: dict[str, float] = {}
        self.guessed = self.aside = 0
        self.memory = True
        """Whether there is room for what is to be saved."""
        self.unsaved: list[int] = []
        self.scored: set[int] = set()
        """Those whose prompt's tokens have come with their log-probabilities."""

    @initialize(capacity=st.sampled_from(CAPACITIES), public=st.booleans())
    def start(self, capacity: m.Capacity, public: bool) -> None:
        self.scheduler = Scheduler(capacity)
        self.public = PUBLIC if public else ()
        self.send(m.PublicDeclared((self.public,)))

    def send(self, event: m.Event) -> list[m.Instruction]:
        self.now += 0.5
        said = self.scheduler.handle(event, self.now)
        for instruction in said:
            self.obey(instruction)
        return said

    def obey(self, instruction: m.Instruction) -> None:
        match instruction:
            case m.OpenSlot(slot=slot, private_tokens=private):
                assert slot not in self.open
                assert (slot == self.scheduler.capacity.private_slot) == bool(private)
                self.open.add(slot)
                self.cells.setdefault(slot, [])
            case m.CloseSlot(slot, keep):
                self.open.remove(slot)
                del self.cells[slot][keep:]
            case m.TrimSlot(slot, tokens):
                assert self.scheduler.capacity.can_trim or tokens in (0, len(self.cells[slot]))
                del self.cells[slot][tokens:]
            case m.CopyPrefix(source, target, tokens):
                assert self.scheduler.capacity.can_copy
                assert not self.cells.get(target)
                assert tokens <= len(self.cells[source])
                self.cells[target] = self.cells[source][:tokens]
            case m.SaveSlot(slot, key) if not self.memory:
                self.unsaved.append(key)
            case m.SaveSlot(slot, key):
                self.saved[key] = list(self.cells[slot])
            case m.RestoreSlot(key, slot):
                assert not self.cells.get(slot)
                self.cells[slot] = list(self.saved[key])
            case m.DropSaved(key) if key in self.unsaved:
                pass
            case m.DropSaved(key):
                del self.saved[key]
            case m.Emit(id=id, prompt=True, scored=scored):
                assert id not in self.ends
                assert not self.text[id]
                assert id not in self.scored
                self.scored.add(id)
                prompt = self.asked[id].prompt
                assert tuple(one.token for one in scored) == prompt[1:]
            case m.Emit(id=id, text=text):
                assert id not in self.ends
                assert (id in self.scored) == (self.asked[id].sampling is SCORING)
                assert text
                self.text[id] += text
            case m.Finish(id=id):
                assert id not in self.ends
                self.ends[id] = instruction

    def write(self, row: m.Row) -> None:
        cells = self.cells[row.slot]
        assert len(cells) == row.start
        (sequence,) = [s for s in self.scheduler.running.values() if s.slot == row.slot]
        cells += [(token, sequence.owner) for token in row.tokens]

    @rule(
        target=ids,
        who=st.sampled_from("abc"),
        shared=st.integers(0, 90),
        own=st.integers(1, 30),
        kind=st.integers(0, 2),
        max_tokens=st.integers(1, 20),
        sampling=st.sampled_from([GREEDY, GREEDY, SCORING]),
        stop=st.sampled_from([(), ("ab",), ("b", "aab")]),
        reproducible=st.sampled_from([False, False, False, True]),
        adapter=st.sampled_from(["", "", "x", "y"]),
    )
    def submit(
        self, who: str, shared: int, own: int, kind: int, max_tokens: int, sampling: Sampling,
        stop: tuple[str, ...], reproducible: bool, adapter: str,
    ) -> int:  # fmt: skip
        self.count += 1
        prompt = (*range(shared), *range(1000 * (kind + 1), 1000 * (kind + 1) + own))
        if sampling is SCORING and max_tokens < 5:
            max_tokens = 0
        asked = prompt, max_tokens, sampling, stop, reproducible, adapter
        event = m.Submitted(self.count, who, *asked)
        self.asked[event.id], self.text[event.id] = event, ""
        self.send(event)
        return event.id

    @rule(id=ids, kind=st.sampled_from([m.CancelRequested, m.DeadlinePassed]))
    def give_up(self, id: int, kind: type[m.CancelRequested]) -> None:
        self.send(kind(id))

    @rule(id=ids, kind=st.sampled_from([m.ReaderFull, m.ReaderReady]))
    def read(self, id: int, kind: type[m.ReaderFull]) -> None:
        self.send(kind(id))

    @rule(id=ids)
    def ask(self, id: int) -> None:
        sequence = self.scheduler.sequences.get(id)
        said = self.send(m.ProgressAsked(id))
        assert len(said) == (sequence is not None and not sequence.generated)
        for progress in said:
            assert isinstance(progress, m.Progress)
            assert 0 <= progress.position < len(self.scheduler.line) + progress.admitted
            assert progress.reason

    @rule()
    def ready(self) -> None:
        self.send(m.EngineReady())

    @rule(
        choices=st.lists(st.sampled_from(["a", "b", "é", "a", "end", "nan"]), min_size=6),
        seconds=st.sampled_from([0.0, 0.001, 0.05, 2.0]),
        threads=st.integers(1, 2),
        aside=st.sampled_from(["going on", "done", "done", "refused"]),
    )
    def steps(self, choices: list[str], seconds: float, threads: int, aside: str) -> None:
        self.stepped(choices, seconds, threads, aside)

    def stepped(self, choices: list[str], seconds: float, threads: int, aside: str) -> None:
        self.send(m.EngineReady())
        if self.scheduler.step is None:
            return
        results = []
        for row, choice in zip(self.scheduler.step.rows, choices, strict=False):
            if row.sample:
                failure = Failure("generation_failed", "nan") if choice == "nan" else None
                piece = b"" if choice in ("end", "nan") else choice.encode()
                token = 6 if choice == "b" else 5
                results.append(m.Sampled(row.slot, token, piece, choice == "end", failure))
        missing = [r for r in self.scheduler.step.rows[len(choices) :] if r.sample]
        results += [m.Sampled(r.slot, 5, b"z", False) for r in missing]
        self.finish_step(m.Stepped(tuple(results), seconds, threads), aside)

    @rule(steps=st.integers(1, 40))
    def serve(self, steps: int) -> None:
        for _ in range(steps):
            self.stepped(["a"] * 6, 0.01, 1, "done")
            self.agrees_with_itself()
            self.slots_hold_what_is_believed()

    def finish_step(self, event: m.Stepped, aside: str) -> None:
        assert self.scheduler.step is not None
        rows, part = self.scheduler.step.rows, self.scheduler.step.aside
        for row in rows:
            self.write(row)
        if part is not None:
            assert self.scheduler.capacity.aside_tokens
            done = aside == "done"
            read = m.AsideRead(part.seconds, done=done, refused=aside == "refused")
            event = replace(event, aside=read)
            if done:
                self.write(m.Row(part.slot, part.start, part.tokens, sample=False))
                self.aside += 1
        assert sum(len(row.scores) for row in rows) <= m.MOST_SCORES
        prompts = tuple(
            m.PromptScores(row.slot, tuple(Scored(token, b"", -1.0) for token in row.scores))
            for row in rows
            if row.scores
        )
        sampled = [one for first in event.sampled for one in self.with_guesses(first)]
        unsaved, self.unsaved = tuple(self.unsaved), []
        self.send(replace(event, sampled=tuple(sampled), prompts=prompts, unsaved=unsaved))

    def with_guesses(self, one: m.Sampled) -> Iterator[m.Sampled]:
        """A token after each guess that was right."""
        assert self.scheduler.step is not None
        (row,) = [row for row in self.scheduler.step.rows if row.slot == one.slot]
        yield one
        for guess in row.tokens[len(row.tokens) - row.guessed :]:
            if one.token != guess or one.failure or one.end_of_generation:
                return
            one = m.Sampled(one.slot, 5, b"a", False)
            self.guessed += 1
            yield one

    @rule()
    def idle(self) -> None:
        said = self.send(m.Idle())
        assert not said or not self.scheduler.sequences
        assert {type(one) for one in said} <= {m.SaveSlot, m.DropSaved}

    @rule(memory=st.booleans())
    def has_memory(self, memory: bool) -> None:
        self.memory = memory

    @rule()
    def flush(self) -> None:
        if self.scheduler.step is None:
            self.send(m.Flushed(tuple(self.unsaved)))
            self.unsaved.clear()

    @rule()
    def step_aborted(self) -> None:
        if self.scheduler.step is not None:
            self.send(m.StepAborted())

    @rule()
    def step_failed(self) -> None:
        if self.scheduler.step is not None:
            self.send(m.StepFailed(Failure("engine_crashed", "why")))

    @invariant()
    def agrees_with_itself(self) -> None:
        if not self.count:
            return
        self.scheduler.check_invariants()
        assert self.open == {s.slot for s in self.scheduler.running.values()}
        assert len(self.scheduler.sequences) == len(
            self.scheduler.stepping() | set(self.scheduler.sequences)
        )

    @invariant()
    def slots_hold_what_is_believed(self) -> None:
        if not self.count:
            return
        room = self.scheduler.line.room
        for sequence in self.scheduler.running.values():
            held = self.cells[sequence.slot]
            assert tuple(token for token, _ in held) == sequence.computed()
            self.check_owners(held, sequence.owner)
        for slot, entry in room.prefixes.kept.items():
            assert tuple(token for token, _ in self.cells[slot]) == entry.tokens
        assert {k: len(v) for k, v in self.saved.items()} == {
            key: entry.size for key, entry in room.prefixes.saved.items() if key not in self.unsaved
        }
        for slot in room.free_slots:
            assert not self.cells.get(slot)

    def check_owners(self, held: list[Cell], mine: tuple[str, str]) -> None:
        assert all(owner[1] == mine[1] for _, owner in held)
        foreign = [at for at, (_, owner) in enumerate(held) if owner != mine]
        assert all(at < len(self.public) for at in foreign)

    @invariant()
    def service_is_shared(self) -> None:
        """Theorem 4.3's bound, on those who wait: at most what is in the cache and what may pass, at
        its highest cost, and one prompt that was charged and then given up.
        """
        if not self.count or any(s.reproducible for s in self.asked.values()):
            return
        line, cap = self.scheduler.line, self.scheduler.capacity
        counters = [line.counters[p] for p in line.counters.waiting]
        bound = COMPLETION_COST * (cap.kv_tokens + cap.kv_tokens // 2) + cap.context_size
        assert not counters or max(counters) - min(counters) <= bound

    @invariant()
    def everybody_is_accounted_for(self) -> None:
        if not self.count:
            return
        assert set(self.asked) == set(self.ends) | set(self.scheduler.sequences)
        assert not set(self.ends) & set(self.scheduler.sequences)
        for id, finish in self.ends.items():
            usage, asked = finish.ended.usage, self.asked[id]
            assert usage.prompt_tokens <= len(asked.prompt)
            if finish.ended.failure is None and finish.ended.reason is not FinishReason.CANCELLED:
                assert usage.prompt_tokens == len(asked.prompt)
            assert usage.completion_tokens <= asked.max_tokens
            assert usage.cached_tokens <= usage.prompt_tokens
            assert usage.cached_tokens < len(asked.prompt)
            assert not (usage.cached_tokens and asked.reproducible)
            if finish.ended.reason is FinishReason.LENGTH:
                assert usage.completion_tokens == asked.max_tokens
            assert (finish.ended.reason is FinishReason.ERROR) == (finish.ended.failure is not None)
        for id, text in self.text.items():
            assert not any(stop in text for stop in self.asked[id].stop)

    def teardown(self) -> None:
        """Whatever happened, those who are left can still be served to their end."""
        if not self.count:
            return
        for id in list(self.scheduler.sequences):
            self.send(m.ReaderReady(id))
        for _ in range(4000):
            self.send(m.EngineReady())
            if self.scheduler.step is None:
                break
            rows = self.scheduler.step.rows
            tokens = tuple(m.Sampled(r.slot, 5, b"z", False) for r in rows if r.sample)
            self.finish_step(m.Stepped(tokens, 0.01), "done")
        assert not self.scheduler.sequences
        assert set(self.ends) == set(self.asked)
        assert self.scheduler.line.room.reserved_tokens == 0
        self.scheduler.check_invariants()


SIZES = st.lists(st.tuples(st.integers(1, 120), st.integers(1, 40)), min_size=4, max_size=12)


@settings(max_examples=40, deadline=None)
@given(
    a=SIZES,
    b=SIZES,
    weight=st.sampled_from([0.5, 1.0, 3.0]),
    late=st.integers(0, 200),
    parallel=st.integers(1, 3),
)
def test_service_of_two_who_always_wait_differs_by_a_bounded_amount(
    a: list[tuple[int, int]], b: list[tuple[int, int]], weight: float, late: int, parallel: int
) -> None:
    """Whatever each asks for, however much of it, and whoever came first."""
    cap = replace(CAPACITIES[0], sequences=parallel, weights={"b": weight}, queue=100)
    scheduler, count = Scheduler(cap), 0
    own: dict[str, int] = {"a": 0, "b": 0}
    begun = None
    for step in range(600):
        for who, sizes in (("a", a), ("b", b if step >= late else [])):
            queued = sum(s.principal == who for s in scheduler.line.waiting())
            while sizes and queued < 3:
                prompt, answer = sizes[own[who] % len(sizes)]
                own[who] += 1
                count += 1
                queued += 1
                # All different: what is found in the cache is not charged.
                tokens = tuple(range(1000 * count, 1000 * count + prompt))
                scheduler.handle(m.Submitted(count, who, tokens, answer, GREEDY), step)
        scheduler.handle(m.EngineReady(), step)
        counters = scheduler.line.counters
        if step >= late and begun is None:
            begun = counters["a"], counters["b"]
        if begun is not None:
            gap = (counters["a"] - begun[0]) - (counters["b"] - begun[1])
            most = COMPLETION_COST * cap.kv_tokens + cap.context_size
            assert abs(gap) <= 2 * most / min(1.0, weight)
        planned = scheduler.step or m.Step(())
        done = tuple(m.Sampled(r.slot, 5, b"z", False) for r in planned.rows if r.sample)
        read = m.AsideRead(0.01, done=True) if planned.aside else None
        scheduler.handle(m.Stepped(done, 0.01, aside=read), step)


# 12,000 steps, and those of `serve`.
Machine.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestMachine = Machine.TestCase
