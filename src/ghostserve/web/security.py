"""Who may use our routes: pure checks, and the FastAPI dependency that applies them.

Theory of operation. Three kinds of caller have to be told apart:

    the operator, with a key     has the key in the Authorization header; may come from anywhere
    the operator, without a key  the server has none; whoever reaches it over loopback is trusted
    a page in the browser        comes over loopback as well, but on behalf of some web site

A web site can make a browser send requests to 127.0.0.1 in two ways. It can post across sites: then the
browser says so in `Origin` and `Sec-Fetch-Site`. Or it can rebind its own name to 127.0.0.1, so that the
browser takes the server for the site itself: then `Host` holds the site's name. Each is refused by the
header that gives it away.

`Host` is compared only where there is no key. A page that rebinds a name does not hold the key, while a
server with a key may well stand behind a name that it does not know.

A reverse proxy on this machine connects from loopback on behalf of anyone, and uvicorn believes what such a
proxy says about its client. So without a key a request that names a proxy is refused; one that hides its
proxy cannot be told from the operator.

Fault injection may want a key of its own: then its routes have a policy with that key alone.

Not checked here: TLS, rate limits, and who holds the key. vLLM's routes: `web.key_gate`.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import urlsplit

from fastapi import HTTPException, Request
from starlette.datastructures import Headers

from ghostserve.errors import UsageError

_DEFAULT_PORTS = {"http": 80, "https": 443}
_WILDCARD_HOSTS = frozenset({"", "0.0.0.0", "::"})
_PROXY_HEADERS = frozenset({"forwarded", "via", "x-real-ip"})
_TRUSTED_FETCH_SITES = frozenset({"same-origin", "none"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFacts:
    """What a request says of where it comes from; `None` where the header or the address is absent."""

    client_host: str | None  # None: a Unix socket, where the file's permissions decide
    host: str | None
    origin: str | None
    fetch_site: str | None
    authorization: str | None
    forwarded: bool = False  # a header names a proxy in between


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessPolicy:
    """What the server demands. `bound_host` is the value of `--host`; a wildcard names no host."""

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    bound_host: str | None = None
    key_name: str = "API key"  # what the keys are called in a refusal


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is turned away: the status to answer with and one sentence for the caller."""

    status: int
    sentence: str


def presented_key(authorization: str | None) -> str | None:
    """The key of the header `Bearer KEY`; None if it holds none."""
    scheme, _, key = (authorization or "").partition(" ")
    return key if key and scheme.lower() == "bearer" else None


def key_is_accepted(authorization: str | None, api_keys: Sequence[str]) -> bool:
    """Whether the header `Bearer KEY` names one of the keys, in a time that does not depend on which or how
    far.
    """
    presented = presented_key(authorization)
    if presented is None:
        return False  # not even where an empty key is among ours
    digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()
    accepted = False
    for key in api_keys:
        expected = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        accepted |= hmac.compare_digest(digest, expected)
    return accepted


def demand_sendable_key(key: str) -> None:
    """Raise UsageError for a key that an HTTP header cannot carry; it is not repeated in the message."""
    if not (key.isascii() and key.isprintable()):
        raise UsageError("the API key holds characters other than printable ASCII; no HTTP header carries it")


def names_a_proxy(header: str) -> bool:
    """Whether a header of this name is one that proxies add, in any case."""
    name = header.lower()
    return name in _PROXY_HEADERS or name.startswith("x-forwarded")


def is_loopback(host: str) -> bool:
    """Whether this name or address can only mean the machine itself."""
    bare = host.rstrip(".").lower()
    if bare == "localhost":
        return True
    try:
        address = ipaddress.ip_address(bare.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def split_host(header: str) -> tuple[str, int | None] | None:
    """The name and port of a `Host` header, lower-cased and without brackets; None if it is malformed."""
    try:
        parts = urlsplit(f"//{header}")
        if not parts.hostname or parts.username is not None or parts.path or parts.query or parts.fragment:
            return None
        return parts.hostname, parts.port
    except ValueError:
        return None


def _origin_is_host(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin)
        origin_port = parts.port
    except ValueError:
        return False
    default_port = _DEFAULT_PORTS.get(parts.scheme)
    here = split_host(host)
    if default_port is None or here is None or parts.path or parts.query:
        return False
    name, port = here
    return parts.hostname == name and (origin_port or default_port) == (port or default_port)


def _host_is_ours(host: str, bound_host: str | None) -> bool:
    parts = split_host(host)
    if parts is None:
        return False
    bound = (bound_host or "").strip("[]").lower()
    return is_loopback(parts[0]) or (bound not in _WILDCARD_HOSTS and parts[0] == bound)


def key_refusal(key_name: str = "API key") -> str:
    """What is said to whoever does not hold the key; it repeats nothing that was sent."""
    return f"the {key_name} is missing or wrong; send it as 'Authorization: Bearer KEY'"


def access_refusal(facts: RequestFacts, policy: AccessPolicy) -> Refusal | None:
    """None if the request may go on, otherwise the first reason against it.

    The browser's headers are looked at before the key, so that a page learns nothing about keys.
    """
    if facts.fetch_site is not None and facts.fetch_site.lower() not in _TRUSTED_FETCH_SITES:
        return Refusal(403, f"refused: the browser reports a {facts.fetch_site} request")
    if facts.origin is not None and not _origin_is_host(facts.origin, facts.host or ""):
        return Refusal(403, "refused: the Origin header differs from the Host header")
    if policy.api_keys:
        if not key_is_accepted(facts.authorization, policy.api_keys):
            return Refusal(401, key_refusal(policy.key_name))
        return None
    if facts.forwarded:
        return Refusal(403, "without --api-key this route does not answer through a proxy; start with a key")
    if facts.client_host is not None and not is_loopback(facts.client_host):
        return Refusal(
            403, "without --api-key this route answers only on loopback; start the server with a key"
        )
    if not _host_is_ours(facts.host or "", policy.bound_host):
        return Refusal(403, "refused: the Host header names neither loopback nor the bound host")
    return None


def joined_header(headers: Headers, name: str) -> str | None:
    """A header's value, None without one. One that is sent twice counts as both values joined: that matches nothing."""
    values = headers.getlist(name)
    return ",".join(values) if values else None


def facts_of(request: Request) -> RequestFacts:
    """Read the facts off a request."""
    header = partial(joined_header, request.headers)
    return RequestFacts(
        client_host=request.client.host if request.client and request.client.host else None,
        host=header("host"),
        origin=header("origin"),
        fetch_site=header("sec-fetch-site"),
        authorization=header("authorization"),
        forwarded=any(names_a_proxy(name) for name in request.headers),
    )


def guard(policy: AccessPolicy) -> Callable[[Request], None]:
    """A FastAPI dependency that raises 401 or 403 for whoever the policy turns away."""

    def refuse_strangers(request: Request) -> None:
        refusal = access_refusal(facts_of(request), policy)
        if refusal is not None:
            headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None
            raise HTTPException(refusal.status, refusal.sentence, headers=headers)

    return refuse_strangers
