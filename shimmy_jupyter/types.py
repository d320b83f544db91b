"""The values that cross between rooms. All frozen, none with behaviour that needs a library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a sequence ended. Only `STOP` and `LENGTH` are successful completions."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a request is counted against, as Jupyter says; never taken from a client header."""

    name: str
    groups: tuple[str, ...] = ()
    admin: bool = False
    kind: str = "local"


@dataclass(frozen=True, slots=True)
class Markers:
    """Texts around a model's reasoning, as its own template writes them."""

    start: str
    end: str
    opening: tuple[str, ...] = ()
    """Texts that may open the answer proper, after the reasoning or in its stead; not shown."""
    closing: str = ""
    """Text that may end the answer; not shown there."""


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What may come before an answer. `inside`: the prompt has already opened it."""

    markers: Markers
    inside: bool = False


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must match. `kind` is json_object, json_schema, lark, regex or gbnf.

    `source` is the schema as JSON, or the grammar; empty for json_object.
    """

    kind: str
    source: str = ""


_LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. `temperature == 0` is the most likely token, as is one so low that it
    could be no other (`greedy`).

    `top_k == 0`, `top_p == 1`, `min_p == 0`, `repeat_penalty == 1` and penalties of 0 are off.
    Penalties look at the last `repeat_last_n` tokens, prompt included. `seed` None is random.
    Defaults are llama.cpp's own.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    """Until so many have been generated, none that would end the answer is chosen."""
    ignore_eos: bool = False
    """Never choose a token that would end the answer."""
    logprobs: int | None = None
    """How many of the likeliest tokens to give log-probabilities of, beside the chosen one; None: of
    none."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens but the first; the prompt is computed anew for it."""
    constraint: Constraint | None = None
    reasoning: Reasoning | None = None
    """What may come before the answer, which alone the constraint and stop strings are for."""

    @property
    def greedy(self) -> bool:
        # Divided by less, logits overflow a float32.
        return self.temperature < _LEAST_TEMPERATURE


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat, its content already flattened to text."""

    role: str
    content: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """A token and the natural logarithm of its probability, before sampling changes it."""

    token: int
    piece: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()
    """The likeliest tokens, the likeliest first: id, bytes, log-probability."""


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a chat is to be rendered. What is None is left to the model's template.

    `thinking` is whether to reason before the answer, or for how many tokens at most; `effort` a
    level that the template knows, or "none"; `variables` are the template's own, by name, as JSON.
    """

    thinking: bool | int | None = None
    effort: str | None = None
    variables: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PinnedModel:
    """The bytes that are to answer, and nothing else: `size` of all files together, the SHA-256 of the
    first and of its further `parts` in order, of the chat template's UTF-8 and of the adapter that the
    request names; the least context in tokens. What is None is not pinned.
    """

    size: int
    sha256: str
    parts: tuple[str, ...] = ()
    chat_template: str | None = None
    context_size: int | None = None
    adapter: str | None = None


Prompt = str | tuple[int, ...] | tuple[Message, ...]
"""Raw text, token ids, or chat messages (a tuple of `Message`, never empty)."""


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One prompt and what is wanted of it. `max_tokens` None means the engine's default."""

    request_id: str
    principal: Principal
    model: str
    prompt: Prompt
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    echo: bool = False
    """Begin the answer with the prompt."""
    chat: ChatOptions = field(default_factory=ChatOptions)
    adapter: str = ""
    """The id of a LoRA adapter to answer with; none where it is empty."""
    suffix: str = ""
    """What comes after the answer; then the prompt is a text. Empty: the answer has no end to meet."""
    n: int = 1
    """Choices: answers to the same prompt, each with a seed of its own."""
    reproducible: bool = False
    """The same bytes every time, on one machine and engine build, whatever else is going on."""
    pin: PinnedModel | None = None
    """Where it is given, another model's answer is no answer."""
    max_seconds: float | None = None
    """From submission to the end; then the request fails with `deadline_exceeded`."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Exact token counts. `cached_tokens` of the prompt were not computed again; `reasoning_tokens`
    of the completion came before the answer, the markers around them included.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds from submission: in the queue, and until the first token (None if none came).

    `tokens_per_second` is the decode rate after the first token, None below two tokens.
    """

    queue_ms: float
    ttft_ms: float | None
    tokens_per_second: float | None


