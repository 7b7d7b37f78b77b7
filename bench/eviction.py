"""Which of a pool's entries should give way: ours, LRU, LFU, and what nobody could beat, on loads made from a real trace.

    .venv/bin/python bench/eviction.py --trace servegen_deepseek-r1.tar.gz

The archive is folder data/reason/deepseek-r1 of github.com/alibaba/ServeGen (see `eviction_trace.py`). Seconds of loading are
what counts: each load that misses costs its model's. No load is ever refused memory by a policy, only by what is in use.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import results
import script
from eviction_trace import KEEP_ALIVE_S, SIZES_GB, Load, Model, make

from ghostserve.weights.eviction import Candidate, choose_victims

GB = 10**9
BUDGETS = (0.1, 0.25, 0.5)  # of all models together
SCENARIOS = {False: "on a device: evictable once loaded", True: "on CPUs: in use while served"}
TIE = 1e-12  # of equals what was used longest ago goes first
ROUNDS = 400  # of lowering the bound


@dataclass(slots=True)
class Use:
    """What a policy may know of a model."""

    count: int = 0  # loads since it came into the pool
    all_count: int = 0
    last_s: float = 0.0  # its last load, or, if it is in use while served, when its last server ended
    next_s: float = math.inf  # only the clairvoyant look at it
    greedy: float = 0.0  # what GreedyDual-Size gave it at its last load
    greedy_counted: float = 0.0  # the same with frequencies


Worth = Callable[[Model, Use, float], float]
"""What a policy thinks of a model at a time; the least goes first."""

OURS = "saving per byte, and second since its last use (ours)"
POLICIES: dict[str, Worth | None] = {
    OURS: None,  # the real one
    "LRU": lambda model, use, now_s: use.last_s,
    "LFU, counts of what is in the pool": lambda model, use, now_s: use.count + use.last_s * TIE,
    "LFU, counts of all time": lambda model, use, now_s: use.all_count + use.last_s * TIE,
    "GreedyDual-Size": lambda model, use, now_s: use.greedy + use.last_s * TIE,
    "GreedyDual-Size with frequencies": lambda model, use, now_s: use.greedy_counted + use.last_s * TIE,
    "clairvoyant: what is loaded last goes": lambda model, use, now_s: -use.next_s,
    "clairvoyant: what saves least per byte and second goes": lambda model, use, now_s: (
        model.cost_s / model.size_gb / max(use.next_s - now_s, 1e-9)
    ),
}


@dataclass(slots=True)
class Pool:
    """One run of one policy over all loads."""

    models: Sequence[Model]
    budget_gb: float
    worth: Worth | None
    while_served: (
        bool  # whether weights are in use as long as their server lives, and not only while it loads
    )
    there: dict[int, Use] = field(default_factory=dict)
    uses: dict[int, Use] = field(default_factory=dict)
    used_by: dict[int, int] = field(default_factory=dict)
    age: float = 0.0  # GreedyDual-Size's: what the last victim was worth
    age_counted: float = 0.0
    hits: int = 0
    saved_s: float = 0.0

    def run(self, loads: Sequence[Load]) -> Pool:
        next_s = next_loads(loads)
        ending: list[tuple[float, int]] = []
        for number, load in enumerate(loads):
            while ending and ending[0][0] <= load.at_s:
                until_s, ended = heapq.heappop(ending)
                self.used_by[ended] -= 1
                self.uses[ended].last_s = max(self.uses[ended].last_s, until_s)
            model, use = self.models[load.model], self.uses.setdefault(load.model, Use())
            if load.model in self.there:
                self.hits += 1
                self.saved_s += model.cost_s
            elif self._room(model.size_gb, load.at_s):
                self.there[load.model] = use
                use.count = 0
            self._note(model, use, load.at_s, next_s[number])
            if load.model in self.there and self.while_served:
                self.used_by[load.model] = self.used_by.get(load.model, 0) + 1
                heapq.heappush(ending, (load.until_s, load.model))
        return self

    def _note(self, model: Model, use: Use, now_s: float, next_s: float) -> None:
        use.count, use.all_count, use.last_s, use.next_s = use.count + 1, use.all_count + 1, now_s, next_s
        use.greedy = self.age + model.cost_s / model.size_gb
        use.greedy_counted = self.age_counted + use.count * model.cost_s / model.size_gb

    def _room(self, need_gb: float, now_s: float) -> bool:
        if need_gb > self.budget_gb:
            return False
        over_gb = sum(self.models[model].size_gb for model in self.there) + need_gb - self.budget_gb
        idle = [self._candidate(model, now_s) for model in self.there if not self.used_by.get(model)]
        victims = choose_victims(idle, need_bytes=math.ceil(over_gb * GB), now_s=now_s).choice
        for victim in victims or ():
            use = self.there.pop(victim.entry)
            self.age = max(self.age, use.greedy)
            self.age_counted = max(self.age_counted, use.greedy_counted)
        return victims is not None

    def _candidate(self, number: int, now_s: float) -> Candidate:
        """For another policy than ours one that `choose_victims` finds worth what the policy says."""
        model, use = self.models[number], self.there[number]
        size_bytes, cost_s, used_s = int(model.size_gb * GB), model.cost_s, use.last_s
        if self.worth is not None:
            cost_s, used_s = self.worth(model, use, now_s) * size_bytes, now_s - 1.0
        return Candidate(
            entry=number, size_bytes=size_bytes, reload_cost_s=cost_s, used_s=used_s, transient=False
        )


def next_loads(loads: Sequence[Load]) -> list[float]:
    """When the model of each load is loaded again."""
    found, coming = [], dict[int, float]()
    for load in reversed(loads):
        found.append(coming.get(load.model, math.inf))
        coming[load.model] = load.at_s
    return found[::-1]


def bound_s(
    models: Sequence[Model], loads: Sequence[Load], budget_gb: float, *, rounds: int = ROUNDS
) -> float:
    """No policy, clairvoyant or not, saves more seconds than this.

    A hit needs its model in the pool from the load before until this one. Put a price on the pool's memory between any two
    loads: whatever is kept, at most the memory's whole price and what each hit saves beyond its own is gained. That holds
    for all prices (Lagrange); they are moved until the bound hardly falls any more.
    """
    last: dict[int, int] = {}
    begin, end, size, cost = [], [], [], []
    for number, load in enumerate(loads):
        if load.model in last:
            begin.append(last[load.model])
            end.append(number)
            size.append(models[load.model].size_gb)
            cost.append(models[load.model].cost_s)
        last[load.model] = number
    if not begin:
        return 0.0
    begins, ends, sizes, costs = np.array(begin), np.array(end), np.array(size), np.array(cost)
    slots = len(loads)
    prices = np.full(slots, float(np.median(costs / (sizes * (ends - begins)))))
    best = float(costs.sum())
    for number in range(rounds):
        paid = np.concatenate(([0.0], np.cumsum(prices)))
        gain = costs - sizes * (paid[ends] - paid[begins])
        kept = gain > 0
        best = min(best, float(gain[kept].sum() + budget_gb * prices.sum()))
        held = np.zeros(slots + 1)
        np.add.at(held, begins[kept], sizes[kept])
        np.subtract.at(held, ends[kept], sizes[kept])
        slope = budget_gb - np.cumsum(held)[:-1]
        step = 0.5 * best / (1 + number / 10) / float((slope**2).sum() + 1e-12)
        prices = np.maximum(0.0, prices - step * slope)
    return best


def compare(
    models: Sequence[Model], loads: Sequence[Load], share: float, *, while_served: bool
) -> dict[str, dict[str, float]]:
    """What share of all seconds of loading each policy saves, and of all loads it hits."""
    budget_gb = share * sum(model.size_gb for model in models)
    all_s = sum(models[load.model].cost_s for load in loads)
    found = {}
    for name, worth in POLICIES.items():
        pool = Pool(models, budget_gb, worth, while_served).run(loads)
        found[name] = {"seconds_saved": pool.saved_s / all_s, "hits": pool.hits / len(loads)}
    if not while_served:  # it may leave out what is in use, and so says little there
        found["nobody saves more than"] = {"seconds_saved": bound_s(models, loads, budget_gb) / all_s}
    return found


def markdown(
    document: Mapping[str, Any], samples: Mapping[str, Mapping[str, Mapping[str, list[float]]]]
) -> str:
    parts = [
        f"{document['models']} models of {SIZES_GB[0]} to {SIZES_GB[-1]} GB, {document['loads']} loads a day; a server ends "
        f"{KEEP_ALIVE_S:g} s after its last request. Share of all seconds of loading that the pool saves, median of "
        f"{document['seeds']} seeds; budgets are shares of all models together."
    ]
    for scenario, policies in samples.items():
        header = [scenario, *next(iter(policies.values()))]
        rows = [
            [name, *(f"{np.median(values):.1%}" for values in columns.values())]
            for name, columns in policies.items()
        ]
        parts.append(results.table(header, rows))
    return "\n\n".join(parts)


def main(argv: Sequence[str]) -> int:
    parser = script.new_parser(__doc__)
    parser.add_argument("--trace", type=Path, required=True, help="servegen_deepseek-r1.tar.gz")
    parser.add_argument("--seeds", type=int, default=20)
    arguments = parser.parse_args(argv)
    about = results.facts()
    samples: dict[str, dict[str, dict[str, list[float]]]] = {}
    counts, every, models = [], [], []
    for seed in range(arguments.seeds):
        for two_sources, while_served, share in itertools.product((False, True), (False, True), BUDGETS):
            models, loads = make(arguments.trace, seed=seed, two_sources=two_sources)
            counts.append(len(loads))
            scenario = SCENARIOS[while_served]
            column = f"{'two sources' if two_sources else 'one disk'}, {share:.0%}"
            for name, figures in compare(models, loads, share, while_served=while_served).items():
                column_of = samples.setdefault(scenario, {}).setdefault(name, {})
                column_of.setdefault(column, []).append(figures["seconds_saved"])
                every.append(
                    {"seed": seed, "scenario": scenario, "column": column, "policy": name, **figures}
                )
        script.say(f"[{seed + 1}/{arguments.seeds}]")
    document = {
        "trace_sha256": hashlib.sha256(arguments.trace.read_bytes()).hexdigest(),
        "seeds": arguments.seeds,
        "models": len(models),
        "loads": int(np.median(counts)),
        "samples": every,
    }
    text = markdown(document, samples)
    script.publish("eviction", about=about, document=document, markdown=text, directory=arguments.out)
    return 0


if __name__ == "__main__":
    script.run(main)
