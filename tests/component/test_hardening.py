"""What a request may be made of, on a real Jupyter server.

Cases: bodies over a route's limit, with a length, without one, and claimed only, on every route and method;
that no body is read before its sender is known, nor kept where none is wanted, by route or method; what
browsers ask first; depth and number of values; numbers that are none, too long, too large, and truths
instead; other encodings; keys twice; bodies of forms with cookies and with a token; ids in the path;
queries; headers; what the log says of a defect, and of an address with a token in it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import tracemalloc
from typing import Any

import pytest
from tornado import web
from tornado.iostream import IOStream, StreamClosedError
from tornado.tcpclient import TCPClient

from shimmy_jupyter.server.handlers.base import SMALL_BODY
from shimmy_jupyter.server.handlers.health import HealthHandler

from .conftest import MODEL, Fakes, chat
from .test_access import OURS, fetch, signed_in, token_header, url
from .test_embeddings import SHAPE, FakeBackend

__all__ = ["signed_in", "url"]

CHAT = "shimmy/v1/chat/completions"
COMPLETIONS = "shimmy/v1/completions"
EMBEDDINGS = "shimmy/v1/embeddings"
TOKENIZE = "shimmy/api/tokenize"
LARGE = ("completions", "embeddings", "rerank", "tokenize", "detokenize", "apply-template")


@pytest.fixture
def fakes() -> Fakes:
    return Fakes()


@pytest.fixture
def ask(server: Any, http_server_client: Any, jp_base_url: str) -> Any:
    """Status and answer of a request with the server's token."""

    async def ask(
        path: str, body: str | bytes | None = None, method: str = "", **headers: str
    ) -> tuple[int, dict[str, Any]]:
        response = await http_server_client.fetch(
            jp_base_url + path, raise_error=False, body=body, allow_nonstandard_methods=True,
            method=method or ("GET" if body is None else "POST"),
            headers=token_header(server) | {k.replace("_", "-"): v for k, v in headers.items()},
        )  # fmt: skip
        answer = json.loads(response.body)
        if response.code >= 400 and "error" in answer:
            assert set(answer["error"]) == {"message", "type", "code", "param", "request_id"}
            assert answer["error"]["request_id"] == response.headers["x-shimmy-request-id"]
        return response.code, answer

    return ask


@pytest.fixture
def raw(server: Any, http_server_client: Any, jp_http_port: int, jp_base_url: str) -> Any:
    """A connection on which a request's head has been sent; the token goes along unless told."""

    async def raw(method: str, path: str, *headers: str, token: bool = True) -> IOStream:
        stream = await TCPClient().connect("127.0.0.1", jp_http_port)
        lines = [f"{method} {jp_base_url}{path} HTTP/1.1", f"Host: 127.0.0.1:{jp_http_port}"]
        if token:
            lines.append(f"Authorization: token {server.identity_provider.token}")
        await stream.write("\r\n".join([*lines, *headers, "", ""]).encode("latin-1"))
        return stream

    return raw


async def answered(stream: IOStream) -> tuple[int, bytes, dict[str, Any]]:
    """Status, head and body of an answer after which the connection is closed."""
    whole = await asyncio.wait_for(stream.read_until_close(), 10)
    head, _, body = whole.partition(b"\r\n\r\n")
    return int(head.split()[1]), head, json.loads(body)["error"]


# Bodies that are too large


@pytest.mark.parametrize(("path", "method"), OURS)
async def test_a_claimed_length_is_refused_before_it_comes(
    raw: Any, path: str, method: str
) -> None:
    most = 8 << 20 if path.endswith(LARGE) else SMALL_BODY
    stream = await raw(method, path, f"Content-Length: {most + 1}")
    status, head, error = await answered(stream)
    assert (status, error["code"]) == (413, "request_too_large")
    assert str(most) in error["message"]
    assert ("max_request_size" in error["message"]) == path.endswith(LARGE)
    assert b"connection: close" in head.lower()


