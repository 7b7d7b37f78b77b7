"""The end of a server that is told to end: nothing new begins, and what is open is finished within a limit.

    serving ──SIGTERM──▶ draining ──nothing is open any more──────────────────▶ stopped
                            │ ├── the engine is lost ────────────────────────▶ stopped
                            └─┴── time is up, or another SIGTERM ──▶ errors ──▶ stopped

Until then the engine core is told nothing: it goes on as ever, so a worker that is lost meanwhile is replaced.
Knows no vLLM and no HTTP; used on the event loop's thread only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator

from ghostserve.clock import monotonic_s

logger = logging.getLogger(__name__)

STATE_NAME = "ghostserve_drain"
"""Under this name the app's state holds the server's drain."""

POLL_S = 0.05
ERRORS_S = 1.0  # for the errors to be written to their clients
REASON = "the server is shutting down; send the request again, to another replica or in a moment"


class Drain:
    """One per server."""

    def __init__(
        self,
        *,
        timeout_s: float,
        end_open: Callable[[str], Awaitable[None]],
        engine_lost: Callable[[], bool],
        stop: Callable[[], None],
    ) -> None:
        """`end_open` gives what is open an error, with this reason; `stop` has the HTTP server end, and is always called."""
        self.timeout_s = timeout_s
        self.open_requests = 0
        self.begun = False
        self._end_open = end_open
        self._engine_lost = engine_lost
        self._stop = stop
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def hurried(self) -> bool:
        """Whether it was told a second time: nothing is waited for any more."""
        return self._hurry.is_set()

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """A request that is to be finished, from its arrival to the last byte of its answer."""
        self.open_requests += 1
        try:
            yield
        finally:
            self.open_requests -= 1

    def tell(self) -> None:
        """SIGTERM: the first begins to drain, the next one ends it."""
        if self.begun:
            self._hurry.set()
            if self._task is not None and self._task.done():
                self._stop()
            return
        self.begun = True
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        logger.info("draining: %d requests are open, %g s at most", self.open_requests, self.timeout_s)
        try:
            await self._wait_until_finished(self.timeout_s)
            if self.open_requests and not self._engine_lost():
                logger.warning("draining: %d requests get an error", self.open_requests)
                await self._end_until_gone()
        except Exception:
            logger.exception("draining failed; the server ends all the same")
        finally:
            self._stop()

    async def _wait_until_finished(self, timeout_s: float) -> None:
        deadline_s = monotonic_s() + timeout_s
        while self.open_requests and not self.hurried and not self._engine_lost():
            left_s = deadline_s - monotonic_s()
            if left_s <= 0:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), min(POLL_S, left_s))

    async def _end_until_gone(self) -> None:
        """Again and again: a request may have been on its way to the engine."""
        deadline_s = monotonic_s() + ERRORS_S
        while self.open_requests and monotonic_s() < deadline_s:
            await self._end_open(REASON)
            await asyncio.sleep(POLL_S)
