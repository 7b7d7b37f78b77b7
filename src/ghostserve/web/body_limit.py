"""A middleware: a request's body has a greatest length (`--max-body-size`).

A length that is announced is looked at before anything is read; of a body that is sent in chunks the app gets no more than the
limit. Starlette has a limit as well, which answers in plain text; clients of the OpenAI API expect JSON.

A connection that is closed while its client still sends is reset, and the client may never read why. So what comes for a moment
more is thrown away first, unless the client waits to be told to send at all (`Expect: 100-continue`).
"""

from __future__ import annotations

from http import HTTPStatus

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ghostserve.web.access import access_of, refuse

DIGITS_MAX = 18  # of a length that fits into 64 bits
LINGER_S, LINGER_BYTES = 1.0, 64 << 20  # whichever is over first


class _TooLong(Exception):
    """Ends the reading; whatever the app makes of it, the client is told 413."""


class _Exchange:
    """One request whose body is counted."""

    def __init__(self, receive: Receive, send: Send, bytes_max: int) -> None:
        self._receive = receive
        self._send = send
        self._left = bytes_max
        self._too_long = False
        self._answered = False
        self.ended = False  # nothing more is to come

    def is_to_be_refused(self) -> bool:
        """The body is too long, and nothing has been answered yet."""
        return self._too_long and not self._answered

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            self.ended = not message.get("more_body", False)
            if self._left < 0:
                self._too_long = True
                raise _TooLong
        return message

    async def send(self, message: Message) -> None:
        if self.is_to_be_refused():
            return  # FastAPI takes any error while it reads for a bad request
        self._answered = True
        await self._send(message)


class BodyLimit:
    """Answers 413 to bodies above the limit."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        bytes_max = access_of(scope).body_bytes_max if scope["type"] == "http" else 0
        if not bytes_max:
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(receive, send, bytes_max)
        if _announced_bytes(scope) <= bytes_max:
            try:
                await self.app(scope, exchange.receive, exchange.send)
            except Exception:
                if not exchange.is_to_be_refused():
                    raise
            if not exchange.is_to_be_refused():
                return
        if not exchange.ended and "expect" not in Headers(scope=scope):
            await _throw_away(receive)
        await refuse(
            scope,
            receive,
            send,
            status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            sentence=f"the body is longer than {bytes_max} bytes (--max-body-size)",
        )


async def _throw_away(receive: Receive) -> None:
    """What is still sent, for a while."""
    left = LINGER_BYTES
    with anyio.move_on_after(LINGER_S):
        while left > 0:
            message = await receive()
            if not message.get("more_body", False):
                return
            left -= len(message.get("body", b""))


def _announced_bytes(scope: Scope) -> int:
    """What Content-Length says; 0 without one, or with one that the server behind will not take."""
    length = Headers(scope=scope).get("content-length", "")
    if not (length.isascii() and length.isdecimal()):
        return 0
    return int(length) if len(length) <= DIGITS_MAX else 10**DIGITS_MAX
