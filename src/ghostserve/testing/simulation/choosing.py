"""What of the restorable blocks is rebuilt in a simulated recovery: the product's plan, over the simulated requests."""

from __future__ import annotations

from dataclasses import dataclass

from ghostserve.recovery.plan import Context, needed_by_others, plan
from ghostserve.shadow.restore import RestorePlan
from ghostserve.shadow.unwritten import Unwritten
from ghostserve.testing.simulation.cluster import Cluster


@dataclass(frozen=True, slots=True)
class TokenCosts:
    """`plan.Costs`: a block costs as much as so many tokens."""

    block: float

    def rebuild_s(self, blocks: int) -> float:
        return self.block * blocks

    def compute_s(self, tokens: int, context: int) -> float:
        return float(tokens)


def choose(
    cluster: Cluster, found: RestorePlan, coming: Unwritten, used: dict[str, set[int]]
) -> tuple[tuple[int, ...], set[int]]:
    """The blocks to rebuild, and those that are gone."""
    contexts = [
        Context(
            request=request.name,
            tokens=request.computed - coming.scheduled.get(request.name, 0),
            tables=request.tables,
            block_sizes=cluster.setup.block_sizes,
        )
        for request in cluster.scheduler.running
    ]
    in_use = set().union(*used.values())
    chosen = plan(
        contexts,
        [block for block in found.restored if block in in_use],
        found.lost.keys(),
        others=needed_by_others(contexts, used),
        costs=TokenCosts(cluster.setup.block_cost) if cluster.setup.block_cost else None,
    )
    cluster.counts["requests recomputed by choice"] += len(chosen.by_choice)
    cluster.counts["blocks not worth rebuilding"] += len(chosen.left)
    cached = tuple(block for block in found.restored if block not in in_use)
    return chosen.rebuilt + cached, set(found.lost) | set(chosen.left)
