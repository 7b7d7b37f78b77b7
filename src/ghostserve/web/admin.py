"""The client of our own routes: what `ghostserve status`, `kill`, the demo and the tests ask a server with.

One connection per call, so calls may come from any number of threads. Every error is ours and says what to
do.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from ghostserve.errors import GhostserveError, UsageError
from ghostserve.web.security import demand_sendable_key, is_loopback

TIMEOUT_S = 10.0
INJECTION = frozenset({"/ghostserve/kill", "/ghostserve/faults", "/ghostserve/switches"})
"""The routes that want the admin key, where the server has one."""


def auth_headers(api_key: str | None) -> dict[str, str]:
    """The header that carries the key, or none."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def error_sentence(body: bytes | str) -> str:
    """The message of an error body, in OpenAI's or FastAPI's form, or else how the body begins."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else body
    try:
        value = json.loads(text)
        error = value.get("error", value)
        message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        message = None
    return str(message or text[:300])


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Files for https, as curl names them; None: the authorities known here, and no certificate of our own."""

    cacert: str | None = None
    cert: str | None = None
    key: str | None = None

    def context(self) -> ssl.SSLContext:
        """For httpx and the like. Reading the certificates can take a second. Raises UsageError."""
        try:
            context = ssl.create_default_context(cafile=self.cacert)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(f"--cacert {self.cacert}: no certificates in it ({_reason(error)})") from None
        if self.cert is not None:
            try:
                context.load_cert_chain(self.cert, self.key, password=_no_password)
            except (OSError, ssl.SSLError) as error:
                raise UsageError(
                    f"--cert {self.cert}: no certificate with its private key in it, or in --key ({_reason(error)})"
                ) from None
        return context

    @property
    def given(self) -> bool:
        """Whether anything differs from what httpx does by itself."""
        return self != NO_TLS


NO_TLS = Tls()


def _no_password() -> str:
    """Or OpenSSL would ask at the terminal, and wait."""
    raise ssl.SSLError("it is encrypted; give it without a passphrase")


def _reason(error: OSError) -> str:
    return str(error.strerror or getattr(error, "reason", None) or error)


class Refused(GhostserveError):
    """The server cannot do it at the moment (409): another time it may."""


