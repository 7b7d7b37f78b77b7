"""Collectives over shared memory, between real processes: right sums, the same bits everywhere, and never a wait for the dead."""

from __future__ import annotations

import itertools
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


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_messages(ranks: int) -> None:
    """From every rank to every other, shorter and longer than a slot, with a collective behind each."""

    def body(rank: int, group: SharedGroup) -> bool:
        for source, to in itertools.permutations(range(ranks), 2):
            for count in (1, 64, SLOT_BYTES, SLOT_BYTES + 1, 3 * SLOT_BYTES + 7):
                said = numbers(source, count, torch.uint8)
                if rank == source:
                    group.send(said.data_ptr(), nbytes=count, to=to)
                if rank == to:
                    found = torch.zeros(count, dtype=torch.uint8)
                    group.recv(found.data_ptr(), nbytes=count, source=source)
                    assert torch.equal(found, said), (source, to, count)
            total = torch.ones(3)
            group.all_reduce(total.data_ptr(), count=3, dtype=Dtype.F32)
            assert total.tolist() == [ranks] * 3
        return True

    assert Ranks(ranks, body).wait() == [True] * ranks


def test_a_short_message_waits_for_nobody() -> None:
    """All send before anybody receives."""

    def body(rank: int, group: SharedGroup) -> list[int]:
        others = [peer for peer in range(3) if peer != rank]
        for peer in others:
            said = torch.full((SLOT_BYTES,), 10 * rank + peer, dtype=torch.uint8)
            group.send(said.data_ptr(), nbytes=SLOT_BYTES, to=peer)
        found = torch.zeros(3, SLOT_BYTES, dtype=torch.uint8)
        for peer in others:
            group.recv(found[peer].data_ptr(), nbytes=SLOT_BYTES, source=peer)
        return [int(value) for peer in others for value in found[peer].unique()]

    assert Ranks(3, body, timeout_s=10).wait() == [[10, 20], [1, 21], [2, 12]]


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


# What a survivor may be in, by the bytes of it; a slot has 128 KiB here, so a sum of three slots is six rounds.
LONG_SLOT_BYTES, LONG_BYTES = 128 << 10, 3 * (128 << 10)
OPERATIONS: dict[str, tuple[int, Callable[[SharedGroup, int], None]]] = {  # rounds, call
    "a short sum": (1, lambda group, at: group.all_reduce(at, count=64, dtype=Dtype.F32)),
    "a long sum": (6, lambda group, at: group.all_reduce(at, count=LONG_BYTES // 4, dtype=Dtype.F32)),
    "all_gather": (3, lambda group, at: group.all_gather(at, at + LONG_BYTES, nbytes=LONG_BYTES)),
    "gather, for another": (3, lambda group, at: group.all_gather(at, 0, nbytes=LONG_BYTES)),
    "broadcast, from here": (3, lambda group, at: group.broadcast(at, nbytes=LONG_BYTES, source=0)),
    "broadcast, from the lost one": (3, lambda group, at: group.broadcast(at, nbytes=LONG_BYTES, source=1)),
}
POINTS = [(name, point) for name, (rounds, _) in OPERATIONS.items() for point in range(rounds + 1)]
HOW_LOST = pytest.mark.parametrize("killed", [True, False], ids=["killed", "left"])


def lose(group: SharedGroup, *, killed: bool) -> tuple[float, str]:
    """This rank is no more, in one way or the other."""
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)
    group.abandon()
    return 0.0, "lost"


def survivor_of(rank: int, group: SharedGroup, call: Callable[[SharedGroup, int], None]) -> tuple[float, str]:
    memory = torch.zeros(4 * LONG_BYTES, dtype=torch.uint8)
    return left_after(group, lambda: call(group, memory.data_ptr()))


@HOW_LOST
@pytest.mark.parametrize(("name", "point"), POINTS)
def test_a_loss_after_every_round_of_every_operation(name: str, point: int, killed: bool) -> None:
    """Rank 1 comes to so many rounds of it (a short broadcast is one, of whatever operation) and to no more."""
    call = OPERATIONS[name][1]

    def body(rank: int, group: SharedGroup) -> tuple[float, str]:
        if rank != 1:
            return survivor_of(rank, group, call)
        line = torch.zeros(64, dtype=torch.uint8)
        for _ in range(point):
            group.broadcast(line.data_ptr(), nbytes=64, source=1)
        return lose(group, killed=killed)

    found = Ranks(3, body, slot_bytes=LONG_SLOT_BYTES).wait(of=[0, 2])
    for seconds, reason in found:
        assert "has ended" in reason or "left the group" in reason
        assert seconds < 5


@HOW_LOST
@pytest.mark.parametrize("point", range(4))
@pytest.mark.parametrize("sends", [True, False], ids=["sends", "receives"])
def test_a_loss_after_every_piece_of_a_message(sends: bool, point: int, killed: bool) -> None:
    """Of three, which rank 0 sends to rank 1, or is to get from it."""

    def body(rank: int, group: SharedGroup) -> tuple[float, str]:
        memory = torch.zeros(3 * SLOT_BYTES, dtype=torch.uint8)
        at = memory.data_ptr()
        if rank == 0:
            send = lambda: group.send(at, nbytes=3 * SLOT_BYTES, to=1)  # noqa: E731
            recv = lambda: group.recv(at, nbytes=3 * SLOT_BYTES, source=1)  # noqa: E731
            return left_after(group, send if sends else recv)
        for _ in range(point):
            if sends:
                group.recv(at, nbytes=SLOT_BYTES, source=0)
            else:
                group.send(at, nbytes=SLOT_BYTES, to=0)
        return lose(group, killed=killed)

    ((seconds, reason),) = Ranks(2, body).wait(of=[0])
    assert "has ended" in reason or "left the group" in reason
    assert seconds < 5


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
