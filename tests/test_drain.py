"""SIGTERM to the stand-in server, which drains by the same code as the real one: what ends well, what gets an error."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.engine.drain import Drain
from ghostserve.testing.client import StreamResult, stream_completion
from ghostserve.testing.server import ServerProcess

pytestmark = pytest.mark.timeout(60)


# ---- the coordinator alone -------------------------------------------------------------------------------------------


class Scene:
    """A drain whose requests end when they are told to; counts what it did."""

    def __init__(self, *, timeout_s: float, obedient: bool = True, fails: bool = False) -> None:
        self.told: list[str] = []
        self.stopped = 0
        self.lost = False
        self._obedient, self._fails = obedient, fails
        self.drain = Drain(
            timeout_s=timeout_s, end_open=self._end, engine_lost=lambda: self.lost, stop=self._stop
        )

    async def _end(self, reason: str) -> None:
        if self._fails:
            raise RuntimeError("cannot")
        self.told.append(reason)
        if self._obedient:
            self.drain.open_requests = 0

    def _stop(self) -> None:
        self.stopped += 1

    async def until_stopped(self, within_s: float) -> float:
        began_s = monotonic_s()
        while not self.stopped:
            assert monotonic_s() - began_s < within_s, "the drain did not stop the server"
            await asyncio.sleep(0.01)
        return monotonic_s() - began_s


def play(scene: Callable[[], Scene], script: Callable[[Scene], object]) -> Scene:
    """Begin to drain with one request open, run the script, wait for the end."""

    async def run() -> Scene:
        made = scene()
        made.drain.open_requests = 1
        made.drain.tell()
        await asyncio.sleep(0.02)
        script(made)
        await made.until_stopped(5.0)
        return made

    return asyncio.run(run())


def test_what_ends_in_time_gets_no_error() -> None:
    ended = play(lambda: Scene(timeout_s=30.0), lambda scene: setattr(scene.drain, "open_requests", 0))
    assert (ended.told, ended.stopped) == ([], 1)


def test_time_is_up() -> None:
    ended = play(lambda: Scene(timeout_s=0.05), lambda _scene: None)
    assert len(ended.told) == 1
    assert "shutting down" in ended.told[0]


def test_a_second_signal_does_not_wait() -> None:
    ended = play(lambda: Scene(timeout_s=30.0), lambda scene: scene.drain.tell())
    assert (len(ended.told), ended.stopped, ended.drain.hurried) == (1, 1, True)


def test_a_lost_engine_is_not_waited_for() -> None:
    ended = play(lambda: Scene(timeout_s=30.0), lambda scene: setattr(scene, "lost", True))
    assert ended.told == []


@pytest.mark.parametrize("scene", [Scene(timeout_s=0.0, obedient=False), Scene(timeout_s=0.0, fails=True)])
def test_the_server_ends_whatever_its_requests_do(scene: Scene) -> None:
    ended = play(lambda: scene, lambda _scene: None)
    assert ended.stopped == 1
    assert ended.drain.open_requests == 1


# ---- a process -------------------------------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    servers: list[ServerProcess] = []

    def start(*flags: str) -> ServerProcess:
        command = [sys.executable, "-m", "ghostserve.testing.fake_server", "--token-s", "0.005", *flags]
        server = ServerProcess(command, log_dir=tmp_path)
        servers.append(server)
        server.start()
        server.wait_ready(timeout_s=30)
        return server

    yield start
    for server in servers:
        server.stop()


class Stream:
    """A request in a thread of its own, already under way."""

    def __init__(self, server: ServerProcess, max_tokens: int) -> None:
        self.result: StreamResult | None = None
        begun = threading.Event()

        def run() -> None:
            self.result = stream_completion(
                server.base_url,
                prompt="x",
                max_tokens=max_tokens,
                model="tiny",
                on_token=lambda *_: begun.set(),
                timeout_s=30,
            )

        self._thread = threading.Thread(target=run)
        self._thread.start()
        assert begun.wait(20), "no token came"

    def wait(self) -> StreamResult:
        self._thread.join(30)
        assert self.result is not None, "the stream did not end"
        return self.result


def ask(server: ServerProcess, method: str, path: str) -> httpx.Response:
    """Without reading certificates, which may take longer than the answer that is hurried after."""
    with httpx.Client(trust_env=False, verify=False) as http:
        return http.request(method, server.base_url + path)


def wait_for_drain(server: ServerProcess) -> None:
    deadline_s = monotonic_s() + 5
    while ask(server, "GET", "/readyz").status_code == 200:
        assert monotonic_s() < deadline_s, "it does not drain"
        sleep_s(0.005)


@pytest.mark.real
def test_a_stream_is_finished_through_a_loss_and_nothing_new_begins(
    start: Callable[..., ServerProcess],
) -> None:
    server = start("--shutdown-timeout", "30", "--outage-s", "0.3")
    stream = Stream(server, 400)
    os.kill(server.pid, signal.SIGTERM)
    wait_for_drain(server)
    server.admin.kill_rank(1)
    refused = ask(server, "POST", "/v1/completions")
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert ask(server, "GET", "/health").status_code == 200
    result = stream.wait()
    assert result.error is None
    assert result.tokens_total == 400
    assert server.wait_exit(timeout_s=10) == 0


@pytest.mark.real
def test_a_stream_that_does_not_end_in_time_gets_an_error(start: Callable[..., ServerProcess]) -> None:
    server = start("--shutdown-timeout", "0.3")
    stream = Stream(server, 4000)
    os.kill(server.pid, signal.SIGTERM)
    result = stream.wait()
    assert result.error is not None
    assert "shutting down" in result.error
    assert 0 < result.tokens_total < 4000
    assert server.wait_exit(timeout_s=10) == 0


@pytest.mark.real
def test_a_second_sigterm_ends_at_once(start: Callable[..., ServerProcess]) -> None:
    server = start("--shutdown-timeout", "600")
    stream = Stream(server, 4000)
    os.kill(server.pid, signal.SIGTERM)
    wait_for_drain(server)
    assert server.poll() is None
    os.kill(server.pid, signal.SIGTERM)
    assert server.wait_exit(timeout_s=5) == 0
    assert "shutting down" in str(stream.wait().error)
