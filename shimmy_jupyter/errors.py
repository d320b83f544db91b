"""One tree of errors. Each knows its stable code, its HTTP status and an OpenAI error type.

ShimmyError
├── RequestError                       400  what was asked is wrong; nothing was computed
│   ├── InvalidValue                        invalid_value
│   │   └── LockError                       invalid_value: shimmy.lock cannot be used, or not so
│   ├── UnsupportedParameter                unsupported_parameter
│   ├── UnknownParameter                    unknown_parameter: on our own routes
│   ├── ContextLengthExceeded               context_length_exceeded
│   └── RequestTooLarge                413  request_too_large
├── ModelNotFound                      404  model_not_found
├── ModelDrifted                       409  model_drifted: it is not what the request pins
├── NotFound                           404  not_found
├── MethodNotAllowed                   405  method_not_allowed
├── AccessDenied                       403  policy_denied
├── DeadlineExceeded                   408  deadline_exceeded
├── RateLimitExceeded                  429  rate_limit_exceeded: says which limit, and when to try again
├── QueueFull                          503  queue_full
├── ModelLoadFailed                    503  model_load_failed
│   ├── GgufError                      503  model_load_failed: by the file's header alone
│   └── NotEnoughMemory                503  model_load_failed: at the moment
├── GenerationFailed                   500  generation_failed: this sequence alone
│   └── Unusable                            an answer that is there, and not what it has to be; has its text
│       ├── AnswerCutOff                    it has reached max_tokens
│       └── AnswerInvalid                   it fits its schema, and its type refuses it; names the field
├── FetchFailed                        502  fetch_failed: the other side, the network, or the file's bytes
│   ├── FetchInterrupted               502  fetch_interrupted: the same call again goes on from there
│   └── ChecksumMismatch               502  checksum_mismatch: the bytes are not those that were asked for
├── FetchRefused                       403  fetch_refused: our own policy; nothing was fetched, or no more
├── FileExists                         409  file_exists: another file has the name
├── DiskFull                           507  disk_full
├── Misconfigured                      503  misconfigured: a setting is wrong; says which
├── AuditUnavailable                   503  audit_unavailable: the ledger cannot be written or read
├── ConstraintTooComplex               400  constraint_too_complex: this sequence alone
├── EngineCrashed                      503  engine_crashed: the sequences of that step
│   └── EngineLost                 503  engine_crashed: every sequence of that engine
├── ShuttingDown                       503  shutting_down
├── InternalError                      500  internal_error: a defect of ours, details in the log
├── ServerUnreachable                  502  server_unreachable: only raised in a kernel
└── Cancelled                          499  cancelled

Messages are safe to show: no traceback, no path of the server's file system.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from .types import Failure


class ShimmyError(Exception):
    """Base of everything this package raises on purpose."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"

    def __init__(
        self, message: str, *, param: str | None = None, request_id: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.request_id = request_id

    def to_json(self, request_id: str | None = None) -> dict[str, Any]:
        """The one error shape that every route answers with."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "code": self.code,
                "param": self.param,
                "request_id": request_id or self.request_id,
            }
        }

    def _render_traceback_(self) -> list[str]:
        """IPython shows this instead of a traceback through our own frames."""
        where = f" (field {self.param!r})" if self.param else ""
        said = f"{type(self).__name__}: {self.message}{where} [{self.code}]"
        # A message can quote a file or a server: nothing in it moves a cursor or turns the text.
        return ["".join(c if c.isprintable() or c == "\n" else " " for c in said)]


class RequestError(ShimmyError):
    code = "invalid_value"
    status = 400
    type = "invalid_request_error"


class InvalidValue(RequestError):
    pass


class UnsupportedParameter(RequestError):
    code = "unsupported_parameter"


class UnknownParameter(RequestError):
    code = "unknown_parameter"


class ContextLengthExceeded(RequestError):
    code = "context_length_exceeded"


class RequestTooLarge(RequestError):
    code = "request_too_large"
    status = 413


class ModelNotFound(ShimmyError):
    code = "model_not_found"
    status = 404
    type = "invalid_request_error"


class ModelDrifted(ShimmyError):
    code = "model_drifted"
    status = 409
    type = "invalid_request_error"


class NotFound(ShimmyError):
    code = "not_found"
    status = 404
    type = "invalid_request_error"


class MethodNotAllowed(ShimmyError):
    code = "method_not_allowed"
    status = 405
    type = "invalid_request_error"


class AccessDenied(ShimmyError):
    code = "policy_denied"
    status = 403
    type = "permission_error"


class DeadlineExceeded(ShimmyError):
    code = "deadline_exceeded"
    status = 408


class RateLimitExceeded(ShimmyError):
    """`retry_after` is in seconds; `limit` the name of the limit that was reached."""

    code = "rate_limit_exceeded"
    status = 429
    type = "rate_limit_error"

    def __init__(
        self, message: str, *, limit: str = "", retry_after: float | None = None, **details: Any
    ) -> None:
        super().__init__(message, **details)
        self.limit, self.retry_after = limit, retry_after


class QueueFull(ShimmyError):
    code = "queue_full"
    status = 503


class ModelLoadFailed(ShimmyError):
    code = "model_load_failed"
    status = 503


class GgufError(ModelLoadFailed):
    """Why a file is refused before anything is loaded. Names no path, and quotes little of the file."""


class NotEnoughMemory(ModelLoadFailed):
    """Says what is needed and what there is."""


class FetchFailed(ShimmyError):
    """`answered` is the status of an answer that was not the one hoped for, and `answer_code` what a
    hub calls the reason (such as "GatedRepo"); None where something else has failed.
    """

    code = "fetch_failed"
    status = 502
    answered: int | None = None
    answer_code: str | None = None


class FetchInterrupted(FetchFailed):
    """What has come is kept; the same request again continues from there."""

    code = "fetch_interrupted"


class ChecksumMismatch(FetchFailed):
    code = "checksum_mismatch"


class FetchRefused(ShimmyError):
    code = "fetch_refused"
    status = 403
    type = "permission_error"


class FileExists(ShimmyError):
    code = "file_exists"
    status = 409
    type = "invalid_request_error"


class DiskFull(ShimmyError):
    code = "disk_full"
    status = 507


class Misconfigured(ShimmyError):
    code = "misconfigured"
    status = 503


class AuditUnavailable(ShimmyError):
    code = "audit_unavailable"
    status = 503


class GenerationFailed(ShimmyError):
    code = "generation_failed"


class Unusable(GenerationFailed):
    """`text` is what the model has written."""

    def __init__(self, message: str, *, text: str = "", **details: Any) -> None:
        super().__init__(message, **details)
        self.text = text


class AnswerCutOff(Unusable):
    """It has reached `max_tokens`; `text` is its beginning."""


class AnswerInvalid(Unusable):
    """It fits its schema, and its type refuses it; `param` is the field."""


class ConstraintTooComplex(ShimmyError):
    code = "constraint_too_complex"
    status = 400
    type = "invalid_request_error"


class EngineCrashed(ShimmyError):
    code = "engine_crashed"
    status = 503


class EngineLost(EngineCrashed):
    """Nothing more can be asked of it; another must be loaded."""


class ShuttingDown(ShimmyError):
    code = "shutting_down"
    status = 503


class InternalError(ShimmyError):
    pass


class ServerUnreachable(ShimmyError):
    code = "server_unreachable"
    status = 502


class Cancelled(ShimmyError):
    code = "cancelled"
    status = 499


def _tree(cls: type[ShimmyError]) -> list[type[ShimmyError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in _tree(child))]


def all_errors() -> list[type[ShimmyError]]:
    """Every class of the tree, the root first."""
    return _tree(ShimmyError)


def from_code(code: str, message: str, **details: Any) -> ShimmyError:
    """The exception for a stable code, as read from a `Failure` or from the wire."""
    abstract = (ShimmyError, RequestError)
    known = (c for c in all_errors() if c.code == code and c not in abstract)
    cls = next(known, InternalError)
    return cls(message, **details)


def from_failure(failure: Failure) -> ShimmyError:
    return from_code(failure.code, failure.message)


_FOLDERS = re.compile(r"(?<![\w.)])(?:[A-Za-z]:)?[/\\](?:[^\s/\\'\"]+[/\\])+")


def without_folders(text: str) -> str:
    """What others say of a file, without where it is."""
    return _FOLDERS.sub("", text)
