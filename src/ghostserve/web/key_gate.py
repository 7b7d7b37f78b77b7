"""A middleware: where the server has API keys, every route asks for one.

vLLM's own check covers paths that begin with /v1 and a few more, and leaves open what runs the model elsewhere (/invocations,
/tokenize, ...). Here it is the other way round: what is not named as open is closed, a route nobody thought of included.

    open      what probes and scrapers ask, who carry no key: health and metrics
    our own   /ui and /ghostserve: each route has its own rules (`web.security`), and /ui is a page without data
    closed    all the rest

A browser's preflight (OPTIONS) carries no key by design and reaches no route; it is let through as in vLLM.
"""

from __future__ import annotations

from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from ghostserve.web.access import access_of, authorization_of, refuse, route_path
from ghostserve.web.security import key_is_accepted, key_refusal

OPEN_PATHS = frozenset({"/health", "/livez", "/readyz", "/ping", "/metrics", "/metrics/"})
OWN_PATHS = ("/ui", "/ghostserve")


def is_closed(path: str, method: str) -> bool:
    """Whether a request for this path needs a key here."""
    own = any(path == prefix or path.startswith(f"{prefix}/") for prefix in OWN_PATHS)
    return method != "OPTIONS" and path not in OPEN_PATHS and not own


class KeyGate:
    """Turns away with 401 who does not hold a key."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and (keys := access_of(scope).api_keys):
            closed = is_closed(route_path(scope), scope.get("method", ""))
            if closed and not key_is_accepted(authorization_of(scope), keys):
                await refuse(
                    scope,
                    receive,
                    send,
                    status=HTTPStatus.UNAUTHORIZED,
                    sentence=key_refusal(),
                    headers={"WWW-Authenticate": "Bearer"},
                )
                return
        await self.app(scope, receive, send)
