"""The middlewares, over an app that tells what reached it: who is let in, how much is read, and with which salt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from ghostserve.errors import UsageError
from ghostserve.testing.fake_engine import FakeEngine
from ghostserve.testing.fake_server import build_app
from ghostserve.web.access import route_path
from ghostserve.web.body_limit import LINGER_BYTES
from ghostserve.web.cache_salt import SALTED_PATHS, salt_for, salted
from ghostserve.web.key_gate import OPEN_PATHS, is_closed

KEYS, SECRET, LIMIT = ("alice", "bob"), b"s" * 32, 2000
ECHO = "/v1/chat/completions"
OF_ALICE = {"Authorization": "Bearer alice"}
OF_BOB = {"Authorization": "Bearer bob"}


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.close()


def connect(engine: FakeEngine, **rules: Any) -> TestClient:
    """A server whose ECHO route answers with the request as it arrived there."""
    app: FastAPI = build_app(engine, **rules)

    async def echo(request: Request) -> dict[str, Any]:
        return {"body": await request.json(), "length": request.headers.get("content-length")}

    for path in ("/invocations", "/cohere/v2/chat", "/v1/chat/completions/render", ECHO):
        app.post(path)(echo)

    async def nothing() -> dict[str, Any]:
        return {}

    app.get("/ping")(nothing)
    app.get("/version")(nothing)
    return TestClient(app, base_url="http://127.0.0.1:8000", client=("127.0.0.1", 50000))


def message(answer: Any) -> str:
    return str(answer.json()["error"]["message"])


# ---- the key ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "HEAD"])
@pytest.mark.parametrize("path", ["/version", "/invocations", "/docs", "/openapi.json", "/no/such/route", "/v1x", "/",
                                  "//health", "/health/", "/HEALTH", "/health/../version", "/uix", "/metricsx"])  # fmt: skip
def test_what_is_not_named_as_open_is_closed(engine: FakeEngine, method: str, path: str) -> None:
    client = connect(engine, api_keys=KEYS)
    answer = client.request(method, path, content=b"{}")
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert client.request(method, path, content=b"{}", headers=OF_BOB).status_code != 401
    assert connect(engine).request(method, path, content=b"{}").status_code != 401, (
        "without keys nothing is asked for"
    )


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_probes_and_scrapers_carry_no_key(engine: FakeEngine, path: str) -> None:
    assert connect(engine, api_keys=KEYS).get(path).status_code in (200, 404)


@pytest.mark.parametrize(
    "sent", ["alice", "Basic alice", "Bearer  alice", "Bearer alice,Bearer alice", "Bearer ALICE"]
)
def test_only_the_key_opens(engine: FakeEngine, sent: str) -> None:
    client = connect(engine, api_keys=KEYS)
    answer = client.get("/version", headers={"Authorization": sent})
    assert answer.status_code == 401
    assert "alice" not in answer.text.lower()
    twice = [("Authorization", "Bearer alice"), ("Authorization", "Bearer bob")]
    assert client.get("/version", headers=twice).status_code == 401


def test_a_preflight_passes_and_reaches_no_route(engine: FakeEngine) -> None:
    assert connect(engine, api_keys=KEYS).options("/version").status_code == 405


def test_no_other_site_may_read_answers(engine: FakeEngine) -> None:
    answer = connect(engine).get("/version", headers={"Origin": "http://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_websocket_needs_the_key_too(engine: FakeEngine) -> None:
    client = connect(engine, api_keys=KEYS)
    with pytest.raises(Exception) as raised, client.websocket_connect("/v1/realtime"):
        pass
    assert getattr(raised.value, "code", None) == 1008


@pytest.mark.parametrize(
    ("root", "path", "route"),
    [("", "/a", "/a"), ("/api", "/api/health", "/health"), ("/api", "/health", "/health"), ("/api", "/api", ""),
     ("/api", "/apihealth", "/apihealth")],
)  # fmt: skip
def test_a_root_path_is_taken_off_as_routes_do(root: str, path: str, route: str) -> None:
    assert route_path({"path": path, "root_path": root}) == route
    assert is_closed("/apihealth", "GET")


# ---- the length ------------------------------------------------------------------------------------------------------


def chunks(total: int) -> Iterator[bytes]:
    yield b'{"prompt": "'
    for _ in range(total // 100):
        yield b"x" * 100
    yield b'"}'


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "in chunks"])
def test_a_body_has_a_greatest_length(engine: FakeEngine, announced: bool) -> None:
    client = connect(engine, body_bytes_max=LIMIT)
    for size, status in ((LIMIT // 2, 200), (LIMIT + 100, 413), (LIMIT * 50, 413)):
        body = b"".join(chunks(size)) if announced else chunks(size)
        answer = client.post(ECHO, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == status, size
        if status == 413:
            assert f"{LIMIT} bytes" in message(answer)
            assert "--max-body-size" in message(answer)
            assert answer.headers["connection"] == "close"
    assert connect(engine).post(ECHO, content=chunks(LIMIT * 50)).status_code == 200, "0: no limit"


def scope_of(path: str, headers: dict[bytes, bytes]) -> dict[str, Any]:
    return {
        "type": "http", "method": "POST", "path": path, "headers": list(headers.items()), "query_string": b"",
        "root_path": "", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000), "scheme": "http", "http_version": "1.1",
    }  # fmt: skip


@pytest.mark.parametrize("waits", [False, True], ids=["sends", "waits to be told to"])
def test_a_client_that_never_ends_is_answered(engine: FakeEngine, waits: bool) -> None:
    """What it sends is thrown away up to a bound, so that it reads the answer; one that waits is told at once."""
    taken, sent = [0], []

    async def receive() -> dict[str, Any]:
        taken[0] += 1 << 20
        return {"type": "http.request", "body": bytes(1 << 20), "more_body": True}

    async def send(event: Any) -> None:
        sent.append(event)

    headers = {b"content-length": b"9" * 12} | ({b"expect": b"100-continue"} if waits else {})
    anyio.run(connect(engine, body_bytes_max=LIMIT).app, scope_of(ECHO, headers), receive, send)
    assert sent[0]["status"] == 413
    assert taken[0] == (0 if waits else LINGER_BYTES)


@pytest.mark.parametrize("length", ["9" * 5000, "9" * 18])
def test_a_boundless_length_is_too_long(engine: FakeEngine, length: str) -> None:
    answer = connect(engine, body_bytes_max=LIMIT).post(
        ECHO, content=b"{}", headers={"Content-Length": length}
    )
    assert answer.status_code == 413


# ---- the salt --------------------------------------------------------------------------------------------------------


def salt_of(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    body = answer.json()["body"]
    assert int(answer.json()["length"]) == len(json.dumps(body, separators=(",", ":")))
    return str(body["cache_salt"])


@pytest.mark.parametrize("path", [ECHO, "/invocations"])
def test_each_key_has_a_salt_of_its_own(engine: FakeEngine, path: str) -> None:
    client = connect(engine, api_keys=KEYS, salt_secret=SECRET)
    request = {"prompt": "héllo", "n": 2}
    alice = salt_of(client.post(path, json=request, headers=OF_ALICE))
    assert alice == salt_of(client.post(path, json=request, headers=OF_ALICE)), "or nothing is ever cached"
    assert alice != salt_of(client.post(path, json=request, headers=OF_BOB))
    assert salt_of(client.post(path, json={**request, "cache_salt": None}, headers=OF_ALICE)) == alice
    own = salt_of(client.post(path, json={**request, "cache_salt": "mine"}, headers=OF_ALICE))
    assert own not in (alice, "mine")
    stolen = salt_of(client.post(path, json={**request, "cache_salt": alice}, headers=OF_BOB))
    assert stolen != alice, "who knows another's salt cannot have it"
    body = client.post(path, json=request, headers=OF_ALICE).json()["body"]
    assert {k: v for k, v in body.items() if k != "cache_salt"} == request


def test_off_means_off(engine: FakeEngine) -> None:
    client = connect(engine, api_keys=KEYS)
    assert client.post(ECHO, content=b'{"a":  1}', headers=OF_ALICE).json() == {
        "body": {"a": 1},
        "length": "9",
    }
    assert client.post("/cohere/v2/chat", json={}, headers=OF_ALICE).status_code == 200


def test_what_only_renders_keeps_its_salt(engine: FakeEngine) -> None:
    client = connect(engine, api_keys=KEYS, salt_secret=SECRET)
    body = {"cache_salt": "mine"}
    answer = client.post("/v1/chat/completions/render", json=body, headers=OF_ALICE)
    assert answer.json()["body"] == body


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 5000, b'{"cache_salt": ""}', b'{"cache_salt": 7}', b'{"cache_salt": "a/b"}',
     b'{"cache_salt": ["x"]}', b'{"cache_salt": false}', b'{"cache_salt": "%s"}' % (b"x" * 129), b'{"n": %s}' % (b"9" * 5000)],
)  # fmt: skip
def test_nothing_reaches_the_model_unsalted(engine: FakeEngine, body: bytes) -> None:
    client = connect(engine, api_keys=KEYS, salt_secret=SECRET)
    answer = client.post(ECHO, content=body, headers={**OF_ALICE, "Content-Type": "application/json"})
    assert answer.status_code == 400
    assert message(answer)


def test_the_last_of_two_salts_counts_and_is_salted(engine: FakeEngine) -> None:
    """As json reads it; what is passed on has one."""
    client = connect(engine, api_keys=KEYS, salt_secret=SECRET)
    twice = b'{"cache_salt": "one", "cache_salt": null}'
    assert salt_of(client.post(ECHO, content=twice, headers=OF_ALICE)) == salt_for(SECRET, "alice", None)


def test_a_route_that_takes_no_salt_is_refused(engine: FakeEngine) -> None:
    client = connect(engine, api_keys=KEYS, salt_secret=SECRET)
    answer = client.post("/cohere/v2/chat", json={}, headers=OF_ALICE)
    assert answer.status_code == 403
    assert "--no-prefix-cache-salt-per-key" in message(answer)


def test_a_stranger_is_not_read(engine: FakeEngine) -> None:
    client = connect(engine, api_keys=KEYS, salt_secret=SECRET)
    for path in SALTED_PATHS:
        assert client.post(path, content=b"{", headers={"Authorization": "Bearer eve"}).status_code == 401


texts = st.one_of(st.none(), st.text(max_size=20))


@settings(deadline=None)
@given(st.tuples(st.text(max_size=9), texts), st.tuples(st.text(max_size=9), texts))
def test_salts_differ_where_anything_does(one: tuple[str, str | None], other: tuple[str, str | None]) -> None:
    assert (salt_for(SECRET, *one) == salt_for(SECRET, *other)) is (one == other)
    assert salt_for(SECRET, *one) != salt_for(b"t" * 32, *one)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=5).filter("cache_salt".__ne__), st.recursive(st.none() | st.floats(allow_nan=False)
       | st.integers() | st.text(max_size=9), lambda inner: st.lists(inner, max_size=3))))  # fmt: skip
def test_the_rest_of_a_request_is_untouched(request: dict[str, Any]) -> None:
    sent = json.dumps(request).encode()
    result = json.loads(salted(sent, SECRET, "alice"))
    assert result.pop("cache_salt") == salt_for(SECRET, "alice", None)
    assert result == json.loads(sent)


def test_a_salt_of_ours_is_one_that_vllm_takes() -> None:
    salt = salt_for(SECRET, "alice", None)
    assert len(salt) == 43
    assert json.loads(salted(json.dumps({"cache_salt": salt}).encode(), SECRET, "bob"))
    with pytest.raises(UsageError, match="cache_salt"):
        salted(b'{"cache_salt": ""}', SECRET, "bob")
