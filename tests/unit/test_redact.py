"""What our loggers write down, without the secrets that are in it.

Cases: tokens in addresses, headers, JSON and assignments; cookies; passwords in addresses; tokens of
the hub; JWTs; exceptions and their causes; arguments of a record; what only looks similar stays; every
logger of the package, and the application's own; twice.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shimmy_jupyter
from shimmy_jupyter.server.redact import LOGGERS, _redact, keep_secrets, redacted

SECRET = "s3cr3t0123456789abcdef0123456789"
HUB = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhZGEifQ.c2lnbmF0dXJlLW9mLWl0"


@pytest.mark.parametrize(
    "text",
    [
        "GET /shimmy/health?token={}",
        "GET /shimmy/health?a=1&token={}&b=2 (::1)",
        "http://127.0.0.1:8888/lab?token={}#x",
        "Authorization: token {}",
        "Authorization: Bearer {}",
        "authorization: {}",
        "{{'Authorization': 'token {}', 'Host': 'x'}}",
        '{{"Authorization": "Bearer {}"}}',
        "Proxy-Authorization: Basic {}",
        "sent Bearer {} to it",
        "token {} is wrong",
        "JUPYTERHUB_API_TOKEN={}",
        "SHIMMY_KERNEL_TOKEN: {}",
        "token='{}'",
        '"access_token": "{}"',
        "HF_TOKEN={}",
        "X-Api-Key: {}",
        "api_key={}",
        "password={}",
        "client_secret = {}",
        "_xsrf={}; next=1",
        "X-XSRFToken: {}",
        "Cookie: username-localhost-8888={}; a=b",
        "Set-Cookie: a={}; Path=/",
        "https://user:{}@models.example/x.gguf",
        "https://{}@models.example/x.gguf",
    ],
)
def test_gone(text: str) -> None:
    shown = redacted(text.format(SECRET))
    assert SECRET not in shown
    assert "[secret]" in shown
    assert redacted(shown) == shown


def test_by_their_looks_alone() -> None:
    for secret in (HUB, JWT):
        assert secret not in redacted(f"fetching with {secret} failed")
        assert secret not in redacted(f"/{secret}/")


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens=12 prompt_tokens=900 tokens: 5",
        "loading the model: 3 tokens/s, 12 of 40",
        "the token count of hf_model is 12",
        "token ids are whole numbers",
        "GET /shimmy/v1/models 200 (ada@127.0.0.1) 3.02ms",
        "no cookie, token=None",
        "https://huggingface.co/owner/name@main",
        "eyJ is how they begin",
    ],
)
def test_left_as_it_is(text: str) -> None:
    assert redacted(text) == text


@given(st.text(alphabet=st.sampled_from("0123456789abcdefABCDEF_-"), min_size=20, max_size=60))
def test_whatever_the_token(token: str) -> None:
    for text in ("?token={}", "Authorization: token {}", "Cookie: a={}", "token={} x"):
        assert token not in redacted(text.format(token))


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.lines.append(self.format(record))


@pytest.fixture
def kept() -> Iterator[Kept]:
    """What a handler at the root hears, once secrets are kept."""
    names = (*LOGGERS, "AnApplication")
    before = {name: list(logging.getLogger(name).filters) for name in names}
    keep_secrets("AnApplication")
    keep_secrets("AnApplication")
    handler = Kept()
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)
    for name, filters in before.items():
        logging.getLogger(name).filters[:] = filters


@pytest.mark.parametrize("name", [*LOGGERS, "AnApplication"])
def test_every_logger(kept: Kept, name: str) -> None:
    logging.getLogger(name).error("GET %s failed after %d", f"/x?token={SECRET}", 3)
    assert kept.lines == ["GET /x?token=[secret] failed after 3"]
    assert logging.getLogger(name).filters.count(_redact) == 1


def fail(why: str, cause: Exception | None = None) -> None:
    raise RuntimeError(why) from cause


def test_exceptions_and_their_causes(kept: Kept) -> None:
    try:
        try:
            fail(f"Authorization: token {SECRET}")
        except RuntimeError as cause:
            fail(f"with {HUB}", cause)
    except RuntimeError:
        logging.getLogger("shimmy_jupyter").exception("it failed", stack_info=True)
    (line,) = kept.lines
    assert SECRET not in line
    assert HUB not in line
    assert "RuntimeError: with [secret]" in line
    assert kept.records[0].exc_info is None


def test_an_exception_without_a_secret_stays_one(kept: Kept) -> None:
    try:
        fail("too hot")
    except RuntimeError:
        logging.getLogger("shimmy_jupyter.models").exception("it failed")
    assert kept.records[0].exc_info is not None
    assert kept.lines[0].endswith("RuntimeError: too hot")


def test_no_logger_is_forgotten() -> None:
    package = Path(shimmy_jupyter.__file__).parent
    text = "\n".join(path.read_text() for path in package.rglob("*.py"))
    ours = set(re.findall(r"getLogger\(\"(shimmy_jupyter[\w.]*)\"\)", text))
    assert ours == set(LOGGERS)
    # Others than by such a name: the children's, and this module's.
    assert len(re.findall(r"getLogger\((?!\")", text)) == 2
