"""Every route: parse, call, write. Each concrete method carries its own decorators."""

from __future__ import annotations

from typing import Any

from .audit import (
    AuditAnchorHandler,
    AuditExportHandler,
    AuditHandler,
    AuditReceiptHandler,
    AuditUsageHandler,
    AuditVerifyHandler,
)
from .base import UnknownRouteHandler
from .completions import ChatCompletionsHandler, CompletionsHandler
from .embeddings import EmbeddingsHandler, RerankHandler
from .health import HealthHandler
from .library import (
    DiscoverHandler,
    JobHandler,
    JobsHandler,
    LibraryHandler,
    LibraryModelHandler,
    LoadHandler,
    ProbeHandler,
    PullHandler,
    SuggestionsHandler,
    UnloadHandler,
    VerifyHandler,
)
from .limits import LimitsHandler
from .models import ModelHandler, ModelsHandler
from .openapi import OpenApiHandler
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
    (r"shimmy/api/models", LibraryHandler),
    (r"shimmy/api/models/discover", DiscoverHandler),
    (r"shimmy/api/models/pull", PullHandler),
    (r"shimmy/api/models/([^/]+)", LibraryModelHandler),
    (r"shimmy/api/models/([^/]+)/load", LoadHandler),
    (r"shimmy/api/models/([^/]+)/unload", UnloadHandler),
    (r"shimmy/api/models/([^/]+)/probe", ProbeHandler),
    (r"shimmy/api/models/([^/]+)/verify", VerifyHandler),
    (r"shimmy/api/suggestions", SuggestionsHandler),
    (r"shimmy/api/jobs", JobsHandler),
    (r"shimmy/api/jobs/([^/]+)", JobHandler),
    (r"shimmy/api/limits", LimitsHandler),
    (r"shimmy/api/audit", AuditHandler),
    (r"shimmy/api/audit/export", AuditExportHandler),
    (r"shimmy/api/audit/usage", AuditUsageHandler),
    (r"shimmy/api/audit/verify", AuditVerifyHandler),
    (r"shimmy/api/audit/anchor", AuditAnchorHandler),
    (r"shimmy/api/audit/receipts/([^/]+)", AuditReceiptHandler),
    (r"shimmy/api/openapi.json", OpenApiHandler),
    (r"shimmy/health", HealthHandler),
    (r"shimmy(?:/.*)?", UnknownRouteHandler),
]
