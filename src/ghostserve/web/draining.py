"""The entrance: counts the requests that a drain has to finish, and refuses new ones while the server drains.

ASGI middleware for vLLM's `--middleware`, which knows only a class name: what it needs it finds in the app's state.
A request is *work* if it may reach the engine: any POST but ours, and any WebSocket. Everything else (probes, metrics, status)
is answered to the end.
"""

from __future__ import annotations

from typing import Any, Protocol

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ghostserve.engine.drain import REASON, STATE_NAME
from ghostserve.web.access import route_path

OBSERVER_NAME = "ghostserve_observe_quiet"
"""Under this name the app's state holds what is called when work arrives; see `health_state.Quiet`."""

OURS = "/ghostserve/"
RETRY_AFTER_S = 5
GOING_AWAY = 1012  # the WebSocket close code for a service that restarts


class Work(Protocol):
    """What is asked of `engine.drain.Drain`."""

    begun: bool

    def request(self) -> Any:
        """A context manager around a request."""


def is_draining(app_state: Any) -> bool:
    """Whether the server of this app was told to end."""
    drain: Work | None = getattr(app_state, STATE_NAME, None)
    return drain is not None and drain.begun


class Entrance:
    """Outermost middleware of ours; does nothing where the app has no drain."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = getattr(scope.get("app"), "state", None)
        drain: Work | None = getattr(state, STATE_NAME, None)
        if drain is None or not is_work(scope):
            await self._app(scope, receive, send)
        elif drain.begun:
            await _refuse(scope, receive, send)
        else:
            observe = getattr(state, OBSERVER_NAME, None)
            if observe is not None:
                observe()
            with drain.request():
                await self._app(scope, receive, send)


def is_work(scope: Scope) -> bool:
    """Whether this connection may give the engine something to do."""
    if scope["type"] == "websocket":
        return True
    return scope["type"] == "http" and scope["method"] == "POST" and not route_path(scope).startswith(OURS)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": GOING_AWAY, "reason": "the server is shutting down"})
        return
    error = {"message": REASON, "type": "ServiceUnavailableError", "param": None, "code": 503}
    headers = {"Retry-After": str(RETRY_AFTER_S), "Connection": "close"}
    await JSONResponse({"error": error}, 503, headers)(scope, receive, send)
