"""Chaos runs as one results file: `ghostserve chaos --json` some times, then this over what they printed.

    for seed in 11 12 13; do ghostserve chaos --faults 75 --seed $seed --json > $seed.json; done
    python bench/chaos.py 11.json 12.json 13.json

Several runs of a few minutes, each with a server of its own, instead of a long one: the last minute of each looks for
what has grown. Exit status 1 if there is a violation, or too little of something.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results
import script

FAULTS_MIN, OF_EACH_KIND_MIN = 200, 10
SUMS = ("requests", "requests_left_by_their_client", "requests_failed", "tokens", "tokens_lost", "tokens_duplicated",
        "tokens_changed", "faults", "single_losses", "single_losses_rebuilt", "wall_s")  # fmt: skip


def total(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sums over all runs; outages are the percentiles of all their losses together."""
    kinds: Counter[str] = Counter()
    paths: Counter[str] = Counter()
    for run in runs:
        kinds.update(run["faults_by_kind"])
        paths.update(run["recoveries_by_path"])
    outages_s = sorted(value for run in runs for value in run["outages_s"])
    return {
        **{name: round(sum(run[name] for run in runs), 1) for name in SUMS},
        "faults_by_kind": dict(sorted(kinds.items())),
        "recoveries_by_path": dict(sorted(paths.items())),
        "outage_s": {
            name: outages_s[min(len(outages_s) - 1, int(share * len(outages_s)))]
            for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
            if outages_s
        },
        "violations": [text for run in runs for text in run["violations"]],
    }


def shortfalls(summed: dict[str, Any]) -> list[str]:
    """What there is too little of."""
    found = [
        f"{kind}: {n} of {OF_EACH_KIND_MIN}"
        for kind, n in summed["faults_by_kind"].items()
        if n < OF_EACH_KIND_MIN
    ]
    if summed["faults"] < FAULTS_MIN:
        found.append(f"faults: {summed['faults']:.0f} of {FAULTS_MIN}")
    return found


def markdown(summed: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """The tables."""
    outage = summed["outage_s"]
    counts = results.table(
        ["fault", "struck with a stream in mid-answer"],
        [[kind, str(count)] for kind, count in summed["faults_by_kind"].items()],
    )
    each = results.table(
        ["seed", "faults", "requests", "tokens", "losses answered by rebuild", "by recompute", "violations", "s"],
        [
            [
                str(run["seed"]), str(run["faults"]), str(run["requests"]), str(run["tokens"]),
                str(run["recoveries_by_path"].get("rebuild", 0)), str(run["recoveries_by_path"].get("recompute", 0)),
                str(len(run["violations"])), f"{run['wall_s']:.0f}",
            ]
            for run in runs
        ],
    )  # fmt: skip
    lines = [
        "The shipped model, TP=2, float32, six streams of greedy and seeded requests with the lengths of two public "
        "traces (scaled down), some with a prefix in common. Every answer is compared with the one that the same "
        "server gave without faults. A fault counts if it struck, with at least one stream in mid-answer.",
        f"**{summed['faults']:.0f} faults, {summed['requests']:.0f} requests, {summed['tokens']:.0f} tokens: "
        f"{summed['tokens_lost']:.0f} lost, {summed['tokens_duplicated']:.0f} duplicated, "
        f"{summed['tokens_changed']:.0f} changed; {summed['requests_failed']:.0f} requests failed; "
        f"{len(summed['violations'])} violations.**",
        f"Of losses of one rank with nothing else wrong {summed['single_losses_rebuilt']:.0f} of "
        f"{summed['single_losses']:.0f} were rebuilt. Outage as clients see it (the longest silence of any stream, "
        "detection included): " + ", ".join(f"{name} {value:.2f} s" for name, value in outage.items()) + ".",
        each,
        counts,
        *(f"- violation: {text}" for text in summed["violations"]),
    ]
    return "\n\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Read the runs and write the results file."""
    parser = script.new_parser("Write the results file of chaos runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="what 'ghostserve chaos --json' printed")
    parser.add_argument("--note", default="", help="a paragraph about these runs")
    options = parser.parse_args(argv)
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in options.runs]
    summed = total(runs)
    written = results.write(
        "chaos",
        about=results.facts(),
        document={"note": options.note, "total": summed, "runs": runs},
        markdown=f"{markdown(summed, runs)}\n\n{options.note}",
        directory=options.out,
    )
    for path in written.paths:
        print(path)
    for text in shortfalls(summed):
        print(f"too few: {text}")
    return 1 if summed["violations"] or shortfalls(summed) else 0


if __name__ == "__main__":
    script.run(main)
