"""A small streaming client of the OpenAI completions route: token ids, text and when each token arrived.

Knows no ghostserve: it talks to stock vLLM just the same, which is what makes a failure-free reference
possible. Each call opens a connection of its own, so calls may run in any number of threads.
"""

from __future__ import annotations

import functools
import json
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from ghostserve.clock import monotonic_s
from ghostserve.web.admin import NO_TLS, Tls, auth_headers, error_sentence

CONNECT_TIMEOUT_S = 10.0

TokenCallback = Callable[[int, Sequence[int], str, float], None]
"""Called as (choice index, token ids, text, arrival on the monotonic clock) for each chunk, in the caller's
thread.
"""


class StopStreaming(Exception):
    """Raised by a callback to close the connection now, as a client that goes away does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamResult:
    """All that one request brought, by choice index. One arrival per token, those of one chunk alike.

    `error` is None only if the stream ended as it should; what came before an error is kept. `aborted`
    means that the callback ended it.
    """

    token_ids: Mapping[int, Sequence[int]]
    text: Mapping[int, str]
    arrivals_s: Mapping[int, Sequence[float]]
    finish_reasons: Mapping[int, str]
    error: str | None
    aborted: bool = False

    @property
    def tokens_total(self) -> int:
        return sum(len(ids) for ids in self.token_ids.values())


@dataclass(slots=True)
class _Gathering:
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    arrivals_s: dict[int, list[float]] = field(default_factory=dict)
    finish_reasons: dict[int, str] = field(default_factory=dict)

    def take(self, choice: Mapping[str, Any], at_s: float) -> tuple[int, list[int], str]:
        index = int(choice["index"])
        ids, text = list(choice.get("token_ids") or ()), choice.get("text") or ""
        self.token_ids.setdefault(index, []).extend(ids)
        self.arrivals_s.setdefault(index, []).extend([at_s] * len(ids))
        self.text[index] = self.text.get(index, "") + text
        if choice.get("finish_reason"):
            self.finish_reasons[index] = choice["finish_reason"]
        return index, ids, text

    def result(self, *, error: str | None, aborted: bool = False) -> StreamResult:
        return StreamResult(
            token_ids=self.token_ids,
            text=self.text,
            arrivals_s=self.arrivals_s,
            finish_reasons=self.finish_reasons,
            error=error,
            aborted=aborted,
        )


class _StreamError(Exception):
    """The server reported an error, or the stream ended early; the message is for the reader."""


@functools.cache
def _context(tls: Tls) -> ssl.SSLContext:
    """Reading the certificates can take a second."""
    return tls.context()


def _connect(base_url: str, api_key: str | None, limits: httpx.Timeout, tls: Tls) -> httpx.Client:
    return httpx.Client(
        base_url=base_url,
        headers=auth_headers(api_key),
        timeout=limits,
        trust_env=False,
        verify=_context(tls),
    )


def first_model(
    base_url: str, *, api_key: str | None = None, tls: Tls = NO_TLS, timeout_s: float = 10.0
) -> str:
    """The name of the first model that the server offers; raises httpx.HTTPError."""
    with _connect(base_url, api_key, httpx.Timeout(timeout_s), tls) as http:
        answer = http.get("/v1/models").raise_for_status()
    return str(answer.json()["data"][0]["id"])


def _events(lines: Iterator[str], deadline_s: float) -> Iterator[dict[str, Any]]:
    """The JSON events of a server-sent stream up to `[DONE]`; comments (keep-alives) are passed over."""
    for line in lines:
        if monotonic_s() > deadline_s:
            raise _StreamError("the request ran past its time limit")
        if not line.startswith("data:"):
            continue
        payload = line[5:].strip()
        if payload == "[DONE]":
            return
        event = json.loads(payload)
        if "error" in event:
            raise _StreamError(error_sentence(payload))
        yield event
    raise _StreamError("the stream ended without [DONE]")


def stream_completion(
    base_url: str,
    *,
    prompt: str | Sequence[int],
    max_tokens: int,
    model: str | None = None,
    temperature: float = 0.0,
    seed: int | None = None,
    n: int = 1,
    cache_salt: str | None = None,
    ignore_eos: bool = True,
    on_token: TokenCallback | None = None,
    timeout_s: float = 120.0,
    api_key: str | None = None,
    tls: Tls = NO_TLS,
    extra: Mapping[str, Any] | None = None,
) -> StreamResult:
    """Stream one completion and return all of it; blocks until it ends.

    Errors of the server, the connection and the clock are values in the result, since a test expects some
    of them; an exception of `on_token` other than StopStreaming passes through. `timeout_s` bounds the wait
    for each chunk and, checked at each chunk, the whole request: a call returns within twice that.
    """
    body: dict[str, Any] = {
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "max_tokens": max_tokens,
        "temperature": temperature,
        "n": n,
        "ignore_eos": ignore_eos,
        "stream": True,
        "return_token_ids": True,
    }
    body |= {k: v for k, v in (("seed", seed), ("cache_salt", cache_salt)) if v is not None}
    body |= dict(extra or {})
    gathering = _Gathering()
    limits = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
    deadline_s = monotonic_s() + timeout_s
    try:
        body["model"] = model or first_model(base_url, api_key=api_key, tls=tls)
        with (
            _connect(base_url, api_key, limits, tls) as http,
            http.stream("POST", "/v1/completions", json=body) as answer,
        ):
            if answer.is_error:
                raise _StreamError(f"HTTP {answer.status_code}: {error_sentence(answer.read())}")
            for event in _events(answer.iter_lines(), deadline_s):
                for choice in event.get("choices", ()):
                    at_s = monotonic_s()
                    index, ids, text = gathering.take(choice, at_s)
                    if on_token is not None and (ids or text):
                        on_token(index, ids, text, at_s)
    except StopStreaming:
        return gathering.result(error=None, aborted=True)
    except _StreamError as failure:
        return gathering.result(error=str(failure))
    except (httpx.HTTPError, ValueError) as failure:
        return gathering.result(error=f"{type(failure).__name__}: {failure}")
    return gathering.result(error=None)
