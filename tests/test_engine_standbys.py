"""A standby that cannot be started is tried again, and not for ever."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ghostserve.clock import sleep_s
from ghostserve.engine import standbys as module
from ghostserve.engine.spawn import StartedProcess
from ghostserve.engine.standbys import DEATHS_MAX, Standbys
from weights_pool_kit import eventually


class Starter:
    """Fails so many times."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.tries = 0

    def __call__(self) -> StartedProcess:
        self.tries += 1
        if self.tries <= self.failures:
            raise EOFError("unexpected EOF")  # as a fork server that is killed while it is asked
        process: Any = SimpleNamespace(
            pid=4_000_000, is_alive=lambda: True, kill=lambda: None, join=lambda timeout: None
        )
        orders = SimpleNamespace(poll=lambda: False, close=lambda: None)
        return StartedProcess(process=process, ready=None, death=None, orders=orders)  # type: ignore[arg-type]


def kept(monkeypatch: pytest.MonkeyPatch, starter: Starter) -> Standbys:
    monkeypatch.setattr(module, "PERIOD_S", 0.01)
    standbys = Standbys(starter, wanted=1)
    standbys.start(busy=lambda: False)
    return standbys


def test_a_start_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    starter = Starter(failures=1)
    standbys = kept(monkeypatch, starter)
    try:
        eventually(standbys.describe)
        assert starter.tries == 2
    finally:
        standbys.close()


def test_one_that_fails_again_and_again_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    starter = Starter(failures=1000)
    standbys = kept(monkeypatch, starter)
    try:
        eventually(lambda: starter.tries == DEATHS_MAX)
        sleep_s(0.2)  # twenty periods, in which nothing is to happen
        assert starter.tries == DEATHS_MAX
    finally:
        standbys.close()
