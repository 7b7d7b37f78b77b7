"""Carries out an injected fault at a named point, on the process that passes it. Nothing happens unless one was armed
from outside.

Each is the real thing where one can be had: a signal, a bad read, the kernel's out-of-memory killer, a collective
without the others.
"""

from __future__ import annotations

import collections
import ctypes
import itertools
import logging
import os
import signal
import struct
import subprocess
from dataclasses import replace
from typing import NoReturn

import torch.distributed as dist
from vllm.distributed import parallel_state

from ghostserve.arena.control import ControlPage, Fault, FaultAction, FaultPoint
from ghostserve.arena.memory_group import MemoryGroup
from ghostserve.clock import sleep_s
from ghostserve.shadow.packed_pieces import HEADER_WORDS, PackedPieces

logger = logging.getLogger(__name__)

SPIN_ITERATIONS = 60 * 10**9  # ten minutes and more, for whoever has no detector
OOM_PIECE_BYTES = 1 << 20
NO_FRAME = 0xFFFFFFFF
_PR_SET_DUMPABLE = 4


class InjectedFault(RuntimeError):
    """Raised by the `raise` action, as a model's own error would be."""


def hit(page: ControlPage, point: FaultPoint, rank: int) -> Fault | None:
    """Suffer here what is armed for this point and rank. One that is the caller's to carry out is returned."""
    fault = page.take_fault(point, rank)
    if fault is None:
        return None
    match fault.action:
        case FaultAction.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        case FaultAction.HANG:
            os.kill(os.getpid(), signal.SIGSTOP)
        case FaultAction.RAISE:
            raise InjectedFault(f"injected at {point.value} on rank {rank}")
        case FaultAction.SEGFAULT:
            _segfault()
        case FaultAction.SPIN:
            _spin()
        case FaultAction.BLOCKED:
            _block()
        case FaultAction.OOM:
            _run_out_of_memory()
        case _:
            return fault
    return None


def after_model(fault: Fault, pieces: PackedPieces, *, took_s: float) -> PackedPieces:
    """Carry out what concerns a step whose forward took `took_s`; the pieces that are to be staged now."""
    slow_down(fault, took_s=took_s)
    if fault.action is FaultAction.FAIL_STAGING:
        return _out_of_bounds(pieces)
    return pieces


def slow_down(fault: Fault, *, took_s: float) -> None:
    """Make of what `took_s` something so many times slower, if that is what was armed."""
    if fault.action is FaultAction.SLOW:
        sleep_s(max(0, fault.argument - 1) * took_s)


def _out_of_bounds(pieces: PackedPieces) -> PackedPieces:
    """The same pieces in frames that are not there: staging refuses them, as it would if the arena were damaged."""
    width = HEADER_WORDS + pieces.ranks
    words = list(struct.unpack(f"<{len(pieces) * width}I", pieces.words))
    for at in range(0, len(words), width):
        words[at + HEADER_WORDS : at + width] = [NO_FRAME] * pieces.ranks
    return replace(pieces, words=struct.pack(f"<{len(words)}I", *words))


def _segfault() -> None:
    """As in C: no handler of Python's; and no core dump, which takes seconds."""
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)
    ctypes.string_at(0)


def _spin() -> None:
    """A loop in C that never looks whether another thread wants the interpreter's lock."""
    collections.deque(itertools.repeat(0, SPIN_ITERATIONS), maxlen=0)


def _block() -> None:
    """Ends when a peer leaves the group, or when gloo's own limit is reached; both raise."""
    dist.barrier(group=parallel_state.get_world_group().cpu_group)


def _run_out_of_memory() -> NoReturn:
    """Allocate until the kernel kills us. Raises UnsupportedError without the right to make a cgroup."""
    group = MemoryGroup.create(f"ghostserve-fault-{os.getpid()}")
    # Nobody is left to remove the group once we are killed: a shell of a few lines waits for that.
    subprocess.Popen(
        [
            "/bin/sh",
            "-c",
            'n=0; while kill -0 "$0" 2>/dev/null && [ $n -lt 600 ]; do sleep 0.1; n=$((n+1)); done; rmdir "$1"',
            str(os.getpid()),
            str(group.path),
        ],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    logger.warning("injected: allocating without end in %s", group.path)
    group.enter()
    held = []
    while True:
        held.append(bytearray(OOM_PIECE_BYTES))
        for at in range(0, OOM_PIECE_BYTES, 4096):
            held[-1][at] = 1
