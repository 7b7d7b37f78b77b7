"""A standby takes the lost rank's place; it is never needed, and its own death is noticed. TP=2, float32, eager."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any

import pytest

from ghostserve.web.processes import read_start_time_ticks
from real.kit import Ask, Served, assert_rebuilt, assert_same

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]


def wait_ready(served: Served) -> dict[str, Any]:
    """The standby that waits. The status is a second old at times: one that has died since is not meant."""

    def is_there(status: dict[str, Any]) -> bool:
        states = [standby["state"] for standby in status["standbys"]]
        return states == ["ready"] and read_start_time_ticks(status["standbys"][0]["pid"]) is not None

    status = served.server.wait_status(is_there, timeout_s=30, what="a standby")
    return dict(status["standbys"][0])


@pytest.fixture(autouse=True)
def _healthy(float32: Served):
    float32.settle()
    yield
    float32.server.admin.disarm_faults()
    float32.settle()


def test_it_takes_the_rank_and_another_one_waits(float32: Served) -> None:
    ask = Ask(max_tokens=150)
    reference, before, standby = float32.reference(ask), float32.recoveries(), wait_ready(float32)
    float32.kill_after(70, 1)
    assert_same(reference, float32.run(ask))
    assert_rebuilt(float32.recovery(after=before), sealed=True)
    assert float32.server.status()["ranks"][1]["pid"] == standby["pid"]
    after = wait_ready(float32)
    assert after["pid"] != standby["pid"]
    shown = float32.server.wait_status(
        lambda status: status["standbys"] and status["standbys"][0]["memory_bytes"] > 1 << 20,
        timeout_s=30,
        what="the standby's memory",
    )
    assert shown["standbys"][0]["memory_bytes"] < 1 << 30


def test_one_that_dies_is_replaced(float32: Served) -> None:
    standby, before = wait_ready(float32), float32.recoveries()
    os.kill(standby["pid"], signal.SIGKILL)
    float32.server.wait_status(
        lambda status: [s["pid"] for s in status["standbys"]] not in ([standby["pid"]], []),
        timeout_s=30,
        what="another standby",
    )
    wait_ready(float32)
    assert float32.recoveries() == before


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_one_that_cannot_take_its_place(float32: Served, signum: signal.Signals) -> None:
    """It dies, or is stopped, right before it is needed: a process is started as without."""
    ask = Ask(max_tokens=150)
    reference, before, standby = float32.reference(ask), float32.recoveries(), wait_ready(float32)

    def hurt() -> None:
        os.kill(standby["pid"], signum)
        float32.kill(0)

    try:
        assert_same(reference, float32.run_with_stops(ask, (70, hurt)))
        assert_rebuilt(float32.recovery(after=before), sealed=True)
        assert float32.server.status()["ranks"][0]["pid"] != standby["pid"]
    finally:
        if signum is signal.SIGSTOP:
            with contextlib.suppress(ProcessLookupError):  # killed when it did not answer
                os.kill(standby["pid"], signal.SIGCONT)
