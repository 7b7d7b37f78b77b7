"""The events over HTTP: the route's contract, streams over a real socket, and the metrics in responses."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from fake_http import serving
from ghostserve.arena.event_rings import RINGS_BYTES, EventRings, Teller
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.events import kinds
from ghostserve.events.log import EventLog
from ghostserve.testing.fake_engine import FakeEngine
from ghostserve.testing.fake_server import build_app
from ghostserve.web import events_route
from ghostserve.web.response_metrics import ResponseMetrics

pytestmark = pytest.mark.long

LOCAL = ("127.0.0.1", 50000)


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine(token_s=0.001, outage_s=0.05)
    engine.log = EventLog(EventRings(engine.memory, teller=None).look)  # numbers from 1 on
    yield engine
    engine.close()


def client_of(engine: FakeEngine, **app: Any) -> TestClient:
    return TestClient(build_app(engine, **app), base_url="http://127.0.0.1:8000", client=LOCAL)


def slow(rank: int) -> kinds.Event:
    return kinds.RankSlow(rank=rank, reason="?")


# -- as JSON -------------------------------------------------------------------------------------------------------


def test_events_as_json(engine: FakeEngine) -> None:
    client = client_of(engine)
    answer = client.get("/ghostserve/events")
    assert answer.json() == {"events": [], "next": 0, "dropped": 0}
    assert answer.headers["cache-control"] == "no-store"
    for rank in range(3):
        engine.events.tell(slow(rank))
    first = client.get("/ghostserve/events", params={"after": 0, "limit": 2}).json()
    assert [event["rank"] for event in first["events"]] == [0, 1]
    assert (first["next"], first["dropped"]) == (2, 0)
    event = first["events"][0]
    assert event.pop("at").endswith("Z")
    assert event == {
        "seq": 1, "kind": "rank_slow", "rank": 0, "request": None, "text": "rank 0 is slow: ?", "data": {"reason": "?"},
    }  # fmt: skip
    rest = client.get("/ghostserve/events", params={"after": first["next"]}).json()
    assert [event["seq"] for event in rest["events"]] == [3]
    newest = client.get("/ghostserve/events", params={"limit": 1}).json()
    assert ([event["seq"] for event in newest["events"]], newest["next"]) == ([3], 3)


def test_a_kill_is_told_with_what_follows(engine: FakeEngine) -> None:
    client = client_of(engine)
    assert client.post("/ghostserve/kill", json={"rank": 1}).status_code == 200
    engine.workers[1].wait()
    client.post("/v1/completions", json={"prompt": "a b", "max_tokens": 2})
    events = client.get("/ghostserve/events").json()["events"]
    order = [
        "fault_injected", "request_admitted", "rank_lost", "rank_taken", "request_resumed", "recovery_ended",
        "request_finished",
    ]  # fmt: skip
    assert [event["kind"] for event in events if event["kind"] in order] == order
    assert events[0]["data"] == {"how": "crash", "pid": events[2]["data"]["pid"], "strikes": "now"}


@pytest.mark.parametrize(
    "query", ["after=-1", "after=x", "after=9007199254740992", "limit=0", "limit=1001", "follow=perhaps"]
)
def test_a_bad_query_is_refused(engine: FakeEngine, query: str) -> None:
    assert client_of(engine).get(f"/ghostserve/events?{query}").status_code == 422


def test_the_access_rules_are_those_of_the_status(engine: FakeEngine) -> None:
    with_key = client_of(engine, api_keys=("secret",))
    for query in ("", "?follow=1"):
        assert with_key.get(f"/ghostserve/events{query}").status_code == 401
    assert with_key.get("/ghostserve/events", headers={"Authorization": "Bearer secret"}).status_code == 200
    stranger = TestClient(build_app(engine), base_url="http://127.0.0.1:8000", client=("10.0.0.9", 5))
    assert stranger.get("/ghostserve/events").status_code == 403


# -- as a stream ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def followed(url: str, query: str = "?follow=1", **headers: str) -> Iterator[Iterator[str]]:
    with (
        httpx.Client(trust_env=False, timeout=10) as http,
        http.stream("GET", f"{url}/ghostserve/events{query}", headers=headers) as answer,
    ):
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield answer.iter_lines()


def take(lines: Iterator[str], count: int) -> list[dict[str, str]]:
    """So many events, as their fields."""
    events: list[dict[str, str]] = []
    fields: dict[str, str] = {}
    for line in lines:
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            events.append(fields)
            fields = {}
            if len(events) == count:
                return events
        else:
            fields = {}
    raise AssertionError(f"the stream ended after {events}")


def test_a_stream_brings_what_was_and_what_comes(engine: FakeEngine) -> None:
    engine.events.tell(slow(0))
    with serving(engine) as (url, _), followed(url) as lines:
        (first,) = take(lines, 1)
        assert (first["id"], first["event"]) == ("1", "rank_slow")
        with httpx.Client(trust_env=False) as http:
            assert json.loads(first["data"]) == http.get(f"{url}/ghostserve/events").json()["events"][0]
        for rank in (1, 2):
            engine.events.tell(slow(rank))
        assert [json.loads(event["data"])["rank"] for event in take(lines, 2)] == [1, 2]


@pytest.mark.parametrize(
    ("query", "headers", "ids"),
    [
        ("?follow=1&after=1", {}, ["2", "3"]),
        ("?follow=1", {"Last-Event-ID": "2"}, ["3"]),
        ("?after=1", {"Accept": "text/event-stream", "Last-Event-ID": "2"}, ["3"]),
        ("?follow=1", {"Last-Event-ID": "99"}, ["1", "2", "3"]),  # of the server before this one
        ("?follow=1&limit=1", {"Last-Event-ID": "x"}, ["3"]),
    ],
)
def test_where_a_stream_goes_on(
    engine: FakeEngine, query: str, headers: dict[str, str], ids: list[str]
) -> None:
    for rank in range(3):
        engine.events.tell(slow(rank))
    with serving(engine) as (url, _), followed(url, query, **headers) as lines:
        assert [event["id"] for event in take(lines, len(ids))] == ids


def test_a_silent_stream_has_heartbeats_and_ends_with_the_server(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_route, "HEARTBEAT_S", 0.2)
    with serving(engine) as (url, server), followed(url) as lines:
        assert next(lines) == "retry: 1000"
        assert [line for line in (next(lines) for _ in range(4)) if line] == [": alive"] * 2
        began_s = monotonic_s()
        server.should_exit = True
        for _ in lines:
            pass
        assert monotonic_s() - began_s < 5


def test_a_stream_that_breaks_off_is_logged(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The client sees it end, and comes back; that it was a mistake of ours is for the log."""
    engine.events.tell(slow(0))

    def broken(_record: object) -> bytes:
        raise RuntimeError("no bytes")

    monkeypatch.setattr(events_route, "_as_sse", broken)
    with serving(engine) as (url, _), followed(f"{url}", "?follow=1") as lines:
        assert [line for line in lines if line] == ["retry: 1000"]
    assert "a stream of events broke off" in caplog.text


