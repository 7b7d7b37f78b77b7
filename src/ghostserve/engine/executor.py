"""vLLM's multiprocess executor, with workers that can be replaced and steps that are committed.

A step is sent, waited for, and accepted: its sampled result is here *and* every rank has stamped it DONE in the
arena. Whatever goes wrong before is handed to the performer, which repairs the group in place; then the step is
sent again. To the engine core above it is a slow step, nothing else.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections import deque
from concurrent.futures import Future
from typing import Any, NoReturn

from vllm import envs
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from ghostserve.arena.control import LANE_ENGINE, ControlPage
from ghostserve.arena.handoff import ARENA_ADDRESS_ENV, fetch_segments
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.engine import logs, session, weights_identity
from ghostserve.engine.calls import call_ranks
from ghostserve.engine.guard import Guard
from ghostserve.engine.in_flight import OpenStep, grammar_of
from ghostserve.engine.leftovers import Leftovers
from ghostserve.engine.limits import refuse_unsupported, refuse_unsupported_kv
from ghostserve.engine.messages import SampleMessage, StepMessage
from ghostserve.engine.monitor import Monitor
from ghostserve.engine.perform import Outcome, Performer
from ghostserve.engine.rebuild import give_up_steps
from ghostserve.engine.request_state import WorkersView
from ghostserve.engine.ring import RankRaised, RanksDied, RankSilent, Ring
from ghostserve.engine.scheduler import FailedStep
from ghostserve.engine.scrub import Scrubber
from ghostserve.engine.settings import Settings
from ghostserve.engine.start import Starter
from ghostserve.engine.status import StatusWriter
from ghostserve.engine.watch import Watch, size_of
from ghostserve.events.kinds import ServerGaveUp
from ghostserve.shadow.commit_rule import first_unfinished, has_failed
from ghostserve.shadow.packed_pieces import pack_pieces

logger = logging.getLogger(__name__)

STAMP_POLL_S, STAMP_SPIN_S = 0.0002, 0.002  # ranks finish a step within microseconds of each other


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
        return True

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
        self.weights = self.weights_now()  # before they are read
        self.weights_changed_by: str | None = None  # an RPC that changed them in memory
        self._connect_arena()
        self.starter = Starter(self, self.settings)
        self.starter.start_all()
        if weights_identity.is_downloaded(self.model_config.model):
            self.weights = self.weights_now()
        self.weights_source = weights_identity.source_of(**self._named())
        self.note_segments()
        self.futures_queue: deque[Any] = deque()
        self.output_rank = self._get_output_rank()
        self.ring = Ring(self)
        self.view = WorkersView()
        self.kv_cache_configs: list[Any] = []
        self.open_steps: list[OpenStep] = []  # sent and not accepted, oldest first
        self._newest: OpenStep | None = None  # may have been given up meanwhile
        self._step = 0
        self.watch = Watch(self)
        self.ring.hung, self.ring.at_fault = self.watch.stopped, self.watch.at_fault
        self.performer = Performer(self)
        self.monitor = Monitor(self)
        self.monitor.start()
        self.scrubber = Scrubber(self)
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

    def weights_now(self) -> Any:
        """What tells the model's files from others; see `weights_identity`."""
        return weights_identity.identity(**self._named())

    def _named(self) -> dict[str, Any]:
        model, cache = self.model_config, self.vllm_config.load_config.download_dir
        return {"model": model.model, "revision": model.revision, "cache": cache}

    def note_segments(self) -> None:
        """Remember what named shared memory vLLM made, and whose it is."""
        self.leftovers.note_all([worker.proc.pid for worker in self.workers])

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        with self.status.refusal_told():
            for config in kv_cache_configs:
                refuse_unsupported_kv(config)
        self.kv_cache_configs = kv_cache_configs
        super().initialize_from_config(kv_cache_configs)

    def compile_or_warm_up_model(self) -> None:
        super().compile_or_warm_up_model()
        layouts = self.collective_rpc("ghost_layout")
        with self.status.refusal_told():
            geometry = self.session.guard.configure(layouts)
        self.collective_rpc("ghost_map", args=(geometry,))
        self.status.start()
        self.starter.standbys.start(busy=lambda: self.performer.phase is not None)
        self.scrubber.start()

    def start_worker_monitor(self, inline: bool = False) -> None:
        """Ours is another: a death is repaired, not the end."""

    def end_without_server(self) -> NoReturn:
        """The front process was killed: nobody can be served, so nothing may stay."""
        logger.critical("the server process is gone: ending")
        for worker in self.workers:
            worker.proc.kill()
        self.starter.standbys.close()
        self.leftovers.remove_all()
        os._exit(1)

    def shutdown(self) -> None:
        if not getattr(self, "shutting_down", False):
            for part in ("monitor", "scrubber", "status"):
                if hasattr(self, part):
                    getattr(self, part).stop()
            if hasattr(self, "starter"):
                self.starter.standbys.close()
            if hasattr(self, "session"):
                self.session.guard.close()
        super().shutdown()

    # -- the step --------------------------------------------------------------------------------------

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        with self.session.lock:
            self._step += 1
            step = OpenStep(
                step=self._step,
                scheduler_output=scheduler_output,
                sent=scheduler_output,
                size=size_of(scheduler_output),
                sent_at_s=monotonic_s(),
                pieces=vars(scheduler_output).pop("ghost_pieces", ()),  # what is left on it is sent, too
            )
            self.open_steps.append(step)
            self._newest = step
            self._send_step(step)
        future = LazyFuture(lambda: self._complete(step, sampled=False))
        return future if non_block else future.result()

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        with self.session.lock:
            step = self._newest
            assert step is not None, "sample_tokens without a step"
            step.grammar_output, step.sampling = grammar_output, True
            if not step.done and not step.one_message:
                self._send_sample(step)
        future = LazyFuture(lambda: self._complete(step, sampled=True))
        return future if non_block else future.result()

    def _send_step(self, step: OpenStep) -> None:
        message = StepMessage(
            epoch=self.performer.epoch,
            step=step.step,
            scheduler_output=step.sent,
            pieces=pack_pieces(step.pieces, ranks=self.world_size),
            sample_at_once=step.one_message,
        )
        self.ring.send("ghost_step", message, reply_rank=self.output_rank, gone=self._known_dead())

    def _send_sample(self, step: OpenStep) -> None:
        message = SampleMessage(
            epoch=self.performer.epoch,
            step=step.step,
            grammar_output=grammar_of(step.grammar_output, step.sent.num_scheduled_tokens),
        )
        self.ring.send("ghost_sample", message, reply_rank=self.output_rank, gone=self._known_dead())

    def _known_dead(self) -> frozenset[int]:
        """Ranks that will not read what is sent now; looked up only once a death was noticed."""
        return frozenset() if self.monitor.noticed_at_s is None else self.ring.dead()

    def _complete(self, step: OpenStep, *, sampled: bool) -> Any:
        """Bring the steps in flight through, oldest first, until this one is; repaired as often as the performer allows.

        Without `sampled` its first half is enough: the engine core asks for the second one once that is here. Of a
        step in one message there is no first half to wait for.
        """
        with self.session.lock:
            while not (step.done or (not sampled and (step.executed or step.one_message))):
                try:
                    self._run_oldest()
                except (RanksDied, RankRaised, RankSilent) as failure:
                    self.recover(failure)
            return step.output

    def recover(self, failure: RanksDied | RankRaised | RankSilent) -> None:
        """Repair the group; what was in flight is sent again, all of it, in order. Raises EngineLost."""
        if self.performer.recover(failure) is Outcome.STEP_FAILED:
            self._fail_oldest()
        for step in self.open_steps:
            step.forget_replies()
            self._send_step(step)
            if step.sampling and not step.one_message:
                self._send_sample(step)

    def _run_oldest(self) -> None:
        """Wait for the next answer to the oldest step; accept it when that was the last."""
        self.watch.evict_slow()
        step = self.open_steps[0]
        if not step.executed:
            step.output = self._next_reply(step)
            step.executed = True
            if step.output is None and not step.sampling:
                return
        if step.sampling and not step.one_message:
            # A step that has lost all its requests has its output already, and answers this with another empty one.
            sampled = self._next_reply(step)
            step.output = sampled if step.output is None else step.output
        self._accept(step, step.output)

    def _fail_oldest(self) -> None:
        """The oldest step is given up: its requests get an error, the others in flight start over from their tokens.

        Now: a client may leave before the scheduler sees the output, and take its request along.
        """
        failing = list(self.open_steps[0].sent.num_scheduled_tokens)
        give_up_steps(self, failing=set(failing))
        for index, step in enumerate(self.open_steps):
            step.output, step.done = FailedStep.of(() if index else failing), True
        self._step = self.open_steps[0].step - 1  # records of past steps are kept by number, for a few steps
        self.open_steps = []

    def _next_reply(self, step: OpenStep) -> Any:
        reply = step.replies.popleft() if step.replies else self.wait_for_reply(step)
        if isinstance(reply, RankRaised):
            raise reply
        return reply

    def wait_for_reply(self, step: OpenStep) -> Any:
        """The next answer to a step. Raises RanksDied, RankRaised or RankSilent."""
        try:
            return self.ring.wait_for_reply(
                self.output_rank,
                deadline_s=monotonic_s() + envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS,
                failed=lambda: self._failed_rank(step),
                expect_alive=range(self.world_size),
                look=lambda: self.watch.look(self.open_steps[0], awaits=self.output_rank),
            )
        except RankSilent as failure:
            raise self.watch.blame(step, failure) if failure.by_time else failure from None

    def _failed_rank(self, step: OpenStep) -> int | None:
        """A rank whose stamp says that this step failed there."""
        epoch, number = self._id(step)
        for rank in range(self.world_size):
            if has_failed(self.session.page.read_stamp(rank), epoch=epoch, step=number):
                return rank
        return None

    def _id(self, step: OpenStep) -> tuple[int, int]:
        return self.performer.epoch, step.step

    def _accept(self, step: OpenStep, output: Any) -> None:
        """The commit rule: result in hand and every rank's stamp in the arena."""
        self._wait_for_stamps(step)
        epoch = self.performer.epoch
        self.view.accept(step.sent, output)
        self.session.guard.commit(epoch=epoch, step=step.step, pieces=step.pieces)
        self.open_steps.remove(step)
        step.done = True
        self.watch.accepted(step)
        self.performer.step_accepted()

    def _wait_for_stamps(self, step: OpenStep) -> None:
        page, (epoch, number) = self.session.page, self._id(step)
        started_s = monotonic_s()
        deadline_s = started_s + envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS
        ranks = range(self.world_size)
        while (rank := first_unfinished(page.read_stamp, ranks, epoch=epoch, step=number)) is not None:
            ranks = range(rank, self.world_size)
            if (failed := self._failed_rank(step)) is not None:
                raise RankRaised(failed, f"rank {failed} failed its step")
            if died := self.ring.dead():
                raise RanksDied(died, f"rank {sorted(died)} died before its stamp")
            if monotonic_s() > deadline_s:
                raise RankSilent(frozenset({rank}), f"rank {rank} did not stamp step {number}")
            if monotonic_s() - started_s < STAMP_SPIN_S:
                os.sched_yield()
            else:
                self.watch.look(step)
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
            results = call_ranks(
                self, method, timeout_s=timeout, args=args, kwargs=kwargs or {}, rank=unique_reply_rank
            )
        if not non_block:
            return results
        future: Future[Any] = Future()
        future.set_result(results)
        return future

    def give_up(self, reason: str) -> None:
        """The group cannot be repaired: clients get an error and the process ends."""
        logger.critical("giving up: %s", reason)
        self.session.page.events.tell(ServerGaveUp(reason=reason))
        self.status.failed = reason
        self.status.write()
        self.is_failed = True
        callback, self.failure_callback = self.failure_callback, None
        if callback is not None:
            callback()