@pytest.mark.parametrize(("path", "method"), OURS)
async def test_without_a_length_it_is_refused_when_it_is_too_much(
    server: Any, raw: Any, path: str, method: str
) -> None:
    server.web_app.settings["shimmy_max_request_bytes"] = 100_000
    stream = await raw(method, path, "Transfer-Encoding: chunked")
    # Never ended, and sent until the server hangs up.
    sent = 0
    try:
        for _ in range(400):
            await stream.write(b"8000\r\n" + b"x" * 0x8000 + b"\r\n")
            sent += 0x8000
            await asyncio.sleep(0)
    except StreamClosedError:
        pass
    # What had come by then may be lost with the connection, by how TCP resets it.
    assert sent < 400 * 0x8000


@pytest.mark.parametrize("path", [CHAT, "shimmy/api/models/discover", "shimmy/health"])
async def test_one_large_chunk_keeps_our_shape(server: Any, raw: Any, path: str) -> None:
    server.web_app.settings["shimmy_max_request_bytes"] = 100_000
    stream = await raw("POST", path, "Transfer-Encoding: chunked")
    await stream.write(b"5000000\r\n" + b"x" * 100_001)
    status, _, error = await answered(stream)
    assert (status, error["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("path", [CHAT, "shimmy/api/models/discover", "shimmy/health"])
async def test_whoever_is_not_known_is_refused_before_the_body(raw: Any, path: str) -> None:
    stream = await raw("POST", path, "Content-Length: 500000000", token=False)
    status, _, error = await answered(stream)
    assert (status, error["code"]) == (403, "policy_denied")


@pytest.mark.parametrize("path", [CHAT, "shimmy/api/limits", "shimmy/health", "shimmy/nowhere"])
@pytest.mark.parametrize(
    "header", ["Content-Length: 500000000", "Content-Length: 1", "Transfer-Encoding: chunked"]
)
async def test_nobody_s_options_have_no_body(raw: Any, path: str, header: str) -> None:
    stream = await raw("OPTIONS", path, header, token=False)
    status, _, error = await answered(stream)
    assert (status, error["code"]) == (403, "policy_denied")


@pytest.mark.parametrize("header", ["X-None: 1", "Content-Length: 0", "Content-Length: 00"])
async def test_what_browsers_ask_first_is_answered(raw: Any, header: str) -> None:
    asked = "Origin: https://page.example", "Access-Control-Request-Method: POST"
    stream = await raw("OPTIONS", CHAT, header, "Connection: close", *asked, token=False)
    whole = await asyncio.wait_for(stream.read_until_close(), 10)
    assert whole.startswith(b"HTTP/1.1 200 ")
    assert b"access-control-allow-methods" in whole.lower()


@pytest.mark.parametrize("method", ["OPTIONS", "GET", "DELETE", "PATCH"])
async def test_a_method_that_has_no_use_for_texts(raw: Any, method: str) -> None:
    stream = await raw(method, CHAT, f"Content-Length: {SMALL_BODY + 1}")
    status, _, error = await answered(stream)
    assert (status, error["code"]) == (413, "request_too_large")
    assert f"this route allows {SMALL_BODY}" in error["message"]


async def test_a_client_that_waits_to_be_told_sends_nothing(raw: Any) -> None:
    stream = await raw("POST", CHAT, "Content-Length: 9000000", "Expect: 100-continue")
    assert (await answered(stream))[0] == 413
    stream = await raw("POST", CHAT, "Content-Length: 900", "Expect: 100-continue")
    assert b"100 (Continue)" in await stream.read_until(b"\r\n")
    stream.close()


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "shimmy/health"), ("OPTIONS", CHAT), ("OPTIONS", "shimmy/api/limits")]
)  # fmt: skip
async def test_a_body_where_none_is_wanted_is_not_kept(
    raw: Any, ask: Any, method: str, path: str
) -> None:
    await ask("shimmy/health")
    tracemalloc.start()
    try:
        streams = [await raw(method, path, "Content-Length: 60000") for _ in range(50)]
        for stream in streams:
            await stream.write(b"x" * 59_999)
        await ask("shimmy/health")
        kept = tracemalloc.take_snapshot().filter_traces(
            [tracemalloc.Filter(True, "*tornado/web.py"), tracemalloc.Filter(True, "*handlers*")]
        )
        assert sum(one.size for one in kept.statistics("filename")) < 1_000_000
        for stream in streams:
            await stream.write(b"x")
            assert b" 200 " in await stream.read_until(b"\r\n")
            stream.close()
    finally:
        tracemalloc.stop()