def test_streams_are_bounded(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_route, "FOLLOWERS_MAX", 1)
    with serving(engine) as (url, _):
        with followed(url) as lines:
            next(lines)
            with httpx.Client(trust_env=False) as http:
                refused = http.get(f"{url}/ghostserve/events?follow=1")
                assert refused.status_code == 503
                assert "1 streams of events are open" in refused.json()["detail"]
                assert http.get(f"{url}/ghostserve/events").status_code == 200
        deadline_s = monotonic_s() + 10  # one that was closed counts no more
        while True:
            with contextlib.suppress(AssertionError), followed(url) as lines:
                next(lines)
                break
            assert monotonic_s() < deadline_s
            sleep_s(0.05)


# -- metrics in responses ------------------------------------------------------------------------------------------

METRICS = '"metrics":{"time_to_first_token_ms":1.5}'
CHUNKS = [
    'data: {"id":"cmpl-a","choices":[{"text":"say \\"metrics\\":{ü"}]}\n\n',
    f'data: {{"id":"cmpl-a","choices":[],{METRICS}}}\n\n',
    "data: [DONE]\n\n",
]
EXTENDED = '"metrics":{"time_to_first_token_ms":1.5,"recoveries":2,"recovery_time_ms":30.5}'


class Log:
    """An event log with two recoveries of `cmpl-a` and one of another request, told while a response is on its way."""

    def __init__(self) -> None:
        memory = memoryview(bytearray(RINGS_BYTES))
        self._rings = EventRings(memory, teller=Teller.ENGINE)
        self.log = EventLog(EventRings(memory, teller=None).look)
        self.resume("cmpl-a-0-00000000", 1000.0)  # an earlier request with the same id

    def resume(self, name: str, ms: float) -> None:
        self._rings.tell(kinds.RequestResumed(request=name, epoch=1, output_tokens=3, recovery_ms=ms))

    def recover(self) -> None:
        self.resume("cmpl-a-0-0123abcd", 10.25)
        self.resume("cmpl-b-0-0123abcd", 100.0)
        self.resume("cmpl-a-0-0123abcd", 20.25)


