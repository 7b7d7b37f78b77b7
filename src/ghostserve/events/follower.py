"""A thread that hands on what the log gets, at its own pace: to a file, to a tracer. Fails open.

What a sink cannot take now it is offered again; meanwhile the log keeps on collecting, and what falls out of it is
missing from the sink alone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from ghostserve.events.log import EventLog
from ghostserve.events.record import Record

logger = logging.getLogger(__name__)

PERIOD_S = 0.1  # the rings hold thousands of events
AFTER_ERROR_S = 1.0
BATCH_MAX = 512
Sink = Callable[[Sequence[Record]], None]


class Follower:
    """`sink` is called with what is new; one that raises is asked again with the same, a second later.

    `on_error(error, first)` is told each time; `first` until it works again.
    """

    def __init__(
        self, log: EventLog, sink: Sink, *, name: str, on_error: Callable[[Exception, bool], None]
    ) -> None:
        self._log = log
        self._sink = sink
        self._on_error = on_error
        self._place = 0
        self._failing = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name=name)
        self._thread.start()

    def close(self, *, timeout_s: float) -> None:
        """Hand on what is there, and end. A sink that hangs is left behind."""
        self._stopping.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("%s did not end within %g s and is left behind", self._thread.name, timeout_s)

    def _run(self) -> None:
        pause_s = PERIOD_S
        while not self._stopping.wait(pause_s):
            pause_s = PERIOD_S if self._hand_on() else AFTER_ERROR_S
        self._hand_on()

    def _hand_on(self) -> bool:
        """All that is new; False if the sink failed."""
        while True:
            excerpt = self._log.after(self._place, limit=BATCH_MAX)
            try:
                if excerpt.records:
                    self._sink(excerpt.records)
            except Exception as error:
                self._on_error(error, not self._failing)
                self._failing = True
                return False
            self._failing = False
            self._place = excerpt.next
            if len(excerpt.records) < BATCH_MAX:
                return True
