"""What `--context N` sends along: the cells that ran last, and what can be left out if they are too many."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from IPython.core.interactiveshell import InteractiveShell

from ..errors import InvalidValue
from .remembered import Remembered, is_prompt, plain

LONGEST = 4000
"""Characters of an output, and of an error. Sources are never cut."""


@dataclass(frozen=True, slots=True)
class Item:
    """A cell that ran: what was written, the result's plain text, the traceback. None where there is none.
    `shortened` are the names of those of which only the beginning and the end are there.
    """

    number: int
    source: str
    output: str | None = None
    error: str | None = None
    shortened: tuple[str, ...] = ()


def recent(shell: InteractiveShell, n: int, remembered: Remembered) -> list[Item]:
    """The `n` cells that ran last, the oldest first. The running cell is none of them, nor is one that only
    asks a model: its prompt and answer are the chat's. What a cell printed is not remembered.

    Raises `InvalidValue` for a negative number.
    """
    if n < 0:
        raise InvalidValue("this is a number of cells, 0 or more", param="--context")
    sources, found = remembered.sources, list[int]()
    for number in range(remembered.completed, 0, -1):
        if len(found) == n:
            break
        if sources[number].strip() and not is_prompt(sources[number]):
            found.append(number)
    return [_item(shell, number, remembered) for number in reversed(found)]


def _item(shell: InteractiveShell, number: int, remembered: Remembered) -> Item:
    shown = None
    history = shell.history_manager
    if history is not None and number in remembered.outputs:  # the texts outlive %reset
        shown = history.output_hist_reprs.get(number)
    whole = {"Out": shown, "Err": remembered.errors.get(number)}
    texts = {name: None if text is None else plain(text, LONGEST) for name, text in whole.items()}
    shortened = [
        f"{name}[{number}]"
        for name, text in whole.items()
        if text is not None and texts[name] != plain(text, len(text))
    ]
    source = remembered.sources[number]
    return Item(number, source, texts["Out"], texts["Err"], tuple(shortened))


def fenced(text: str, language: str = "") -> str:
    """The text as a code block in Markdown that nothing in it can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def as_message(items: Iterable[Item]) -> str:
    """The cells as one message, "" without any."""
    parts: list[str] = []
    for item in items:
        parts.append(f"In[{item.number}]:\n{fenced(item.source, 'python')}")
        if item.output is not None:
            parts.append(f"Out[{item.number}]:\n{fenced(item.output)}")
        if item.error is not None:
            parts.append(f"Err[{item.number}]:\n{fenced(item.error)}")
    head = "The cells of this notebook that ran last, the oldest first. Numbers are the order they ran in."
    return "\n\n".join([head, *parts]) if parts else ""


_NAME = re.compile(r"(?:(In|Out|Err)\[(\d+)\]|(\d+))")


def without(items: Sequence[Item], names: Iterable[str]) -> list[Item]:
    """The items without some parts: `Out[3]` and `Err[3]` alone; `In[3]`, or `3`, with all that came of it.

    Raises `InvalidValue` for a name that is none of theirs.
    """
    kept = {item.number: item for item in items}
    gone: set[int] = set()
    for name in names:
        match = _NAME.fullmatch(name.strip())
        number = int(match[2] or match[3]) if match else 0
        if match is None or number not in kept:
            there = ", ".join(f"In[{known}]" for known in kept) or "nothing to leave out"
            raise InvalidValue(f"{name.strip()!r} is not sent; {there} is", param="--leave-out")
        if match[1] == "Out":
            kept[number] = replace(kept[number], output=None)
        elif match[1] == "Err":
            kept[number] = replace(kept[number], error=None)
        else:
            gone.add(number)
    return [item for number, item in kept.items() if number not in gone]


