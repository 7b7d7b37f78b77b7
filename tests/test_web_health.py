"""The probes and the entrance over the stand-in: status codes, bodies, keys, and who stands before whom."""

from __future__ import annotations

import asyncio
import datetime
import importlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from ghostserve.clock import monotonic_s, wall_s
from ghostserve.engine.drain import STATE_NAME, Drain
from ghostserve.testing.fake_engine import FakeEngine
from ghostserve.testing.fake_server import build_app
from ghostserve.web.access import MIDDLEWARES
from ghostserve.web.draining import Entrance
from ghostserve.web.health import SharedProbe

Connect = Callable[..., TestClient]
OPEN = ("/livez", "/readyz", "/health")


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine(token_s=0.001)
    yield engine
    engine.close()


@pytest.fixture
def client(engine: FakeEngine) -> TestClient:
    return TestClient(build_app(engine), base_url="http://127.0.0.1:8000")


def new_drain() -> Drain:
    async def end_open(_reason: str) -> None: ...

    return Drain(timeout_s=0.0, end_open=end_open, engine_lost=lambda: False, stop=lambda: None)


def codes(client: TestClient) -> dict[str, int]:
    return {path: client.get(path).status_code for path in OPEN}


def test_a_server_that_serves(client: TestClient, engine: FakeEngine) -> None:
    assert codes(client) == dict.fromkeys(OPEN, 200)
    answer = client.get("/health")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json() == {
        "state": "serving",
        "reason": None,
        "running": 0,
        "last_token_age_seconds": None,
        "recovery": None,
    }
    engine.step()
    engine.open_streams = 2
    body = client.get("/readyz").json()
    assert body["running"] == 2
    assert 0.0 <= body["last_token_age_seconds"] < 10.0


def test_head_is_answered_as_get_is(client: TestClient, engine: FakeEngine) -> None:
    """As some load balancers ask."""
    for state, status in (("serving", 200), ("failed", 503)):
        engine.state = state
        assert client.head("/health").status_code == client.head("/readyz").status_code == status
        assert client.head("/livez").status_code == 200


def test_ours_answers_health_and_not_the_route_that_was_there_before() -> None:
    """vLLM's has no body. Negative control: without ours it is that one which answers."""
    engine = FakeEngine()
    try:
        app = build_app(engine)
        assert TestClient(app).get("/health").json()["state"] == "serving"
        app.router.routes[:] = [
            route for route in app.router.routes if getattr(route, "name", "") != "health_route"
        ]
        assert TestClient(app).get("/health").json() == {}
    finally:
        engine.close()


def test_during_a_recovery(client: TestClient, engine: FakeEngine) -> None:
    engine.state, engine.recovering_since_s = "recovering", monotonic_s() - 0.25
    engine.recoveries.append({"ok": True, "total_ms": 2000.0})
    assert codes(client) == dict.fromkeys(OPEN, 200)
    body = client.get("/health").json()
    assert body["state"] == "recovering"
    recovery = body["recovery"]
    assert recovery["phase"] == "spawn"
    assert 0.25 <= recovery["elapsed_seconds"] < 5.0
    assert recovery["expected_seconds"] == 2.0
    end_s = datetime.datetime.fromisoformat(recovery["expected_end"]).timestamp()
    assert abs(end_s - (wall_s() + 2.0 - recovery["elapsed_seconds"])) < 2.0


def test_a_recovery_that_lasts_is_not_ready_but_healthy(client: TestClient, engine: FakeEngine) -> None:
    engine.state, engine.recovering_since_s = "recovering", monotonic_s() - 11.0
    assert codes(client) == {"/livez": 200, "/readyz": 503, "/health": 200}


