"""The use-cases: completions and embeddings. HTTP handlers, the kernel's fallback, the command line
and the tests all come through here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from .auditing import Auditing
from .completion import Completion, Echo, settled
from .engine.embedder import Embedder
from .engine.inputs import check_fits
from .engine.model import Encoded, LoadedModel
from .errors import (
    AccessDenied,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineLost,
    InvalidValue,
    ModelLoadFailed,
    ModelNotFound,
    QueueFull,
    UnsupportedParameter,
)
from .guard.asked import Asked
from .guard.guard import Guard
from .guard.visit import Result, Visit, result_of
from .models.jobs import Progress, Report, unheard
from .models.library import ModelLibrary
from .models.lifecycle import ModelPool
from .models.resident import ModelStatus
from .offloop import in_turns
from .submission import Wanted, submitted
from .types import (
    ChatOptions,
    CompletionRequest,
    EmbeddingRequest,
    Message,
    ModelFacts,
    Principal,
    Prompt,
    Usage,
)

_Prepared = tuple[LoadedModel, Encoded, str]
"""The model, the prompt, the adapter's path."""
_AS_IT_IS = ChatOptions()
_COUNTING = Progress("counting the prompt")


@dataclass(frozen=True, slots=True)
class Vectors:
    """One of each input, and the tokens of all inputs together."""

    vectors: list[bytes]
    """Little-endian float32."""
    tokens: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """`count` are its tokens; `cached` of them would not be computed again if it were asked now."""

    text: str
    count: int
    cached: int


