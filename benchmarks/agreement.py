"""Greedy answers beside those of llama-server: the same, or different where two tokens are level.

    python benchmarks/agreement.py

Fifty prompts on the bundled model, as the same tokens on each side. Ours are asked all at once, in
shared steps, and once more as reproducible ones; xllamacpp answers one after the other. Where two
answers part, the two best logits there must be closer than `LEVEL`; else the exit code is 1.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from child import Child

from shimmy_jupyter.core.messages import Row
from shimmy_jupyter.engine.backend import LoadSpec
from shimmy_jupyter.engine.llama import LlamaBackend
from shimmy_jupyter.engine.llama.binding import quick
from shimmy_jupyter.engine.model import LoadedModel
from shimmy_jupyter.models.sources import BUNDLED
from shimmy_jupyter.types import Message, Sampling

TOKENS = 48
LEVEL = 0.1
NAMES = (
    "len json.dumps os.path.join str.split collections.Counter abs sorted dict.get os.getcwd "
    "str.upper math.sqrt pathlib.Path random.choice shutil.copy textwrap.wrap time.sleep zip "
    "enumerate functools.reduce itertools.chain re.compile subprocess.run list.append set.union "
    "os.listdir math.floor str.join dict.items hashlib.sha256 csv.reader tempfile.mkdtemp heapq.heappush"
).split()
OTHERS = (
    "What is the capital of France?",
    "Tell me a story about a lighthouse.",
    "How do I read a file line by line?",
    "Which function sorts a list?",
    "Write a haiku about snow.",
    "Explain recursion to a child.",
    "Is 91 a prime number?",
    "Summarize the plot of Hamlet in one sentence.",
    "def add(a, b):\n    return",
    "Why is the sky blue?",
    "Translate 'good morning' into German.",
    "Give me three names for a cat.",
    "What happens when I press enter?",
    "¿Qué hace print?",
    "1 2 3 4 5 6 7",
    "Compare lists and tuples.",
    "hello",
    "Return the number of items in a container. Which function is that?",
)


@dataclass(frozen=True)
class Answer:
    """Text, and its tokens where the side says them."""

    text: str
    tokens: tuple[int, ...] = ()


async def ask_ours(
    model: LoadedModel, prompts: list[tuple[int, ...]], *, reproducible: bool
) -> list[Answer]:
    async def one(prompt: tuple[int, ...]) -> Answer:
        greedy = Sampling(temperature=0)
        stream = model.submit("local", prompt, TOKENS, greedy, (), reproducible=reproducible)
        async with stream:
            return Answer("".join([text async for text in stream]))

    return list(await asyncio.gather(*map(one, prompts)))


@contextmanager
def llama_server(path: str) -> Iterator[tuple[str, str]]:
    """Its address and key."""
    key = secrets.token_hex(16)
    options = {"model": path, "threads": 0, "slots": 1, "kv_tokens": 2048, "cache": False}
    child = Child("run_xllamacpp.py")
    try:
        yield child.ask(options | {"key": key})["address"], key
    finally:
        child.close()


def ask_theirs(address: str, key: str, prompts: list[tuple[int, ...]]) -> list[Answer]:
    answers = []
    for prompt in prompts:
        body = {
            "prompt": list(prompt),
            "n_predict": TOKENS,
            "temperature": 0,
            "cache_prompt": False,
            "return_tokens": True,
        }
        request = urllib.request.Request(
            f"{address}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            found = json.load(response)
        answers.append(Answer(found["content"], tuple(found["tokens"])))
    return answers


class Judge:
    """The model by itself: what tokens say, and how far apart its two best logits are."""

    def __init__(self, path: str) -> None:
        self._backend = LlamaBackend()
        self._facts = self._backend.load(LoadSpec(path=path, sequences=1))

    def parted(self, theirs: Answer, ours: Answer) -> int | None:
        """How many of their tokens our text begins with; None where the texts are the same."""
        if theirs.text == ours.text:
            return None
        said, text = b"", ours.text.encode()
        for at, token in enumerate(theirs.tokens):
            said += self._backend._vocabulary.piece(token)[0]
            if not text.startswith(said):
                return at
        return len(theirs.tokens)

    def gap(self, context: tuple[int, ...]) -> float:
        shared = self._backend._shared
        assert shared is not None
        shared.decode([Row(0, 0, context, sample=True)], self._facts.threads)
        logits = quick.llama_get_logits_ith(shared.handle, len(context) - 1)
        values = sorted(logits[i] for i in range(self._facts.vocabulary))
        quick.llama_memory_seq_rm(shared.memory, 0, -1, -1)
        return float(values[-1] - values[-2])

    def close(self) -> None:
        self._backend.unload()


def compare(
    title: str,
    prompts: list[tuple[int, ...]],
    ours: list[Answer],
    theirs: list[Answer],
    judge: Judge,
) -> bool:
    """Print how many agree, and where the others part. Whether all that part were level there."""
    level, same = True, 0
    lines = []
    for i, (prompt, mine, other) in enumerate(zip(prompts, ours, theirs, strict=True)):
        at = judge.parted(other, mine)
        if at is None:
            same += 1
            continue
        gap = judge.gap((*prompt, *other.tokens[:at]))
        level = level and gap <= LEVEL
        lines.append(f"  {ASKED[i]!r}: from token {at}, gap {gap:.4f}")
        lines.append(f"    ours   {mine.text!r}\n    theirs {other.text!r}")
    print(f"{title}: {same} of {len(prompts)} agree")
    print("\n".join(lines), end="\n" if lines else "")
    return level


ASKED = [*(f"What does {name} do?" for name in NAMES), *OTHERS]


async def main() -> int:
    path = str(BUNDLED)
    model = await LoadedModel.load(LlamaBackend, LoadSpec(path=path))
    try:
        prompts = [await model.encode((Message("user", text),)) for text in ASKED]
        together = await ask_ours(model, prompts, reproducible=False)
        exact = await ask_ours(model, prompts, reproducible=True)
        widest = max(model.engine.statistics.rows)
    finally:
        await model.close()
    with llama_server(path) as (address, key):
        theirs = await asyncio.to_thread(ask_theirs, address, key, prompts)
    judge = Judge(path)
    try:
        level = [
            compare(f"shared, up to {widest} in a step", prompts, together, theirs, judge),
            compare("reproducible", prompts, exact, theirs, judge),
        ]
    finally:
        judge.close()
    return 0 if all(level) else 1


if __name__ == "__main__":
    assert len(ASKED) == 50
    sys.exit(asyncio.run(main()))