async def test_a_small_limit_holds_for_all(server: Any, ask: Any) -> None:
    server.web_app.settings["shimmy_max_request_bytes"] = 1000
    status, answer = await ask("shimmy/api/models/discover", b" " * 1001)
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    assert (await ask("shimmy/api/models/discover", b" " * 1000))[0] == 200


@pytest.mark.parametrize("length", ["-1", "\xb2", "1" * 5000, "1e3", "0x10", "1, 2", "5\t"])
async def test_lengths_that_are_none(raw: Any, length: str) -> None:
    stream = await raw("POST", CHAT, f"Content-Length: {length}")
    await stream.write(b"{}   ")
    said = await asyncio.wait_for(stream.read_until(b"\r\n"), 10)
    assert b" 400 " in said
    stream.close()


async def test_compressed_bodies_are_not_unpacked(ask: Any) -> None:
    import gzip

    body = gzip.compress(b'{"model": "' + b"x" * 10_000_000 + b'"}')
    status, answer = await ask(CHAT, body, Content_Encoding="gzip")
    assert (status, answer["error"]["code"]) == (400, "invalid_value")


# What is in them


def nested(levels: int, around: str = "[]") -> str:
    inner = "1"
    for _ in range(levels):
        inner = f"[{inner}]" if around == "[]" else f'{{"a":{inner}}}'
    return inner


@pytest.mark.parametrize("around", ["[]", "{}"])
@pytest.mark.parametrize("path", [CHAT, TOKENIZE, EMBEDDINGS, "shimmy/api/models/discover"])
async def test_depth(ask: Any, path: str, around: str) -> None:
    for levels in (64, 500, 6000):
        status, answer = await ask(path, f'{{"model": "fake", "x": {nested(levels, around)}}}')
        error = answer["error"]
        assert (status, error["code"]) == (400, "invalid_value")
        assert "64 levels" in error["message"]
    if path == CHAT:
        body = json.loads(chat()) | {"x": json.loads(nested(63, around))}
        assert (await ask(path, json.dumps(body)))[0] == 200


async def test_brackets_in_texts_are_no_levels(ask: Any) -> None:
    assert (await ask(COMPLETIONS, json.dumps({"model": MODEL, "prompt": ">" + "[{" * 20})))[
        0
    ] == 200
    body = json.dumps({"model": MODEL, "prompt": '\\"[{' * 200_000})
    assert (await ask(COMPLETIONS, body))[1]["error"]["code"] == "context_length_exceeded"


async def test_more_objects_than_memory_should_hold(ask: Any) -> None:
    for inner in ("{}", "[]", '{"[":[]}'):
        body = f'{{"model": "fake", "x": [{",".join([inner] * 300_000)}]}}'
        status, answer = await ask(CHAT, body)
        assert (status, answer["error"]["code"]) == (400, "invalid_value")
        assert "262144 objects and lists" in answer["error"]["message"]


NUMBERS = {
    "temperature": 2, "top_p": 1, "top_k": 1, "min_p": 1, "repeat_penalty": 1, "repeat_last_n": 1,
    "presence_penalty": 1, "frequency_penalty": 1, "seed": 1, "max_tokens": 1, "min_tokens": 1,
    "max_seconds": 1, "n": 1, "max_completion_tokens": 1, "top_logprobs": 1,
}  # fmt: skip
SIGNED = ("seed", "presence_penalty", "frequency_penalty")


