"""Starts an executor's ranks: all of them with the server, or one in place of a lost one. Every wait has a bound."""

from __future__ import annotations

import math
import os
from typing import Any

import zmq
from vllm import envs
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.platforms import current_platform
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.utils.torch_utils import set_torch_threads_for_runtime
from vllm.v1.executor.multiproc_executor import WorkerProc, set_multiprocessing_worker_envs

from ghostserve.clock import monotonic_s
from ghostserve.engine.rendezvous import Meeting
from ghostserve.engine.settings import Settings
from ghostserve.engine.spawn import Place, StartedProcess, WorkerStart, fork_server, start_process
from ghostserve.engine.standbys import Standbys
from ghostserve.events.kinds import RankTaken
from ghostserve.types import FailureKind

HANDSHAKE_S = 60.0
START_LEAST_S, START_FACTOR = 20.0, 3.0


class Starter:
    """What is needed to start a rank's process, kept for as long as the server runs."""

    def __init__(self, executor: Any, settings: Settings) -> None:
        self._executor = executor
        self.meeting = Meeting(executor.world_size)
        self._omp = OMPProcessManager(executor.vllm_config)
        if cpus := self._cpus_of(0):
            os.environ["OMP_NUM_THREADS"] = str(len(cpus))
        self._context = fork_server(settings.preload_modules(executor.vllm_config))
        self._worker_lock = self._context.Lock()  # newcomers need it too: keep it referenced
        self._timeout_s = settings.config.start_timeout
        self._took_s: float | None = None  # the longest start so far; the first one imports everything
        page = executor.session.page
        self.standbys = Standbys(
            self.start_standby,
            wanted=settings.standbys(),
            on_death=lambda: page.ledger.count_failure(FailureKind.STANDBY),
            tell=page.events.tell,
        )

    def start_all(self) -> None:
        """Start every rank and wait until all are ready. Raises if one is not."""
        executor = self._executor
        set_multiprocessing_worker_envs(executor.local_world_size)
        executor.rpc_broadcast_mq = MessageQueue(
            executor.world_size,
            executor.local_world_size,
            max_chunk_bytes=envs.VLLM_MQ_MAX_CHUNK_BYTES_MB * 1024 * 1024,
        )
        executor.leftovers.note(executor.rpc_broadcast_mq.buffer.shared_memory.name)
        self.meet()
        unready: list[Any] = []
        began_s = monotonic_s()
        try:
            unready.extend(self.start_rank(rank, join_at=None) for rank in range(executor.world_size))
            executor.workers = WorkerProc.wait_for_ready(unready)
            self.ready_after(monotonic_s() - began_s)
            set_torch_threads_for_runtime()
            executor.response_mqs = [worker.worker_response_mq for worker in executor.workers]
            for queue in (executor.rpc_broadcast_mq, *executor.response_mqs):
                shake_hands(queue, timeout_s=HANDSHAKE_S)
            self.met()
        except BaseException:
            for handle in unready:
                if handle.death_writer is not None:
                    handle.death_writer.close()
                    handle.death_writer = None
            executor._ensure_worker_termination([handle.proc for handle in unready])
            raise

    def ready_after(self, took_s: float) -> None:
        """A start that went well took so long, weights included."""
        self._took_s = took_s if self._took_s is None else max(self._took_s, took_s)

    @property
    def bound_s(self) -> float:
        """How long a replacement may take: some times what any took so far, at most `--start-timeout`."""
        if self._took_s is None:
            return self._timeout_s
        return min(self._timeout_s, max(START_LEAST_S, START_FACTOR * self._took_s))

    def meet(self) -> None:
        """A new place to form the groups; whoever still waits at an older one is called off."""
        self.meeting.close()
        self.meeting = Meeting(self._executor.world_size)

    def met(self) -> None:
        """All ranks have met. NCCL's watchdog goes on asking the store; gloo does not need it any more."""
        if not current_platform.is_cuda():
            self.meeting.close()

    def start_rank(self, rank: int, *, join_at: int | None) -> Any:
        """Start a process for a rank; `join_at` where it is to enter the ring, None at the server's start."""
        self._executor.session.page.clear_marks(rank)
        self._executor.session.page.clear_progress(rank)
        place = self._place(rank, join_at=join_at)
        if join_at is not None and (standby := self.standbys.take()) is not None:
            handle = standby.send_to(place)
            self._tell_taken(rank, handle, standby=True)
            return handle
        # At the server's start the fork server imports everything first, from a cold disk perhaps.
        timeout_s = math.inf if join_at is None else self._timeout_s
        handle = start_process(self._context, self.worker_start(), place, timeout_s=timeout_s).handle(rank)
        if join_at is not None:
            self._tell_taken(rank, handle, standby=False)
        return handle

    def _tell_taken(self, rank: int, handle: Any, *, standby: bool) -> None:
        self._executor.session.page.events.tell(RankTaken(rank=rank, pid=handle.proc.pid, standby=standby))

    def start_standby(self) -> StartedProcess:
        """A process that waits to be told its rank."""
        return start_process(self._context, self.worker_start(), None, timeout_s=self._timeout_s)

    def worker_start(self) -> WorkerStart:
        """The same for all; as the server's configuration is now."""
        executor = self._executor
        return WorkerStart(
            vllm_config=executor.vllm_config,
            input_shm_handle=executor.rpc_broadcast_mq.export_handle(),
            shared_worker_lock=self._worker_lock,
        )

    def _place(self, rank: int, *, join_at: int | None) -> Place:
        executor = self._executor
        kv_bytes = None
        if join_at is not None:
            kv_bytes = sum(tensor.size for tensor in executor.kv_cache_configs[rank].kv_cache_tensors)
        return Place(
            rank=rank,
            local_rank=rank,
            init_method=self.meeting.url,
            is_driver_worker=executor._is_driver_worker(rank),
            join_at=join_at,
            cpus=self._cpus_of(rank),
            kv_bytes=kv_bytes,
            weights_source=None if join_at is None else executor.weights_source,
        )

    def _cpus_of(self, rank: int) -> tuple[int, ...]:
        """CPUs that vLLM binds a rank to; empty where it binds none."""
        lists = getattr(self._omp, "cpu_lists", None)
        return tuple(lists[rank]) if lists else ()


def shake_hands(queue: Any, *, timeout_s: float) -> None:
    """vLLM's handshake of a queue's two ends, bounded. Raises TimeoutError."""
    queue.local_socket.setsockopt(zmq.RCVTIMEO, int(timeout_s * 1000))
    try:
        queue.wait_until_ready()
    except zmq.Again:
        raise TimeoutError(f"a worker did not connect within {timeout_s:g} s") from None
    finally:
        queue.local_socket.setsockopt(zmq.RCVTIMEO, -1)
