"""Starts worker processes: at the server's start, and in place of a lost rank.

vLLM's own start-up always spawns, which pays for all imports again (7 s here); ours forks from a fork server
that has them done. A standby does so ahead of time, for whatever rank will be lost. The worker side is vLLM's WorkerProc with one difference: a newcomer joins the
executor's broadcast ring where the writer stands, instead of at its beginning.
"""

from __future__ import annotations

import copy
import gc
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from setproctitle import setproctitle
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.logger import configure_logging
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.executor.multiproc_executor import UnreadyWorkerProcHandle, WorkerProc

from ghostserve.arena.control import ControlPage, Mark
from ghostserve.arena.handoff import ARENA_ADDRESS_ENV, fetch_segments
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.engine import load_format, logs, rotary
from ghostserve.engine.process import WatchedProcess, start_within
from ghostserve.engine.weights_identity import ask_no_hub

logger = logging.getLogger(__name__)

PRELOAD_MODULE = "ghostserve.engine.preload"
STANDBY_TITLE = "ghostserve: standby"
WAITING = "waiting"  # what a standby says once it can take a rank
# How long a worker may take to end by itself once the engine core is gone.
ORPHAN_GRACE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStart:
    """What every worker process of a server needs. Some of it can only be inherited, not sent."""

    vllm_config: Any
    input_shm_handle: Any
    shared_worker_lock: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The rank that a process takes, and how.

    `join_at` is the ring index a newcomer starts reading at; None at the server's start. `cpus` pins the
    process on CPU platforms (a fork server's children do not see per-rank environment variables). `kv_bytes`: of a
    newcomer, whose size is known; a worker that is to find it out refuses where memory is in use. `weights_source`: of a
    newcomer, the files that the server started with, if they are known.
    """

    rank: int
    local_rank: int
    init_method: str
    is_driver_worker: bool
    join_at: int | None
    cpus: tuple[int, ...]
    kv_bytes: int | None
    weights_source: str | None


@dataclass(slots=True, kw_only=True)
class StartedProcess:
    """A process and the parent's ends of its pipes."""

    process: WatchedProcess
    ready: Connection  # it reports READY here once it has its model
    death: Connection  # closed: it ends
    orders: Connection | None  # of a standby: it says that it waits, and is told its place

    def handle(self, rank: int) -> UnreadyWorkerProcHandle:
        """As vLLM wants it."""
        return UnreadyWorkerProcHandle(self.process, rank, self.ready, self.death)


class GhostWorkerProc(WorkerProc):
    """vLLM's worker process; a newcomer joins the ring at the writer's index."""

    def __init__(self, start: WorkerStart, place: Place) -> None:
        self._join_at = place.join_at
        super().__init__(
            vllm_config=_config_of(start, place),
            local_rank=place.local_rank,
            rank=place.rank,
            distributed_init_method=place.init_method,
            input_shm_handle=start.input_shm_handle,
            shared_worker_lock=start.shared_worker_lock,
            is_driver_worker=place.is_driver_worker,
        )

    def _init_message_queues(self, input_shm_handle: Any, vllm_config: Any) -> None:
        super()._init_message_queues(input_shm_handle, vllm_config)
        if self._join_at is not None and self.rpc_broadcast_mq is not None:
            self.rpc_broadcast_mq.current_idx = self._join_at

    def wait_until_queues_ready(self) -> None:
        """The stock handshake; a newcomer skips the ring's, which its peers did at the server's start."""
        if self._join_at is None and self.rpc_broadcast_mq is not None:
            self.rpc_broadcast_mq.wait_until_ready()
        assert self.worker_response_mq is not None
        self.worker_response_mq.wait_until_ready()


def fork_server(models: list[str]) -> Any:
    """The start context, with all imports done once in the fork server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD_MODULE, *models])
    return context


def start_process(
    context: Any, start: WorkerStart, place: Place | None, *, timeout_s: float
) -> StartedProcess:
    """Start a process for a rank, or a standby for any. Raises OSError or EOFError."""
    ready_reader, ready_writer = context.Pipe(duplex=False)
    death_reader, death_writer = context.Pipe(duplex=False)
    ours, theirs = context.Pipe() if place is None else (None, None)
    process = WatchedProcess(
        target=worker_main,
        args=(start, place, ready_writer, death_reader, theirs),
        name="VllmWorker-standby" if place is None else f"VllmWorker-{place.rank}",
        daemon=True,
    )
    start_within(process, timeout_s=timeout_s)
    for end in (ready_writer, death_reader, theirs):
        if end is not None:
            end.close()
    return StartedProcess(process=process, ready=ready_reader, death=death_writer, orders=ours)


def worker_main(
    start: WorkerStart, place: Place | None, ready: Connection, death: Connection, orders: Connection | None
) -> None:
    """A worker process from first to last line."""
    # All that the fork server imported is here to stay: vLLM collects garbage twice while it loads a model, which took
    # 0.5 s each over this heap and copied every page of it.
    gc.freeze()
    stopping = threading.Event()
    _install_signal_handlers(stopping)
    if logging_config := getattr(start.vllm_config, "logging_config", None):
        configure_logging(logging_config)
    logs.join_vllm()
    queues: list[MessageQueue | None] = []
    _watch_parent(death, stopping, queues)  # also while it waits for peers that may never come
    if place is None:
        assert orders is not None
        place = _stand_by(start, orders)
    if place.join_at is not None:
        ask_no_hub()
    _pin(place.cpus)
    _mark_started(place.rank)
    worker: GhostWorkerProc | None = None
    try:
        worker = GhostWorkerProc(start, place)
        queues += [worker.rpc_broadcast_mq, worker.worker_response_mq]
        assert worker.worker_response_mq is not None
        ready.send(
            {
                "status": WorkerProc.READY_STR,
                "handle": worker.worker_response_mq.export_handle(),
                "peer_response_handles": worker.peer_response_handles,
            }
        )
        worker.wait_until_queues_ready()
        ready.close()
        worker.worker_busy_loop()
    except SystemExit:
        raise
    except Exception:
        if not stopping.is_set():
            logger.exception("rank %d ends", place.rank)
        stopping.set()
    finally:
        ready.close()
        if worker is not None:
            worker.shutdown()


def _stand_by(start: WorkerStart, orders: Connection) -> Place:
    """Do all that does not depend on the rank, say so, and wait to be told. Ends with the engine core.

    Layers read their rank when they are built, so the model is built once that is known.
    """
    setproctitle(STANDBY_TITLE)
    # What WorkerProc does first; here it finds nothing left to do, or little.
    load_general_plugins()
    current_platform.register_triton_kernel_overrides()
    resolve_obj_by_qualname(start.vllm_config.parallel_config.worker_cls)
    rotary.prepare(start.vllm_config)
    for segment in fetch_segments(os.environ[ARENA_ADDRESS_ENV], timeout_s=10.0).values():
        segment.close()
    try:
        place: Place | None = None
        while place is None:  # asked whether it is there, it says so again
            orders.send(WAITING)
            place = orders.recv()
    except (EOFError, OSError):
        raise SystemExit from None
    orders.close()
    return place


def _config_of(start: WorkerStart, place: Place) -> Any:
    if place.kv_bytes is None:
        return start.vllm_config
    config = copy.copy(start.vllm_config)
    config.cache_config = copy.copy(config.cache_config)
    config.cache_config.kv_cache_memory_bytes = place.kv_bytes
    config.load_config = load_format.for_newcomer(config.load_config, place.weights_source)
    return config


def _install_signal_handlers(stopping: threading.Event) -> None:
    def stop(signum: int, frame: Any) -> None:
        if not stopping.is_set():
            stopping.set()
            raise SystemExit

    signal.signal(signal.SIGTERM, stop)
    # Ctrl-C reaches the whole foreground group: the front ends the server, a rank must not seem to die first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _pin(cpus: tuple[int, ...]) -> None:
    """Before any OpenMP region: all threads of this rank inherit the mask."""
    if not cpus:
        return
    os.sched_setaffinity(0, cpus)
    torch.set_num_threads(len(cpus))


def _mark_started(rank: int) -> None:
    segments = fetch_segments(os.environ[ARENA_ADDRESS_ENV], timeout_s=10.0)
    ControlPage(segments["control"]).mark(rank, Mark.PROCESS_STARTED, monotonic_s())
    for segment in segments.values():
        segment.close()


def _watch_parent(death: Connection, stopping: threading.Event, queues: list[MessageQueue | None]) -> None:
    """End with the engine core, even from within a collective that will never return."""

    def watch() -> None:
        try:
            death.recv()
        except (EOFError, OSError):
            stopping.set()
            for queue in queues:
                if queue is not None:
                    queue.shutdown()
            sleep_s(ORPHAN_GRACE_S)
            os._exit(0)

    threading.Thread(target=watch, daemon=True, name="ghostserve-parent").start()


def ring_readers_done(queue: MessageQueue, ranks: Callable[[], list[int]]) -> None:
    """Mark every slot of the ring as read by ranks that will never read again, so that the writer goes on."""
    for index in range(queue.buffer.max_chunks):
        with queue.buffer.get_metadata(index) as flags:
            for rank in ranks():
                flags[1 + rank] = 1
