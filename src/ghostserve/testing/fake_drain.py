"""Serves the stand-in's app and ends as the real server does: SIGTERM drains, Ctrl-C too."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from ghostserve.engine.drain import STATE_NAME, Drain
from ghostserve.testing.fake_engine import FakeEngine


class _Server(uvicorn.Server):
    """Leaves signals to us, as vLLM's does."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run_until_told(
    config: uvicorn.Config, app: FastAPI, engine: FakeEngine, *, shutdown_timeout_s: float
) -> None:
    """Serve `app`, as `config` says, until SIGTERM or Ctrl-C, and through the drain that follows."""
    asyncio.run(_serve(_Server(config), app, engine, shutdown_timeout_s))


async def _serve(server: _Server, app: FastAPI, engine: FakeEngine, shutdown_timeout_s: float) -> None:
    def stop() -> None:
        server.should_exit = True
        server.force_exit = drain.hurried

    drain = Drain(
        timeout_s=shutdown_timeout_s,
        end_open=engine.end_open,
        engine_lost=lambda: engine.errored,
        stop=stop,
    )
    setattr(app.state, STATE_NAME, drain)
    app.state.server = server  # as vLLM does: streams of events end when it is told to
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, drain.tell)
    await server.serve()