def asked(
    answer: Response, *, path: str = "/v1/completions", log: Log | None = None, on: bool = True
) -> tuple[dict[str, Any], list[bytes]]:
    """(start, body messages) of what `answer` becomes on its way out."""
    known = log or Log()
    messages: list[dict[str, Any]] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        known.recover()
        await answer(scope, receive, send)

    async def send(message: Any) -> None:
        messages.append(dict(message))

    async def receive() -> Any:
        await asyncio.sleep(3600)

    state = SimpleNamespace(**({"ghostserve_events": known.log} if on else {}))
    scope = {
        "type": "http",
        "path": path,
        "app": SimpleNamespace(state=state),
        "method": "POST",
        "headers": [],
    }
    asyncio.run(ResponseMetrics(inner)(scope, receive, send))
    start, *bodies = messages
    assert start["type"] == "http.response.start"
    return start, [message["body"] for message in bodies]


def streamed() -> StreamingResponse:
    async def chunks() -> AsyncIterator[str]:
        for chunk in CHUNKS:
            yield chunk

    return StreamingResponse(chunks(), media_type="text/event-stream")


def test_the_last_chunk_of_a_stream_says_it() -> None:
    """Every other chunk is the same, and they are as many."""
    _, bodies = asked(streamed())
    expected = [CHUNKS[0], CHUNKS[1].replace(METRICS, EXTENDED), CHUNKS[2], ""]
    assert [body.decode() for body in bodies] == expected


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/prefix/v1/completions"])
def test_a_whole_answer_says_it_and_its_length(path: str) -> None:
    start, (body,) = asked(
        JSONResponse({"id": "cmpl-a", "metrics": {"time_to_first_token_ms": 1.5}, "text": "ü"}), path=path
    )
    assert json.loads(body) == {
        "id": "cmpl-a", "text": "ü",
        "metrics": {"time_to_first_token_ms": 1.5, "recoveries": 2, "recovery_time_ms": 30.5},
    }  # fmt: skip
    assert dict(start["headers"])[b"content-length"] == str(len(body)).encode()


def test_an_answer_without_a_recovery_says_so() -> None:
    _, (body,) = asked(JSONResponse({"id": "cmpl-c", "metrics": {}}))
    assert json.loads(body)["metrics"] == {"recoveries": 0, "recovery_time_ms": 0}


UNTOUCHED: dict[str, Callable[[], Response]] = {
    "without metrics": lambda: JSONResponse({"id": "cmpl-a", "metrics": None}),
    "an error": lambda: JSONResponse({"error": {"message": "no"}}, status_code=400),
    "no id": lambda: JSONResponse({"metrics": {}}),
    "not an object": lambda: JSONResponse([{"metrics": {}}]),
    "metrics further in": lambda: JSONResponse({"id": "cmpl-a", "more": {"metrics": {}}}),
    "not JSON after all": lambda: Response(b'{"metrics":{', media_type="application/json"),
    "text": lambda: PlainTextResponse('{"id":"cmpl-a","metrics":{}}'),
    "empty": lambda: Response(status_code=204),
}


@pytest.mark.parametrize("answer", UNTOUCHED.values(), ids=UNTOUCHED.keys())
def test_what_carries_no_such_object_stays_as_it_is(answer: Callable[[], Response]) -> None:
    start, bodies = asked(answer())
    plain_start, plain_bodies = asked(answer(), on=False)
    assert (start, bodies) == (plain_start, plain_bodies)


def test_other_routes_are_left_alone() -> None:
    _, bodies = asked(streamed(), path="/v1/responses")
    assert [body.decode() for body in bodies] == [*CHUNKS, ""]


def test_a_json_body_in_pieces_is_left_alone() -> None:
    pieces = [b'{"id":"cmpl-a",', f"{METRICS}}}".encode()]

    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    _, bodies = asked(StreamingResponse(body(), media_type="application/json"))
    assert bodies == [*pieces, b""]


def test_the_middleware_works_on_an_app() -> None:
    """As vLLM adds it: with `add_middleware`, finding the log on the app's state."""
    app = FastAPI()
    known = Log()
    app.state.ghostserve_events = known.log

    @app.post("/v1/completions")
    def completions() -> JSONResponse:
        known.recover()
        return JSONResponse({"id": "cmpl-a", "metrics": {}})

    app.add_middleware(ResponseMetrics)
    assert TestClient(app).post("/v1/completions").json()["metrics"]["recoveries"] == 2
