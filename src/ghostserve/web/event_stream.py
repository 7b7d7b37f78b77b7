"""An HTTP response of server-sent events that ends with the server, and with a client that is gone.

uvicorn lets open responses end by themselves before it shuts down, up to its grace period, so a stream without end would delay every
shutdown by that long. This one looks whether the server is ending and then closes the stream properly; a browser takes it up again
when there is a server. A client that stays and reads no more costs uvicorn its grace period, as on any route.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)

LOOK_S = 0.2
LAST_WORD_S = 0.2
HEARTBEAT = b": alive\n\n"


def event_bytes(data: Any) -> bytes:
    """One event, on one line of JSON."""
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def is_ending(request: Request) -> bool:
    """Whether the server has begun to shut down; vLLM's launcher puts uvicorn's server into the app's state."""
    server = getattr(request.app.state, "server", None)
    return bool(getattr(server, "should_exit", False))


class EventStream(Response):
    """Sends what `events` yields; that is cancelled when the stream ends for another reason."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], request: Request) -> None:
        # A proxy in between must not wait until its buffer is full.
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        tasks = {asyncio.ensure_future(self._pump(send)), asyncio.ensure_future(_gone(receive))}
        try:
            running = tasks
            while len(running) == len(tasks) and not is_ending(self._request):
                _, running = await asyncio.wait(tasks, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, Exception) and not isinstance(
                    outcome, OSError
                ):  # a client that is gone
                    logger.error("a stream of events broke off", exc_info=outcome)
        with contextlib.suppress(TimeoutError, OSError):
            last = {"type": "http.response.body", "body": b"", "more_body": False}
            await asyncio.wait_for(send(last), LAST_WORD_S)

    async def _pump(self, send: Send) -> None:
        async with contextlib.aclosing(self._events) as pieces:
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