@dataclass(frozen=True, slots=True)
class MadeBy:
    """What computed an answer, as it was when it was loaded. What nobody has looked at is None.

    `sha256` are of the model's files, in order; `chat_template`, `adapter` and `prompt` the SHA-256 of
    the template's UTF-8, of the adapter's file and of the prompt's token ids, each as 4 bytes, the
    lowest first; `build` one of the engine's native libraries.
    """

    sha256: tuple[str, ...] | None
    quantization: str | None
    chat_template: str | None
    adapter: str | None
    prompt: str
    engine: str
    build: str | None
    cpu: str | None
    cpu_features: tuple[str, ...]
    context_size: int
    kv_type: str
    threads: int
    gpu_layers: int


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as a plain message, so that it can cross a thread or a socket."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The last word on a sequence."""

    reason: FinishReason
    usage: Usage
    timings: Timings
    failure: Failure | None = None


EmbeddingInput = tuple[str, ...] | tuple[int, ...]
"""A text, a query and a document, or tokens, which are taken as they are; never empty."""


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Texts to make vectors of; or, to `rank`, a query with each of its documents."""

    request_id: str
    principal: Principal
    model: str
    inputs: tuple[EmbeddingInput, ...]
    names: tuple[str, ...] = ()
    """What the body calls each of them, for errors."""
    rank: bool = False
    dimensions: int | None = None
    """How many numbers of each vector are wanted; None: all."""


@dataclass(frozen=True, slots=True)
class EmbeddingFacts:
    """How a model makes vectors. Sizes are in tokens: `tokens` of one input at most, `batch_tokens`
    of all inputs of a call. A vector has `width` numbers; where `pooling` is "rank" they are scores.
    """

    pooling: str
    width: int
    tokens: int
    batch_tokens: int
    sequences: int
    divisible: bool = False
    """Whether an input may be spread over several calls."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a loaded model says of itself; context and KV sizes are in tokens."""

    architecture: str
    description: str
    parameters: int
    size_bytes: int
    context_size: int
    kv_tokens: int
    vocabulary: int
    chat_template: str | None
    special: Mapping[str, str] = field(default_factory=dict)
    """The text of special tokens that chat templates name: `bos_token`, `eos_token`."""
    longest_token: int = 1
    """Bytes of text that one token can stand for, at most."""
    special_tokens: tuple[str, ...] = ()
    """Texts that are one token wherever they stand in a prompt."""
    slots: int = 32
    """Places in the KV cache, for sequences and for prefixes that are kept."""
    can_copy: bool = True
    """Whether a slot may take part of another's KV."""
    can_trim: bool = True
    """Whether a slot's KV can be cut short; recurrent models can only forget all of it."""
    can_read_aside: bool = False
    """Whether a long prompt can be read in a context of its own beside those that decode."""
    row_block: int = 1
    """Beyond the first so many rows of a step, each begun block of as many takes the time of a whole one."""
    kv_bytes_per_token: int = 1
    state_bytes: int = 0
    """Of each slot, whatever is in it: recurrent layers have a state."""
    threads: int = 1
    """Threads that may compute, at most."""
    offloaded_layers: int = 0
    can_generate: bool = True
    embedding: EmbeddingFacts | None = None
    infill: tuple[str, ...] = ()
    """The special tokens before the prefix, the suffix and the middle, of a model that can infill."""
    notes: tuple[str, ...] = ()
    """What an administrator should know, such as a GPU that this build cannot use."""


def amount(size: float) -> str:
    """A number of bytes for people, in units of 1000."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