@pytest.mark.parametrize("field", NUMBERS)
async def test_numbers(ask: Any, field: str) -> None:
    begin = chat()[:-1]
    wrong = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "true", "false", '"1"', "[1]", "{}"]
    wrong += ["1" + "0" * 400, "-" + "9" * 4000, "1e300", "-5e300"]
    wrong += [] if field in SIGNED else ["-1", "-0.5"]
    for value in wrong:
        status, answer = await ask(CHAT, f'{begin}, "{field}": {value}}}')
        assert (status, answer["error"]["code"]) == (400, "invalid_value"), value
        assert answer["error"]["param"] == field, value


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, '{"model":"fake","messages":[{"role":"user","content":NaN}]}', "messages.0.content"),
        (CHAT, '{"model":"fake","logit_bias":{"5":1e999},"messages":[]}', "logit_bias.5"),
        (COMPLETIONS, '{"model":"fake","prompt":[1e999]}', "prompt.0"),
        (COMPLETIONS, '{"model":"fake","prompt":[true]}', "prompt"),
        (COMPLETIONS, '{"model":"fake","prompt":[62,null]}', "prompt"),
        (COMPLETIONS, '{"model":"fake","prompt":[[null]]}', "prompt"),
        ("shimmy/api/detokenize", '{"model":"fake","tokens":[null]}', "tokens"),
        (EMBEDDINGS, '{"model":"fake","input":[5,null]}', "input"),
        (EMBEDDINGS, '{"model":"fake","input":[[5,null]]}', "input.0"),
        (COMPLETIONS, '{"model":"fake","prompt":[-1]}', "prompt"),
        (EMBEDDINGS, '{"model":"fake","input":[NaN]}', "input.0"),
        (EMBEDDINGS, '{"model":"fake","input":"x","dimensions":true}', "dimensions"),
        (EMBEDDINGS, '{"model":"fake","input":"x","dimensions":-1}', "dimensions"),
        (
            "shimmy/v1/rerank",
            '{"model":"fake","query":"x","documents":["y"],"top_n":true}',
            "top_n",
        ),
        ("shimmy/v1/rerank", '{"model":"fake","query":"x","documents":["y"],"top_n":0}', "top_n"),
        ("shimmy/api/detokenize", '{"model":"fake","tokens":[1e999]}', "tokens.0"),
        (TOKENIZE, '{"model":"fake","messages":[],"thinking":1e999}', "thinking"),
    ],
)
async def test_numbers_elsewhere(ask: Any, fakes: Fakes, path: str, body: str, param: str) -> None:
    fakes.make = lambda: FakeBackend(embedding=SHAPE)
    status, answer = await ask(path, body)
    assert (status, answer["error"]["code"]) == (400, "invalid_value")
    assert answer["error"]["param"] == param


async def test_numbers_that_nobody_looks_at(ask: Any) -> None:
    for value, place in (("NaN", "x"), ("1e999", "x"), ('[1, {"y": -Infinity}]', "x.1.y")):
        status, answer = await ask(CHAT, f'{chat()[:-1]}, "x": {value}}}')
        assert (status, answer["error"]["code"]) == (400, "invalid_value")
        assert answer["error"]["param"] == place
        assert "is not a number here" in answer["error"]["message"]
    status, answer = await ask(CHAT, f'{chat()[:-1]}, "x": {"9" * 5000}}}')
    assert (status, answer["error"]["message"]) == (
        400,
        "the body is not JSON: a whole number is too long",
    )


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xfe{\x00}\x00",
        '{"model": "fake"}'.encode("utf-16"),
        '{"model": "fake"}'.encode("utf-32"),
        b'{"model": "\xed\xa0\x80"}',
        b'{"model": "\x00"}',
        b"\x00",
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b"{'model': 'fake'}",
        b'{"model": "fake"}{}',
        b'{"model": "fake",}',
    ],
)
@pytest.mark.parametrize("path", [CHAT, TOKENIZE, EMBEDDINGS])
async def test_what_is_no_json(ask: Any, path: str, body: bytes) -> None:
    status, answer = await ask(path, body, method="POST")
    assert (status, answer["error"]["code"]) == (400, "invalid_value")


async def test_half_of_a_pair_nowhere(ask: Any) -> None:
    body = chat(x="MARK").encode()
    assert (await ask(CHAT, body.replace(b"MARK", b"\xf0\x9f\x99\x82")))[0] == 200
    status, answer = await ask(CHAT, body.replace(b"MARK", b"\xed\xa0\x80"))
    assert (status, answer["error"]["code"]) == (400, "invalid_value")


