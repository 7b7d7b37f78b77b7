"""Notices a worker's death at once, also while the engine is idle; a stopped worker and the front's death soon after.

While a step is open the main thread repairs the group from within its wait; the monitor only repairs when
nothing is open, under the same lock.
"""

from __future__ import annotations

import logging
import multiprocessing.connection
import threading
from typing import Any

from ghostserve.clock import monotonic_s
from ghostserve.engine.ring import RanksDied, RankSilent
from ghostserve.errors import EngineLost

logger = logging.getLogger(__name__)

WAIT_S = 0.5
RETRY_S = 0.05


class Monitor:
    """A thread that waits on the workers' sentinels."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="ghostserve-monitor")
        self.noticed_at_s: float | None = None  # when the loss being repaired was noticed

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Before workers are told to end."""
        self._stopping.set()

    def _watch(self) -> None:
        while not self._stopping.is_set():
            workers = list(self._executor.workers)
            multiprocessing.connection.wait([worker.proc.sentinel for worker in workers], WAIT_S)
            if self._stopping.is_set():
                return
            if self._executor.leftovers.server_gone():
                self._executor.end_without_server()
            if not (self._executor.ring.dead() or self._executor.ring.hung()):
                if self._executor.performer.phase is None:
                    self.noticed_at_s = None  # whoever was stopped goes on
                continue
            if self.noticed_at_s is None:
                self.noticed_at_s = monotonic_s()
            if not self._repair_if_idle():
                self._stopping.wait(RETRY_S)

    def _repair_if_idle(self) -> bool:
        """Repair, unless a step is open: then its owner does. True if nothing is left to do."""
        executor = self._executor
        if not executor.session.lock.acquire(timeout=RETRY_S):
            return False
        try:
            scheduler = executor.session.scheduler
            dead, hung = executor.ring.dead(), executor.ring.hung()
            if not (dead or hung) or self._stopping.is_set():
                return True
            if scheduler is None or scheduler.open:
                return False
            if dead:
                executor.performer.recover(RanksDied(dead, "noticed while idle"))
            else:
                executor.performer.recover(RankSilent(hung, "stopped while idle"))
            return True
        except EngineLost:  # given up, and told why
            return False
        except Exception as error:
            logger.exception("a repair in idle time failed")
            self._executor.give_up(f"a repair in idle time failed: {error}")
            return False
        finally:
            executor.session.lock.release()
