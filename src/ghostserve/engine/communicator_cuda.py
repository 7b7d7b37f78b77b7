"""Collectives over NCCL that a survivor can leave. Written without a GPU and not run on one yet.

A kernel of NCCL waits for a dead peer for ever, and the thread that waits for the device with it. NCCL's way out is an
abort from another thread (`ncclCommAbort`): kernels end, with garbage, and the communicator is of no use any more.
`EpochWatch` calls it. What vLLM has beside NCCL (custom all-reduce, symmetric memory, FlashInfer) has no such way out,
and stays off.

Forming a communicator cannot be called off: a newcomer that dies in the middle of it is noticed when `--leave-timeout`
ends, and costs its peers.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator

from ghostserve.arena.shared_group import GroupAbandoned

logger = logging.getLogger(__name__)

# Those of CudaCommunicator that go over the wire. Once abandoned they must not: vLLM falls back to torch's own
# communicator, which would be made anew, among ranks of which some are gone.
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gatherv", "reduce_scatter", "reduce_scatterv", "gather", "broadcast", "send", "recv",
    "batch_isend_irecv", "dispatch", "dispatch_router_logits", "combine",
)  # fmt: skip
# Switched off, by the variable that does it.
NO_WAY_OUT = {
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "torch's symmetric memory",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "FlashInfer's all-reduce",
    "VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC": "FlashInfer's all-reduce over PCIe",
    "VLLM_USE_NCCL_SYMM_MEM": "NCCL's symmetric memory",
}
FUSED_PASS = "fuse_allreduce_rms"  # compiles FlashInfer's all-reduce into the model
ABORT_S = 6.0  # vLLM itself gives an abort 5 s
_lock = threading.Lock()  # of `_formed`, and of who begins an abort
_formed: weakref.WeakSet[AbandonableCudaCommunicator] = weakref.WeakSet()


class AbandonableCudaCommunicator(CudaCommunicator):
    """vLLM's CUDA communicator, which can be left from another thread."""

    pynccl_comm: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.abandoned = False
        self._abort: threading.Thread | None = None
        super().__init__(*args, **kwargs)
        with _lock:
            _formed.add(self)

    def abandon(self) -> None:
        """Leave for good; from any thread, and again. Peers notice only by their own abort.

        Returns at once: NCCL may hold the abort until the CUDA graphs that use the communicator are gone.
        """
        with _lock:
            if self.abandoned:
                return
            # Before the abort: what the main thread calls next must not find another way.
            self.abandoned = True
            self._abort = threading.Thread(target=self._do_abort, name="ghostserve-abort", daemon=True)
            self._abort.start()

    def _do_abort(self) -> None:
        # pynccl_comm stays where it is: without one, vLLM would turn to torch's own communicator.
        if self.pynccl_comm is not None:
            self.pynccl_comm.destroy()  # ncclCommAbort
        try:
            dist.distributed_c10d._abort_process_group(self.device_group)
        except Exception as error:  # of no use any more, whatever it says
            logger.debug("while aborting a group: %s", error)

    def destroy(self) -> None:
        """After the graphs were dropped. Waits for the abort, bounded."""
        self.abandon()
        if self._abort is not None:
            self._abort.join(timeout=ABORT_S)
        self.pynccl_comm = None  # aborted once: a second time would free it twice
        super().destroy()


def _refusing(name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def call(self: AbandonableCudaCommunicator, *args: Any, **kwargs: Any) -> Any:
        if self.abandoned:
            raise GroupAbandoned(f"{name}: this process has left the group")
        return stock(self, *args, **kwargs)

    return call


for _name in COLLECTIVES:
    setattr(AbandonableCudaCommunicator, _name, _refusing(_name, getattr(CudaCommunicator, _name)))


def abandon_all() -> None:
    """This process leaves every group that it is in: all aborts begin, none is waited for."""
    with _lock:
        formed = list(_formed)
    for communicator in formed:
        communicator.abandon()


def switch_off_what_cannot_be_left(vllm_config: Any) -> list[str]:
    """Leave NCCL alone of vLLM's ways to add up on CUDA. Returns what was switched off, in words."""
    off = []
    if not vllm_config.parallel_config.disable_custom_all_reduce:
        vllm_config.parallel_config.disable_custom_all_reduce = True
        off.append("vLLM's custom all-reduce")
    for variable, words in NO_WAY_OUT.items():
        if os.environ.get(variable) != "0":
            os.environ[variable] = "0"  # workers inherit it
            off.append(words)
    passes = getattr(vllm_config.compilation_config, "pass_config", None)
    if getattr(passes, FUSED_PASS, None):
        setattr(passes, FUSED_PASS, False)
        off.append(f"the compiler pass {FUSED_PASS}")
    return off
