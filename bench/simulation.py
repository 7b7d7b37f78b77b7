"""Ten thousand simulated schedules, recorded: what happened in them, how long they took, and what was violated.

.venv/bin/python bench/simulation.py [--seeds N] [--first-seed S] [--jobs J]
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import results
import script

from ghostserve.testing.simulation.report import Totals, simulate


def markdown(totals: Totals, *, jobs: int) -> str:
    """The sums, and the counts by kind."""
    counts = [[name, str(count)] for name, count in sorted(totals.counts.items())]
    shapes = [[f"n={n} m={m}", str(count)] for (n, m), count in sorted(totals.shapes.items())]
    return "\n\n".join(
        (
            f"{totals.seeds} schedules from seed {totals.first_seed} on {jobs} processes: {totals.took_s:.0f} s, "
            f"{totals.cpu_s:.0f} s of CPU. {totals.events} events ({totals.events_mean:.0f} each on average, at least "
            f"{totals.events_min}), {totals.without_loss} schedules without a loss, **{totals.violated} violations**.",
            results.table(["what", "count"], counts),
            results.table(["ranks, parity shards", "schedules"], shapes),
        )
    )


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 1 if an invariant was violated."""
    parser = script.new_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args(argv)
    about = results.facts()
    totals = simulate(
        first_seed=arguments.first_seed,
        seeds=arguments.seeds,
        jobs=arguments.jobs,
        on_progress=lambda done, of, violated: script.say(f"[{done}/{of}] {violated} violations"),
    )
    text = markdown(totals, jobs=arguments.jobs)
    script.publish(
        "simulation", about=about, document=totals.to_dict(), markdown=text, directory=arguments.out
    )
    return 1 if totals.violated else 0


if __name__ == "__main__":
    script.run(main)
