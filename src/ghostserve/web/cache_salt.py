"""A middleware: with several API keys, each key has a prefix cache of its own.

Whether a prompt's beginning is in the cache shows in the time to the first token. So who may send prompts can find out what
others have sent, guess by guess (CVE-2025-46570). vLLM hashes a request's `cache_salt` with its first block, so that only
requests with the same salt share blocks; but the caller chooses it, while here the server must. What a request
gets is

    HMAC(secret of this server, key, its own salt if it has one)

so that holders of other keys cannot name it, also not by a salt of their own, and one tenant may still divide its cache.

The body is read whole (`--max-body-size` bounds it) and written anew. What is no JSON object, or has a salt that vLLM would not
take, is refused here, as vLLM would: nothing reaches the model unsalted.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from http import HTTPStatus
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ghostserve.errors import UsageError
from ghostserve.web.access import access_of, authorization_of, refuse, route_path
from ghostserve.web.security import key_is_accepted, presented_key

SALTED_PATHS = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/responses",
        "/v1/messages",
        "/v1/systemone",
        "/inference/v1/generate",
        "/generative_scoring",
        "/invocations",
    }
)
"""vLLM 0.32.0's routes that run the model and take a `cache_salt`."""

UNSALTABLE_PATHS = frozenset({"/cohere/v2/chat"})
"""Those that run the model and take none."""

SALT_CHARS_MAX = 128
_NOT_IN_A_SALT = frozenset("@/\\\x00")


def salt_for(secret: bytes, key: str, own_salt: str | None) -> str:
    """43 characters, always the same for the same three; each of the three matters, and none can pass for another."""
    own = b"" if own_salt is None else b"\x01" + own_salt.encode("utf-8", "surrogatepass")
    message = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest() + own
    digest = hmac.new(secret, message, hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def salted(body: bytes, secret: bytes, key: str) -> bytes:
    """The request with the salt that it gets. Raises UsageError for what vLLM would refuse as well."""
    try:
        request: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise UsageError("the body must be a JSON object") from None
    if not isinstance(request, dict):
        raise UsageError("the body must be a JSON object")
    own = request.get("cache_salt")
    if own is not None and (
        not isinstance(own, str) or not 1 <= len(own) <= SALT_CHARS_MAX or _NOT_IN_A_SALT & set(own)
    ):
        raise UsageError(
            f"'cache_salt' must be a string of 1 to {SALT_CHARS_MAX} characters without '@', '/', '\\' and NUL"
        )
    request["cache_salt"] = salt_for(secret, key, own)
    return json.dumps(request, separators=(",", ":")).encode()


class CacheSalt:
    """Gives each request that runs the model the salt of its key."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        access, path, authorization = access_of(scope), route_path(scope), authorization_of(scope)
        secret, key = access.salt_secret, presented_key(authorization)
        if secret is None or path not in SALTED_PATHS | UNSALTABLE_PATHS:
            await self.app(scope, receive, send)
        elif key is None or not key_is_accepted(authorization, access.api_keys):
            await self.app(scope, receive, send)  # vLLM's own check turns it away
        elif path in UNSALTABLE_PATHS:
            await refuse(
                scope,
                receive,
                send,
                status=HTTPStatus.FORBIDDEN,
                sentence=f"{path} takes no cache salt, so that holders of other API keys could find out what was asked; "
                "use /v1/chat/completions, or serve with --no-prefix-cache-salt-per-key",
            )
        else:
            await self._pass_on(scope, receive, send, secret, key)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, secret: bytes, key: str) -> None:
        last, body = await _read(receive)
        if last["type"] == "http.request":
            try:
                body = salted(body, secret, key)
            except UsageError as error:
                param = "cache_salt" if "cache_salt" in str(error) else None
                status = HTTPStatus.BAD_REQUEST
                await refuse(scope, receive, send, status=status, sentence=str(error), param=param)
                return
            last = {"type": "http.request", "body": body, "more_body": False}
            _set_length(scope, len(body))
        replay = [last]

        async def replayed() -> Message:
            return replay.pop() if replay else await receive()

        await self.app(scope, replayed, send)


async def _read(receive: Receive) -> tuple[Message, bytes]:
    """The last message and the whole body; the message is a disconnect if the client went away before the end."""
    pieces: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return message, b""
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return message, b"".join(pieces)


def _set_length(scope: Scope, body_bytes: int) -> None:
    """Have the request announce the length that its body has now."""
    headers = MutableHeaders(raw=list(scope["headers"]))
    if "transfer-encoding" in headers:
        del headers["transfer-encoding"]
    headers["content-length"] = str(body_bytes)
    scope["headers"] = headers.raw
