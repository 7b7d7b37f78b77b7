"""Collectives of the CPU platform that a survivor can leave: over shared memory, or over gloo where that cannot be.

vLLM's own shared-memory collectives spin for ever on a dead peer. Ours (`arena/shared_group.py`) end when a peer's
process ends or any rank abandons the group; gloo's end when a connection breaks, and cost some hundred times more.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

from ghostserve.arena.memfd import Segment
from ghostserve.arena.shared_group import Dtype, SharedGroup, memory_bytes

logger = logging.getLogger(__name__)

SLOT_BYTES = 1 << 20  # what a rank puts in at once; longer tensors go in parts
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
_progress: list[Any] = []  # where this process shows how far it is; empty if nobody looks
_named: dict[str, TensorParallelCollectives] = {}  # of this process, by vLLM's unique name of the group


class AbandonableCommunicator(CpuCommunicator):
    """vLLM's CPU communicator with other collectives in its `dist_module`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.world_size > 1 and self.unique_name.startswith("tp"):
            before, shared = _named.get(self.unique_name), SharedMemory.form(self.device_group)
            if before is not None and before.over_shared_memory and shared is None and self.world_size > 2:
                # gloo adds in another order: what comes after would not be what would have come.
                raise RuntimeError("collectives were over shared memory and cannot be again")
            self.dist_module = TensorParallelCollectives(self.unique_name, self.device_group, shared)
            self.supports_tensor_dict = shared is not None  # else vLLM sends them over gloo, piece by piece

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        if not self.supports_tensor_dict:
            return super().broadcast(tensor, src)
        self.dist_module.broadcast(tensor, src)
        return tensor

    def send(self, tensor: torch.Tensor, dst: int | None = None) -> None:
        to = (self.rank_in_group + 1) % self.world_size if dst is None else dst
        if self.supports_tensor_dict:
            self.dist_module.send(tensor, to)
        else:
            super().send(tensor, to)

    def recv(self, size: torch.Size, dtype: torch.dtype, src: int | None = None) -> torch.Tensor:
        source = (self.rank_in_group - 1) % self.world_size if src is None else src
        if self.supports_tensor_dict:
            tensor: torch.Tensor = self.dist_module.recv(size, dtype, source)
            return tensor
        return super().recv(size, dtype, source)

    def _all_group_ranks_share_shm_group_name(self) -> bool:
        return False  # the stock shared-memory collectives stay off

    def destroy(self) -> None:
        if isinstance(self.dist_module, TensorParallelCollectives):
            self.dist_module.abandon()
        super().destroy()