def test_a_stalled_engine(client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.open_streams = 1
    assert codes(client) == dict.fromkeys(OPEN, 200)
    later_s = monotonic_s() + 301.0
    monkeypatch.setattr("ghostserve.web.health.monotonic_s", lambda: later_s)
    assert codes(client) == {"/livez": 200, "/readyz": 503, "/health": 503}
    assert "no step was accepted" in client.get("/health").json()["reason"]
    engine.last_step_s = later_s  # a step: it goes on
    assert codes(client) == dict.fromkeys(OPEN, 200)


@pytest.mark.parametrize("looks", [True, False])
def test_an_idle_hour_before_a_request_is_no_stall(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, looks: bool
) -> None:
    """The entrance looks when work arrives: the count begins there. Negative control: where it does not look."""
    app = build_app(engine)
    client = TestClient(app)
    if looks:
        setattr(app.state, STATE_NAME, new_drain())
    assert client.get("/health").status_code == 200
    now_s = monotonic_s() + 3600.0
    monkeypatch.setattr("ghostserve.web.health.monotonic_s", lambda: now_s)
    client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
    engine.open_streams, engine.last_step_s = 1, None
    now_s += 1.0
    assert client.get("/health").status_code == (200 if looks else 503)


def test_a_dead_engine_and_one_that_starts(client: TestClient, engine: FakeEngine) -> None:
    engine.errored = True
    assert codes(client) == {"/livez": 200, "/readyz": 503, "/health": 503}
    engine.errored = False
    engine.read_state = lambda: None  # type: ignore[method-assign]
    assert codes(client) == {"/livez": 200, "/readyz": 503, "/health": 503}
    assert client.get("/livez").json()["state"] == "starting"


def test_with_a_key_only_the_costly_probe_asks_for_it(engine: FakeEngine) -> None:
    client = TestClient(build_app(engine, api_keys=("secret",)), base_url="http://10.0.0.7:8000")
    assert codes(client) == dict.fromkeys(OPEN, 200)
    assert client.get("/health_generate").status_code == 401
    with_key = client.get("/health_generate", headers={"Authorization": "Bearer secret"})
    assert with_key.status_code == 200


def test_without_a_key_the_costly_probe_is_open_to_probes_from_elsewhere(client: TestClient) -> None:
    assert client.get("/health_generate").status_code == 200


# ---- /health_generate ------------------------------------------------------------------------------------------------


def test_a_pass_through_the_engine(client: TestClient, engine: FakeEngine) -> None:
    before = engine.tokens
    body = client.get("/health_generate").json()
    assert engine.tokens == before + 1
    assert (body["state"], body["reason"]) == ("serving", None)
    assert body["generate_seconds"] >= 0.0


@pytest.mark.parametrize("timeout", ["0", "-1", "61", "soon", "nan"])
def test_a_bound_that_is_none_is_refused(client: TestClient, timeout: str) -> None:
    assert client.get("/health_generate", params={"timeout": timeout}).status_code == 422


def test_no_token_in_time_and_a_pass_that_fails(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    async def held(_client: Any) -> None:
        await asyncio.get_running_loop().run_in_executor(None, release.wait, 10.0)

    async def broken(_client: Any) -> None:
        raise RuntimeError("no rank answers")

    monkeypatch.setattr(engine, "generate_one_token", held)
    with TestClient(build_app(engine)) as client:
        answer = client.get("/health_generate?timeout=0.05")
        release.set()
    assert (answer.status_code, answer.json()["reason"]) == (503, "no token came within 0.05 s")
    monkeypatch.setattr(engine, "generate_one_token", broken)
    answer = TestClient(build_app(engine)).get("/health_generate")
    assert (answer.status_code, answer.json()["reason"]) == (503, "no token came: no rank answers")


def test_whoever_asks_together_shares_one_pass() -> None:
    passes = 0

    async def generate(_engine: Any) -> None:
        nonlocal passes
        passes += 1
        await asyncio.sleep(0.02)

    async def ask() -> None:
        probe = SharedProbe(generate)
        await asyncio.gather(*(probe.run(None, timeout_s=5.0) for _ in range(5)))
        assert passes == 1
        await probe.run(None, timeout_s=5.0)
        assert passes == 2

    asyncio.run(ask())


def test_one_that_does_not_wait_any_more_leaves_the_pass_to_the_others() -> None:
    async def ask() -> None:
        release = asyncio.Event()

        async def generate(_engine: Any) -> None:
            await release.wait()

        probe = SharedProbe(generate)
        patient = asyncio.create_task(probe.run(None, timeout_s=5.0))
        with pytest.raises(TimeoutError):
            await probe.run(None, timeout_s=0.01)
        release.set()
        await patient

    asyncio.run(ask())


# ---- the entrance ----------------------------------------------------------------------------------------------------


def test_what_comes_while_draining(engine: FakeEngine) -> None:
    app = build_app(engine)
    drain = new_drain()
    setattr(app.state, STATE_NAME, drain)
    client = TestClient(app, base_url="http://127.0.0.1:8000", client=("127.0.0.1", 50000))
    work = {"prompt": "x", "max_tokens": 1}
    assert client.post("/v1/completions", json=work).status_code == 200
    assert drain.open_requests == 0
    assert client.get("/ghostserve/status").json()["draining"] is False
    drain.begun = True
    refused = client.post("/v1/completions", json=work)
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0
    error = refused.json()["error"]
    assert (error["code"], error["type"]) == (503, "ServiceUnavailableError")
    assert "shutting down" in error["message"]
    assert codes(client) == {"/livez": 200, "/readyz": 503, "/health": 200}
    assert client.get("/health_generate").status_code == 503
    assert client.get("/readyz").json()["state"] == "draining"
    assert client.post("/ghostserve/kill", json={"rank": 0}).status_code == 200  # an operator's, no work
    assert client.get("/v1/models").status_code == 200
    assert client.get("/ghostserve/status").json()["draining"] is True


def test_a_websocket_is_refused_while_draining(engine: FakeEngine) -> None:
    app = FastAPI()
    app.add_middleware(Entrance)

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("hello")
        await socket.close()

    drain = new_drain()
    setattr(app.state, STATE_NAME, drain)
    client = TestClient(app)
    with client.websocket_connect("/v1/realtime") as socket:
        assert socket.receive_text() == "hello"
    drain.begun = True
    with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect("/v1/realtime"):
        pass
    assert closed.value.code == 1012


def test_the_entrance_is_found_by_its_name() -> None:
    """As vLLM finds what `--middleware` names."""
    module, name = MIDDLEWARES[-1].rsplit(".", 1)
    assert getattr(importlib.import_module(module), name) is Entrance


def test_an_app_without_a_drain_is_left_alone() -> None:
    app = FastAPI()
    app.add_middleware(Entrance)

    @app.post("/v1/completions")
    def completions() -> dict[str, str]:
        return {"text": "x"}

    assert TestClient(app).post("/v1/completions").json() == {"text": "x"}
