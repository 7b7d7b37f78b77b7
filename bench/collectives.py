"""Sums between the ranks of one machine: how long one takes, and how fast a survivor leaves one that will never end.

ours   collectives over shared memory (`ghostserve.engine.communicator`)
gloo   torch.distributed, which vLLM takes where its own shared-memory collectives cannot be had; those never end
       when a peer dies, so there is nothing to measure

.venv/bin/python bench/collectives.py [--quick]
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import results
import script
import torch
import torch.distributed as dist
from estimates import Spread, spread_of
from script import say

from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.engine import communicator

WAYS = ("ours", "gloo")
COUNTS = (256, 4096, 65536, 1 << 20)  # float32: 1 KiB to 4 MiB
LOSSES = {
    "killed while they sum": (256, False),
    "killed while they sum 4 MiB": (1 << 20, False),
    "killed while the others wait for it": (256, True),
}
TRIAL_TIMEOUT_S = 60.0
Sum = Callable[[torch.Tensor], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Microseconds of one all_reduce: the median of each round's mean, over the rounds."""

    way: str
    count: int
    spread: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving:
    """Milliseconds from a peer's SIGKILL to the exception in the slowest survivor.

    `after_end`: since the kernel had taken the process apart, before which nobody can know.
    """

    way: str
    loss: str
    ranks: int
    spread: Spread
    after_end: Spread


# ---- in a rank -------------------------------------------------------------------------------------------------------


def make_sum(way: str) -> Sum:
    """What adds up a tensor in place, over the world group."""
    world = dist.group.WORLD
    if way == "gloo":
        return lambda tensor: dist.all_reduce(tensor, group=world)
    shared = communicator.SharedMemory.form(world)
    if shared is None:
        raise RuntimeError("shared memory cannot be had")
    return communicator.TensorParallelCollectives("tp:0", world, shared).all_reduce_now


