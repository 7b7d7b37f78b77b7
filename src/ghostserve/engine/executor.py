"""vLLM's multiprocess executor, with workers that can be replaced and steps that are committed.

A step is sent, waited for, and accepted: its sampled result is here *and* every rank has stamped it DONE in the
arena. Whatever goes wrong before is handed to the performer, which repairs the group in place; then the step is
sent again. To the engine core above it is a slow step, nothing else.
"""

from __future__ import annotations

import logging
import math
import os
import weakref
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NoReturn

import cloudpickle
from vllm import envs
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from ghostserve.arena.control import LANE_ENGINE, ControlPage, StampStatus
from ghostserve.arena.handoff import ARENA_ADDRESS_ENV, fetch_segments
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.engine import logs, session, weights_identity
from ghostserve.engine.guard import Guard
from ghostserve.engine.leftovers import Leftovers
from ghostserve.engine.limits import refuse_unsupported, refuse_unsupported_kv
from ghostserve.engine.messages import SampleMessage, StepMessage
from ghostserve.engine.monitor import Monitor
from ghostserve.engine.perform import Outcome, Performer
from ghostserve.engine.request_state import WorkersView
from ghostserve.engine.ring import RankRaised, RanksDied, RankSilent, Ring
from ghostserve.engine.scheduler import FailedStep
from ghostserve.engine.settings import Settings
from ghostserve.engine.start import Starter
from ghostserve.engine.status import StatusWriter
from ghostserve.recovery.detector import RUNNING, RankView, dead_ranks, verdict
from ghostserve.shadow.manifest import Piece

logger = logging.getLogger(__name__)

STAMP_POLL_S = 0.0002
WEIGHT_CHANGES = ("reload_weights", "update_weights", "load_model")


@dataclass(slots=True, kw_only=True)
class OpenStep:
    """The step in flight. `sent` is what the workers got: the engine core's own, or less after rung 3."""

    step: int
    scheduler_output: Any
    sent: Any
    pieces: tuple[Piece, ...]
    grammar_output: Any = None
    sampling: bool = False