class TensorParallelCollectives:
    """The part of `torch.distributed` that CpuCommunicator calls, for one group.

    Compiled code calls operators that name the group and find it when they run: so it outlives the group, and serves
    the one that is formed under the same name after a loss.
    """

    def __init__(self, name: str, group: dist.ProcessGroup, shared: SharedMemory | None) -> None:
        self._name = name
        self._device_group = group
        self._rank = dist.get_rank(group)
        self._shared = shared
        _named[name] = self

    @property
    def over_shared_memory(self) -> bool:
        """Whether it is, or was until it was abandoned."""
        return self._shared is not None

    def all_reduce(self, tensor: torch.Tensor, group: Any = None) -> None:
        """Sum in place, in the order of the ranks: the same bits on all of them."""
        if torch.compiler.is_compiling():
            torch.ops.ghostserve.all_reduce(tensor, self._name)
        else:
            self.all_reduce_now(tensor)

    def all_gather_into_tensor(self, output: torch.Tensor, tensor: torch.Tensor, group: Any = None) -> None:
        """Every rank's tensor, one after the other; `output` is contiguous."""
        if torch.compiler.is_compiling():
            torch.ops.ghostserve.all_gather(output, tensor, self._name)
        else:
            self.all_gather_now(output, tensor)

    def gather(self, tensor: torch.Tensor, parts: list[torch.Tensor] | None, dst: int, group: Any) -> None:
        """Every rank's tensor to the rank `dst` (of all ranks, not of the group)."""
        if self._shared is None:
            dist.gather(tensor, parts, dst=dst, group=self._device_group)
            return
        flat = tensor.contiguous()
        if parts is None:
            assert dist.get_group_rank(self._device_group, dst) != self._rank
            self._shared.group.all_gather(flat.data_ptr(), 0, nbytes=flat.nbytes)
            return
        every = torch.empty((len(parts), *flat.shape), dtype=flat.dtype)
        self._shared.group.all_gather(flat.data_ptr(), every.data_ptr(), nbytes=flat.nbytes)
        for part, row in zip(parts, every, strict=True):
            part.copy_(row)

    def all_reduce_now(self, tensor: torch.Tensor) -> None:
        dtype = DTYPES.get(tensor.dtype)
        if self._shared is None or dtype is None:
            dist.all_reduce(tensor, group=self._device_group)
            return
        flat = tensor.contiguous()
        self._shared.group.all_reduce(flat.data_ptr(), count=flat.numel(), dtype=dtype)
        if flat is not tensor:
            tensor.copy_(flat)

    def all_gather_now(self, output: torch.Tensor, tensor: torch.Tensor) -> None:
        flat = tensor.contiguous()
        if self._shared is None:
            dist.all_gather_into_tensor(output, flat, group=self._device_group)
            return
        assert output.is_contiguous()
        self._shared.group.all_gather(flat.data_ptr(), output.data_ptr(), nbytes=flat.nbytes)

    def set_timeout(self, timeout_s: float) -> None:
        """Bound every wait for a peer that lives."""
        if self._shared is not None:
            self._shared.group.set_timeout(timeout_s)

    def abandon(self) -> None:
        """Leave for good, and make the peers leave. May be called again."""
        if self._shared is not None:
            self._shared.abandon()

    # -- over shared memory alone: without it vLLM has ways of its own, over gloo -------------------------

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """The tensor of rank `src` of the group to all, in place."""
        assert self._shared is not None
        flat = tensor.contiguous()
        self._shared.group.broadcast(flat.data_ptr(), nbytes=flat.nbytes, source=src)
        if flat is not tensor:
            tensor.copy_(flat)

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """To rank `dst` of the group, which must ask for as much."""
        assert self._shared is not None
        flat = tensor.contiguous()
        self._shared.group.send(flat.data_ptr(), nbytes=flat.nbytes, to=dst)

    def recv(self, size: Sequence[int], dtype: torch.dtype, src: int) -> torch.Tensor:
        """What rank `src` of the group sends next."""
        assert self._shared is not None
        tensor = torch.empty(size, dtype=dtype)
        self._shared.group.recv(tensor.data_ptr(), nbytes=tensor.nbytes, source=src)
        return tensor

    def send_tensor_dict(self, values: dict[str, Any], dst: int) -> None:
        """Tensors and what can be pickled, to rank `dst` of the group."""
        tensors = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
        outline = {key: _Outline.of(value) if key in tensors else value for key, value in values.items()}
        header = torch.frombuffer(bytearray(pickle.dumps(outline)), dtype=torch.uint8)
        for tensor in (torch.tensor([header.numel()]), header, *tensors.values()):
            self.send(tensor, dst)

    def recv_tensor_dict(self, src: int) -> dict[str, Any]:
        """What rank `src` of the group sends as a dictionary, in the same order."""
        length = int(self.recv((1,), torch.int64, src).item())
        outline = pickle.loads(self.recv((length,), torch.uint8, src).numpy().tobytes())
        return {
            key: self.recv(value.size, value.dtype, src) if isinstance(value, _Outline) else value
            for key, value in outline.items()
        }


@dataclass(frozen=True, slots=True)
class _Outline:
    """What a receiver must know of a tensor before it comes."""

    size: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Outline:
        return cls(tuple(tensor.shape), tensor.dtype)


def _all_reduce(tensor: torch.Tensor, group: str) -> None:
    _named[group].all_reduce_now(tensor)


