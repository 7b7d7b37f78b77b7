"""Probes and the drain on a real server: what they answer while a recovery is held up, and how a server ends.

One server for the probes and then for its own drain; another one that is told twice.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.testing.client import StreamResult
from real import kit
from real.kit import Ask, assert_same

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

HELD_S = 5.0  # a newcomer that is stopped is noticed after so long
READY_S = 1.0
DRAIN_S = 12
FLAGS = (
    "--dtype", "float32", "--enforce-eager", "--api-key", "secret",
    "--hang-timeout", str(HELD_S), "--ready-while-recovering", str(READY_S), "--shutdown-timeout", str(DRAIN_S),
)  # fmt: skip
FINISHES = Ask(max_tokens=250)
STRUCK = Ask(max_tokens=150)
DOES_NOT = Ask(max_tokens=3900)
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kit.Served]:
    served = kit.serve(tmp_path_factory.mktemp("health"), "health", *FLAGS, door=kit.Door(api_key="secret"))
    yield served
    served.server.stop()
    if served.server.poll() != 0:
        print(served.server.log_tail(lines=80))


@pytest.fixture(scope="module")
def http(served: kit.Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.server.base_url, timeout=20.0, trust_env=False, verify=False) as http:
        yield http


class Stream:
    """A request in a thread of its own, its answer begun."""

    def __init__(self, served: kit.Served, ask: Ask) -> None:
        self._result: StreamResult | None = None
        begun = threading.Event()

        def run() -> None:
            self._result = served.run(ask, on_token=lambda *_: begun.set())
            begun.set()

        self._thread = threading.Thread(target=run)
        self._thread.start()
        assert begun.wait(60), "no token came"

    def wait(self) -> StreamResult:
        self._thread.join(90)
        assert self._result is not None, "the stream did not end"
        return self._result


def wait_for(http: httpx.Client, path: str, holds: Callable[[httpx.Response], bool]) -> dict[str, Any]:
    """The first body for which it holds."""
    deadline_s = monotonic_s() + 20
    while not holds(answer := http.get(path)):
        assert monotonic_s() < deadline_s, answer.text
        sleep_s(0.02)
    body: dict[str, Any] = answer.json()
    return body


def test_probes_of_a_server_that_serves(http: httpx.Client) -> None:
    for path in ("/livez", "/readyz", "/health"):
        answer = http.get(path)
        assert (answer.status_code, answer.json()["state"]) == (200, "serving"), path
    assert http.get("/health_generate").status_code == 401
    body = http.get("/health_generate", headers=KEY).raise_for_status().json()
    assert body["generate_seconds"] > 0
    assert http.get("/health").json()["last_token_age_seconds"] < 10  # it was a step like any other


def test_probes_during_a_recovery_that_is_held_up(served: kit.Served, http: httpx.Client) -> None:
    """The newcomer is stopped as it loads: the outage lasts until that is noticed, and the stream comes out unharmed."""
    reference = served.reference(STRUCK)
    before = served.recoveries()
    served.arm(point="weights", rank=1, action="hang")
    served.kill_after(20, 1)
    stream = Stream(served, STRUCK)
    body = wait_for(http, "/health", lambda answer: answer.json()["recovery"] is not None)
    assert http.get("/readyz").status_code == 200  # a short one is waited for
    assert body["state"] == "recovering"
    assert body["running"] == 1
    assert body["recovery"]["expected_seconds"] is None  # the first of this server
    phase = wait_for(
        http, "/health", lambda answer: (answer.json()["recovery"] or {}).get("phase") == "spawn"
    )
    assert phase["last_token_age_seconds"] > 0
    stuck = http.get("/health_generate?timeout=0.5", headers=KEY)
    assert (stuck.status_code, stuck.json()["reason"]) == (503, "no token came within 0.5 s")
    lasting = wait_for(http, "/readyz", lambda answer: answer.status_code == 503)
    assert lasting["recovery"]["elapsed_seconds"] > READY_S
    assert http.get("/health").status_code == 200  # a restart would help nobody
    assert http.get("/livez").status_code == 200
    assert_same(reference, stream.wait())
    served.recovery(after=before)
    assert wait_for(http, "/readyz", lambda answer: answer.status_code == 200)["state"] == "serving"
    assert http.get("/health_generate", headers=KEY).status_code == 200


def test_the_next_recovery_has_an_expected_end(served: kit.Served, http: httpx.Client) -> None:
    reference = served.reference(STRUCK)
    served.arm(point="adopt", rank=0, action="slow", argument=300)  # long enough to be looked at
    served.kill_after(20, 0)
    stream = Stream(served, STRUCK)
    body = wait_for(http, "/health", lambda answer: answer.json()["recovery"] is not None)
    assert body["recovery"]["expected_seconds"] > 0
    assert body["recovery"]["expected_end"] is not None
    assert_same(reference, stream.wait())


def test_a_rank_stopped_for_a_moment(served: kit.Served) -> None:
    """In mid-step, for less than --hang-timeout: it is suspected, and nobody is replaced."""
    reference, before = served.reference(STRUCK), served.recoveries()
    pid = served.settle()["ranks"][1]["pid"]
    served.arm(point="before_model", rank=1, action="hang", skip=60)
    stream = Stream(served, STRUCK)
    served.server.wait_status(
        lambda status: status["ranks"][1]["health"] == "suspect", timeout_s=30, what="a suspicion"
    )
    os.kill(pid, signal.SIGCONT)
    assert_same(reference, stream.wait())
    assert served.settle()["ranks"][1]["pid"] == pid
    assert served.recoveries() == before


def test_drain(served: kit.Served, http: httpx.Client) -> None:
    """The last test of this server: one stream ends in time, through a loss, and one does not; new requests are refused."""
    reference = served.reference(FINISHES)
    long = Stream(served, DOES_NOT)
    short = Stream(served, FINISHES)
    names = shared_names(served)
    os.kill(served.server.pid, signal.SIGTERM)
    began_s = monotonic_s()
    assert wait_for(http, "/readyz", lambda answer: answer.status_code == 503)["state"] == "draining"
    refused = http.post(
        "/v1/completions", headers=KEY, json={"model": "tiny", "prompt": "x", "max_tokens": 1}
    )
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["code"] == 503
    assert http.get("/health").status_code == 200
    assert http.get("/health_generate", headers=KEY).status_code == 503
    served.arm(point="adopt", rank=1, action="slow", argument=300)  # long enough to be looked at
    served.kill(1)
    recovering = wait_for(http, "/health", lambda answer: answer.json()["recovery"] is not None)
    assert recovering["state"] == "draining"
    assert_same(reference, short.wait())
    served.arm(
        point="after_model", rank=0, action="slow", argument=20, count=0
    )  # the other one will not end in time
    names |= shared_names(served)
    cut = long.wait()
    assert cut.error is not None
    assert "shutting down" in cut.error
    assert 0 < cut.tokens_total < DOES_NOT.max_tokens
    assert monotonic_s() - began_s > DRAIN_S - 1
    assert served.server.wait_exit(timeout_s=15) == 0, served.server.log_tail()
    assert_nothing_left(served, names)


@pytest.mark.slow
def test_a_second_sigterm_ends_at_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    flags = ("--dtype", "float32", "--enforce-eager", "--shutdown-timeout", "600")
    served = kit.serve(tmp_path_factory.mktemp("twice"), "told twice", *flags)
    try:
        stream = Stream(served, DOES_NOT)
        names = shared_names(served)
        os.kill(served.server.pid, signal.SIGTERM)
        with httpx.Client(
            base_url=served.server.base_url, timeout=5.0, trust_env=False, verify=False
        ) as http:
            wait_for(http, "/readyz", lambda answer: answer.status_code == 503)
        assert served.server.wait_exit(timeout_s=1) is None  # it would wait for the stream
        os.kill(served.server.pid, signal.SIGTERM)
        assert served.server.wait_exit(timeout_s=10) == 0, served.server.log_tail()
        assert "shutting down" in str(stream.wait().error)
        assert_nothing_left(served, names)
    finally:
        served.server.stop()


def shared_names(served: kit.Served) -> set[Path]:
    """What this server's processes have mapped from /dev/shm: other servers may run beside it."""
    served.server.record_processes()
    names: set[Path] = set()
    for mark in served.server.processes:
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{mark.pid}/maps").read_text()
            names |= {
                Path(line.split()[-1])
                for line in maps.splitlines()
                if line.split()[-1].startswith("/dev/shm/")
            }
    return names


def assert_nothing_left(served: kit.Served, names: set[Path]) -> None:
    """Of its processes, and of what they had in /dev/shm."""
    assert names, "vLLM's queues were not seen"
    assert not served.server.leaks(settle_s=10).processes
    assert not [name for name in names if name.exists()]
