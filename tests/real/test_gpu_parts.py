"""What is written for GPUs, as far as a machine without one can tell: it fits vLLM's code, and says what it does.

No test here has seen NCCL or a CUDA graph.
"""

from __future__ import annotations

import inspect
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator

from ghostserve.arena.control import CONTROL_BYTES, ControlPage
from ghostserve.arena.memfd import Segment
from ghostserve.arena.shared_group import GroupAbandoned, SharedGroup, memory_bytes
from ghostserve.clock import monotonic_s
from ghostserve.engine import communicator_cuda, graphs
from ghostserve.engine.communicator_cuda import COLLECTIVES, NO_WAY_OUT, AbandonableCudaCommunicator
from ghostserve.engine.epoch_watch import EpochWatch

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]

# Public names of vLLM's CUDA communicator that do not wait for a peer, or are reached through one that is refused.
OTHERS = {
    "allocate_combine_input", "checkpoint_prepare", "checkpoint_restore", "combine_into_output", "custom_all_gather",
    "custom_reduce_scatter", "destroy", "get_symmetric_memory_buffer", "reduce_scatterv_into_output", "resume", "suspend",
}  # fmt: skip


@pytest.fixture
def page() -> Iterator[ControlPage]:
    segment = Segment.create("ghostserve-test", CONTROL_BYTES)
    ControlPage.format(segment)
    yield ControlPage(segment, lane=0)
    segment.close()


def blocked_rank(ended: list[tuple[float, str]]) -> tuple[SharedGroup, threading.Thread]:
    """A rank that waits in a collective for one that never comes, in a thread; the native call holds no lock."""
    group = SharedGroup(
        np.zeros(memory_bytes(2, 4096), dtype=np.uint8),
        rank=0,
        ranks=2,
        pidfds=[-1, -1],
        slot_bytes=4096,
        timeout_s=30,
    )

    def wait() -> None:
        try:
            group.broadcast(np.zeros(8, dtype=np.uint8).ctypes.data, nbytes=8, source=1)
        except GroupAbandoned as error:
            ended.append((monotonic_s(), str(error)))

    thread = threading.Thread(target=wait)
    thread.start()
    return group, thread


def test_a_raised_epoch_ends_the_wait_of_another_thread(page: ControlPage) -> None:
    ended: list[tuple[float, str]] = []
    group, thread = blocked_rank(ended)
    with ExitStack() as stack:
        watch = EpochWatch(page, abandon=group.abandon)
        stack.callback(group.abandon)
        stack.callback(watch.stop)
        watch.groups_of(page.epoch)
        thread.join(timeout=0.5)
        assert thread.is_alive()  # negative control: nothing ends it while the epoch is that of its group
        raised_s = monotonic_s()
        page.epoch += 1
        thread.join(timeout=10)
    assert not thread.is_alive()
    ((left_s, reason),) = ended
    assert "left" in reason
    assert left_s >= raised_s


def test_groups_of_the_new_epoch_are_left_alone(page: ControlPage) -> None:
    left: list[int] = []
    watch = EpochWatch(page, abandon=lambda: left.append(page.epoch), poll_s=0.001)
    try:
        page.epoch = 7
        watch.groups_of(7)
        assert not wait_for(lambda: bool(left), timeout_s=0.2)
        page.epoch = 8
        assert wait_for(lambda: left == [8], timeout_s=5)
        assert not wait_for(lambda: len(left) > 1, timeout_s=0.2)
    finally:
        watch.stop()


def wait_for(condition: Any, *, timeout_s: float) -> bool:
    deadline_s = monotonic_s() + timeout_s
    while not condition() and monotonic_s() < deadline_s:
        threading.Event().wait(0.002)
    return bool(condition())


def test_every_collective_of_vllm_is_known() -> None:
    """One that is new in vLLM must be refused after an abort, or be named as harmless."""
    public = {name for name in dir(CudaCommunicator) if not name.startswith("_")}
    assert public == set(COLLECTIVES) | OTHERS


class FakeNccl:
    """As vLLM's PyNcclCommunicator: whoever destroys it twice before the first has ended frees it twice."""

    def __init__(self) -> None:
        self.destroyed = 0
        self.graphs_gone = threading.Event()

    def destroy(self) -> None:
        self.destroyed += 1
        assert self.graphs_gone.wait(timeout=10)


def made_by_hand() -> tuple[AbandonableCudaCommunicator, FakeNccl]:
    """As after a start, without a device."""
    made: Any = object.__new__(AbandonableCudaCommunicator)
    nccl = FakeNccl()
    rest = dict.fromkeys(("ca_comm", "aiter_ar_comm", "fi_ar_comm", "fi_pcie_ipc_ar_comm", "all2all_manager"))
    vars(made).update(abandoned=False, _abort=None, pynccl_comm=nccl, device_group=None, **rest)
    return made, nccl


