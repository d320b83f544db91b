"""Every route: parse, call, write. Each concrete method carries its own decorators."""

from __future__ import annotations

from typing import Any

from .base import UnknownRouteHandler
from .completions import ChatCompletionsHandler, CompletionsHandler
from .embeddings import EmbeddingsHandler, RerankHandler
from .health import HealthHandler
from .models import ModelHandler, ModelsHandler
from .tokens import ApplyTemplateHandler, DetokenizeHandler, TokenizeHandler

ROUTES: list[tuple[str, type[Any]]] = [
    (r"shimmy/v1/chat/completions", ChatCompletionsHandler),
    (r"shimmy/v1/completions", CompletionsHandler),
    (r"shimmy/v1/embeddings", EmbeddingsHandler),
    (r"shimmy/v1/rerank", RerankHandler),
    (r"shimmy/v1/models", ModelsHandler),
    (r"shimmy/v1/models/([^/]+)", ModelHandler),
    (r"shimmy/api/tokenize", TokenizeHandler),
    (r"shimmy/api/detokenize", DetokenizeHandler),
    (r"shimmy/api/apply-template", ApplyTemplateHandler),
    (r"shimmy/health", HealthHandler),
    (r"shimmy(?:/.*)?", UnknownRouteHandler),
]
