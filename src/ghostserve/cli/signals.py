"""What ends a verb that has started a server: every signal that asks for it unwinds the stack."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def signals_like_ctrl_c() -> Iterator[None]:
    """Have SIGTERM and SIGHUP unwind the stack, so that the server is stopped then too. Main thread only."""

    def interrupt(number: int, _frame: object) -> None:
        if number == signal.SIGHUP:
            # It may come twice, from the kernel and from the shell; the second must not cut the end short.
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as `nohup` leaves SIGHUP
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
