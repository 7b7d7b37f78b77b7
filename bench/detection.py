"""How soon a dead and a hung worker are noticed, and whether a busy machine is ever taken for a hang.

death   SIGKILL in mid-answer, until the engine has noticed (target 50 ms)
hang    SIGSTOP in mid-answer, and a worker that spins, until it is fenced (target: the larger of 1 s and five steps)
soak    streams for some minutes while as many processes as there are cores do nothing but compute: nobody may be fenced

.venv/bin/python bench/detection.py [--quick] [--minutes 10]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import results
import script
from estimates import nearest_rank, spread_of
from script import say
from servers import MODEL_NAME, OURS_ON, Servers, kv_bytes_per_token, shipped_prompts

from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.testing.client import StreamResult, stream_completion
from ghostserve.testing.server import ServerProcess

TARGETS_S = {"death": 0.05, "stopped": 1.0, "spins": 1.0}
CONTEXT_MAX = 2048
STREAMS = 4  # of the soak


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One loss: from the blow to its being noticed, and to the fence."""

    kind: str
    rank: int
    noticed_s: float
    fenced_s: float
    identical: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Soak:
    """`gaps_s`: between two tokens of a stream, as the client saw them."""

    minutes: float
    busy_processes: int
    answers: int
    changed: int
    recoveries: int
    longest_quiet_s: float
    gap_p50_s: float
    gap_p999_s: float
    gap_max_s: float


