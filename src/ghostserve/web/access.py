"""What our middlewares go by, and how they turn a request away.

vLLM makes middlewares itself, by name and without arguments (`--middleware`), before the app is ours to mount on. So what they
go by lies in the app's state, and is looked up with each request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from http import HTTPStatus

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from ghostserve.web.security import joined_header

MIDDLEWARES = (
    "ghostserve.web.cache_salt.CacheSalt",
    "ghostserve.web.key_gate.KeyGate",
    "ghostserve.web.body_limit.BodyLimit",
    "ghostserve.web.draining.Entrance",
)
"""From the inside out: a body is counted before it is read, and read only of those who hold a key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """The rules for every route, vLLM's and ours."""

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    body_bytes_max: int = 0  # 0: no limit
    salt_secret: bytes | None = field(default=None, repr=False)  # None: requests keep the salt they come with


def set_access(app: FastAPI, access: Access) -> None:
    """To be called before the app is served."""
    app.state.ghostserve_access = access


def access_of(scope: Scope) -> Access:
    """The rules of the app that this request is for; AttributeError (a 500, never an open door) if it has none."""
    access: Access = scope["app"].state.ghostserve_access
    return access


def authorization_of(scope: Scope) -> str | None:
    """The Authorization header."""
    return joined_header(Headers(scope=scope), "authorization")


def route_path(scope: Scope) -> str:
    """The path that routes are matched with: without the prefix that `--root-path` names."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    if not root or not path.startswith(root):
        return path
    rest = path[len(root) :]
    return rest if not rest or rest.startswith("/") else path


async def refuse(
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    status: HTTPStatus,
    sentence: str,
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> None:
    """Answer with an error in the form of the OpenAI API, and close the connection: its body was not read."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": sentence[:100]})
        return
    error = {"message": sentence, "type": status.phrase, "param": param, "code": status.value}
    answer = JSONResponse(
        {"error": error}, status_code=status, headers={"Connection": "close", **(headers or {})}
    )
    await answer(scope, receive, send)