class LazyFuture(Future[Any]):
    """Waits, and recovers if it must, in the thread that asks for the result."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self._run = run

    def result(self, timeout: float | None = None) -> Any:
        if not self.done():
            try:
                self.set_result(self._run())
            except BaseException as error:
                self.set_exception(error)
        return super().result(timeout)


class GhostExecutor(MultiprocExecutor):
    """Executor for `--distributed-executor-backend ghostserve.engine.executor.GhostExecutor`."""

    supports_pp = False

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return False

    # -- start and end ---------------------------------------------------------------------------------

    def _init_executor(self) -> None:
        logs.join_vllm()
        refuse_unsupported(self.vllm_config)
        self._finalizer = weakref.finalize(self, self.shutdown)
        self.is_failed = False
        self.failure_callback: Any = None
        self._get_parallel_sizes()
        self.settings = Settings.from_environment()
        self.leftovers = Leftovers()
        self.weights = weights_identity.identity(self.model_config.model)
        self.weights_changed_by: str | None = None  # an RPC that changed them in memory
        self._connect_arena()
        self.starter = Starter(self, self.settings)
        self.starter.start_all()
        self.note_segments()
        self.futures_queue: deque[Any] = deque()
        self.output_rank = self._get_output_rank()
        self.ring = Ring(self)
        self.view = WorkersView()
        self.kv_cache_configs: list[Any] = []
        self.open_step: OpenStep | None = None
        self._step = 0
        self.performer = Performer(self)
        self.monitor = Monitor(self)
        self.monitor.start()
        self.status = StatusWriter(self)

    def _connect_arena(self) -> None:
        address = os.environ[ARENA_ADDRESS_ENV]
        segments = fetch_segments(address, timeout_s=self.settings.arena_timeout_s)
        page = ControlPage(segments["control"], lane=LANE_ENGINE)
        guard = Guard(
            page=page,
            segments=segments,
            address=address,
            limits=self.settings.guard_limits(self.vllm_config),
            ranks=self.world_size,
        )
        self.session = session.Session(guard=guard, page=page)
        session.start(self.session)

    def note_segments(self) -> None:
        """Remember what named shared memory vLLM made, and whose it is."""
        self.leftovers.note_all([worker.proc.pid for worker in self.workers])

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        for config in kv_cache_configs:
            refuse_unsupported_kv(config)
        self.kv_cache_configs = kv_cache_configs
        super().initialize_from_config(kv_cache_configs)

    def compile_or_warm_up_model(self) -> None:
        super().compile_or_warm_up_model()
        layouts = self.collective_rpc("ghost_layout")
        geometry = self.session.guard.configure(layouts)
        self.collective_rpc("ghost_map", args=(geometry,))
        self.status.start()

    def start_worker_monitor(self, inline: bool = False) -> None:
        """Ours is another: a death is repaired, not the end."""

    def end_without_server(self) -> NoReturn:
        """The front process was killed: nobody can be served, so nothing may stay."""
        logger.critical("the server process is gone: ending")
        for worker in self.workers:
            worker.proc.kill()
        self.leftovers.remove_all()
        os._exit(1)

    def shutdown(self) -> None:
        if not getattr(self, "shutting_down", False):
            for part in ("monitor", "status"):
                if hasattr(self, part):
                    getattr(self, part).stop()
            if hasattr(self, "session"):
                self.session.guard.close()
        super().shutdown()

    # -- the step --------------------------------------------------------------------------------------

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        with self.session.lock:
            self._step += 1
            self.open_step = OpenStep(
                step=self._step,
                scheduler_output=scheduler_output,
                sent=scheduler_output,
                pieces=getattr(scheduler_output, "ghost_pieces", ()),
            )
            self._send_step(self.open_step)
        future = LazyFuture(self._complete)
        return future if non_block else future.result()

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        with self.session.lock:
            step = self.open_step
            assert step is not None, "sample_tokens without a step"
            step.grammar_output, step.sampling = grammar_output, True
            self._send_sample(step)
        future = LazyFuture(self._complete)
        return future if non_block else future.result()

    def _send_step(self, step: OpenStep) -> None:
        message = StepMessage(
            epoch=self.performer.epoch, step=step.step, scheduler_output=step.sent, pieces=step.pieces
        )
        self.ring.send("ghost_step", message, reply_rank=self.output_rank, gone=self._known_dead())

    def _send_sample(self, step: OpenStep) -> None:
        message = SampleMessage(
            epoch=self.performer.epoch, step=step.step, grammar_output=step.grammar_output
        )
        self.ring.send("ghost_sample", message, reply_rank=self.output_rank, gone=self._known_dead())

    def _known_dead(self) -> frozenset[int]:
        """Ranks that will not read what is sent now; looked up only once a death was noticed."""
        return frozenset() if self.monitor.noticed_at_s is None else self.ring.dead()

    def _complete(self) -> Any:
        """Bring the open step through its present stage, repairing as often as the performer allows."""
        with self.session.lock:
            step = self.open_step
            assert step is not None
            send_again = False
            while True:
                try:
                    return self._run_stage(step, send_again=send_again)
                except (RanksDied, RankRaised, RankSilent) as failure:
                    outcome = self.performer.recover(failure)
                    if outcome is Outcome.STEP_FAILED:
                        self.session.guard.withdraw(step.pieces)
                        # Now: a client may leave before the scheduler sees the output, and take its request along.
                        self.session.scheduler.evict_unwritten(step.sent)
                        self.open_step = None
                        return FailedStep.of(step.sent)
                    send_again = True

    def _run_stage(self, step: OpenStep, *, send_again: bool) -> Any:
        if send_again:
            self._send_step(step)
        output = self._wait_for_step() if send_again or not step.sampling else None
        if output is None and step.sampling:
            if send_again:
                self._send_sample(step)
            output = self._wait_for_step()
        if output is not None:
            self._accept(step, output)
        return output

    def _wait_for_step(self) -> Any:
        started_s = monotonic_s()
        try:
            return self.ring.wait_for_reply(
                self.output_rank,
                deadline_s=started_s + envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS,
                failed=self._failed_rank,
                expect_alive=range(self.world_size),
            )
        except RankSilent as failure:
            raise self._who_is_silent(started_s, failure) from None

    def _who_is_silent(self, started_s: float, failure: RankSilent) -> RankSilent:
        """The ranks that hold up the step, by their stamps: not necessarily the one that was to answer."""
        limit_s = float(envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)
        epoch, step = self._open_id()
        verdicts = verdict(
            monotonic_s(),
            [self._view_of(rank) for rank in range(self.world_size)],
            epoch=epoch,
            step=step,
            step_started_at_s=started_s,
            deadline_s=limit_s,
            all_stuck_s=limit_s,
        )
        reason = "; ".join(f"rank {found.rank}: {found.reason}" for found in verdicts)
        return RankSilent(dead_ranks(verdicts) or failure.ranks, reason)

    def _view_of(self, rank: int) -> RankView:
        stamp, process = self.session.page.read_stamp(rank), self.workers[rank].proc
        at_work = stamp.status in (StampStatus.BEGUN, StampStatus.STAGED)
        return RankView(
            rank=rank,
            exited=not process.is_alive(),
            exit_code=process.exitcode,
            stamp_epoch=stamp.epoch,
            stamp_step=stamp.step,
            stamp_status=RUNNING if at_work else stamp.status.name.lower(),
            stamp_at_s=stamp.at_s,
        )

    def _failed_rank(self) -> int | None:
        """A rank whose stamp says that the open step failed there."""
        assert self.open_step is not None
        for rank in range(self.world_size):
            stamp = self.session.page.read_stamp(rank)
            failed = stamp.status in (StampStatus.FAILED, StampStatus.PEER_LEFT)
            if failed and (stamp.epoch, stamp.step) == self._open_id():
                return rank
        return None

    def _open_id(self) -> tuple[int, int]:
        assert self.open_step is not None
        return self.performer.epoch, self.open_step.step

    def _accept(self, step: OpenStep, output: Any) -> None:
        """The commit rule: result in hand and every rank's stamp in the arena."""
        self._wait_for_stamps()
        epoch = self.performer.epoch
        self.view.accept(step.sent, output)
        self.session.guard.commit(epoch=epoch, step=step.step, pieces=step.pieces)
        self.open_step = None
        self.performer.step_accepted()

    def _wait_for_stamps(self) -> None:
        page, expected = self.session.page, self._open_id()
        deadline_s = monotonic_s() + envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS
        for rank in range(self.world_size):
            while True:
                stamp = page.read_stamp(rank)
                if (stamp.epoch, stamp.step) == expected and stamp.status is StampStatus.DONE:
                    break
                if (failed := self._failed_rank()) is not None:
                    raise RankRaised(failed, f"rank {failed} failed its step")
                if died := self.ring.dead():
                    raise RanksDied(died, f"rank {sorted(died)} died before its stamp")
                if monotonic_s() > deadline_s:
                    raise RankSilent(frozenset({rank}), f"rank {rank} did not stamp step {expected[1]}")
                sleep_s(STAMP_POLL_S)

    # -- other calls -----------------------------------------------------------------------------------

    def collective_rpc(
        self,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        unique_reply_rank: int | None = None,
        **aggregators: Any,
    ) -> Any:
        """vLLM's RPC, bounded once the server is up. A rank that dies meanwhile is replaced, and the call repeated."""
        with self.session.lock:
            if method in WEIGHT_CHANGES and self.session.scheduler is not None:
                self.weights_changed_by = method
            try:
                results = self._call(method, timeout, args, kwargs or {}, unique_reply_rank)
            except (RanksDied, RankSilent) as failure:
                if self.session.scheduler is None:
                    raise RuntimeError(f"a worker ended while the server was starting: {failure}") from None
                self.performer.recover(failure)
                if isinstance(failure, RankSilent):
                    raise TimeoutError(f"RPC call to {method} timed out: {failure}") from None
                results = self._call(method, timeout, args, kwargs or {}, unique_reply_rank)
        if not non_block:
            return results
        future: Future[Any] = Future()
        future.set_result(results)
        return future

    def _call(
        self,
        method: Any,
        timeout: float | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rank: int | None,
    ) -> Any:
        assert self.rpc_broadcast_mq is not None
        name = method if isinstance(method, str) else cloudpickle.dumps(method)
        self.rpc_broadcast_mq.enqueue((name, args, kwargs, rank))
        ranks = range(self.world_size) if rank is None else [rank]
        serving = self.session.scheduler is not None  # before that a model loads, for as long as it takes
        longest_s = envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS if serving else math.inf
        try:
            replies = self.ring.collect(ranks, timeout_s=longest_s if timeout is None else timeout)
        except (RankRaised, RankSilent) as failure:
            # Replies that are on their way would be taken for answers to the next call.
            silent = self.ring.drain(
                range(self.world_size), gone=(), timeout_s=self.settings.config.leave_timeout
            )
            if silent:
                raise RankSilent(silent, f"ranks {sorted(silent)} do not answer") from None
            if isinstance(failure, RankSilent):
                raise TimeoutError(f"RPC call to {method} timed out: {failure.reason}") from None
            raise RuntimeError(f"Worker failed with error '{failure.reason}'") from None
        return list(replies.values()) if rank is None else replies[rank]

    def give_up(self, reason: str) -> None:
        """The group cannot be repaired: clients get an error and the process ends."""
        logger.critical("giving up: %s", reason)
        self.status.failed = reason
        self.status.write()
        self.is_failed = True
        callback, self.failure_callback = self.failure_callback, None
        if callback is not None:
            callback()
