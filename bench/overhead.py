"""What protection costs while nothing fails: six servers, one after the other, round by round; the others are stopped.

a  ghostserve serve                        our collectives       a / d  to vLLM as it comes   at least 0.97, or 150 us per step
e  ghostserve serve --async-scheduling     our collectives       e / d  the same, two batches in flight
b  ghostserve serve --protection none      vLLM's collectives    b / d  what off costs        at least 0.99
c  stock vLLM with our platform plugin     our collectives       a / c  what the shadow costs
d  stock vLLM                              vLLM's collectives
f  stock vLLM, a second server             vLLM's collectives    f / d  what two servers differ by that run the same code

.venv/bin/python bench/overhead.py [--quick] [--rounds N]
"""

from __future__ import annotations

import random
import signal
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import results
import script
from estimates import Estimate, estimate_median, judge_cost
from script import say
from servers import (
    MODEL_NAME,
    OURS_ASYNC,
    OURS_OFF,
    OURS_ON,
    STOCK,
    STOCK_AGAIN,
    STOCK_OURS,
    Servers,
    Variant,
    cpu_s,
    pause,
    shipped_prompts,
)
from streams import Rate, TimedStream, rate_of, run_streams

from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.errors import GhostserveError
from ghostserve.testing.server import ServerProcess

VARIANTS = (OURS_ON, OURS_ASYNC, OURS_OFF, STOCK_OURS, STOCK, STOCK_AGAIN)
STREAMS = (1, 8)
FLAGS = ("--max-model-len", "4096", "--kv-cache-memory-bytes", str(64 << 20))
WARM_UP_TOKENS = 24
ATTEMPTS = 4
QUIET_S, QUIET_CPU_S, QUIET_TIMEOUT_S = 1.0, 0.15, 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two variants to compare, and how fast the first must at least be, as a share of the second.

    Or how much longer a step of it may take, in microseconds: the more generous of the two decides.
    """

    over: str
    under: str
    meaning: str
    at_least: float
    or_at_most_us: float = 0.0


ON_US = 150.0
PAIRS = (
    Pair(over="a", under="d", meaning="ours on, vLLM as it comes", at_least=0.97, or_at_most_us=ON_US),
    Pair(
        over="e",
        under="d",
        meaning="ours on with two batches in flight, vLLM as it comes",
        at_least=0.97,
        or_at_most_us=ON_US,
    ),
    Pair(over="b", under="d", meaning="ours off, vLLM as it comes", at_least=0.99),
    Pair(over="f", under="d", meaning="the same code in two servers", at_least=0.99),
    Pair(over="a", under="c", meaning="ours on, same collectives", at_least=0.97, or_at_most_us=ON_US),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measurement. `others_cpu_percent`: what the stopped servers used of one core meanwhile."""

    round: int
    place: int  # in the round's order, from 0
    variant: str
    streams: int
    tokens_per_s: float
    step_us: float
    gap_p50_us: float  # between two tokens of a stream
    gap_p99_us: float
    others_cpu_percent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured."""

    rounds: int
    tokens_by_streams: Mapping[int, int]
    seed: int


# ---- what the samples say (pure) -------------------------------------------------------------------------------------


def by_round(samples: Iterable[Sample], *, variant: str, streams: int) -> dict[int, Sample]:
    """The samples of one variant."""
    return {s.round: s for s in samples if s.variant == variant and s.streams == streams}


def compare(
    samples: Sequence[Sample], pair: Pair, *, streams: int, rng: random.Random
) -> tuple[Estimate, Estimate]:
    """Of each round's pair: the ratio of speeds, and the difference in microseconds per step."""
    over = by_round(samples, variant=pair.over, streams=streams)
    under = by_round(samples, variant=pair.under, streams=streams)
    rounds = sorted(over.keys() & under.keys())
    ratios = [over[r].tokens_per_s / under[r].tokens_per_s for r in rounds]
    differences = [over[r].step_us - under[r].step_us for r in rounds]
    return estimate_median(ratios, rng=rng), estimate_median(differences, rng=rng)


def summarise(samples: Sequence[Sample], *, seed: int) -> dict[str, Any]:
    """Medians of the variants and all comparisons, as plain values."""
    rng = random.Random(seed)
    speeds, comparisons = [], []
    for streams in STREAMS:
        for variant in VARIANTS:
            mine = list(by_round(samples, variant=variant.letter, streams=streams).values())
            speeds.append(
                {
                    "streams": streams,
                    "variant": variant.letter,
                    "tokens_per_s": statistics.median(s.tokens_per_s for s in mine),
                    "step_us": statistics.median(s.step_us for s in mine),
                    "gap_p50_us": statistics.median(s.gap_p50_us for s in mine),
                    "gap_p99_us": statistics.median(s.gap_p99_us for s in mine),
                }
            )
        for pair in PAIRS:
            ratio, difference = compare(samples, pair, streams=streams, rng=rng)
            decision = judge_cost(ratio, difference, at_least=pair.at_least, or_at_most=pair.or_at_most_us)
            comparisons.append(
                {
                    "streams": streams,
                    **asdict(pair),
                    "ratio": asdict(ratio),
                    "step_us": asdict(difference),
                    "judgement": decision.choice.value,
                    "reason": decision.reason,
                }
            )
    return {"speeds": speeds, "comparisons": comparisons}


