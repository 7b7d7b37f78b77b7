"""The communicator between real ranks: what vLLM asks of it equals torch.distributed, and a rank that leaves is not waited for."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from vllm.distributed import parallel_state

from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.engine import communicator, groups

pytestmark = [pytest.mark.real, pytest.mark.timeout(120)]
DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16,
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64,
]  # fmt: skip
COPIED = [*DTYPES, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]  # what is never added up over the wire
SHAPES = [(1,), (3, 5), (8, 257), (70, 1000), (3, 1 << 18)]
KNOWN_TO_GLOO = set(COPIED) - {torch.int16, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2}
Body = Callable[[int, Any], Any]


def _rank(rank: int, ranks: int, store: str, body: Body, results: Any) -> None:
    try:
        signal.alarm(100)
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        results.put((rank, body(rank, dist.group.WORLD)))
    except BaseException:
        results.put((rank, traceback.format_exc()))


def run(tmp_path: Path, ranks: int, body: Body) -> list[Any]:
    """What each rank returned; a traceback for one that failed. Ranks that are killed return nothing."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    store = str(tmp_path / "store")
    processes = [
        context.Process(target=_rank, args=(rank, ranks, store, body, results)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    deadline_s = monotonic_s() + 100
    while len(found) < ranks and monotonic_s() < deadline_s:
        while not results.empty():
            rank, value = results.get()
            found[rank] = value
        if all(not process.is_alive() for process in processes) and results.empty():
            break
        sleep_s(0.01)
    for process in processes:
        process.kill()
        process.join()
    return [found.get(rank) for rank in range(ranks)]


def numbers(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    made = torch.Generator().manual_seed(rank + 1)
    if dtype.is_floating_point or dtype is torch.bool:
        return torch.randn(shape, generator=made).to(dtype)
    return torch.randint(0, 40, shape, generator=made).to(dtype)


def collectives(world: Any) -> communicator.TensorParallelCollectives:
    shared = communicator.SharedMemory.form(world)
    assert shared is not None
    return communicator.TensorParallelCollectives("tp:0", world, shared)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and torch.equal(
        left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
    )


def same_sum(ours: Any, world: Any, mine: torch.Tensor, every: list[torch.Tensor]) -> None:
    """Bit for bit in the order of the ranks, half types by way of float; about what torch says."""
    total, dtype = mine.clone(), mine.dtype
    ours.all_reduce(total, group=world)
    through = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    expected = torch.zeros(mine.shape, dtype=through)
    for part in every:
        expected = expected + part.to(through)
    assert torch.equal(total, expected.to(dtype)), (dtype, mine.shape)
    if dtype in (torch.float32, torch.float64, torch.int32, torch.int64):
        theirs = mine.clone()
        dist.all_reduce(theirs, group=world)
        assert torch.allclose(total, theirs, atol=1e-5), (dtype, mine.shape)  # added in another order


def same_copies_as_gloo(ours: Any, world: Any, mine: torch.Tensor) -> None:
    """What is compared above with what was put in, torch.distributed gives, too."""
    ranks = dist.get_world_size(world)
    found, theirs = (
        torch.empty((ranks * mine.shape[0], *mine.shape[1:]), dtype=mine.dtype) for _ in range(2)
    )
    ours.all_gather_into_tensor(found, mine, group=world)
    dist.all_gather_into_tensor(theirs, mine, group=world)
    assert same_bits(found, theirs)
    for source in range(ranks):
        found, theirs = mine.clone(), mine.clone()
        ours.broadcast(found, source)
        dist.broadcast(theirs, group=world, group_src=source)
        assert same_bits(found, theirs)


def same_as_torch(rank: int, world: Any) -> str:
    ours = collectives(world)
    ranks = dist.get_world_size(world)
    for dtype in COPIED:
        for shape in SHAPES:
            mine = numbers(rank, shape, dtype)
            every = [numbers(peer, shape, dtype) for peer in range(ranks)]
            if dtype in DTYPES:
                same_sum(ours, world, mine, every)

            gathered = torch.empty((ranks * shape[0], *shape[1:]), dtype=dtype)
            ours.all_gather_into_tensor(gathered, mine, group=world)
            assert same_bits(gathered, torch.cat(every)), (dtype, shape)

            for peer in range(ranks):
                parts = [torch.empty_like(mine) for _ in range(ranks)] if rank == peer else None
                ours.gather(mine, parts, dst=peer, group=world)
                if parts is not None:
                    assert all(same_bits(part, whole) for part, whole in zip(parts, every, strict=True))
                said = mine.clone()
                ours.broadcast(said, peer)
                assert same_bits(said, every[peer]), (dtype, shape)
                if rank == peer:
                    ours.send(mine, (peer + 1) % ranks)
                if rank == (peer + 1) % ranks:
                    assert same_bits(ours.recv(shape, dtype, peer), every[peer]), (dtype, shape)

            if shape == SHAPES[1] and dtype in KNOWN_TO_GLOO:
                same_copies_as_gloo(ours, world, mine)

    flags = torch.tensor([rank == 0, False])
    ours.all_reduce(flags, group=world)  # what we cannot add is left to gloo
    assert flags.tolist() == [True, False]
    across = numbers(rank, (6, 8), torch.float32).t()
    ours.all_reduce(across, group=world)
    assert torch.equal(across, sum(numbers(peer, (6, 8), torch.float32) for peer in range(ranks)).t())
    return "same"


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_what_vllm_asks_for_equals_torch(tmp_path: Path, ranks: int) -> None:
    assert run(tmp_path, ranks, same_as_torch) == ["same"] * ranks


def coordinator(world: Any) -> Any:
    """vLLM's own object for a group, with our communicator in it, as in a worker."""
    ranks = list(range(dist.get_world_size(world)))
    made = parallel_state.GroupCoordinator(
        group_ranks=[ranks],
        local_rank=dist.get_rank(world),
        torch_distributed_backend="gloo",
        use_device_communicator=False,  # the platform of this process is vLLM's own
        group_name="tp",
    )
    made.device_communicator = communicator.AbandonableCommunicator(
        cpu_group=made.cpu_group,
        device=made.device,
        device_group=made.device_group,
        unique_name=made.unique_name,
    )
    assert made.device_communicator.dist_module.over_shared_memory
    made.use_cpu_custom_send_recv = (
        made.device_communicator.supports_tensor_dict
    )  # as it finds by itself on our platform
    assert made.use_cpu_custom_send_recv
    return made


def dictionary(rank: int) -> dict[str, Any]:
    """Tensors of every dtype, an empty one, and what is no tensor."""
    tensors = {str(dtype): numbers(rank, (3, 5), dtype) for dtype in COPIED}
    across = numbers(rank, (6, 8), torch.float32).t()
    return {**tensors, "across": across, "empty": torch.empty(0, 7), "name": f"of rank {rank}", "none": None}


def same_dictionary(found: dict[str, Any] | None, expected: dict[str, Any]) -> bool:
    return (
        found is not None
        and found.keys() == expected.keys()
        and all(
            same_bits(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
            for name, value in expected.items()
        )
    )


def through_the_coordinator(rank: int, world: Any) -> str:
    """Single tensors and dictionaries from one rank to another over ours; the coordinator's own broadcasts over gloo."""
    group, ranks = coordinator(world), dist.get_world_size(world)
    for source, to in itertools.permutations(range(ranks), 2):
        if rank == source:
            group.send(numbers(rank, (3, 1000), torch.float32), dst=to)
            group.send_tensor_dict(dictionary(rank), dst=to)
        if rank == to:
            found = group.recv(torch.Size((3, 1000)), torch.float32, src=source)
            assert torch.equal(found, numbers(source, (3, 1000), torch.float32))
            assert same_dictionary(group.recv_tensor_dict(src=source), dictionary(source))
    for source in range(ranks):
        plain = {
            "a": numbers(source, (3, 5), torch.float32),
            "b": numbers(source, (2,), torch.int64),
            "c": "said",
        }
        assert same_dictionary(
            group.broadcast_tensor_dict(plain if rank == source else None, src=source), plain
        )
        mine = numbers(rank, (3, 1000), torch.bfloat16)
        assert torch.equal(group.broadcast(mine, src=source), numbers(source, (3, 1000), torch.bfloat16))
        said = group.device_communicator.broadcast(numbers(rank, (7,), torch.float16), source)
        assert torch.equal(said, numbers(source, (7,), torch.float16))
        total = group.all_reduce(numbers(rank, (8, 257), torch.float32))  # the ways do not get mixed up
        expected = sum(numbers(peer, (8, 257), torch.float32) for peer in range(ranks))
        assert torch.equal(total, expected)
    return "same"


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_tensors_and_dictionaries_from_rank_to_rank(tmp_path: Path, ranks: int) -> None:
    assert run(tmp_path, ranks, through_the_coordinator) == ["same"] * ranks


def waits_for_a_dictionary(rank: int, world: Any, *, dies: bool) -> tuple[float, str]:
    """Rank 1 is to send one, and is gone instead."""
    group, began_s = coordinator(world), monotonic_s()
    if rank == 1:
        sleep_s(0.5)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        groups.leave_groups()
        return 0.0, "left"
    try:
        group.recv_tensor_dict(src=1)
    except Exception as error:
        return monotonic_s() - began_s, f"{groups.peer_left(error)}: {error}"
    raise AssertionError


@pytest.mark.parametrize("dies", [True, False], ids=["killed", "left"])
def test_a_dictionary_of_a_peer_that_is_gone(tmp_path: Path, dies: bool) -> None:
    def body(rank: int, world: Any) -> Any:
        return waits_for_a_dictionary(rank, world, dies=dies)

    first, _ = run(tmp_path, 2, body)
    assert first[1].startswith("True: "), first


def a_long_one(rank: int, world: Any) -> str:
    """Every operation on 64 MiB."""
    ours, ranks = collectives(world), dist.get_world_size(world)
    mine = torch.full((1 << 24,), float(rank + 1))
    mine[-1] = 7.0
    every = torch.empty(ranks, 1 << 24)
    ours.all_gather_into_tensor(every, mine, group=world)
    assert [(row[0].item(), row[-2].item(), row[-1].item()) for row in every] == [
        (peer + 1, peer + 1, 7) for peer in range(ranks)
    ]
    parts = list(every.zero_()) if rank == 1 else None
    ours.gather(mine, parts, dst=1, group=world)
    assert parts is None or [part[-2].item() for part in parts] == [peer + 1 for peer in range(ranks)]
    ours.broadcast(every[0] if rank else mine, 0)
    assert not rank or torch.equal(every[0, :-1], torch.ones(1 << 24)[:-1])
    if rank == 0:
        ours.send_tensor_dict({"long": mine}, ranks - 1)
    if rank == ranks - 1:
        assert torch.equal(ours.recv_tensor_dict(0)["long"], every[0])
    del every
    for dtype, count in ((torch.float32, 1 << 24), (torch.bfloat16, 1 << 25)):
        tensor = torch.full((count,), float(rank + 1), dtype=dtype)
        tensor[-1] = 7.0
        ours.all_reduce(tensor, group=world)
        assert tensor[:-1].min() == tensor[:-1].max() == sum(range(ranks + 1))
        assert tensor[-1] == 7 * ranks
    return "same"


@pytest.mark.parametrize("ranks", [2, 4])
def test_64_mib(tmp_path: Path, ranks: int) -> None:
    assert run(tmp_path, ranks, a_long_one) == ["same"] * ranks


def one_cannot(rank: int, world: Any) -> str:
    if rank == 1:
        communicator._open = _refuse
    shared = communicator.SharedMemory.form(world)
    tensor = torch.ones(3)
    communicator.TensorParallelCollectives("tp:0", world, shared).all_reduce(tensor)  # all are still in step
    return f"{shared} {int(tensor[0])}"


def _refuse(pid: int, fd: int) -> Any:
    raise PermissionError(f"/proc/{pid}/fd/{fd}")


def test_all_fall_back_where_one_cannot(tmp_path: Path) -> None:
    assert run(tmp_path, 3, one_cannot) == ["None 3"] * 3


def endless(rank: int, world: Any, *, leaves: Callable[[], None]) -> tuple[float, str]:
    ours = collectives(world)
    tensor, began_s = torch.ones(1000), monotonic_s()
    try:
        for turn in range(10**9):
            if rank == 1 and turn == 50:
                leaves()
            ours.all_reduce(tensor, group=world)
    except Exception as error:
        return monotonic_s() - began_s, f"{groups.peer_left(error)}: {error}"
    raise AssertionError


def test_survivors_of_a_kill_leave(tmp_path: Path) -> None:
    def body(rank: int, world: Any) -> Any:
        return endless(rank, world, leaves=lambda: os.kill(os.getpid(), signal.SIGKILL))

    first, _, last = run(tmp_path, 3, body)
    for _, reason in (first, last):
        assert reason.startswith("True: ")
        assert "has ended" in reason or "left the group" in reason


def test_leaving_the_groups_makes_peers_leave(tmp_path: Path) -> None:
    """As a rank does when its step raises: the others must not wait for it."""

    def body(rank: int, world: Any) -> Any:
        return endless(rank, world, leaves=groups.leave_groups)

    first, _, last = run(tmp_path, 3, body)
    for _, reason in (first, last):
        assert reason.startswith("True: ")
        assert "a peer has left" in reason
