"""A call into a file system with a bound on its time: opening a file, too, hangs when the server of its file system is gone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ghostserve.errors import WeightsReadError

STALL_S = 60.0
"""How long nothing may move: longer than a network file system takes to fail over, shorter than a person's patience."""
WAIT_S = 1.0
"""Waits are counted in pieces of this, so that a process that was itself stopped for a while blames nobody."""

T = TypeVar("T")


def answer_within(seconds: float, call: Callable[[], T], path: Path) -> T:
    """What `call` returns or raises. WeightsReadError if it takes longer; its thread is then left behind."""
    answers: list[T] = []
    errors: list[BaseException] = []

    def answer() -> None:
        try:
            answers.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=answer, name="ghostserve-files", daemon=True)
    thread.start()
    waited_s = 0.0
    while thread.is_alive() and waited_s < seconds:
        thread.join(min(WAIT_S, seconds))
        waited_s += min(WAIT_S, seconds)
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # or the error, its traceback and this frame would keep each other
    if not answers:
        raise WeightsReadError(
            f"{path}: its file system did not answer for {seconds:g} s; check the connection to its server"
        )
    return answers[0]
