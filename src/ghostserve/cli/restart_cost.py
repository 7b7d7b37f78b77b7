"""What it costs to start a server anew: a second one is started with the same flags, asked for one token, and ended.

    start() ─▶ thread: start ─▶ wait until it is healthy ─▶ one token ─▶ stop         describe() at any time

It listens on a port of its own on loopback. Should this process end meanwhile, the kernel tells the second server to end, too
(`ServerProcess`), and its log goes with our run directory.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ghostserve.clock import monotonic_s
from ghostserve.errors import GhostserveError
from ghostserve.testing.client import first_model, stream_completion
from ghostserve.testing.server import ServerProcess
from ghostserve.web.injection import NotNow

logger = logging.getLogger(__name__)

READY_MAX_S, TOKEN_MAX_S = 600.0, 60.0
MEMORY_SPARE = 1.2
PROMPT = "def"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """How far it is, or how it ended."""

    state: str = "none"
    seconds: float | None = None
    reason: str = "not measured"


def obstacle(arguments: Namespace) -> str | None:
    """Why a server with these arguments is not started twice; None if it can be."""
    if arguments.uds:
        return "a server on a Unix socket is not started twice"
    if arguments.ssl_certfile:
        return "a server with TLS is not started twice"
    return None


def lack_of_memory(*, needed_bytes: int, available_bytes: int) -> str | None:
    """Why a second server does not fit; None if it does."""
    if available_bytes < MEMORY_SPARE * needed_bytes:
        return f"a second server needs about {needed_bytes >> 20} MiB of memory, and {available_bytes >> 20} MiB are available"
    return None


def memory_of_this_server() -> int:
    """What this process and those below it have for themselves, in bytes."""
    this = psutil.Process()
    found = 0
    for process in (this, *this.children(recursive=True)):
        try:
            found += process.memory_full_info().uss
        except psutil.Error:
            continue  # it has just ended
    return found


class SecondServer:
    """Implements `web.restart.RestartCost` for the server that was started with `argv` and `environment`."""

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        *,
        api_key: str | None,
        obstacle: str | None,
    ) -> None:
        # The last one counts. Two servers must not write one file of events: each would rotate it under the other.
        no_events = ("--event-log", os.devnull)
        self._command = [sys.executable, "-m", "ghostserve.cli.main", "serve", *argv, *no_events]
        self._environment = dict(environment)
        self._api_key = api_key
        self._obstacle = obstacle
        self._lock = threading.Lock()
        self._result = _Result()
        self._began_s = 0.0

    def start(self) -> None:
        """Begin in the background; NotNow if it is under way. A lack of memory is the measurement's result."""
        with self._lock:
            if self._result.state == "running":
                raise NotNow("a second server is being started already")
            self._result = _Result(state="running", reason="")
            self._began_s = monotonic_s()
        threading.Thread(target=self._measure, daemon=True, name="ghostserve-second-server").start()

    def describe(self) -> dict[str, Any]:
        """The state, and what was found."""
        result = self._result
        elapsed_s = monotonic_s() - self._began_s if result.state == "running" else 0.0
        return {
            "state": result.state,
            "elapsed_s": round(elapsed_s, 1),
            "seconds": result.seconds,
            "reason": result.reason,
        }

    def _measure(self) -> None:
        try:
            refusal = self._obstacle or lack_of_memory(
                needed_bytes=memory_of_this_server(), available_bytes=psutil.virtual_memory().available
            )
            if refusal is not None:
                raise GhostserveError(refusal)
            seconds = self._start_and_ask()
            self._result = _Result(state="done", seconds=round(seconds, 3), reason="")
        except Exception as error:  # whatever it is, this server goes on
            logger.warning("the second server could not be measured: %s", error)
            self._result = _Result(state="failed", reason=f"not measured: {str(error).splitlines()[0]}")

    def _start_and_ask(self) -> float:
        """Seconds from the start to the first token."""
        with ServerProcess(
            self._command,
            log_dir=Path(os.environ["GHOSTSERVE_RUN_DIRECTORY"]),
            whole_env=self._environment,
            api_key=self._api_key,
        ) as server:
            began_s = monotonic_s()
            server.start()
            server.wait_ready(timeout_s=READY_MAX_S)
            answer = stream_completion(
                server.base_url,
                prompt=PROMPT,
                max_tokens=1,
                model=first_model(server.base_url, api_key=self._api_key),
                api_key=self._api_key,
                timeout_s=TOKEN_MAX_S,
            )
            if answer.error is not None:
                raise GhostserveError(answer.error)
            return monotonic_s() - began_s
