"""The live status: how often, for how many, and that nobody who watches holds the server up."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import HTTPException

from ghostserve.clock import monotonic_s
from ghostserve.testing.fake_engine import FakeEngine
from ghostserve.testing.fake_server import build_app
from ghostserve.web import live
from ghostserve.web.live import Live


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine(token_s=0.001)
    yield engine
    engine.close()


class Serving:
    """The app under uvicorn in a thread, as vLLM's launcher runs it."""

    def __init__(self, engine: FakeEngine, **app: Any) -> None:
        self.app = build_app(engine, **app)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        config = uvicorn.Config(self.app, log_level="warning", timeout_graceful_shutdown=5)
        self.server = uvicorn.Server(config)
        self.app.state.server = self.server
        self._thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self._thread.start()

    def end(self) -> float:
        """Seconds until it has shut down."""
        began_s = monotonic_s()
        self.server.should_exit = True
        self._thread.join(timeout=20)
        assert not self._thread.is_alive()
        self.socket.close()
        return monotonic_s() - began_s


@contextmanager
def serving(engine: FakeEngine, **app: Any) -> Iterator[Serving]:
    running = Serving(engine, **app)
    try:
        yield running
    finally:
        running.end()


@contextmanager
def watching(url: str, **headers: str) -> Iterator[Iterator[str]]:
    """The lines of the stream."""
    with (
        httpx.Client(trust_env=False, timeout=10, headers=headers) as http,
        http.stream("GET", url + "/ghostserve/live") as answer,
    ):
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        yield answer.iter_lines()


def documents(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    return (json.loads(line[5:]) for line in lines if line.startswith("data:"))


def test_the_first_document_comes_at_once(engine: FakeEngine) -> None:
    with serving(engine) as running, watching(running.url) as lines:
        document = next(documents(lines))
        status = httpx.get(running.url + "/ghostserve/status", trust_env=False).json()
        assert status.items() <= document.items()
        assert [one["rank"] for one in document["progress"]] == [0, 1]
        assert document["progress"][0]["age_s"] is None  # no step yet
        engine.step()
        second = next(documents(lines))
        assert 0 <= second["progress"][1]["age_s"] < 5
        assert (second["progress"][1]["steps"], second["progress"][1]["step"]) == (1, 1)


def test_it_ends_with_the_server_and_does_not_delay_it(engine: FakeEngine) -> None:
    running = Serving(engine)
    with watching(running.url) as lines, watching(running.url):
        next(documents(lines))
        took_s: list[float] = []
        ending = threading.Thread(target=lambda: took_s.append(running.end()))
        ending.start()
        for _ in lines:  # to a proper end: a broken one would raise
            pass
        ending.join()
    assert took_s[0] < 2.5  # uvicorn's grace is 5 s


def test_it_needs_the_key(engine: FakeEngine) -> None:
    with serving(engine, api_keys=("secret",)) as running:
        assert httpx.get(running.url + "/ghostserve/live", trust_env=False).status_code == 401
        with watching(running.url, Authorization="Bearer secret") as lines:
            assert next(documents(lines))["state"] == "serving"


def test_a_watcher_too_many_is_told_so(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "WATCHERS_MAX", 1)
    with serving(engine) as running:
        with watching(running.url) as lines:
            next(documents(lines))
            answer = httpx.get(running.url + "/ghostserve/live", trust_env=False)
            assert (answer.status_code, "1 pages watch" in answer.text) == (503, True)
        deadline_s = monotonic_s() + 5
        while True:  # who has left is noticed
            with suppress(AssertionError), watching(running.url) as lines:
                next(documents(lines))
                break
            assert monotonic_s() < deadline_s


# -- how often -------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only in `sleep`."""

    def __init__(self) -> None:
        self.now_s = 100.0

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(live, "monotonic_s", lambda: clock.now_s)
    monkeypatch.setattr(live.asyncio, "sleep", clock.sleep)
    return clock


def sent_at(watched: Live, clock: Clock, *, seconds: float, then: Any = None) -> list[float]:
    """When events came, in seconds from the start, within so many seconds."""

    async def collect() -> list[float]:
        began_s, times = clock.now_s, []
        async for _ in watched.events():
            times.append(round(clock.now_s - began_s, 3))
            if then is not None:
                then(times[-1])
            if times[-1] >= seconds:
                return times
        return times

    return asyncio.run(collect())


def test_five_times_per_second_while_it_serves(engine: FakeEngine, clock: Clock) -> None:
    engine.open_streams = 1
    made = []
    state = engine.read_state()

    def document() -> dict[str, Any]:
        made.append(clock.now_s)
        return {**(state or {}), "counters": engine.counters()}

    watched = Live(engine, document)
    times = sent_at(watched, clock, seconds=2)
    assert len(times) == pytest.approx(11, abs=1)
    assert len(made) <= len(times)
    assert watched.watchers == 0


def test_once_per_second_in_idle_time_but_changes_at_once(engine: FakeEngine, clock: Clock) -> None:
    state = engine.read_state() or {}

    def lose(now_s: float) -> None:
        if now_s >= 3:
            state["epoch"] = 1

    watched = Live(engine, lambda: {**state, "counters": engine.counters()})
    times = sent_at(watched, clock, seconds=4.5, then=lose)
    assert len([at for at in times if at <= 3]) == 4
    assert [at for at in times if 3 < at <= 3.5] == [pytest.approx(3.2, abs=0.05)]


def test_before_the_first_document_it_is_alive(clock: Clock) -> None:
    def none() -> dict[str, Any]:
        raise HTTPException(503, "the server is still starting")

    async def first_two() -> list[bytes]:
        found = []
        async for piece in Live(FakeEngineless(), none).events():
            found.append(piece)
            if len(found) == 2:
                break
        return found

    assert asyncio.run(first_two()) == [b": alive\n\n"] * 2


class FakeEngineless:
    """A page that nobody may ask."""

    def read_stamp(self, rank: int) -> Any:
        raise AssertionError

    def progress(self, rank: int) -> Any:
        raise AssertionError


def test_an_error_ends_the_stream_and_is_logged(
    engine: FakeEngine, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Live(engine, dict)
    assert sent_at(watched, clock, seconds=1) == []
    assert "could not be put together" in caplog.text
    assert watched.watchers == 0
