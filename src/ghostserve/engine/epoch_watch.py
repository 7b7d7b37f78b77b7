"""Leaves a rank's groups once the engine core has raised the epoch, from a thread of its own.

On a GPU a survivor's main thread waits for the device, the device in a collective for a dead peer: nobody would read
`ghost_leave`. On a CPU our own collectives end by themselves, and nothing is watched.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ghostserve.arena.control import ControlPage

logger = logging.getLogger(__name__)

POLL_S = 0.005


class EpochWatch:
    """One thread; a daemon, for it may be inside an abort that never returns."""

    def __init__(self, page: ControlPage, *, abandon: Callable[[], None], poll_s: float = POLL_S) -> None:
        self._page = page
        self._abandon = abandon
        self._poll_s = poll_s
        self._epoch: int | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ghostserve-epoch", daemon=True)
        self._thread.start()

    def groups_of(self, epoch: int) -> None:
        """Groups are about to be formed for this epoch: a later one ends them."""
        with self._lock:
            self._epoch = epoch

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while not self._stop.wait(self._poll_s):
            if not self._ended():
                continue
            try:
                self._abandon()
            except Exception:  # the thread stays: the next groups need it, too
                logger.exception("could not leave the groups of an epoch that has ended")

    def _ended(self) -> bool:
        """Whether the epoch of the groups has just ended; says so once."""
        with self._lock:
            ended = self._epoch is not None and self._page.epoch != self._epoch
            if ended:
                self._epoch = None
        return ended