def measure_speed(rank: int, rounds: int, seed: int) -> dict[tuple[str, int], list[float]]:
    """Per way and count, each round's mean in microseconds; all ranks shuffle alike."""
    ways = {way: make_sum(way) for way in WAYS}
    cells = [(way, count) for way in WAYS for count in COUNTS]
    found: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
    order = random.Random(seed)
    for _ in range(rounds):
        order.shuffle(cells)
        for way, count in cells:
            tensor, turns = torch.ones(count), max(10, min(1000, (1 << 21) // count))
            ways[way](tensor)
            began_s = monotonic_s()
            for _ in range(turns):
                ways[way](tensor)
            found[way, count].append((monotonic_s() - began_s) / turns * 1e6)
    return found if rank == 0 else {}


def sum_for_ever(rank: int, way: str, count: int, stays_away: bool, ready: Any) -> float:
    """Sum until it fails; when that was (monotonic). Rank 1, which is going to be killed, may stay away."""
    add, tensor = make_sum(way), torch.ones(count)
    add(tensor)
    ready.put(rank)
    if rank == 1 and stays_away:
        sleep_s(TRIAL_TIMEOUT_S)
    try:
        while True:
            tensor.fill_(1.0)
            add(tensor)
    except Exception:
        return monotonic_s()


def _rank(rank: int, ranks: int, store: str, body: Callable[..., Any], arguments: Any, out: Any) -> None:
    signal.alarm(int(TRIAL_TIMEOUT_S) * 10)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    out.put((rank, body(rank, *arguments)))
    out.close()
    out.join_thread()
    os._exit(0)  # a broken group has nothing to say at its end


# ---- in the bench ----------------------------------------------------------------------------------------------------


class Ranks:
    """Forked ranks that run one body; a context manager that leaves none behind."""

    def __init__(self, ranks: int, body: Callable[..., Any], *arguments: Any) -> None:
        self._context = multiprocessing.get_context("fork")
        self._directory = tempfile.TemporaryDirectory(prefix="gs-bench-")
        self._out = self._context.Queue()
        store = str(Path(self._directory.name) / "store")
        self.processes = [
            self._context.Process(target=_rank, args=(rank, ranks, store, body, arguments, self._out))
            for rank in range(ranks)
        ]

    def __enter__(self) -> Ranks:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self._directory.cleanup()

    def answers(self, count: int, *, timeout_s: float) -> dict[int, Any]:
        """What the first `count` ranks to answer said. Raises queue.Empty after `timeout_s`."""
        return dict(self._out.get(timeout=timeout_s) for _ in range(count))


def speeds(rounds: int, seed: int) -> list[Speed]:
    """Two ranks, both ways in the same processes."""
    with Ranks(2, measure_speed, rounds, seed) as ranks:
        found = ranks.answers(2, timeout_s=600)[0]
    return [Speed(way=way, count=count, spread=spread_of(us)) for (way, count), us in sorted(found.items())]


def leaving(trials: int, seed: int) -> list[Leaving]:
    """Every cell once per trial, in shuffled order; the moment of the kill is random."""
    cells = [(way, loss, ranks) for way in WAYS for loss in LOSSES for ranks in (2, 4)]
    found: dict[tuple[str, str, int], list[tuple[float, float]]] = {cell: [] for cell in cells}
    order = random.Random(seed)
    for trial in range(trials):
        order.shuffle(cells)
        for way, loss, ranks in cells:
            found[way, loss, ranks].append(_one_loss(way, loss, ranks, wait_s=order.uniform(0.02, 0.15)))
        say(f"  losses: {trial + 1} of {trials} trials")
    return [
        Leaving(
            way=way,
            loss=loss,
            ranks=ranks,
            spread=spread_of([since_kill for since_kill, _ in both]),
            after_end=spread_of([since_end for _, since_end in both]),
        )
        for (way, loss, ranks), both in sorted(found.items())
    ]


def _one_loss(way: str, loss: str, ranks: int, *, wait_s: float) -> tuple[float, float]:
    """Milliseconds since the kill, and since the end of the process."""
    count, stays_away = LOSSES[loss]
    ready = multiprocessing.get_context("fork").Queue()
    with Ranks(ranks, sum_for_ever, way, count, stays_away, ready) as running:
        for _ in range(ranks):
            ready.get(timeout=TRIAL_TIMEOUT_S)
        sleep_s(wait_s)
        killed_s = monotonic_s()
        running.processes[1].kill()
        running.processes[1].join()
        ended_s = monotonic_s()
        left_s = max(running.answers(ranks - 1, timeout_s=TRIAL_TIMEOUT_S).values())
        return (left_s - killed_s) * 1e3, (left_s - ended_s) * 1e3


def markdown(fast: Sequence[Speed], left: Sequence[Leaving]) -> str:
    """Both tables."""
    by_count = {(speed.way, speed.count): speed.spread for speed in fast}
    rows = [
        [
            f"{count * 4 // 1024} KiB",
            *(
                f"{by_count[way, count].median:.1f} ({by_count[way, count].minimum:.1f} to {by_count[way, count].maximum:.1f})"
                for way in WAYS
            ),
            f"{by_count['gloo', count].median / by_count['ours', count].median:.1f}",
        ]
        for count in COUNTS
    ]
    losses = [
        [
            f"{entry.loss}, {entry.ranks} ranks, {entry.way}",
            *(
                f"{spread.median:.1f} ({spread.minimum:.1f} to {spread.maximum:.1f})"
                for spread in (entry.spread, entry.after_end)
            ),
        ]
        for entry in left
    ]
    worst = max(entry.after_end.maximum for entry in left if entry.way == "ours")
    median = statistics.median(entry.after_end.median for entry in left if entry.way == "ours")
    return "\n".join(
        (
            "all_reduce of float32 between two ranks, µs; median of the rounds, smallest and largest.",
            "",
            results.table(("size", "ours", "gloo", "gloo / ours"), rows),
            "",
            "From SIGKILL to the exception in the slowest survivor, ms. Ranks outnumber the cores with four.",
            "",
            results.table(("a rank is", "since the kill", "since its process had ended"), losses),
            "",
            f"Ours, since the process had ended: {median:.1f} ms in the middle, {worst:.1f} ms at the longest; aimed at are 10 ms. "
            "Before that the kernel takes the process apart, and a survivor of a negative figure saw its end sooner than the bench.",
        )
    )


def main(argv: Sequence[str]) -> int:
    """Exit status 0."""
    parser = script.new_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it works")
    parser.add_argument("--rounds", type=int, help="of the sums; default 9; 3 with --quick")
    parser.add_argument("--trials", type=int, help="losses of each kind; default 20; 2 with --quick")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    about = results.facts()
    fast = speeds(arguments.rounds or (3 if arguments.quick else 9), arguments.seed)
    left = leaving(arguments.trials or (2 if arguments.quick else 20), arguments.seed)
    text = markdown(fast, left)
    document = {"speeds": [asdict(entry) for entry in fast], "leaving": [asdict(entry) for entry in left]}
    name = "collectives-quick" if arguments.quick else "collectives"
    script.publish(name, about=about, document=document, markdown=text, directory=arguments.out)
    return 0


if __name__ == "__main__":
    script.run(main)