async def test_of_a_key_that_is_there_twice_the_last_counts(ask: Any) -> None:
    body = f'{{"model": "ghost", {chat()[1:]}'
    status, answer = await ask(CHAT, body)
    assert (status, answer["model"]) == (200, MODEL)
    status, answer = await ask(CHAT, f'{chat()[:-1]}, "model": "ghost"}}')
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded;a=b", "Multipart/Form-Data"])  # fmt: skip
async def test_what_a_form_of_another_site_could_send(
    server: Any, http_server_client: Any, url: Any, signed_in: Any, ask: Any, kind: str
) -> None:
    cookies, xsrf = await signed_in()
    browser = {"Cookie": f"{cookies}; _xsrf={xsrf}", "X-XSRFToken": xsrf}
    for path, method in OURS:
        if method == "GET":
            continue
        status, body = await fetch(
            http_server_client, url(path), method, headers=browser | {"Content-Type": kind}
        )
        error = json.loads(body)["error"]
        assert (status, error["code"], error["param"]) == (400, "invalid_value", "Content-Type")
        json_kind = {"Content-Type": "application/json; charset=utf-8"}
        status, body = await fetch(
            http_server_client, url(path), method, headers=browser | json_kind
        )
        assert b"Content-Type" not in body
    # `curl -d` with a token says that it sends a form, and no page of another site has the token.
    assert (await ask(CHAT, chat(), Content_Type=kind))[0] == 200


# Paths, queries and headers


STRANGE = [
    "%00", "a%00b", "%2e%2e%2f", "..%2f..%2fetc%2fpasswd", "a%2fb", "%5c", "a%20b", "%0d%0aX:y",
    "%E2%80%AE", "a" * 129, "a" * 5000, "fake%00", "fake%2F", "%66ake%20", "*", "'", "%22", "%3Cb%3E",
    "%F0%9F%99%82",
]  # fmt: skip


@pytest.mark.parametrize("id", STRANGE)
async def test_ids_that_no_model_has(ask: Any, id: str) -> None:
    for path in (f"shimmy/v1/models/{id}", f"shimmy/api/models/{id}"):
        status, answer = await ask(path)
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        assert len(answer["error"]["message"]) < 200
    for verb in ("load", "unload", "probe", "verify"):
        status, answer = await ask(f"shimmy/api/models/{id}/{verb}", "")
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
    for method in ("GET", "DELETE"):
        status, answer = await ask(f"shimmy/api/jobs/{id}", method=method)
        assert (status, answer["error"]["code"]) == (404, "not_found")


async def test_ids_by_percent(ask: Any) -> None:
    assert (await ask("shimmy/v1/models/%66ake"))[1]["id"] == MODEL
    for id in ("%ff", "%c3", "%ed%a0%80"):
        for path in (f"shimmy/v1/models/{id}", f"shimmy/api/jobs/{id}"):
            status, answer = await ask(path)
            assert (status, answer["error"]["code"]) == (400, "invalid_value")
    for path in ("shimmy/v1/models/..", "shimmy/api/models/.", "shimmy/v1/models/../../api"):
        assert (await ask(path))[0] == 404


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ("task=chat", 200, None),
        ("task=chat&x=1", 200, None),
        ("task=chat&task=chat", 400, "task"),
        ("task=chat&task=code", 400, "task"),
        ("task=", 400, "task"),
        ("task=%00", 400, "task"),
        ("task=%20chat", 400, "task"),
        ("task=ghost", 400, "task"),
        ("task=%ff", 400, None),
        ("%ff=1", 200, None),
        ("&&==&", 200, None),
    ],
)
async def test_queries(ask: Any, query: str, status: int, param: str | None) -> None:
    got, answer = await ask(f"shimmy/api/suggestions?{query}")
    assert got == status
    if status == 400:
        assert answer["error"]["code"] == "invalid_value"
        assert answer["error"]["param"] == param


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value)
          for name in ("x-shimmy-notebook", "x-shimmy-cell", "Accept", "X-XSRFToken", "Cookie",
                       "User-Agent", "Content-Type", "X-Forwarded-For", "Referer")
          for value in ("\xe9\xff\x80", "x" * 20_000, "\t\x0b", '";=,', "")),
        ("Authorization", "\xe9"),
        ("Authorization", "token \xff"),
        ("Authorization", "token " + "x" * 20_000),
        ("Authorization", "Bearer"),
        ("Origin", "\xe9"),
        ("Origin", "http://[::1"),
        ("Sec-Fetch-Mode", "\xe9"),
        ("Expect", "\xe9"),
    ],
)  # fmt: skip
async def test_strange_headers(server: Any, raw: Any, name: str, value: str) -> None:
    body = chat().encode()
    stream = await raw(
        "POST", CHAT, f"Content-Length: {len(body)}", "Connection: close",
        f"{name}: {value}", token=name != "Authorization",
    )  # fmt: skip
    await stream.write(body)
    said = await asyncio.wait_for(stream.read_until(b"\r\n"), 10)
    stream.close()
    assert int(said.split()[1]) in (200, 400, 403, 404)


