"""What the real-process tests share: servers, requests, references, and the assertions of a repaired loss.

A reference is the failure-free run of the same request on the same server; it is run once and kept. Reference
and faulted run have different cache salts, so that neither feeds on the other's prefix cache.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

import ghostserve
from ghostserve.clock import monotonic_s
from ghostserve.testing.client import StreamResult, stream_completion
from ghostserve.testing.oracle import compare_choices
from ghostserve.testing.server import ServerProcess, ghostserve_command
from ghostserve.web.admin import NO_TLS, Tls, auth_headers
from real.overlay import v2_environment
from weights_pool_kit import eventually

TINY = Path(ghostserve.__file__).parent / "models" / "tiny-llama"
PROMPTS = {
    item["name"]: item["prompt"]
    for item in json.loads((TINY.parent / "prompts.json").read_text(encoding="utf-8"))
}
SERVER_ENV = {"VLLM_SERVER_DEV_MODE": "1"}
STARTED: list[str] = []  # every server start of this session, by configuration
SERVING = {  # flags and environment: model runner and scheduling
    "v1-sync": ((), dict),  # what vLLM takes by itself on a CPU
    "v1-async": (("--async-scheduling",), dict),
    "v2-sync": (("--no-async-scheduling",), v2_environment),
    "v2-async": (("--async-scheduling",), v2_environment),
}
_salts = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request, hashable so that its reference can be kept."""

    prompt: str = PROMPTS["json-dump"]
    max_tokens: int = 120
    temperature: float = 0.0
    seed: int | None = None
    n: int = 1
    regex: str | None = None
    presence_penalty: float = 0.0  # the sampler needs every token of the answer so far

    @property
    def extra(self) -> dict[str, Any]:
        grammar = {} if self.regex is None else {"structured_outputs": {"regex": self.regex}}
        return {**grammar, **({"presence_penalty": self.presence_penalty} if self.presence_penalty else {})}

    @property
    def body(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "n": self.n,
        }


