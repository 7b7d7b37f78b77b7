"""`recoveries` and `recovery_time_ms` in vLLM's per-request metrics: an ASGI middleware, mounted with that flag alone.

vLLM 0.32.0 has the object behind `--enable-per-request-metrics` (entrypoints/generate/base/protocol.py:
PerRequestMetrics), in the answer, or in a stream's last chunk (the one with the usage). Its fields are fixed, and the
handlers make it by themselves, so the extension point is the one for responses, `--middleware`.

Only messages that hold such an object are changed; all others pass as the bytes they are, chunk by chunk, at once.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ghostserve.events.kinds import RequestResumed
from ghostserve.events.log import EventLog
from ghostserve.events.story import belongs_to

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

NAME = f"{__name__}.ResponseMetrics"
PATHS = ("/v1/completions", "/v1/chat/completions")
_KEY = b'"metrics":{'  # inside a string the quotes would be escaped
_DATA = b"data: "


class ResponseMetrics:
    """For `app.add_middleware`. Finds the log at `app.state.ghostserve_events`; without one it changes nothing."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        log = getattr(getattr(scope.get("app"), "state", None), "ghostserve_events", None)
        ours = scope["type"] == "http" and str(scope["path"]).endswith(PATHS)
        await self._app(scope, receive, _Sender(send, log).send if ours and log is not None else send)


class _Sender:
    """One response on its way. `http.response.start` of a JSON answer waits for the body: it names its length."""

    def __init__(self, send: Send, log: EventLog) -> None:
        self._send = send
        self._log = log
        self._since = log.collect()  # what is older is of an earlier request, perhaps with the same id
        self._start: Message | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and _is_json(message):
            self._start = message
            return
        if message["type"] == "http.response.body" and _KEY in message.get("body", b""):
            message = {
                **message,
                "body": self._with_recoveries(message["body"], more=message.get("more_body", False)),
            }
        if self._start is not None:
            start, self._start = self._start, None
            await self._send(_with_length(start, message))
        await self._send(message)

    def _with_recoveries(self, body: bytes, *, more: bool) -> bytes:
        """The same, or the bytes as they are where they are not what is expected."""
        if self._start is not None:
            return body if more else self._extended(body)
        return b"".join(
            _DATA + self._extended(part[len(_DATA) :]) if _KEY in part and part.startswith(_DATA) else part
            for part in body.splitlines(keepends=True)
        )

    def _extended(self, text: bytes) -> bytes:
        try:
            doc = json.loads(text)
        except ValueError:
            return text
        metrics = doc.get("metrics") if isinstance(doc, dict) else None
        if not isinstance(metrics, dict) or not isinstance(doc.get("id"), str):
            return text
        metrics.update(self._recoveries_of(doc["id"]))
        end = text[len(text.rstrip(b"\r\n")) :]
        return json.dumps(doc, separators=(",", ":"), ensure_ascii=False).encode() + end

    def _recoveries_of(self, response_id: str) -> dict[str, float]:
        times_ms = [
            record.event.recovery_ms
            for record in self._log.resumed_after(self._since)
            if isinstance(record.event, RequestResumed)
            and belongs_to(record.event.request or "", response_id)
        ]
        return {"recoveries": len(times_ms), "recovery_time_ms": round(sum(times_ms), 3)}


def _is_json(start: Message) -> bool:
    return any(name.lower() == b"content-type" and b"json" in value for name, value in start["headers"])


def _with_length(start: Message, body: Message) -> Message:
    """The start with the length of a body that came whole."""
    if body["type"] != "http.response.body" or body.get("more_body", False):
        return start
    length = str(len(body.get("body", b""))).encode()
    headers = [
        (name, length if name.lower() == b"content-length" else value) for name, value in start["headers"]
    ]
    return {**start, "headers": headers}