@pytest.mark.parametrize("name", COLLECTIVES)
def test_an_abandoned_communicator_refuses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, nccl = made_by_hand()
    monkeypatch.setattr(communicator_cuda, "_formed", [made])
    try:
        getattr(made, name)(torch.zeros(1))
    except GroupAbandoned:
        pytest.fail("refused before it was abandoned")
    except Exception as error:  # the stock one, without a device
        print(f"as stock: {type(error).__name__}")
    for _ in range(2):
        communicator_cuda.abandon_all()
    with pytest.raises(GroupAbandoned, match=name):
        getattr(made, name)(torch.zeros(1))
    nccl.graphs_gone.set()
    made.destroy()
    assert nccl.destroyed == 1


def test_an_abort_is_not_waited_for_until_the_graphs_are_gone() -> None:
    """NCCL may hold it until then, and it is the thread that leaves which drops them."""
    made, nccl = made_by_hand()
    made.abandon()  # as the watch does; returns although the abort does not
    assert wait_for(lambda: nccl.destroyed == 1, timeout_s=5)
    threading.Timer(0.2, nccl.graphs_gone.set).start()
    assert not nccl.graphs_gone.is_set()
    made.destroy()
    assert nccl.graphs_gone.is_set()
    assert nccl.destroyed == 1
    assert made.pynccl_comm is None


def test_a_failed_abort_does_not_end_the_watch(page: ControlPage) -> None:
    tried: list[int] = []

    def abandon() -> None:
        tried.append(page.epoch)
        raise RuntimeError("injected")

    watch = EpochWatch(page, abandon=abandon, poll_s=0.001)
    try:
        for epoch in (1, 2):
            watch.groups_of(epoch - 1)
            page.epoch = epoch
            assert wait_for(lambda epoch=epoch: tried == list(range(1, epoch + 1)), timeout_s=5)
    finally:
        watch.stop()


def test_what_cannot_be_left_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in NO_WAY_OUT:
        monkeypatch.setenv(variable, "1")
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(disable_custom_all_reduce=False),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(fuse_allreduce_rms=True)),
    )
    off = communicator_cuda.switch_off_what_cannot_be_left(config)
    assert off == ["vLLM's custom all-reduce", *NO_WAY_OUT.values(), "the compiler pass fuse_allreduce_rms"]
    assert config.parallel_config.disable_custom_all_reduce
    assert communicator_cuda.switch_off_what_cannot_be_left(config) == []  # nothing is left to say


def test_vllm_knows_the_variables() -> None:
    from vllm import envs
    from vllm.config.compilation import PassConfig

    assert set(NO_WAY_OUT) <= set(envs.environment_variables)
    assert communicator_cuda.FUSED_PASS in PassConfig.__dataclass_fields__


def test_the_platform_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension that a build for CPUs lacks is stood in for: it is imported for its side effects alone."""
    monkeypatch.setitem(sys.modules, "vllm._C_stable_libtorch", types.ModuleType("stand-in"))
    from ghostserve.engine.platform_cuda import GhostCudaPlatform

    where = GhostCudaPlatform.get_device_communicator_cls()
    module, _, name = where.rpartition(".")
    assert getattr(sys.modules[module], name) is AbandonableCudaCommunicator


def test_graphs_are_dropped_and_captured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.compilation.cuda_graph import CUDAGraphWrapper
    from vllm.config import CUDAGraphMode

    wrapper: Any = object.__new__(CUDAGraphWrapper)
    wrapper.concrete_cudagraph_entries = {"a": 1}
    CUDAGraphWrapper._all_instances.add(wrapper)
    done: list[str] = []
    runner = SimpleNamespace(
        device=torch.device("cuda"),
        cudagraph_manager=SimpleNamespace(release_graphs=lambda: done.append("released")),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.PIECEWISE),
        max_num_tokens=64,
        _dummy_run=lambda tokens, **how: done.append(f"ran {tokens} {sorted(how)}"),
        capture_model=lambda: done.append("captured"),
    )
    monkeypatch.setattr(graphs, "current_platform", SimpleNamespace(new_graph_pool=lambda: "a new pool"))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: done.append("synchronized"))
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    on_a_cpu = SimpleNamespace(**{**vars(runner), "device": torch.device("cpu")})
    graphs.drop_graphs(on_a_cpu)
    graphs.capture_graphs(on_a_cpu, v2=True)
    assert wrapper.concrete_cudagraph_entries
    graphs.drop_graphs(runner)
    graphs.capture_graphs(runner, v2=True)
    assert not wrapper.concrete_cudagraph_entries
    assert done == ["released", "ran 64 ['skip_eplb']", "synchronized", "captured"]
    assert wrapper.graph_pool == runner.cudagraph_manager.pool == "a new pool"


def test_what_is_asked_of_the_runners_exists() -> None:
    """The names that graphs.py gives to vLLM's dummy runs."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as V1

    common = {"skip_eplb", "is_profile"}
    assert common | {"skip_attn"} <= set(inspect.signature(V2._dummy_run).parameters)
    v1 = inspect.signature(V1._dummy_run).parameters
    assert common | {"cudagraph_runtime_mode", "force_attention"} <= set(v1)