class CompletionService:
    """`default_max_tokens` is what a request gets that does not say how much it wants. Without a guard
    everybody may do everything, and nothing is recorded.
    """

    def __init__(
        self,
        pool: ModelPool[LoadedModel],
        library: ModelLibrary,
        *,
        guard: Guard | None = None,
        default_max_tokens: int = 1024,
    ) -> None:
        self.pool, self.library = pool, library
        self.guard = guard or Guard()
        self.auditing = Auditing(self.guard)
        self.default_max_tokens = default_max_tokens

    def visit(self, asked: Asked) -> Visit:
        """A request that is about to be made. Whoever makes it hands it to `start` or `embed`, or ends it."""
        return Visit(self.guard, asked)

    async def start(
        self, request: CompletionRequest, report: Report = unheard, visit: Visit | None = None
    ) -> Completion:
        """See whether it may be asked, resolve the model, count the prompt exactly, refuse what cannot
        fit, queue the rest. A model that is not in memory is loaded first; `report` hears how far that
        is. However it fails, `visit` is ended.
        """
        visit = visit or self.visit(Asked(request.principal, request.request_id))
        try:
            return await self._started(request, report, visit)
        except asyncio.CancelledError as gone:
            visit.end_later(result_of(gone))
            raise
        except BaseException as error:
            await visit.end(result_of(error))
            raise

    async def _started(
        self, request: CompletionRequest, report: Report, visit: Visit
    ) -> Completion:
        clock = asyncio.get_running_loop().time
        began = clock()
        await visit.check(request)
        limits = [t for t in (request.max_seconds, visit.seconds) if t is not None]
        limit = min(limits, default=None)
        async with AsyncExitStack() as held:
            async with _deadline(limit):
                await visit.arrive(lambda before: report(_turn(before)))
                model, encoded, adapter = await self._prepared(request, held, report)
                made = self.library.made_by(model, adapter, encoded.tokens)
                visit.model_sha256 = made.sha256[0] if made.sha256 else None
                count = len(encoded.tokens)
                room = self._room(request, count, model.facts)
                max_tokens = await visit.reserve(count, request.max_tokens, room, choices=request.n)
                echo = await self._echo(model, request, encoded) if request.echo else None
            request = settled(request, max_tokens)
            if max_tokens == 0 and request.sampling.prompt_logprobs is None:
                return Completion(request, count, visit=visit, echo=echo, made=made)
            left = None if limit is None else max(0.0, limit - (clock() - began))
            wanted = Wanted(encoded, max_tokens, adapter, left)
            streams, bell = submitted(model, request, wanted)
            return Completion(request, count, streams, bell, visit=visit, echo=echo, made=made)

    async def _check_loading(self, id: str, principal: Principal) -> None:
        """Raises `ModelNotFound`, and `AccessDenied` where a model would have to be loaded for somebody who
        may not.
        """
        found = await self.pool.catalog.find(id, self.may_use(principal))
        if self.guard.allows(principal, "load", id):
            return
        if self.pool.status_of(found).state != "loaded":
            raise AccessDenied(f"{id} is not in memory, and you may not load it", param="model")

    async def _encoded(
        self, request: CompletionRequest, held: AsyncExitStack, report: Report
    ) -> _Prepared:
        await self._check_loading(request.model, request.principal)
        if request.pin is not None:
            await self.library.attached.hold(request.model, request.adapter, request.pin)
        model = await held.enter_async_context(self.pool.use(request.model, report))
        report(_COUNTING)
        if not model.facts.can_generate:
            raise UnsupportedParameter("this model makes embeddings only", param="model")
        model.check_bias(request.sampling.logit_bias)
        prompt = request.prompt
        if request.suffix:
            prompt = model.between(prompt, request.suffix)
        if request.sampling.constraint is not None:
            await model.compile(request.sampling.constraint, request.principal.name)
        adapter = await self._adapter(model, request)
        if request.pin is not None:
            await self.library.attached.hold_loaded(model, adapter, request.pin)
        encoded = await model.prepare(prompt, request.principal.name, request.chat)
        return model, encoded, str(adapter) if adapter is not None else ""

    async def _echo(self, model: LoadedModel, request: CompletionRequest, prompt: Encoded) -> Echo:
        prompted, who = request.prompt, request.principal.name
        text = prompted if isinstance(prompted, str) else await model.decode(prompt.tokens, who)
        first = await model.decode(prompt.tokens[:1], who)
        # What the model wants before every prompt is not part of this one's text.
        return Echo(text, first if text.startswith(first) else "")

    async def _adapter(self, model: LoadedModel, request: CompletionRequest) -> Path | None:
        """Its path, once it is loaded; None where the request names none and the model has none."""
        attached = self.library.attached
        try:
            who = request.principal
            if request.adapter:
                found = await self.pool.catalog.find(request.adapter, self.may_use(who))
                may = self.guard.allows(who, "load", request.adapter)
                if not (may or model.has_adapter(str(found.path))):
                    raise AccessDenied(
                        f"{found.id} is not in memory, and you may not load it", param="adapter"
                    )
            return await attached.use_adapter(model, request.model, request.adapter)
        except (ModelNotFound, ModelLoadFailed) as error:
            error.param = "adapter"
            raise

    async def _prepared(
        self, request: CompletionRequest, held: AsyncExitStack, report: Report
    ) -> _Prepared:
        try:
            return await self._encoded(request, held, report)
        except EngineLost:
            # Its process ended while nobody was using it: nothing of this request is lost. What is
            # held of it is given up first, as another takes its place when nobody has it.
            await held.aclose()
            return await self._encoded(request, held, report)

    def _room(self, request: CompletionRequest, prompt_tokens: int, facts: ModelFacts) -> int:
        """How many tokens to generate. Raises `ContextLengthExceeded` if they cannot all fit."""
        context, wanted = facts.context_size, request.max_tokens
        chat = isinstance(next(iter(request.prompt), None), Message)
        param = "messages" if chat else "prompt"
        if prompt_tokens == 0:
            raise InvalidValue("the prompt is empty: there is nothing to continue", param=param)
        check_fits(prompt_tokens, context, param, answer=1 if wanted is None else 0)
        if wanted is None:
            return min(self.default_max_tokens, context - prompt_tokens)
        over = prompt_tokens + wanted - context
        if over > 0:
            raise ContextLengthExceeded(
                f"the prompt's {prompt_tokens} tokens and max_tokens {wanted} are {over} tokens "
                f"more than this model's context of {context}",
                param="max_tokens",
            )
        return wanted

    async def embed(self, request: EmbeddingRequest, visit: Visit | None = None) -> Vectors:
        """Vectors of texts, or scores of a query's documents. Raises what `LoadedModel` does, and
        `UnsupportedParameter` where the model cannot make them. `visit` is ended.
        """
        visit = visit or self.visit(Asked(request.principal, request.request_id, "embeddings"))
        try:
            await visit.check(request)
            async with _deadline(visit.seconds):
                await visit.arrive(lambda before: None)
                found = await self._vectors(request, visit)
        except asyncio.CancelledError as gone:
            visit.end_later(result_of(gone))
            raise
        except BaseException as error:
            await visit.end(result_of(error))
            raise
        await visit.end(Result("ok", usage=Usage(found.tokens, 0)))
        return found

    async def _vectors(self, request: EmbeddingRequest, visit: Visit) -> Vectors:
        async with AsyncExitStack() as held:
            try:
                model, embedder, tokens = await self._inputs(request, held)
            except EngineLost:
                # As in `_prepared`.
                await held.aclose()
                model, embedder, tokens = await self._inputs(request, held)
            visit.model_sha256 = self.library.digest(model)
            count = sum(map(len, tokens))
            await visit.reserve(count, 0, 0)
            # Also where it is stopped: how much of it had been computed is not known then.
            visit.usage = Usage(count, 0)
            try:
                vectors = await embedder.vectors(tokens, request.principal.name)
            except QueueFull:
                visit.usage = None
                raise
        return Vectors(vectors, count)

    async def _inputs(
        self, request: EmbeddingRequest, held: AsyncExitStack
    ) -> tuple[LoadedModel, Embedder, tuple[tuple[int, ...], ...]]:
        await self._check_loading(request.model, request.principal)
        model = await held.enter_async_context(self.pool.use(request.model))
        embedder = model.embedder
        if embedder is None:
            raise UnsupportedParameter("this model makes no embeddings", param="model")
        ranks = embedder.shape.pooling == "rank"
        if request.rank and not ranks:
            raise UnsupportedParameter("this model is no reranker", param="model")
        if ranks and not request.rank:
            raise UnsupportedParameter("this model is a reranker: it makes scores", param="model")
        width = embedder.shape.width
        if (request.dimensions or 0) > width:
            raise InvalidValue(f"this model's vectors have {width} numbers", param="dimensions")
        who = request.principal.name
        tokens = await model.encode_inputs(request.inputs, request.names, who)
        return model, embedder, tokens

    @contextlib.asynccontextmanager
    async def _for_counting(self, model: str, principal: Principal) -> AsyncIterator[LoadedModel]:
        """A model whose tokenizer is wanted. Raises `AccessDenied`."""
        self.guard.check(principal, "use", model)
        self.guard.check_feature("tokenize")
        await self.guard.count(principal)
        await self._check_loading(model, principal)
        async with self.pool.use(model) as found:
            yield found

    async def tokenize(
        self, model: str, prompt: Prompt, principal: Principal, options: ChatOptions = _AS_IT_IS
    ) -> tuple[int, ...]:
        """The exact tokens that a prompt has, as `start` would count them."""
        async with self._for_counting(model, principal) as found:
            return await found.encode(prompt, principal.name, options)

    async def detokenize(self, model: str, tokens: tuple[int, ...], principal: Principal) -> str:
        """The text of tokens; bytes that make no character become U+FFFD."""
        async with self._for_counting(model, principal) as found:
            return await found.decode(tokens, principal.name)

    async def rendered(
        self, model: str, prompt: Prompt, principal: Principal, options: ChatOptions = _AS_IT_IS
    ) -> Rendered:
        """A chat as the model's template writes it, and its tokens."""
        async with self._for_counting(model, principal) as found:
            text = await found.render(prompt, principal.name, options)
            tokens = await found.encode(text, principal.name)
            cached = await found.reusable(tokens, principal.name)
            return Rendered(text, len(tokens), cached)

    async def models(self, principal: Principal) -> list[ModelStatus]:
        """Those that this user can name as a request's `model`."""
        return [
            status
            async for status in in_turns(await self.pool.status())
            if status.file.kind == "model"
            and status.file.problem is None
            and self.guard.allows(principal, "use", status.file.id)
        ]

    def may_use(self, principal: Principal) -> Callable[[str], bool]:
        """Whether this user may use a model, by its id: of others they are told nothing."""
        return lambda id: self.guard.allows(principal, "use", id)

    async def model(self, id: str, principal: Principal) -> ModelStatus:
        """Raises `ModelNotFound`, also for one that this user may not use, whether there is one or not."""
        if not self.guard.allows(principal, "use", id):
            raise ModelNotFound(f"there is no model {id[:128]!r} for you", param="model")
        return self.pool.status_of(await self.pool.catalog.find(id, self.may_use(principal)))

    @property
    def active(self) -> int:
        """Requests queued or running, of all models, and jobs."""
        return sum(model.active for model in self.pool.loaded()) + self.library.jobs.active

    async def close(self) -> None:
        self.pool.begin_close()
        await self.library.close()
        await self.pool.close()
        await self.guard.close()


@contextlib.asynccontextmanager
async def _deadline(seconds: float | None) -> AsyncIterator[None]:
    """Raises `DeadlineExceeded` after so many seconds."""
    late = False
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        late = True
    if late:
        # Not amid the TimeoutError: by way of it the error would have the task whose error it is, and
        # both would stay, with the request.
        raise DeadlineExceeded("the request took longer than its max_seconds") from None


def _turn(before: int) -> Progress:
    return Progress(f"waiting for your turn: {before} of yours before it")