class AdminClient:
    """Asks one server. Calls raise UsageError for what the server finds wrong in the request (422), and
    GhostserveError when it cannot be reached or refuses.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        tls: Tls | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """Nothing is sent yet. `admin_key` goes to the fault routes instead of `api_key`.

        UsageError unless `url` is an http or https URL, the keys can be sent, and the files of `tls` can be used.
        """
        host = _host_of(url)
        for key in (api_key, admin_key):
            if key:
                demand_sendable_key(key)
        self.url = url.rstrip("/")
        # Some servers say so, others close the connection.
        self._may_want_a_cert = self.url.lower().startswith("https") and (tls is None or tls.cert is None)
        self._admin_headers = auth_headers(admin_key)
        # Set up once, so that a kill is not late; no connection is kept, so that none is found stale.
        self._http = httpx.Client(
            headers=auth_headers(api_key),
            timeout=timeout_s,
            trust_env=not is_loopback(host),
            verify=tls.context()
            if tls is not None and tls.given and url.lower().startswith("https")
            else True,
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    def status(self) -> dict[str, Any]:
        """The state document, with counters."""
        return self._ask("GET", "/ghostserve/status")

    def events(self, *, after: int, limit: int) -> dict[str, Any]:
        """What has happened behind `after`: `events`, `next` and `dropped`."""
        return self._ask("GET", f"/ghostserve/events?after={after}&limit={limit}")

    @contextmanager
    def stream(self, path: str, *, read_timeout_s: float) -> Iterator[Iterator[str]]:
        """The lines of a stream. Raises httpx.HTTPError where waiting may help, else as `_ask`."""
        timeout = httpx.Timeout(TIMEOUT_S, read=read_timeout_s)
        with self._http.stream("GET", self.url + path, timeout=timeout) as answer:
            if answer.status_code in (401, 403, 404, 422):
                answer.read()
                self._refuse(answer)
            answer.raise_for_status()
            yield answer.iter_lines()

    def kill_rank(self, rank: int) -> dict[str, Any]:
        """SIGKILL the worker of this rank; the answer names the pid."""
        return self.inflict("crash", rank=rank)

    def inflict(
        self, how: str, *, rank: int | None = None, steps: int | None = None, factor: int | None = None
    ) -> dict[str, Any]:
        """Bring a fault about now, or in the next step; names as in `arena.fault_kinds`. The answer says which."""
        body = {"how": how, "rank": rank, "steps": steps, "factor": factor}
        return self._ask("POST", "/ghostserve/kill", {k: v for k, v in body.items() if v is not None})

    def arm_fault(
        self, *, point: str, rank: int, action: str, skip: int = 0, argument: int = 0, count: int = 1
    ) -> None:
        """Have a rank suffer `action` at `point`; names and numbers as in `arena.names.Fault`."""
        body = {
            "point": point,
            "rank": rank,
            "action": action,
            "skip": skip,
            "argument": argument,
            "count": count,
        }
        self._ask("POST", "/ghostserve/faults", body)

    def disarm_faults(self) -> None:
        """Forget all faults that have not struck."""
        self._ask("DELETE", "/ghostserve/faults")

    def set_switch(self, name: str, on: bool) -> None:
        """Turn a run-time switch on or off; names as in `arena.names.Switch`, in lower case."""
        self._ask("POST", "/ghostserve/switches", {name: on})

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            headers = self._admin_headers if path in INJECTION else {}
            answer = self._http.request(method, self.url + path, json=body, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            tls = _tls_failure(error)
            if tls is not None:
                raise GhostserveError(
                    f"no TLS connection to {self.url}: {tls}; {self._tls_remedy(tls)}"
                ) from error
            raise GhostserveError(
                f"no server answers at {self.url} ({type(error).__name__}); start one with "
                "'ghostserve serve MODEL', or name its address with --url"
                + ("; if it wants a client certificate, give it with --cert" if self._may_want_a_cert else "")
            ) from error
        self._refuse(answer)
        return _as_object(answer)

    def _tls_remedy(self, failure: str) -> str:
        if "CERTIFICATE_REQUIRED" in failure and self._may_want_a_cert:
            return "it wants a client certificate: give it with --cert, and its private key with --key"
        if "ALERT" in failure:
            return "it does not accept our certificate: check --cert"
        return "check its certificate (--cacert), and whether it is http"

    def _refuse(self, answer: httpx.Response) -> None:
        """Raise what an answer with an error means."""
        if answer.status_code == 422:
            raise UsageError(error_sentence(answer.content))
        if answer.status_code == 404:
            raise GhostserveError(
                f"the server at {self.url} has no ghostserve routes: it is not run by ghostserve, or runs "
                "with --protection none"
            )
        if answer.status_code == 401:
            kind = "admin" if "admin key" in error_sentence(answer.content) else "API"
            raise GhostserveError(
                f"the {kind} key is missing or wrong; give it with --{'admin-' * (kind == 'admin')}api-key"
            )
        if answer.status_code == 409:
            raise Refused(f"{error_sentence(answer.content)} (HTTP 409)")
        if answer.is_error:
            raise GhostserveError(f"{error_sentence(answer.content)} (HTTP {answer.status_code})")


def _host_of(url: str) -> str:
    """The host that an http or https URL names; raises UsageError for any other text."""
    try:
        parts = urlsplit(url)
        httpx.URL(url)  # stricter about the host, and used later
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts.hostname
        reason = ""
    except (ValueError, httpx.InvalidURL) as error:
        reason = f" ({error})"
    raise UsageError(f"{url!r} is not a URL such as http://127.0.0.1:8000{reason}")


def _tls_failure(error: BaseException) -> str | None:
    """What TLS found wrong, if that is the cause behind this error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return str(getattr(cause, "verify_message", "") or cause.reason or cause)
        cause = cause.__cause__ or cause.__context__
    return None


def _as_object(answer: httpx.Response) -> dict[str, Any]:
    try:
        value = answer.json()
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise GhostserveError(f"{answer.url} did not answer with a JSON object")
    return value
