"""Streams that are timed with as little work as possible while they run: bytes and a time are kept, no more.

On two cores the client takes its time from the workers, so JSON is read when all is over. A step is what all
streams wait for together:

    stream 0   t t t t t t t t
    stream 1     t t t t t t t t        the rate is taken between `begin`, when the last stream has begun,
    stream 2       t t t t t t t t      and `end`, when the first one ends: all of them run in that window
               begin┘     └end
"""

from __future__ import annotations

import http.client
import itertools
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ghostserve.clock import monotonic_s
from ghostserve.errors import GhostserveError

TIMEOUT_S = 120.0
READ_BYTES = 65536

Chunk = tuple[float, bytes]  # when it was read (monotonic), and what


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedStream:
    """One answer; one arrival (monotonic) per token."""

    token_ids: tuple[int, ...]
    arrivals_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """How fast streams went while all of them ran. One step gives every stream a token."""

    tokens_per_s: float
    step_us: float
    gap_p50_us: float
    gap_p99_us: float


def read_events(chunks: Sequence[Chunk]) -> Iterator[tuple[float, Mapping[str, Any]]]:
    """The JSON events, each with the time at which its last byte was read.

    Raises GhostserveError for an error event or a stream that does not end with [DONE].
    """
    rest = b""
    for at_s, data in chunks:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            payload = line.removeprefix(b"data:").strip()
            if payload == b"[DONE]":
                return
            if not line.startswith(b"data:"):
                continue
            event = json.loads(payload)
            if "error" in event:
                raise GhostserveError(f"the server reports an error: {event['error']}")
            yield at_s, event
    raise GhostserveError("the stream ended without [DONE]")


def parse_stream(chunks: Sequence[Chunk]) -> TimedStream:
    """The tokens of a completion of one choice. Raises GhostserveError, see read_events."""
    token_ids: list[int] = []
    arrivals_s: list[float] = []
    for at_s, event in read_events(chunks):
        for choice in event.get("choices", ()):
            ids = choice.get("token_ids") or ()
            token_ids.extend(ids)
            arrivals_s.extend([at_s] * len(ids))
    return TimedStream(token_ids=tuple(token_ids), arrivals_s=tuple(arrivals_s))


def rate_of(streams: Sequence[TimedStream]) -> Rate:
    """The rate while all streams run. Raises GhostserveError if they do not run together for long enough."""
    begin_s = max((stream.arrivals_s[0] for stream in streams if stream.arrivals_s), default=0.0)
    end_s = min((stream.arrivals_s[-1] for stream in streams if stream.arrivals_s), default=0.0)
    tokens_per_s = 0.0
    gaps_s: list[float] = []
    for stream in streams:
        inside = [at_s for at_s in stream.arrivals_s if begin_s <= at_s <= end_s]
        if len(inside) < 2 or inside[-1] <= inside[0]:
            raise GhostserveError("the streams did not run at the same time; ask for more tokens")
        tokens_per_s += (len(inside) - 1) / (inside[-1] - inside[0])
        gaps_s += [after_s - before_s for before_s, after_s in itertools.pairwise(inside)]
    gaps_s.sort()
    return Rate(
        tokens_per_s=tokens_per_s,
        step_us=len(streams) * 1e6 / tokens_per_s,
        gap_p50_us=1e6 * gaps_s[len(gaps_s) // 2],
        gap_p99_us=1e6 * gaps_s[len(gaps_s) * 99 // 100],
    )


class _Reader(threading.Thread):
    """One request; what it brings is in `chunks` once it was joined, what went wrong in `failure`."""

    def __init__(self, base_url: str, body: bytes) -> None:
        super().__init__(name="bench-stream", daemon=True)
        self.chunks: list[Chunk] = []
        self.failure: Exception | None = None
        self._address = urlsplit(base_url).netloc
        self._body = body

    def run(self) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=TIMEOUT_S)
        try:
            connection.request("POST", "/v1/completions", self._body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise GhostserveError(f"HTTP {answer.status}: {answer.read()[:300]!r}")
            while data := answer.read1(READ_BYTES):
                self.chunks.append((monotonic_s(), data))
        except (OSError, http.client.HTTPException, GhostserveError) as error:
            self.failure = error
        finally:
            connection.close()


def run_streams(
    base_url: str, *, prompts: Sequence[str], max_tokens: int, model: str, cache_salt: str
) -> list[TimedStream]:
    """One greedy answer per prompt, all at the same time, each of exactly `max_tokens` tokens.

    Raises GhostserveError for whatever went wrong with any of them.
    """
    body = {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "cache_salt": cache_salt,
    }
    readers = [_Reader(base_url, json.dumps({**body, "prompt": prompt}).encode()) for prompt in prompts]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(timeout=2 * TIMEOUT_S)
    results = []
    for reader in readers:
        if reader.is_alive() or reader.failure is not None:
            raise GhostserveError(f"a stream failed: {reader.failure or 'it did not end'}")
        result = parse_stream(reader.chunks)
        if len(result.token_ids) != max_tokens:
            raise GhostserveError(f"an answer has {len(result.token_ids)} tokens instead of {max_tokens}")
        results.append(result)
    return results