async def test_a_head_that_is_too_long(raw: Any) -> None:
    with pytest.raises(StreamClosedError):
        stream = await raw("GET", "shimmy/health", "x-shimmy-notebook: " + "x" * 100_000)
        await stream.read_until(b"\r\n")


async def test_methods_of_no_kind(raw: Any) -> None:
    stream = await raw("BREW", "shimmy/health", "Connection: close")
    status, _, error = await answered(stream)
    assert (status, error["code"]) == (405, "method_not_allowed")


# What is written down


async def test_a_defect_is_logged_without_the_token(
    server: Any, ask: Any, monkeypatch: Any, caplog: Any
) -> None:
    secret = server.identity_provider.token

    async def broken(_self: Any) -> None:
        raise RuntimeError(f"Authorization: token {secret} went wrong")

    monkeypatch.setattr(HealthHandler, "get", web.authenticated(broken))
    with caplog.at_level(logging.DEBUG):
        status, answer = await ask(f"shimmy/health?token={secret}&a=1")
    error = answer["error"]
    assert (status, error["code"]) == (500, "internal_error")
    assert error["message"] == "something went wrong; the server's log says what"
    said = caplog.text
    assert secret not in said
    assert "RuntimeError: Authorization: token [secret] went wrong" in said
    assert f"request {error['request_id']}, GET" in said
    assert "Traceback" in said


async def test_what_a_client_did_wrong_is_logged_without_the_token(
    server: Any, http_server_client: Any, url: Any, signed_in: Any, caplog: Any
) -> None:
    secret = server.identity_provider.token
    cookies, _ = await signed_in()
    with caplog.at_level(logging.DEBUG):
        for path in ("shimmy/v1/models/%ff", "shimmy/nothing", "shimmy/api/jobs/x"):
            await fetch(http_server_client, url(f"{path}?token={secret}"), "GET")
        refused = await fetch(
            http_server_client, url(f"{CHAT}?access_token={secret}"), "POST",
            headers={"Cookie": cookies, "Referer": f"http://x/?token={secret}"},
        )  # fmt: skip
    assert refused[0] == 403
    assert "XSRF" in caplog.text or "_xsrf" in caplog.text
    assert secret not in caplog.text


@pytest.mark.parametrize(("status", "code"), [(401, "policy_denied"), (402, "invalid_value"), (431, "invalid_value"), (502, "internal_error")])  # fmt: skip
async def test_what_others_raise_has_our_shape(
    ask: Any, monkeypatch: Any, status: int, code: str
) -> None:
    async def raising(_self: Any) -> None:
        raise web.HTTPError(status, "secret detail %s", "x")

    monkeypatch.setattr(HealthHandler, "get", raising)
    got, answer = await ask("shimmy/health")
    assert answer["error"]["code"] == code
    assert got == {"policy_denied": 403, "invalid_value": 400, "internal_error": 500}[code]
    assert "secret" not in answer["error"]["message"]
