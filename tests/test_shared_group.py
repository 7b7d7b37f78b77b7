"""Collectives over shared memory, between real processes: right sums, the same bits everywhere, and never a wait for the dead."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ghostserve.arena.memfd import Segment
from ghostserve.arena.shared_group import Dtype, GroupAbandoned, SharedGroup, memory_bytes
from ghostserve.clock import monotonic_s, sleep_s

pytestmark = pytest.mark.long
SLOT_BYTES = 4096
DTYPES = {
    torch.float32: Dtype.F32,
    torch.float64: Dtype.F64,
    torch.float16: Dtype.F16,
    torch.bfloat16: Dtype.BF16,
    torch.int8: Dtype.I8,
    torch.uint8: Dtype.U8,
    torch.int16: Dtype.I16,
    torch.int32: Dtype.I32,
    torch.int64: Dtype.I64,
}
torch.set_num_threads(1)  # a forked child must not find its parent's OpenMP threads missing
Body = Callable[[int, SharedGroup], Any]


class Ranks:
    """`ranks` forked processes that run `body(rank, group)`, and what each returned."""

    def __init__(
        self,
        ranks: int,
        body: Body,
        *,
        slot_bytes: int = SLOT_BYTES,
        timeout_s: float = 20.0,
        spins: int = 200,
    ) -> None:
        segment = Segment.create("test-group", memory_bytes(ranks, slot_bytes))
        gates, self._results, self.pids = [], [], []
        for rank in range(ranks):
            gate_read, gate_write = os.pipe()
            result_read, result_write = os.pipe()
            pid = os.fork()
            if pid == 0:
                code = 1
                signal.alarm(60)
                try:
                    pids = pickle.loads(os.read(gate_read, 65536))
                    fds = [-1 if peer == rank else os.pidfd_open(pids[peer]) for peer in range(ranks)]
                    group = SharedGroup(
                        segment.array, rank=rank, ranks=ranks, pidfds=fds,
                        slot_bytes=slot_bytes, timeout_s=timeout_s, spins=spins,
                    )  # fmt: skip
                    with os.fdopen(result_write, "wb") as file:
                        file.write(pickle.dumps(body(rank, group)))
                    code = 0
                except BaseException:
                    traceback.print_exc()
                    sys.stderr.flush()
                finally:
                    os._exit(code)
            os.close(gate_read)
            os.close(result_write)
            gates.append(gate_write)
            self._results.append(result_read)
            self.pids.append(pid)
        for gate in gates:
            os.write(gate, pickle.dumps(self.pids))
            os.close(gate)

    def wait(self, *, of: list[int] | None = None) -> list[Any]:
        """What the ranks returned, in order; those not asked for are killed."""
        wanted = range(len(self.pids)) if of is None else of
        made = []
        for rank in wanted:
            with os.fdopen(self._results[rank], "rb") as file:
                content = file.read()
            assert content, f"rank {rank} failed"
            made.append(pickle.loads(content))
        for rank, pid in enumerate(self.pids):
            if rank not in wanted:
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return made


def numbers(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    made = torch.Generator().manual_seed(1000 * count + rank)
    if dtype.is_floating_point:
        return torch.randn(count, generator=made, dtype=torch.float32).to(dtype)
    return torch.randint(0, 100, (count,), generator=made).to(dtype)


def expected_sum(ranks: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """In the order of the ranks; half types in float, rounded once."""
    through = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    total = numbers(0, count, dtype).to(through)
    for rank in range(1, ranks):
        total = total + numbers(rank, count, dtype).to(through)
    return total.to(dtype)


def reduce_all(rank: int, group: SharedGroup) -> list[torch.Tensor]:
    made = []
    for dtype, code in DTYPES.items():
        for count in (1, 3, 64, 1000, 4097, 70001):
            tensor = numbers(rank, count, dtype)
            group.all_reduce(tensor.data_ptr(), count=count, dtype=code)
            made.append(tensor)
    return made


@pytest.mark.parametrize(
    ("ranks", "slot_bytes"), [(2, SLOT_BYTES), (2, 1 << 20), (3, 128 << 10), (4, 1 << 20)]
)
def test_sums(ranks: int, slot_bytes: int) -> None:
    """Short and long, in one piece and in many; every rank has the same bits."""
    made = Ranks(ranks, reduce_all, slot_bytes=slot_bytes).wait()
    cases = [(dtype, count) for dtype in DTYPES for count in (1, 3, 64, 1000, 4097, 70001)]
    for index, (dtype, count) in enumerate(cases):
        for rank in range(ranks):
            assert torch.equal(made[rank][index], expected_sum(ranks, count, dtype)), (dtype, count, rank)


@pytest.mark.parametrize("ranks", [2, 3])
def test_gather_and_broadcast(ranks: int) -> None:
    def body(rank: int, group: SharedGroup) -> list[torch.Tensor]:
        made = []
        for count in (1, 5, 4096, 10001):
            mine = numbers(rank, count, torch.uint8)
            every = torch.zeros(ranks, count, dtype=torch.uint8)
            group.all_gather(mine.data_ptr(), every.data_ptr(), nbytes=count)
            group.all_gather(mine.data_ptr(), 0 if rank else every.data_ptr(), nbytes=count)
            said = numbers(rank, count, torch.uint8)
            group.broadcast(said.data_ptr(), nbytes=count, source=ranks - 1)
            made += [every, said]
        return made

    for result in Ranks(ranks, body).wait():
        for index, count in enumerate((1, 5, 4096, 10001)):
            assert torch.equal(
                result[2 * index], torch.stack([numbers(rank, count, torch.uint8) for rank in range(ranks)])
            )
            assert torch.equal(result[2 * index + 1], numbers(ranks - 1, count, torch.uint8))


def test_many_rounds_of_ranks_out_of_step() -> None:
    """A slot is not overwritten while a slow rank still reads it."""

    def body(rank: int, group: SharedGroup) -> bool:
        total = torch.zeros(600)
        for step in range(3000):
            mine = torch.full((600,), float(step * 10 + rank))
            if (step + rank) % 97 == 0:
                sleep_s(0.001)
            group.all_reduce(mine.data_ptr(), count=600, dtype=Dtype.F32)
            total += mine
            assert (mine == 3 * step * 10 + 3).all(), step
        return True

    assert Ranks(3, body).wait() == [True] * 3


# ---- leaving ---------------------------------------------------------------------------------------------------------


def left_after(group: SharedGroup, call: Callable[[], None]) -> tuple[float, str]:
    began_s = monotonic_s()
    try:
        while True:
            call()
    except GroupAbandoned as error:
        return monotonic_s() - began_s, str(error)


def endless(rank: int, group: SharedGroup) -> tuple[float, str]:
    tensor = torch.ones(50_000)
    return left_after(group, lambda: group.all_reduce(tensor.data_ptr(), count=50_000, dtype=Dtype.F32))


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_a_killed_peer_is_not_waited_for(killed: int) -> None:
    ranks = Ranks(3, endless)
    sleep_s(0.2)
    os.kill(ranks.pids[killed], signal.SIGKILL)
    for _, reason in ranks.wait(of=[rank for rank in range(3) if rank != killed]):
        assert "has ended" in reason or "left the group" in reason


def test_a_peer_that_leaves_is_not_waited_for() -> None:
    def body(rank: int, group: SharedGroup) -> tuple[float, str]:
        if rank == 1:
            sleep_s(0.2)
            group.abandon()
            group.abandon()
            with pytest.raises(GroupAbandoned, match="this process has left"):
                group.broadcast(0, nbytes=0, source=0)
            sleep_s(3)
            return 0.0, "left"
        return endless(rank, group)

    (seconds, reason), _ = Ranks(2, body).wait()
    assert "a peer has left the group" in reason
    assert seconds < 2.5


def test_a_stopped_peer_is_waited_for_until_the_limit() -> None:
    """It may go on: only the limit ends that wait. Negative control: without the stop there is none."""
    ranks = Ranks(2, endless, timeout_s=0.5)
    sleep_s(0.2)
    os.kill(ranks.pids[1], signal.SIGSTOP)
    ((_, reason),) = ranks.wait(of=[0])
    assert "did not come within 0.5 s" in reason


def test_who_waits_sleeps() -> None:
    """Waiting for a late peer takes next to no processor time."""

    def body(rank: int, group: SharedGroup) -> float:
        used_s = sum(os.times()[:2])
        if rank == 1:
            sleep_s(1.0)
        tensor = torch.ones(8)
        group.all_reduce(tensor.data_ptr(), count=8, dtype=Dtype.F32)
        return sum(os.times()[:2]) - used_s

    waiting_s, _ = Ranks(2, body).wait()
    assert waiting_s < 0.5