@dataclass(frozen=True, slots=True)
class Choice:
    """What to leave out of a prompt so that it fits. `left_out` are names for `without` and about how many
    tokens each is; `items` what is then sent, in `tokens` tokens, the prompt's own included. `over` is by how many
    tokens all of it is too long, 0 if nothing need be left out. `last` is the largest N whose `--context N` fits.
    """

    items: tuple[Item, ...]
    left_out: tuple[tuple[str, int], ...]
    tokens: int
    budget: int
    over: int
    last: int

    @property
    def fits(self) -> bool:
        return self.tokens <= self.budget

    def __str__(self) -> str:
        """The offer to the user; "" if there is nothing to offer."""
        if not self.over:
            return ""
        if not self.fits:
            alone = f"{self.tokens - self.budget:,}"
            return f"the prompt alone is too long by {alone} tokens, without any cell"
        named = [f"{name} ({size:,} tokens)" for name, size in self.left_out]
        flag = f"--leave-out {','.join(name for name, _ in self.left_out)}"
        other = f"; or --context {self.last}" if self.last else ""
        return f"too long by {self.over:,} tokens; without {_listed(named)} it fits: {flag}{other}"


def what_to_leave_out(
    items: Sequence[Item], count: Callable[[list[Item]], int], budget: int
) -> Choice:
    """Proposes as few parts as possible, and of those the smallest that will do: it is mostly one long output
    that is too much, and what is left out for nothing is missed. Of equals the oldest. The last cell, which a
    question is mostly about, stays if the others are enough.

    `count` is of tokens of the whole prompt with those items; it is asked about three times for each.
    """
    whole = count(list(items))
    if whole <= budget:
        return Choice(tuple(items), (), whole, budget, 0, len(items))
    # Measured once: tokens add up nearly, and what a plan comes to is counted.
    names = [name for item in items for name in _names(item)]
    sizes = {name: max(0, whole - count(without(items, [name]))) for name in names}
    plan = _Plan(items, count, sizes, whole)
    for spared in (items[-1:], ()):
        plan = _Plan(items, count, sizes, whole)
        while plan.tokens > budget and plan.take(budget, {item.number for item in spared}):
            pass
        if plan.tokens <= budget:
            break
    left_out = tuple((name, sizes[name]) for name in plan.names)
    return Choice(
        tuple(plan.kept), left_out, plan.tokens, budget, whole - budget, _last(items, count, budget)
    )


class _Plan:
    """Parts that are left out so far."""

    def __init__(
        self,
        items: Sequence[Item],
        count: Callable[[list[Item]], int],
        sizes: Mapping[str, int],
        tokens: int,
    ) -> None:
        self._items, self._count, self._sizes = items, count, sizes
        self.kept, self.tokens = list(items), tokens
        self.names: list[str] = []

    def take(self, budget: int, spared: set[int]) -> bool:
        """Leave one more part out: the smallest that is enough, else the largest. False if there is none."""
        further = {
            name: self._gain(name)
            for item in self.kept
            if item.number not in spared
            for name in _names(item)
        }
        if not further:
            return False
        over = self.tokens - budget
        enough = [name for name, size in further.items() if size >= over]
        name = (
            min(enough, key=further.__getitem__)
            if enough
            else max(further, key=further.__getitem__)
        )
        if name.startswith("In"):  # with all that came of it
            self.names = [known for known in self.names if _cell(known) != _cell(name)]
        self.names.append(name)
        self.kept = without(self._items, self.names)
        self.tokens = self._count(self.kept)
        return True

    def _gain(self, name: str) -> int:
        """What leaving it out is worth, where parts of its cell may be left out already."""
        gone = (self._sizes[known] for known in self.names if _cell(known) == _cell(name))
        return self._sizes[name] - (sum(gone) if name.startswith("In") else 0)


def _names(item: Item) -> list[str]:
    """Names of an item's parts, the smaller first."""
    parts = [("Out", item.output), ("Err", item.error), ("In", item.source)]
    return [f"{kind}[{item.number}]" for kind, text in parts if text is not None]


def _cell(name: str) -> str:
    return name.partition("[")[2]


def _last(items: Sequence[Item], count: Callable[[list[Item]], int], budget: int) -> int:
    """How many of the last items fit, whole; 0 if not even one does."""
    fits, too_many = 0, len(items)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if count(list(items[-middle:])) <= budget:
            fits = middle
        else:
            too_many = middle
    return fits


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
