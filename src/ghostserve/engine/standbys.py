"""Processes that wait to take a lost rank's place: started in the background, counted, replaced when used or dead.

A standby is never needed: where none waits, or one does not take its place, a process is started as without. One that
keeps dying is not started again for a while.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

from ghostserve.clock import monotonic_s
from ghostserve.engine.process import start_time
from ghostserve.engine.spawn import WAITING, Place, StartedProcess
from ghostserve.events.kinds import Event, StandbyDied, StandbyReady

logger = logging.getLogger(__name__)

PERIOD_S = 0.5
START_TIMEOUT_S = 60.0
ANSWER_S = 0.05  # it has nothing else to do
DEATHS_MAX, DEATHS_WINDOW_S = 5, 60.0
MEMORY_PERIOD_S = 60.0  # the kernel walks all its pages
CALM_S = 1.0  # after a recovery, before the next one is prepared: streams come first


@dataclass(slots=True, kw_only=True)
class Standby:
    """One process. `memory_bytes`: what would be free without it."""

    started: StartedProcess
    since_s: float
    waiting: bool = False
    memory_bytes: int = 0
    measured_s: float = 0.0

    @property
    def alive(self) -> bool:
        return self.started.process.is_alive()

    def answers(self) -> bool:
        """Whether it says at once that it still waits. One that does not is left to be cleared away."""
        orders = self.started.orders
        assert orders is not None
        try:
            orders.send(None)
            self.waiting = orders.poll(ANSWER_S) and orders.recv() == WAITING
        except (EOFError, OSError):
            self.waiting = False
        return self.waiting

    def send_to(self, place: Place) -> Any:
        """It takes the place; the handle of a worker that is not ready yet. One that just died is found by its exit."""
        orders = self.started.orders
        assert orders is not None
        try:
            orders.send(place)
        except OSError as error:
            logger.warning("a standby could not be told its rank: %s", error)
        orders.close()
        return self.started.handle(place.rank)

    def end(self) -> None:
        """SIGKILL; it holds nothing."""
        self.started.process.kill()
        self.started.process.join(1.0)
        for end in (self.started.ready, self.started.death, self.started.orders):
            if end is not None:
                end.close()


class Standbys:
    """Kept by a thread of its own, as a fork server that died takes seconds to come back; taken by whoever recovers."""

    def __init__(
        self,
        start: Callable[[], StartedProcess],
        *,
        wanted: int,
        on_death: Callable[[], object] = lambda: None,
        tell: Callable[[Event], object] = lambda event: None,
    ) -> None:
        self._start = start
        self._on_death = on_death
        self._tell = tell
        self.wanted = wanted
        self._lock = threading.Lock()
        self._standbys: list[Standby] = []
        self._deaths: deque[float] = deque()
        self._quiet_until_s = 0.0
        self._closing = threading.Event()

    def start(self, *, busy: Callable[[], bool]) -> None:
        """Keep them from now on; nothing is started while the server is `busy` with a recovery."""
        threading.Thread(target=self._keep, args=(busy,), daemon=True, name="ghostserve-standbys").start()

    def _keep(self, busy: Callable[[], bool]) -> None:
        while not self._closing.wait(PERIOD_S):
            try:
                if not busy():
                    self.keep()
            except (
                Exception
            ):  # a recovery does without; a fork server that is gone is a new one at the next try
                logger.exception("no standby could be started")
                self._note_death(monotonic_s())

    def keep(self) -> None:
        """Start what is missing, note who waits, clear away who is dead."""
        now_s = monotonic_s()
        with self._lock:
            for standby in list(self._standbys):
                self._look(standby, now_s)
            missing = len(self._standbys) < self.wanted and now_s >= self._quiet_until_s
        if not missing or self._closing.is_set():
            return
        standby = Standby(started=self._start(), since_s=now_s)  # outside the lock: it may take its time
        with self._lock:
            if not self._closing.is_set():
                self._standbys.append(standby)
                return
        standby.end()

    def calm(self) -> None:
        """A recovery has ended: nothing is started for a moment."""
        self._quiet_until_s = max(self._quiet_until_s, monotonic_s() + CALM_S)

    def take(self) -> Standby | None:
        """One that waits and answers; it is the caller's from now on. None if there is none."""
        with self._lock:
            for standby in self._standbys:
                self._hear(standby)
                if standby.waiting and standby.alive and standby.answers():
                    self._standbys.remove(standby)
                    return standby
        return None

    def close(self) -> None:
        """End them all. Nothing is started afterwards."""
        self._closing.set()
        with self._lock:
            standbys, self._standbys = self._standbys, []
        for standby in standbys:
            standby.end()

    def describe(self) -> list[dict[str, Any]]:
        """For the status page; without one that is dead and not cleared away yet."""
        return [
            {
                "pid": self._pid(standby),
                "start_time": start_time(self._pid(standby)),
                "state": "ready" if standby.waiting else "starting",
                "memory_bytes": standby.memory_bytes,
            }
            for standby in list(self._standbys)
            if standby.alive
        ]

    def _look(self, standby: Standby, now_s: float) -> None:
        waited = standby.waiting
        self._hear(standby)
        if standby.waiting and not waited:
            self._tell(StandbyReady(pid=self._pid(standby), start_ms=(now_s - standby.since_s) * 1e3))
        overdue = not standby.waiting and now_s - standby.since_s > START_TIMEOUT_S
        if standby.alive and not overdue:
            if now_s - standby.measured_s > MEMORY_PERIOD_S and standby.waiting:
                standby.measured_s, standby.memory_bytes = now_s, _own_memory_bytes(self._pid(standby))
            return
        reason = "did not start" if standby.alive else "ended"
        logger.warning("standby %d %s", self._pid(standby), reason)
        self._tell(StandbyDied(pid=self._pid(standby), reason=reason))
        self._standbys.remove(standby)
        standby.end()
        self._on_death()
        self._note_death(now_s)

    def _note_death(self, now_s: float) -> None:
        """One that ended, or could not be started: too many of them, and none is started for a while."""
        self._deaths.append(now_s)
        while self._deaths[0] < now_s - DEATHS_WINDOW_S:
            self._deaths.popleft()
        if len(self._deaths) >= DEATHS_MAX:
            logger.error(
                "%d standbys died or did not start in %g s: none for as long", DEATHS_MAX, DEATHS_WINDOW_S
            )
            self._deaths.clear()
            self._quiet_until_s = now_s + DEATHS_WINDOW_S

    @staticmethod
    def _hear(standby: Standby) -> None:
        orders = standby.started.orders
        assert orders is not None
        try:
            if not standby.waiting and orders.poll():
                standby.waiting = orders.recv() == WAITING
        except (EOFError, OSError):
            standby.waiting = False

    @staticmethod
    def _pid(standby: Standby) -> int:
        pid = standby.started.process.pid
        assert pid is not None
        return pid


def _own_memory_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_full_info().uss)
    except psutil.Error:
        return 0
