"""The stand-in server in a thread of the test, on a socket."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn

from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.testing.fake_engine import FakeEngine
from ghostserve.testing.fake_server import build_app


@contextlib.contextmanager
def serving(engine: FakeEngine, *, port: int = 0, **rules: Any) -> Iterator[tuple[str, uvicorn.Server]]:
    """(URL, server); its end waits for streams, which must not hold it up. `rules` are those of `build_app`."""
    app = build_app(engine, **rules)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    app.state.server = server
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline_s = monotonic_s() + 20
    while not server.started:
        assert monotonic_s() < deadline_s
        sleep_s(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "a stream holds the server up"