SEEDED = Ask(temperature=0.8, seed=7)
SEEDED_PAIR = Ask(temperature=0.8, seed=11, n=2, max_tokens=90)
LONG_PROMPT = Ask(prompt=(PROMPTS["json-dump"] + "\n") * 35, max_tokens=40)
LONG_SEEDED = Ask(prompt=(PROMPTS["json-dump"] + "\n") * 35, max_tokens=40, temperature=0.8, seed=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """How one gets in: nothing is needed for a server that asks for nothing."""

    api_key: str | None = None
    admin_key: str | None = None
    tls: Tls = NO_TLS

    def client(self) -> httpx.Client:
        """No connection is kept: a server's references outlive it, and a socket that nobody closes fails a later test."""
        return httpx.Client(
            timeout=30.0,
            trust_env=False,
            limits=httpx.Limits(max_keepalive_connections=0),
            headers=auth_headers(self.api_key),
            verify=self.tls.context() if self.tls.given else True,
        )


@dataclass(slots=True)
class Served:
    """A running server and the references taken on it."""

    server: ServerProcess
    references: dict[Ask, StreamResult] = field(default_factory=dict)
    door: Door = field(default_factory=Door)
    _http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self._http = self.door.client()

    # -- requests --------------------------------------------------------------------------------------

    def run(
        self, ask: Ask, *, on_token: Any = None, salt: str | None = None, timeout_s: float = 90.0
    ) -> StreamResult:
        return stream_completion(
            self.server.base_url,
            model="tiny",
            cache_salt=salt or fresh_salt(),
            on_token=on_token,
            timeout_s=timeout_s,
            api_key=self.door.api_key,
            tls=self.door.tls,
            extra=ask.extra,
            **ask.body,
        )

    def run_together(
        self, asks: Sequence[Ask], *, during: Callable[[Callable[[], int]], None] | None = None
    ) -> list[StreamResult]:
        """All requests queued before the first step, so that the batch is the same each time.

        `during(tokens)` runs in the caller's thread while they stream; `tokens()` counts what arrived so far.
        """
        results: dict[int, StreamResult] = {}
        arrived = itertools.count()
        seen = [0]

        def count(index: int, ids: Sequence[int], text: str, at_s: float) -> None:
            for _ in ids:
                seen[0] = next(arrived) + 1

        def one(position: int) -> None:
            results[position] = self.run(asks[position], on_token=count)

        self.post("/pause?mode=keep&clear_cache=false")
        threads = [threading.Thread(target=one, args=(position,)) for position in range(len(asks))]
        for position, thread in enumerate(threads):
            thread.start()
            self.wait_for_open(position + 1)  # arrival order is part of the batch
        self.post("/resume")
        if during is not None:
            during(lambda: seen[0])
        for thread in threads:
            thread.join(timeout=120)
            assert not thread.is_alive(), "a stream did not end"
        return [results[position] for position in range(len(asks))]

    def run_with_stops(self, ask: Ask, *stops: tuple[int, Callable[[], Any]]) -> StreamResult:
        """A request that stands still after so many tokens while something is done: see Stops. None is left out."""
        at = Stops(self, *stops)
        result = self.run(ask, on_token=at)
        assert at.done, result
        return result

    def reference(self, ask: Ask) -> StreamResult:
        """The failure-free run."""
        if ask not in self.references:
            result = self.run(ask)
            assert result.error is None, result.error
            assert all(len(ids) == ask.max_tokens for ids in result.token_ids.values()), "a short reference"
            self.references[ask] = result
        return self.references[ask]

    # -- the server ------------------------------------------------------------------------------------

    def post(self, path: str, body: Any = None) -> Any:
        answer = self._http.post(self.server.base_url + path, json=body)
        assert answer.is_success, f"{path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def wait_for_open(self, requests: int) -> None:
        """Until the scheduler knows so many requests."""
        self.server.wait_status(
            lambda status: status["counters"]["requests_open"] >= requests,
            timeout_s=15,
            what="queued requests",
        )

    def wait_paused(self) -> None:
        """Until an armed pause is in effect. One that comes after the strike comes after the resume, too, and stays."""
        eventually(
            lambda: self._http.get(f"{self.server.base_url}/is_paused").json()["is_paused"],
            "the armed pause does not come",
            timeout_s=15,
        )

    def rpc(self, method: str, *arguments: Any) -> list[Any]:
        """Call a worker's method on every rank (vLLM's development route)."""
        body = {"method": method, "args": list(arguments)}
        results: list[Any] = self.post("/collective_rpc", body)["results"]
        return results

    def kill(self, rank: int) -> dict[str, Any]:
        """SIGKILL a rank's process now (no look around first: the stream goes on meanwhile)."""
        return self.server.admin.kill_rank(rank)

    def arm(self, *, point: str, rank: int, action: str, **more: int) -> None:
        self.server.admin.arm_fault(point=point, rank=rank, action=action, **more)

    def kill_after(self, steps: int, *ranks: int, point: str = "before_model") -> None:
        """Have ranks end by SIGKILL in the step that follows on `steps` more, that is tokens of each stream.

        Counted by the server: a client that gets little processor cannot be late.
        """
        for rank in ranks:
            self.arm(point=point, rank=rank, action="kill", skip=steps)

    def one_step(self) -> None:
        """Of what stands still."""
        before = self.server.status()["counters"]["steps_total"]
        self.arm(point="scheduled", rank=0, action="pause")
        self.post("/resume")
        self.server.wait_status(
            lambda status: status["counters"]["steps_total"] > before, timeout_s=30, what="a step"
        )

    @contextlib.contextmanager
    def unscrubbed(self) -> Iterator[None]:
        """Nothing is scrubbed meanwhile: corruption stays until it is met."""
        self.server.set_switch("skip_scrub", True)
        try:
            yield
        finally:
            self.server.set_switch("skip_scrub", False)

    def wait_now(
        self, condition: Callable[[dict[str, Any]], bool], *, timeout_s: float, what: str
    ) -> dict[str, Any]:
        """The first status that was written from now on for which it holds: one that is there already may be a second old."""
        asked_s = monotonic_s()
        return self.server.wait_status(
            lambda status: status["written_at_s"] > asked_s and condition(status),
            timeout_s=timeout_s,
            what=what,
        )

    def settle(self) -> dict[str, Any]:
        """Serving, everything sealed is coded, all ranks alive."""
        return self.wait_now(
            lambda status: (
                status["state"] == "serving"
                and status["shadow"]["backlog_blocks"] == 0
                and all(rank["state"] == "alive" for rank in status["ranks"])
            ),
            timeout_s=20,
            what="serving with everything coded",
        )

    def recovery(self, *, after: int) -> dict[str, Any]:
        """The report of the recovery that follows `after` recoveries."""
        status = self.server.wait_status(
            lambda status: status["recoveries_total"] > after and status["state"] == "serving",
            timeout_s=60,
            what="a recovery",
        )
        report: dict[str, Any] = status["last_recovery"]
        return report

    def recoveries(self) -> int:
        return int(self.server.status()["recoveries_total"])


def fresh_salt() -> str:
    return f"salt-{next(_salts)}"


def serve(
    tmp_path: Path,
    name: str,
    *flags: str,
    model: str | Path = TINY,
    env: dict[str, str] | None = None,
    serving: str = "v1-sync",
    door: Door | None = None,
) -> Served:
    """Start a server of ours for one configuration and wait for it."""
    door = door or Door()
    more_flags, more_env = SERVING[serving]
    command = ghostserve_command(
        model,
        "--tensor-parallel-size", "2",
        "--max-model-len", "4096",
        "--max-num-seqs", "16",
        "--max-num-batched-tokens", "256",
        "--block-size", "32",
        "--kv-cache-memory-bytes", str(48 << 20),
        "--enable-fault-injection",
        "--losses-max", "1000",
        "--enable-prompt-tokens-details",
        "--served-model-name", "tiny",
        *flags,
        *more_flags,
    )  # fmt: skip
    server = ServerProcess(
        command,
        log_dir=tmp_path,
        env={**SERVER_ENV, **more_env(), **(env or {})},
        api_key=door.api_key,
        admin_key=door.admin_key,
        tls=door.tls,
    )
    STARTED.append(name)
    server.start()
    try:
        server.wait_ready(timeout_s=300)
    except BaseException:  # the test's own time limit, too
        server.stop()
        raise
    return Served(server, door=door)


class Stops:
    """A callback for a lone stream that stands still after so many tokens each time, while something is done.

    It is the server that counts and stops, so nothing is done too late, however little processor the client gets.
    Between them it runs on: after the last one to its end.
    """

    def __init__(self, served: Served, *stops: tuple[int, Callable[[], Any]]) -> None:
        self._served = served
        self._left = list(stops)
        self._seen = 0
        self._arm()

    @property
    def done(self) -> bool:
        return not self._left

    def __call__(self, index: int, ids: Sequence[int], text: str, at_s: float) -> None:
        self._seen += len(ids)
        if self._left and self._seen >= self._left[0][0]:
            try:
                self._left.pop(0)[1]()
                self._arm()
            finally:
                self._served.post("/resume")

    def _arm(self) -> None:
        if self._left:
            steps = self._left[0][0] - self._seen
            self._served.arm(point="scheduled", rank=0, action="pause", skip=steps - 1)


class Hurt:
    """A callback that does something once, when a stream has shown so many tokens, or later."""

    def __init__(self, at_token: int, action: Callable[[], Any]) -> None:
        self._at_token = at_token
        self._action = action
        self._seen = 0
        self.answer: Any = None
        self.done = False

    def __call__(self, index: int, ids: Sequence[int], text: str, at_s: float) -> None:
        self._seen += len(ids)
        if not self.done and self._seen >= self._at_token:
            self.done = True
            self.answer = self._action()


def head(result: StreamResult, tokens: int) -> StreamResult:
    """The first tokens of each choice: of a stream that was held open for longer than its reference."""
    return replace(result, token_ids={index: ids[:tokens] for index, ids in result.token_ids.items()})


def assert_same(reference: StreamResult, faulted: StreamResult) -> None:
    """The one oracle."""
    assert faulted.error is None, faulted.error
    verdict = compare_choices(reference.token_ids, faulted.token_ids)
    assert verdict.identical, verdict


def assert_rebuilt(report: dict[str, Any], *, sealed: bool) -> None:
    """The right path, not only the right tokens."""
    assert report["ok"], report
    assert report["path"] == "rebuild", report
    assert report["tokens_recomputed"] == 0, report
    if sealed:
        assert report["kv_blocks_from_parity"] > 0, report