def _all_gather(output: torch.Tensor, tensor: torch.Tensor, group: str) -> None:
    _named[group].all_gather_now(output, tensor)


def _nothing(*_: Any) -> None:
    """What the operators do to tensors without data: all they change is what is in their first one."""


_library = torch.library.Library("ghostserve", "DEF")
for _signature, _function in (
    ("all_reduce(Tensor(a!) tensor, str group) -> ()", _all_reduce),
    ("all_gather(Tensor(a!) output, Tensor tensor, str group) -> ()", _all_gather),
):
    _library.define(_signature)
    _library.impl(_signature.partition("(")[0], _function, "CPU")
    _library.impl(_signature.partition("(")[0], _nothing, "Meta")


class SharedMemory:
    """The memory of a group, mapped, and its peers' processes watched."""

    def __init__(self, segment: Segment, *, rank: int, pids: list[int]) -> None:
        """Raises OSError if a peer's process cannot be watched or the C library is not there."""
        self._segment = segment
        self._pidfds: list[int] = []
        try:
            for peer, pid in enumerate(pids):
                self._pidfds.append(-1 if peer == rank else os.pidfd_open(pid))
            self.group = SharedGroup(
                segment.array,
                rank=rank,
                ranks=len(pids),
                pidfds=self._pidfds,
                slot_bytes=SLOT_BYTES,
                timeout_s=dist.default_pg_timeout.total_seconds(),
                progress=_progress[0] if _progress else None,
            )
        except BaseException:
            self._close()
            raise

    @classmethod
    def form(cls, group: dist.ProcessGroup) -> SharedMemory | None:
        """Called by every rank of `group`; None for all of them if one cannot.

        Rank 0 brings the memory, anonymous, and the others open it through its process: same machine, same user.
        """
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        segment: Segment | None = None
        mine: SharedMemory | None = None
        reason = ""
        if rank == 0:
            segment = Segment.create("ghostserve-collectives", memory_bytes(ranks, SLOT_BYTES))
        try:
            said: list[Any] = [None] * ranks
            dist.all_gather_object(said, (os.getpid(), -1 if segment is None else segment.fd), group=group)
            try:
                if segment is None:
                    pid, fd = said[0]
                    segment = _open(pid, fd)
                mine = cls(segment, rank=rank, pids=[pid for pid, _ in said])
            except (OSError, AttributeError) as error:  # the library may be missing, or of another build
                reason = str(error)
            reasons: list[Any] = [None] * ranks
            dist.all_gather_object(reasons, reason, group=group)
        except BaseException:
            _give_up(mine, segment)
            raise
        if any(reasons):
            _give_up(mine, segment)
            logger.warning("collectives go over gloo, which is slow: %s", next(filter(None, reasons)))
            return None
        return mine

    def abandon(self) -> None:
        """Leave for good, and make the peers leave. May be called again."""
        self.group.abandon()
        self._close()

    def _close(self) -> None:
        pidfds, self._pidfds = self._pidfds, []
        for pidfd in pidfds:
            if pidfd >= 0:
                os.close(pidfd)
        self._segment.close()


def show_progress(words: Any) -> None:
    """From the next group on: where collectives note how far this process is (`shared_group.PROGRESS_WORDS`)."""
    _progress[:] = [words]


def abandon_all() -> None:
    """This process leaves every shared group that it is in; peers that wait for it leave, too."""
    for collectives in _named.values():
        collectives.abandon()


def set_timeout_of_all(timeout_s: float) -> None:
    """Bound every wait for a peer that lives, in every shared group of this process."""
    for collectives in _named.values():
        collectives.set_timeout(timeout_s)


def _open(pid: int, fd: int) -> Segment:
    opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        return Segment.attach(opened)
    except BaseException:
        os.close(opened)
        raise


def _give_up(mine: SharedMemory | None, segment: Segment | None) -> None:
    if mine is not None:
        mine.abandon()
    elif segment is not None:
        segment.close()