def markdown(
    summary: Mapping[str, Any], *, plan: Plan, collectives: Mapping[str, str], worst_others_percent: float
) -> str:
    """Both tables."""
    titles = {variant.letter: f"{variant.title} ({collectives[variant.letter]})" for variant in VARIANTS}
    speeds = [
        [
            f"{entry['variant']}  {titles[entry['variant']]}",
            str(entry["streams"]),
            f"{entry['tokens_per_s']:.1f}",
            f"{entry['step_us']:.0f}",
            f"{entry['gap_p50_us']:.0f}",
            f"{entry['gap_p99_us']:.0f}",
        ]
        for entry in summary["speeds"]
    ]
    comparisons = [
        [
            f"{entry['over']} / {entry['under']}  {entry['meaning']}",
            str(entry["streams"]),
            "{median:.3f}".format(**entry["ratio"]),
            "{low:.3f} to {high:.3f}".format(**entry["ratio"]),
            "{median:+.0f}".format(**entry["step_us"]),
            "{low:+.0f} to {high:+.0f}".format(**entry["step_us"]),
            f"at least {entry['at_least']:g}"
            + (f", or {entry['or_at_most_us']:+.0f} µs" if entry["or_at_most_us"] else ""),
            entry["judgement"],
        ]
        for entry in summary["comparisons"]
    ]
    tokens = ", ".join(f"{count} tokens at {streams}" for streams, count in plan.tokens_by_streams.items())
    return "\n".join(
        (
            f"{plan.rounds} rounds; each measures every server once, in shuffled order, {tokens} streams. "
            f"Medians. The other servers were stopped (SIGSTOP) and used at most {worst_others_percent:.1f} % of one core during a measurement.",
            "",
            results.table(
                ("server", "streams", "tokens/s", "µs per step", "between tokens p50 µs", "p99 µs"), speeds
            ),
            "",
            "Ratios of speed and differences per step, taken within each round; intervals are 95 %.",
            "",
            results.table(
                ("pair", "streams", "ratio", "interval", "µs per step", "interval", "target", "judgement"),
                comparisons,
            ),
        )
    )


# ---- measuring -------------------------------------------------------------------------------------------------------


