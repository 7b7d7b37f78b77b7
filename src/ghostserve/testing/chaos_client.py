"""The clients of a chaos run: a process of its own, told what to do in JSON lines and telling what it sees in others.

    python -m ghostserve.testing.chaos_client

    in    {"url", "model", "requests", "streams", "seed", "plan"}   first, once
          {"do": "once", "order": [...], "salt"}   each of these requests, over all streams; "idle" follows
          {"do": "loop", "salt"}     requests drawn at random, until "stop"; a plan begins
          {"do": "leave"}            one stream in mid-answer goes away
          {"do": "stop"}             what runs ends, then "idle"
    out   {"event": "first", "stream"}                      a stream shows its first token
          {"event": "end", "stream", "request", "tokens", "error", "aborted", "gaps"}
          {"event": "performed", "kinds"}                       before the "idle" of "stop": what of the plan was done
          {"event": "idle"}

Times are of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

from ghostserve.errors import GhostserveError
from ghostserve.testing.client import StopStreaming, StreamResult, TokenCallback, stream_completion
from ghostserve.testing.fault_plan import FaultPlan
from ghostserve.testing.fault_runner import FaultRunner
from ghostserve.web.admin import AdminClient

GAP_S_MIN = 0.05  # shorter ones say nothing of an outage
REQUEST_TIMEOUT_S = 60.0


class Clients:
    """Streams, each in a thread, that take requests from one place."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._salt = ""
        self._salts = itertools.count()
        self._order: deque[int] = deque()
        self._looping = False
        self._active = 0
        self._leaving = 0  # streams that are to go away at their next token
        self._wake = threading.Condition()
        self._out = threading.Lock()
        self._planned: FaultRunner | None = None
        self._runner: FaultRunner | None = None  # the same, while the faults of the plan may strike
        if config.get("plan"):
            self._planned = FaultRunner(AdminClient(config["url"]), FaultPlan.from_dict(config["plan"]))
        for stream in range(config["streams"]):
            threading.Thread(target=self._work, args=(stream,), daemon=True).start()

    def take(self, command: dict[str, Any]) -> None:
        """Do what a line says."""
        with self._wake:
            match command["do"]:
                case "once":
                    self._order, self._salt = deque(command["order"]), command["salt"]
                case "loop":
                    self._looping, self._salt = True, command["salt"]
                    self._runner = self._planned
                case "leave":
                    self._leaving += 1
                case "stop":
                    self._looping = False
            self._wake.notify_all()
        if command["do"] == "loop" and self._runner is not None:
            self._runner.start()
        if command["do"] in ("once", "stop"):
            self._wait_idle()
            self._leaving = 0
            if self._runner is not None:
                self._say(event="performed", kinds=[item.fault.kind.value for item in self._runner.performed])
                self._runner = None
            self._say(event="idle")

    # -- private ---------------------------------------------------------------------------------------

    def _wait_idle(self) -> None:
        with self._wake:
            while self._order or self._active:
                self._wake.wait()

    def _next(self, rng: random.Random) -> int:
        with self._wake:
            while not (self._order or self._looping):
                self._wake.wait()
            self._active += 1
            return self._order.popleft() if self._order else rng.randrange(len(self._config["requests"]))

    def _work(self, stream: int) -> None:
        rng = random.Random(f"{self._config['seed']}/{stream}")
        while True:
            number = self._next(rng)
            result = self._run(stream, self._config["requests"][number])
            self._say(
                event="end",
                stream=stream,
                request=number,
                tokens={index: list(ids) for index, ids in result.token_ids.items()},
                error=result.error,
                aborted=result.aborted,
                gaps=gaps_of(result),
            )
            with self._wake:
                self._active -= 1
                self._wake.notify_all()

    def _run(self, stream: int, request: dict[str, Any]) -> StreamResult:
        group = next(self._salts) if request["prefix"] is None else f"shared-{request['prefix']}"
        try:
            if self._runner is not None:
                self._runner.sending()
            return stream_completion(
                self._config["url"],
                model=self._config["model"],
                prompt=request["prompt"],
                max_tokens=request["max_tokens"],
                temperature=request["temperature"],
                seed=request["seed"],
                n=request["n"],
                cache_salt=f"{self._salt}-{group}",
                on_token=self._callback(stream),
                timeout_s=REQUEST_TIMEOUT_S,
            )
        except GhostserveError as error:  # a fault of the plan could not be performed
            return StreamResult(
                token_ids={}, text={}, arrivals_s={}, finish_reasons={}, error=f"plan: {error}"
            )

    def _callback(self, stream: int) -> TokenCallback:
        told = False
        watch = None if self._runner is None else self._runner.watch()

        def on_token(index: int, ids: Sequence[int], text: str, at_s: float) -> None:
            nonlocal told
            if not told:
                told = True
                self._say(event="first", stream=stream)
            if self._leaving:
                with self._wake:
                    leaves = self._leaving > 0
                    self._leaving -= int(leaves)
                if leaves:
                    raise StopStreaming
            if watch is not None:
                watch(index, ids, text, at_s)

        return on_token

    def _say(self, **event: Any) -> None:
        line = json.dumps(event, separators=(",", ":"))
        with self._out:
            print(line, flush=True)


def gaps_of(result: StreamResult) -> list[tuple[float, float]]:
    """When a choice showed nothing for GAP_S_MIN or longer, between two tokens."""
    return [
        (before_s, after_s)
        for arrivals_s in result.arrivals_s.values()
        for before_s, after_s in itertools.pairwise(arrivals_s)
        if after_s - before_s >= GAP_S_MIN
    ]


def main() -> None:
    """Until the standard input ends."""
    clients = Clients(json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        clients.take(json.loads(line))


if __name__ == "__main__":
    main()
