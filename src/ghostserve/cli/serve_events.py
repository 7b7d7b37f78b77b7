"""The events of one server, as its front process keeps them: the log, the file, the spans. Ends with the server."""

from __future__ import annotations

import logging
from pathlib import Path

from ghostserve.arena.control import ControlPage
from ghostserve.arena.event_rings import News
from ghostserve.arena.names import Counter
from ghostserve.clock import wall_s
from ghostserve.config import GhostConfig
from ghostserve.events.file import EventFile
from ghostserve.events.follower import Follower, Sink
from ghostserve.events.kinds import ServerStopped
from ghostserve.events.log import EventLog

logger = logging.getLogger(__name__)

END_TIMEOUT_S = 2.0


class KeptEvents:
    """Made before the engine starts, so that what keeps it from starting is in the file. `close` once everything has ended."""

    def __init__(self, page: ControlPage, config: GhostConfig) -> None:
        """UsageError if the file of `--event-log` cannot be opened: later it may fail, but not from the start."""
        self._page = page
        self._file: EventFile | None = None
        if config.event_log is not None:
            self._file = EventFile(
                Path(config.event_log), max_bytes=config.event_log_max_bytes, files=config.event_log_files
            )
        self.log = EventLog(self._look, base=int(wall_s() * 1e6))
        # One that only collects, so that nothing is overwritten while nobody asks.
        self._followers = [self._follow(lambda records: None, "collector")]
        if self._file is not None:
            self._followers.append(self._follow(self._file.write, "file"))

    def trace(self) -> None:
        """Spans, too: vLLM has set a tracer up."""
        from opentelemetry import trace

        from ghostserve.events.spans import RecoverySpans

        self._followers.append(self._follow(RecoverySpans(trace.get_tracer("ghostserve")), "spans"))

    def close(self, exit_status: int, reason: str = "") -> None:
        """Tell the end, and why; hand everything on, end the threads; bounded."""
        self._page.events.tell(ServerStopped(exit_status=exit_status, reason=reason))
        for follower in self._followers:
            follower.close(timeout_s=END_TIMEOUT_S)
        if self._file is not None:
            self._file.close()

    def _look(self) -> News:
        news = self._page.events.look()
        if news.lost:
            self._page.add(Counter.EVENTS_LOST_TOTAL, news.lost)
        return news

    def _follow(self, sink: Sink, name: str) -> Follower:
        def on_error(error: Exception, first: bool) -> None:
            self._page.add(Counter.EVENT_LOG_ERRORS_TOTAL)
            if first:
                logger.warning("the %s of events fails, it is tried again each second: %s", name, error)

        return Follower(self.log, sink, name=f"ghostserve-events-{name}", on_error=on_error)
