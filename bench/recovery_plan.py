"""When it pays to compute lost KV again instead of rebuilding it, and when to do both: the product's own plan on drawn loads.

A calculation, not a measurement: `recovery/plan.py` decides on contexts whose lengths are those of real traces, with costs that are
swept. Computing a token costs 1 plus its context / HALF_AT (attention grows with it: in a model of 8B parameters it doubles the work at
some 32k tokens); rebuilding costs `ratio` per token, in whole blocks.

.venv/bin/python bench/recovery_plan.py [--loads N] [--requests N] [--seed S]
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import results
import script

from ghostserve.recovery.plan import Context, plan
from ghostserve.testing.chaos_load import TRACES, sample_quantiles, trace_lengths

BLOCK_TOKENS = 16
HALF_AT = 32_768  # tokens of context at which attention costs as much as all the rest
RATIOS = (1 / 32, 1 / 8, 1 / 2, 0.8, 1.0, 1.2, 1.5, 2.0, 4.0)
SHARED_SHARE = 0.5  # of requests, that begin with the same system prompt
SHARED_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Costs:
    """In units of the time that one token without context takes."""

    ratio: float

    def rebuild_s(self, blocks: int) -> float:
        return self.ratio * blocks * BLOCK_TOKENS

    def compute_s(self, tokens: int, context: int) -> float:
        return tokens * (1 + (context + tokens / 2) / HALF_AT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Means over all loads; times as shares of rebuilding everything."""

    ratio: float
    recompute_all: float
    plan: float
    mixed_share: float  # of loads whose plan does both
    chosen_share: float  # of requests that compute again


def draw(rng: random.Random, requests: int) -> list[Context]:
    """One load at the moment of a loss: requests somewhere in their answers."""
    numbers = iter(range(1, 1 << 30))
    shared = [next(numbers) for _ in range(SHARED_TOKENS // BLOCK_TOKENS)]
    contexts = []
    for index in range(requests):
        lengths = trace_lengths()[rng.choice(TRACES)]
        tokens = int(
            sample_quantiles(lengths["input_tokens"], rng.random())
            + rng.random() * sample_quantiles(lengths["output_tokens"], rng.random())
        )
        begin = shared if rng.random() < SHARED_SHARE else []
        tokens = max(tokens, len(begin) * BLOCK_TOKENS) + 1
        own = math.ceil(tokens / BLOCK_TOKENS) - len(begin)
        table = [*begin, *(next(numbers) for _ in range(own))]
        contexts.append(
            Context(request=str(index), tokens=tokens, tables=[table], block_sizes=(BLOCK_TOKENS,))
        )
    return contexts


def time_to_service(contexts: Sequence[Context], left: set[int], costs: Costs) -> float:
    """A rank rebuilds, then computes. What is shared and gone is computed once."""
    blocks: set[int] = set().union(*(context.blocks for context in contexts))
    total, computed = costs.rebuild_s(len(blocks - left)), set[int]()
    for context in contexts:
        start = context.first_of(left - computed)
        total += costs.compute_s(context.tokens - start, start)
        computed |= context.blocks & left
    return total


def measure(ratio: float, loads: Sequence[list[Context]]) -> Row:
    costs, recompute, planned, mixed, chosen, requests = Costs(ratio), [], [], 0, 0, 0
    for contexts in loads:
        every: set[int] = set().union(*(context.blocks for context in contexts))
        found = plan(contexts, sorted(every), (), costs=costs)
        rebuild = time_to_service(contexts, set(), costs)
        recompute.append(time_to_service(contexts, every, costs) / rebuild)
        planned.append(time_to_service(contexts, set(found.left), costs) / rebuild)
        mixed += 0 < len(found.by_choice) < len(contexts)
        chosen += len(found.by_choice)
        requests += len(contexts)
    return Row(
        ratio=ratio,
        recompute_all=statistics.fmean(recompute),
        plan=statistics.fmean(planned),
        mixed_share=mixed / len(loads),
        chosen_share=chosen / requests,
    )


def markdown(rows: Sequence[Row]) -> str:
    table = [
        [
            f"{row.ratio:.3g}",
            "1.00",
            f"{row.recompute_all:.2f}",
            f"{row.plan:.2f}",
            f"{row.chosen_share:.0%}",
            f"{row.mixed_share:.0%}",
        ]
        for row in rows
    ]
    return "\n\n".join(
        (
            "Time until all requests go on, as a share of rebuilding everything, by what rebuilding a token costs beside computing one:",
            results.table(
                [
                    "rebuild / compute",
                    "rebuild all",
                    "recompute all",
                    "plan",
                    "requests recomputed",
                    "loads with both",
                ],
                table,
            ),
        )
    )


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 1 if a plan is slower than either way alone."""
    parser = script.new_parser(__doc__)
    parser.add_argument("--loads", type=int, default=300, help="loads per row (default 300)")
    parser.add_argument("--requests", type=int, default=8, help="requests per load (default 8)")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    about, rng = results.facts(), random.Random(arguments.seed)
    loads = [draw(rng, arguments.requests) for _ in range(arguments.loads)]
    rows = [measure(ratio, loads) for ratio in RATIOS]
    text = markdown(rows)
    document = {"half_at": HALF_AT, "block_tokens": BLOCK_TOKENS, "rows": [asdict(row) for row in rows]}
    script.publish("recovery-plan", about=about, document=document, markdown=text, directory=arguments.out)
    return int(any(row.plan > min(1.0, row.recompute_all) + 1e-9 for row in rows))


if __name__ == "__main__":
    script.run(main)