class Bench:
    """One server of ours."""

    def __init__(self, servers: Servers) -> None:
        self._server = servers.start(
            OURS_ON,
            *("--max-model-len", str(CONTEXT_MAX), "--enable-fault-injection", "--losses-max", "1000"),
            *("--kv-cache-memory-bytes", str(12 * CONTEXT_MAX * kv_bytes_per_token())),
        )
        self._reference = self._stream("reference")

    def losses(self, rounds: int, rng: random.Random) -> list[Sample]:
        """All kinds in shuffled order, each rank in turn."""
        samples = []
        for number in range(rounds):
            for kind in rng.sample(sorted(TARGETS_S), k=len(TARGETS_S)):
                samples.append(self._lose(kind, rank=number % 2, salt=f"{kind}-{number}"))
                say(f"{kind}: fenced after {samples[-1].fenced_s:.3f} s")
        return samples

    def _lose(self, kind: str, *, rank: int, salt: str) -> Sample:
        settle(self._server)
        status = self._server.status()
        pid, before = status["ranks"][rank]["pid"], status["recoveries_total"]
        struck: list[float] = []

        def strike() -> None:
            struck.append(monotonic_s())
            if kind == "spins":
                self._server.admin.arm_fault(point="before_model", rank=rank, action="spin")
            else:
                os.kill(pid, signal.SIGKILL if kind == "death" else signal.SIGSTOP)

        result = self._stream(salt, at_token=60, action=strike)
        report = self._server.wait_status(
            lambda now: now["recoveries_total"] > before, timeout_s=60, what="a recovery"
        )["last_recovery"]
        noticed_s = report["noticed_at_s"] + report["phases_ms"]["detect"] / 1e3 - struck[0]
        return Sample(
            kind=kind,
            rank=rank,
            noticed_s=noticed_s,
            fenced_s=noticed_s + report["phases_ms"]["fence"] / 1e3,
            identical=result.error is None and result.token_ids == self._reference.token_ids,
        )

    def soak(self, minutes: float) -> Soak:
        """Streams beside busy processes."""
        settle(self._server)
        before = self._server.status()["recoveries_total"]
        busy = [multiprocessing.Process(target=compute, daemon=True) for _ in os.sched_getaffinity(0)]
        for process in busy:
            process.start()
        gaps: list[float] = []
        answers: list[bool] = []
        until_s = monotonic_s() + 60 * minutes

        def ask(stream: int) -> None:
            number = 0
            while monotonic_s() < until_s:
                result = self._stream(f"soak-{stream}-{number}", gaps=gaps)
                answers.append(result.error is None and result.token_ids == self._reference.token_ids)
                number += 1

        threads = [threading.Thread(target=ask, args=(stream,)) for stream in range(STREAMS)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for process in busy:
                process.kill()
        status = self._server.status()
        ordered = sorted(gaps)
        return Soak(
            minutes=minutes,
            busy_processes=len(busy),
            answers=len(answers),
            changed=answers.count(False),
            recoveries=status["recoveries_total"] - before,
            longest_quiet_s=status["longest_quiet_s"],
            gap_p50_s=nearest_rank(ordered, 0.5),
            gap_p999_s=nearest_rank(ordered, 0.999),
            gap_max_s=ordered[-1],
        )

    def _stream(
        self,
        salt: str,
        *,
        at_token: int = 0,
        action: Callable[[], None] | None = None,
        gaps: list[float] | None = None,
    ) -> StreamResult:
        seen = [0]
        last: list[float] = []

        def on_token(index: int, ids: Sequence[int], text: str, at_s: float) -> None:
            if gaps is not None and last:
                gaps.append(at_s - last[0])
            last[:] = [at_s]
            before, seen[0] = seen[0], seen[0] + len(ids)
            if action is not None and before < at_token <= seen[0]:
                action()

        return stream_completion(
            self._server.base_url,
            model=MODEL_NAME,
            prompt=shipped_prompts()[0],
            max_tokens=150,
            cache_salt=salt,
            on_token=on_token,
            timeout_s=180,
        )


def compute() -> None:
    """Keep a core busy."""
    while True:
        sum(range(100_000))


def settle(server: ServerProcess) -> None:
    """Serving, everything coded, a standby waits."""
    server.wait_status(
        lambda status: (
            status["state"] == "serving"
            and status["shadow"]["backlog_blocks"] == 0
            and any(standby["state"] == "ready" for standby in status["standbys"])
        ),
        timeout_s=60,
        what="everything coded",
    )
    sleep_s(0.3)


def markdown(samples: Sequence[Sample], soak: Soak | None) -> str:
    """Both tables."""
    rows = []
    for kind, target_s in TARGETS_S.items():
        mine = [sample for sample in samples if sample.kind == kind]
        noticed, fenced = (
            [1e3 * getattr(sample, name) for sample in mine] for name in ("noticed_s", "fenced_s")
        )
        rows.append(
            [
                kind,
                str(len(mine)),
                f"{spread_of(noticed).median:.0f} ({max(noticed):.0f})",
                f"{spread_of(fenced).median:.0f} ({max(fenced):.0f})",
                f"{1e3 * target_s:.0f}",
                "yes" if all(sample.identical for sample in mine) else "NO",
            ]
        )
    text = [
        "Milliseconds from the blow until it was noticed and until the rank was fenced, medians (longest):",
        "",
        results.table(("loss", "times", "noticed", "fenced", "target", "same tokens"), rows),
    ]
    if soak is not None:
        text += [
            "",
            f"{soak.minutes:g} minutes, {STREAMS} streams, {soak.busy_processes} processes that only compute beside them: "
            f"{soak.answers} answers, {soak.changed} changed, {soak.recoveries} recoveries (0 expected). Between two tokens "
            f"{1e3 * soak.gap_p50_s:.0f} ms in the median, {1e3 * soak.gap_p999_s:.0f} ms at p99.9, "
            f"{1e3 * soak.gap_max_s:.0f} ms at most; a rank was without progress for {1e3 * soak.longest_quiet_s:.0f} ms at most.",
        ]
    return "\n".join(text)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = script.new_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="one loss of each kind: shows that it works")
    parser.add_argument("--rounds", type=int, default=20, help="losses of each kind (default 20)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the soak; 0: none (default 10)")
    parser.add_argument("--seed", type=int, default=1, help="of the order")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 1 if a stream changed or somebody was fenced in the soak."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments = parse_arguments(argv)
    about: Mapping[str, Any] = results.facts()
    with Servers() as servers:
        bench = Bench(servers)
        samples = bench.losses(1 if arguments.quick else arguments.rounds, random.Random(arguments.seed))
        minutes = 0.2 if arguments.quick else arguments.minutes
        soak = bench.soak(minutes) if minutes else None
    document = {
        "targets_s": TARGETS_S,
        "samples": [asdict(sample) for sample in samples],
        "soak": None if soak is None else asdict(soak),
    }
    text = markdown(samples, soak)
    name = "detection-quick" if arguments.quick else "detection"
    script.publish(name, about=about, document=document, markdown=text, directory=arguments.out)
    wrong = [sample.kind for sample in samples if not sample.identical]
    if wrong or (soak is not None and (soak.changed or soak.recoveries)):
        say(f"ERROR: changed streams {json.dumps(wrong)}, or a false alarm in the soak")
        return 1
    return 0


if __name__ == "__main__":
    script.run(main)
