"""How long a client waits when a worker is killed: rebuilt in place, recomputed in place, or stock vLLM restarted.

standby     ghostserve serve; a standby takes the rank, the lost KV comes back from survivors, parity and mirrors
rebuild     the same without a standby
recompute   ghostserve serve; the rank is replaced in place, the request computes its context again (rung 3, forced)
restart     stock vLLM, started again as soon as it has exited; the client sends prompt and received tokens again

The outage is what the client sees: from the last token before the kill to the first one after.

.venv/bin/python bench/outage.py [--quick] [--contexts 256 4096 16384]
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import results
import script
from estimates import estimate_median, nearest_rank, spread_of
from script import say
from servers import MODEL_DIR, MODEL_NAME, OURS_ON, STOCK, Servers, kv_bytes_per_token, shipped_prompts

from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.errors import CheckFailed
from ghostserve.testing.client import StreamResult, stream_completion
from ghostserve.testing.server import ServerProcess

METHODS = ("standby", "rebuild", "recompute", "restart")
PATHS = {"standby": "rebuild"}  # where the method is not the path that the server reports
KILLED_RANK = 1
TOKENS_BEFORE, TOKENS_AFTER = (
    24,
    80,
)  # many after: the kill takes effect some tokens late; with 40 once after the last
ATTEMPTS_MAX = 5
STREAM_TIMEOUT_S = 280.0
EXIT_TIMEOUT_S = 120.0
TARGETS_S = {"standby": 0.5, "rebuild": 1.5}  # medians, at the shortest context


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One kill. `phases_ms` are the server's own figures, empty for a restart."""

    round: int
    method: str
    context: int
    outage_s: float
    identical: bool
    path: str
    phases_ms: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured."""

    contexts: tuple[int, ...]
    rounds: Mapping[str, int]  # by method, for each context
    seed: int


# ---- what the samples say (pure) -------------------------------------------------------------------------------------


def summarise(samples: Sequence[Sample], *, contexts: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """For each context and method: the spread of outages, the interval of the median, the ratio to standby."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for context in contexts:
        for method in METHODS:
            mine = [s for s in samples if (s.context, s.method) == (context, method)]
            if not mine:
                continue
            outages = [s.outage_s for s in mine]
            phases = {
                name: [s.phases_ms[name] for s in mine if name in s.phases_ms] for name in mine[0].phases_ms
            }
            rows.append(
                {
                    "context": context,
                    "method": method,
                    **asdict(spread_of(outages)),
                    "interval": asdict(estimate_median(outages, rng=rng)),
                    "identical": all(s.identical for s in mine),
                    "phases_ms": {name: spread_of(values).median for name, values in phases.items()},
                    "phases_p95_ms": {
                        name: nearest_rank(sorted(values), 0.95) for name, values in phases.items()
                    },
                }
            )
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The outages, and the phases of the two that repair in place."""
    by_key = {(row["context"], row["method"]): row for row in rows}
    outages, phases = [], []
    for row in rows:
        base = by_key.get((row["context"], "standby"))
        times = f"{row['median'] / base['median']:.1f}x" if base else ""
        outages.append(
            [
                f"{row['context']} tokens, {row['method']}",
                str(row["count"]),
                f"{row['median']:.2f}",
                "{low:.2f} to {high:.2f}".format(**row["interval"]),
                f"{row['minimum']:.2f} to {row['maximum']:.2f}",
                times,
                "yes" if row["identical"] else "NO",
            ]
        )
        if row["phases_ms"]:
            phases.append(
                [
                    f"{row['context']} tokens, {row['method']}",
                    *(
                        f"{ms:.0f} ({row['phases_p95_ms'][name]:.0f})"
                        for name, ms in row["phases_ms"].items()
                    ),
                ]
            )
    names = next((tuple(row["phases_ms"]) for row in rows if row["phases_ms"]), ())
    return "\n".join(
        (
            "Seconds between the last token before the kill and the first one after, seen by the client.",
            "",
            results.table(
                ("context", "kills", "median", "95 % interval", "range", "of standby", "same tokens"), outages
            ),
            "",
            "Phases, milliseconds, medians (95th percentiles); the tail of a prefill counts as retry:",
            "",
            results.table(("context", *names), phases),
        )
    )


# ---- measuring -------------------------------------------------------------------------------------------------------


class _Stopwatch:
    """Kills once, after so many tokens; the outage is the longest wait for a token from then on.

    (Not simply the next one: a token may be on its way to us at the kill.)
    """

    def __init__(self, kill: Callable[[], None]) -> None:
        self._kill: Callable[[], None] | None = kill
        self._seen = 0
        self.last_s = self.outage_s = 0.0

    def __call__(self, index: int, ids: Sequence[int], text: str, at_s: float) -> None:
        if self._kill is None:
            self.outage_s = max(self.outage_s, at_s - self.last_s)
        self._seen += len(ids)
        self.last_s = at_s
        if self._kill is not None and self._seen >= TOKENS_BEFORE:
            kill, self._kill = self._kill, None
            kill()


class Bench:
    """Our server and a stock one, and the samples taken so far."""

    def __init__(self, servers: Servers, plan: Plan) -> None:
        self.samples: list[Sample] = []
        self._servers = servers
        longest = max(plan.contexts) + TOKENS_BEFORE + TOKENS_AFTER + 64
        self._flags = (
            "--max-model-len", str(longest),
            "--kv-cache-memory-bytes", str(int(1.5 * longest * kv_bytes_per_token()) + (16 << 20)),
        )  # fmt: skip
        self._with_standby = self._start_ours(servers, standbys=1)
        self._without = self._start_ours(servers, standbys=0)
        say("starting stock vLLM")
        self._stock = servers.start(STOCK, *self._flags)
        self._references: dict[int, StreamResult] = {}

    def _start_ours(self, servers: Servers, *, standbys: int) -> ServerProcess:
        say(f"starting ghostserve serve --standbys {standbys}")
        more = ("--enable-fault-injection", "--losses-max", "1000", "--standbys", str(standbys))
        return servers.start(OURS_ON, *self._flags, *more)

    def run(self, plan: Plan) -> None:
        """All kills, the methods of a round in shuffled order."""
        rng = random.Random(plan.seed)
        for context in plan.contexts:
            self._references[context] = self._stream(self._without, context, salt=f"reference-{context}")
            for number in range(max(plan.rounds.values())):
                methods = [method for method in METHODS if number < plan.rounds[method]]
                for method in rng.sample(methods, k=len(methods)):
                    self.samples.append(self._measure(method, context, number))
                    s = self.samples[-1]
                    say(f"{context} tokens, round {number + 1}, {method}: {s.outage_s:.2f} s")

    def _measure(self, method: str, context: int, number: int, *, attempt: int = 0) -> Sample:
        if attempt == ATTEMPTS_MAX:
            raise CheckFailed(f"{attempt} kills in a row came after the last token: this machine is too busy")
        salt = f"{method}-{context}-{number}-{attempt}"
        if method == "restart":
            return self._restart(context, number, salt=salt)
        ours = self._with_standby if method == "standby" else self._without
        ours.set_switch("force_recompute", method == "recompute")
        _settle(ours, standbys=int(method == "standby"))
        before = ours.status()["recoveries_total"]
        watch = _Stopwatch(lambda: ours.admin.kill_rank(KILLED_RANK))
        result = self._stream(ours, context, salt=salt, on_token=watch)
        report = ours.wait_status(
            lambda status: status["recoveries_total"] > before, timeout_s=60, what="a recovery"
        )["last_recovery"]
        if report["path"] != PATHS.get(method, method):
            raise CheckFailed(f"the path was {report['path']} instead of {method}")
        if watch.outage_s * 1e3 < sum(report["phases_ms"].values()) / 2:  # nobody waited for it
            say("the kill came after the last token: once more")
            return self._measure(method, context, number, attempt=attempt + 1)
        return Sample(
            round=number,
            method=method,
            context=context,
            outage_s=watch.outage_s,
            identical=result.error is None and self._same(result, context),
            path=report["path"],
            phases_ms=report["phases_ms"],
        )

    def _restart(self, context: int, number: int, *, salt: str) -> Sample:
        """What people do today, at its best: an instant restart, and a client that sends what it has."""
        self._servers.note(self._stock)
        title = f"VLLM::Worker_TP{KILLED_RANK}"
        (pid,) = {mark.pid for mark in self._stock.processes if mark.title.startswith(title)}
        watch = _Stopwatch(functools.partial(os.kill, pid, signal.SIGKILL))
        first = self._stream(self._stock, context, salt=salt, on_token=watch)
        received = first.token_ids[0]
        if first.error is None:
            raise CheckFailed("stock vLLM survived the kill")
        self._stock.wait_exit(timeout_s=EXIT_TIMEOUT_S)
        self._servers.stop(self._stock)
        self._stock = self._servers.start(STOCK, *self._flags)
        arrived: list[float] = []

        def on_token(index: int, ids: Sequence[int], text: str, at_s: float) -> None:
            arrived.append(at_s)

        rest = self._stream(self._stock, context, salt=salt, on_token=on_token, received=tuple(received))
        whole = [*received, *rest.token_ids[0]]
        return Sample(
            round=number,
            method="restart",
            context=context,
            outage_s=arrived[0] - watch.last_s,
            identical=whole == list(self._references[context].token_ids[0]),
            path="restart",
            phases_ms={},
        )

    def _stream(
        self,
        server: ServerProcess,
        context: int,
        *,
        salt: str,
        on_token: Callable[..., None] | None = None,
        received: tuple[int, ...] = (),
    ) -> StreamResult:
        return stream_completion(
            server.base_url,
            model=MODEL_NAME,
            prompt=[*prompt_of(context), *received],
            max_tokens=TOKENS_BEFORE + TOKENS_AFTER - len(received),
            cache_salt=salt,
            on_token=on_token,
            timeout_s=STREAM_TIMEOUT_S,
        )

    def _same(self, result: StreamResult, context: int) -> bool:
        return result.token_ids == self._references[context].token_ids


def _settle(server: ServerProcess, *, standbys: int) -> None:
    """Everything is coded, and as many standbys wait."""
    server.wait_status(
        lambda status: (
            status["state"] == "serving"
            and status["shadow"]["backlog_blocks"] == 0
            and sum(standby["state"] == "ready" for standby in status["standbys"]) >= standbys
        ),
        timeout_s=60,
        what="everything coded",
    )
    sleep_s(0.5)


@functools.cache
def prompt_of(tokens: int) -> tuple[int, ...]:
    """So many token ids: the shipped prompts, over and over."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    once = tokenizer("\n\n".join(shipped_prompts()) + "\n\n").input_ids
    return tuple((once * (tokens // len(once) + 1))[:tokens])


def parse_arguments(argv: Sequence[str]) -> tuple[Plan, str, Path]:
    """The plan, the name and the directory of the results."""
    parser = script.new_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one kill each: shows that it works")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 4096, 16384], metavar="TOKENS")
    parser.add_argument(
        "--rounds",
        type=int,
        default=10,
        help="kills per context, rebuilt, with and without a standby (default 10)",
    )
    parser.add_argument("--recomputes", type=int, default=5, help="kills per context, recomputed (default 5)")
    parser.add_argument("--restarts", type=int, default=3, help="kills per context, stock (default 3)")
    parser.add_argument("--seed", type=int, default=1, help="of the order in the rounds and of the bootstrap")
    arguments = parser.parse_args(argv)
    counts = (arguments.rounds, arguments.recomputes, arguments.restarts)
    counts = (1, 1, 1) if arguments.quick else counts
    rounds = dict(zip(METHODS, (counts[0], *counts), strict=True))
    plan = Plan(contexts=tuple(arguments.contexts), rounds=rounds, seed=arguments.seed)
    return plan, "outage-quick" if arguments.quick else "outage", arguments.out


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 1 if a repaired stream was not the same as the undisturbed one."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    plan, name, directory = parse_arguments(argv)
    about, began_s = results.facts(), monotonic_s()
    with Servers() as servers:
        bench = Bench(servers, plan)
        bench.run(plan)
    rows = summarise(bench.samples, contexts=plan.contexts, seed=plan.seed)
    document = {
        "plan": asdict(plan),
        "targets_s": TARGETS_S,
        "wall_s": round(monotonic_s() - began_s, 1),
        "summary": rows,
        "samples": [asdict(sample) for sample in bench.samples],
    }
    text = markdown(rows)
    script.publish(name, about=about, document=document, markdown=text, directory=directory)
    changed = [sample for sample in bench.samples if not sample.identical and sample.method != "restart"]
    if changed:
        say(f"ERROR: {len(changed)} repaired streams differ: {json.dumps([s.method for s in changed])}")
        return 1
    return 0


if __name__ == "__main__":
    script.run(main)