class Bench:
    """The running servers and the samples taken so far."""

    def __init__(self, servers: Servers, plan: Plan) -> None:
        self.samples: list[Sample] = []
        self._plan = plan
        self._prompts = shipped_prompts()
        self._answers: set[tuple[int, ...]] = set()
        self.taken_again: list[str] = []  # measurements that could not be used, with when their streams ran
        self._servers: dict[str, ServerProcess] = {}
        self.collectives: dict[str, str] = {}  # as found: without AVX-512 stock vLLM uses gloo, too
        for variant in VARIANTS:
            say(f"starting {variant.title}")
            self._servers[variant.letter] = servers.start(variant, *FLAGS)
            self.collectives[variant.letter] = servers.collectives(self._servers[variant.letter]).value

    @property
    def answers_identical(self) -> bool:
        """Whether all servers said the same in all rounds, one stream at a time."""
        return len(self._answers) == 1

    def run(self) -> None:
        """All rounds."""
        rng = random.Random(self._plan.seed)
        for number in range(self._plan.rounds):
            order = rng.sample(VARIANTS, k=len(VARIANTS))
            for place, variant in enumerate(order):
                self._measure(variant, round_number=number, place=place)
            say(f"round {number + 1} of {self._plan.rounds}: " + ", ".join(self._of_round(number)))

    def _of_round(self, number: int) -> list[str]:
        return [f"{s.variant}{s.streams} {s.tokens_per_s:.0f}/s" for s in self.samples if s.round == number]

    def _measure(self, variant: Variant, *, round_number: int, place: int) -> None:
        """A warm-up that is thrown away, then one measurement for each number of streams."""
        self._wake(variant)
        salt = f"overhead-{round_number}"
        self._answer(variant, streams=1, max_tokens=WARM_UP_TOKENS, salt=f"{salt}-warm-up")
        for streams in STREAMS:
            others_before_s, began_s = self._others_cpu_s(variant), monotonic_s()
            rate = self._rate(variant, streams=streams, salt=f"{salt}-{streams}")
            others_s = self._others_cpu_s(variant) - others_before_s
            self.samples.append(
                Sample(
                    round=round_number,
                    place=place,
                    variant=variant.letter,
                    streams=streams,
                    tokens_per_s=rate.tokens_per_s,
                    step_us=rate.step_us,
                    gap_p50_us=rate.gap_p50_us,
                    gap_p99_us=rate.gap_p99_us,
                    others_cpu_percent=100 * others_s / (monotonic_s() - began_s),
                )
            )

    def _rate(self, variant: Variant, *, streams: int, salt: str) -> Rate:
        """Taken again, and counted, where a client that had no processor makes the streams look as if they came apart."""
        for attempt in range(ATTEMPTS):
            answers = self._answer(
                variant,
                streams=streams,
                max_tokens=self._plan.tokens_by_streams[streams],
                salt=f"{salt}-{attempt}",
            )
            if streams == 1:
                self._answers.add(answers[0].token_ids)
            try:
                return rate_of(answers)
            except GhostserveError as error:
                spans = [(stream.arrivals_s[0], stream.arrivals_s[-1]) for stream in answers]
                begin_s = min(first for first, _ in spans)
                shown = ", ".join(f"{a - begin_s:.2f} to {b - begin_s:.2f}" for a, b in spans)
                self.taken_again.append(f"{variant.letter}{streams}: {shown} s")
                say(f"  {variant.title}, {streams} streams, once more: {error} (they ran {shown} s)")
        raise GhostserveError(f"{variant.title}: the streams did not run at the same time {ATTEMPTS} times")

    def _answer(self, variant: Variant, *, streams: int, max_tokens: int, salt: str) -> list[TimedStream]:
        return run_streams(
            self._servers[variant.letter].base_url,
            prompts=[self._prompts[index % len(self._prompts)] for index in range(streams)],
            max_tokens=max_tokens,
            model=MODEL_NAME,
            cache_salt=salt,
        )

    def _others_cpu_s(self, variant: Variant) -> float:
        return sum(cpu_s(server) for letter, server in self._servers.items() if letter != variant.letter)

    def _wake(self, variant: Variant) -> None:
        """Stop all other servers and wait until this one is at rest: readers of vLLM's message ring spin for a second."""
        for letter, server in self._servers.items():
            pause(server, stopped=letter != variant.letter)
        mine, deadline_s = self._servers[variant.letter], monotonic_s() + QUIET_TIMEOUT_S
        while monotonic_s() < deadline_s:
            before_s = cpu_s(mine)
            sleep_s(QUIET_S)
            if cpu_s(mine) - before_s <= QUIET_CPU_S:
                return
        say("  the server does not come to rest")


def parse_arguments(argv: Sequence[str]) -> tuple[Plan, str, Path]:
    """The plan, the name and the directory of the results."""
    parser = script.new_parser(__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="few rounds: shows that it works, resolves nothing"
    )
    parser.add_argument("--rounds", type=int, help="default 7; 3 with --quick")
    parser.add_argument("--tokens", type=int, default=600, help="tokens of the single stream (default 600)")
    parser.add_argument(
        "--tokens-each", type=int, default=400, help="tokens of each of 8 streams (default 400)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the order in the rounds and of the bootstrap")
    arguments = parser.parse_args(argv)
    plan = Plan(
        rounds=arguments.rounds or (3 if arguments.quick else 7),
        tokens_by_streams={1: arguments.tokens, 8: arguments.tokens_each},
        seed=arguments.seed,
    )
    return plan, "overhead-quick" if arguments.quick else "overhead", arguments.out


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 1 if the servers did not all say the same."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    plan, name, directory = parse_arguments(argv)
    about, began_s = results.facts(), monotonic_s()
    with Servers() as servers:
        bench = Bench(servers, plan)
        bench.run()
    summary = summarise(bench.samples, seed=plan.seed)
    worst = max(sample.others_cpu_percent for sample in bench.samples)
    text = markdown(summary, plan=plan, collectives=bench.collectives, worst_others_percent=worst)
    document = {
        "plan": asdict(plan),
        "wall_s": round(monotonic_s() - began_s, 1),
        "answers_identical": bench.answers_identical,
        "taken_again": bench.taken_again,
        "collectives": bench.collectives,
        **summary,
        "samples": [asdict(sample) for sample in bench.samples],
    }
    script.publish(name, about=about, document=document, markdown=text, directory=directory)
    if not bench.answers_identical:
        say("ERROR: the servers did not all give the same answer to the same request")
        return 1
    return 0


if __name__ == "__main__":
    script.run(main)
