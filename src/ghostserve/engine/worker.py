"""A rank: vLLM's own worker, plus staging after each step and a way back after a loss.

Order within a step, and why:

    refuse other epochs and anything after a failed step   a survivor must not run on over inconsistent state
    stock execute_model                                     untouched
    mirror the slots it wrote, stamp STAGED                 only once it RETURNED: a failed forward stages nothing
    stock sample_tokens, record random states, stamp DONE   the step is whole on this rank

Every method named `ghost_*` is called over vLLM's message ring.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable
from typing import Any

from vllm.compilation.counter import compilation_counter
from vllm.config import CompilationMode, set_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

import ghostserve.engine.loader  # noqa: F401  - the load format that a server names
from ghostserve.arena.control import ControlPage, Fault, FaultPoint, Mark, StampStatus, Switch
from ghostserve.arena.handoff import ARENA_ADDRESS_ENV, fetch_segments
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.engine import communicator, compat, faults, runner_v1, runner_v2
from ghostserve.engine.epoch_watch import EpochWatch
from ghostserve.engine.graphs import capture_graphs, drop_graphs, warm_up
from ghostserve.engine.groups import abandon_groups, form_groups, leave_groups, peer_left
from ghostserve.engine.messages import (
    ArenaGeometry,
    JoinMessage,
    RankLayout,
    RegroupMessage,
    RepairReport,
    RestoreReport,
    SampleMessage,
    StateMessage,
    StepLeft,
    StepMessage,
)
from ghostserve.engine.rank_scrub import RankScrub
from ghostserve.engine.rank_shadow import RankShadow
from ghostserve.errors import StaleEpoch
from ghostserve.shadow.commit_rule import StepGate
from ghostserve.shadow.packed_pieces import PackedPieces
from ghostserve.shadow.restore import BlockRestore
from ghostserve.shadow.scrub import Check

logger = logging.getLogger(__name__)

ARENA_TIMEOUT_S = 10.0
NEWCOMER_POLL_S = 0.001


class GhostWorkerMixin:
    """What we add to vLLM's worker; the same for every device."""

    # Provided by vLLM's worker.
    rank: int
    local_rank: int
    vllm_config: Any
    model_runner: Any
    use_v2_model_runner: bool

    _page: ControlPage
    _shadow: RankShadow | None = None
    _gate: StepGate
    _rolled_back: bool = False  # no step was run since
    _kv_cache_config: Any = None
    _watch: EpochWatch | None = None

    def init_device(self) -> None:
        self._segments = fetch_segments(os.environ[ARENA_ADDRESS_ENV], timeout_s=ARENA_TIMEOUT_S)
        self._page = ControlPage(self._segments["control"], lane=self.rank)
        self._gate = StepGate()
        self._fault(FaultPoint.SPAWN)
        self._page.mark(self.rank, Mark.IMPORTS_DONE, monotonic_s())
        self._fault(FaultPoint.REGROUP)
        if current_platform.is_cpu():
            communicator.show_progress(self._page.progress_words(self.rank))
        if current_platform.is_cuda():
            self._watch = EpochWatch(self._page, abandon=abandon_groups)
            self._watch.groups_of(self._page.epoch)
        super().init_device()  # type: ignore[misc]
        self._page.mark(self.rank, Mark.GROUPS_READY, monotonic_s())

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        self._fault(FaultPoint.WEIGHTS)
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        if self.vllm_config.compilation_config.mode != CompilationMode.NONE:
            compat.load_compiled_graphs(self.model_runner)
        self._page.mark(self.rank, Mark.WEIGHTS_LOADED, monotonic_s())

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]
        self._kv_cache_config = kv_cache_config

    # -- the step --------------------------------------------------------------------------------------

    def ghost_step(self, message: StepMessage) -> Any:
        """Run and mirror one step, and sample it if told so.

        Returns what the stock worker returns (None: tokens are sampled next), or StepLeft.
        """
        return self._unless_left(message, lambda: self._run(message))

    def ghost_sample(self, message: SampleMessage) -> Any:
        """Sample the step that `ghost_step` ran."""
        return self._unless_left(message, lambda: self._sample(message))

    def _run(self, message: StepMessage) -> Any:
        self._stamp(message, StampStatus.BEGUN)
        if self._rolled_back:
            self._rolled_back = False
            self._fault(FaultPoint.RETRY)
        self._fault(FaultPoint.BEFORE_MODEL)
        began_s = monotonic_s()
        output = self.execute_model(message.scheduler_output)  # type: ignore[attr-defined]
        pieces = message.pieces
        if fault := self._fault(FaultPoint.AFTER_MODEL):
            pieces = faults.after_model(fault, pieces, took_s=monotonic_s() - began_s)
        if self._shadow is not None:
            self._shadow.stage(epoch=message.epoch, step=message.step, pieces=pieces)
        self._stamp(message, StampStatus.STAGED)
        if message.pieces and (fault := self._fault(FaultPoint.STAGED)) and self._shadow is not None:
            self._shadow.corrupt(fault, message.pieces)
        if output is not None:
            self._finish(message)
            return output
        if not message.sample_at_once:
            return None
        return self._sample(SampleMessage(epoch=message.epoch, step=message.step, grammar_output=None))

    def _sample(self, message: SampleMessage) -> Any:
        self._fault(FaultPoint.BEFORE_SAMPLE)
        stock = self.use_v2_model_runner or self._page.get_switch(Switch.STOCK_GENERATORS)
        aside = compat.chunked_generators_set_aside(self.model_runner)
        with contextlib.nullcontext() if stock else aside:
            output = self.sample_tokens(message.grammar_output)  # type: ignore[attr-defined]
        self._fault(FaultPoint.AFTER_SAMPLE)
        self._finish(message)
        return output

    def _finish(self, message: StepMessage | SampleMessage) -> None:
        if self._shadow is not None:
            record = self._requests.capture(self.model_runner).encode()
            self._shadow.record_random_state(epoch=message.epoch, step=message.step, record=record)
        self._stamp(message, StampStatus.DONE)
        self._fault(FaultPoint.BEFORE_REPLY)

    def _unless_left(self, message: StepMessage | SampleMessage, part: Callable[[], Any]) -> Any:
        """Refuse what is of another epoch, or comes after a failed step. If the step raises: say so, and leave the
        groups, so that peers blocked on us leave too.

        An error of its own goes on: vLLM logs it with a traceback and reports it. A rank that only follows a peer has
        nothing to explain: it answers StepLeft.
        """
        if (refusal := self._gate.refusal(epoch=message.epoch)) is not None:
            return StepLeft(reason=f"rank {self.rank}: {refusal}")
        began_s = monotonic_s()
        try:
            output = part()
            self._page.add_step_time(self.rank, monotonic_s() - began_s)
            return output
        except Exception as error:
            self._gate.failed(epoch=message.epoch, step=message.step)
            left = peer_left(error)
            self._stamp(message, StampStatus.PEER_LEFT if left else StampStatus.FAILED)
            self._leave_groups()
            if not left:
                raise
            logger.warning("rank %d left step %d: %s", self.rank, message.step, error)
            return StepLeft(reason=f"rank {self.rank}: {error}")

    @property
    def _requests(self) -> Any:
        """How this rank's runner keeps requests: `capture`, `restore` and `output_ids`."""
        return runner_v2 if self.use_v2_model_runner else runner_v1

    def _stamp(self, message: StepMessage | SampleMessage, status: StampStatus) -> None:
        self._page.stamp(
            self.rank, epoch=message.epoch, step=message.step, status=status, now_s=monotonic_s()
        )

    def _fault(self, point: FaultPoint) -> Fault | None:
        return faults.hit(self._page, point, self.rank)

    # -- the arena -------------------------------------------------------------------------------------

    def ghost_layout(self) -> RankLayout:
        """Probe the KV layout. Once per rank, before any request is served by it."""
        self._shadow = RankShadow(
            rank=self.rank,
            ranks=self.vllm_config.parallel_config.world_size,
            runner=self.model_runner,
            kv_cache_config=self._kv_cache_config,
            layers=self.vllm_config.compilation_config.static_forward_context,
            page=self._page,
            segments=self._segments,
        )
        return self._shadow.layout()

    def ghost_map(self, geometry: ArenaGeometry) -> None:
        """Map the arena; from here on steps are mirrored."""
        assert self._shadow is not None
        self._shadow.map_arena(geometry)
        self._shadow.record_random_state(
            epoch=self._gate.epoch, step=0, record=self._requests.capture(self.model_runner).encode()
        )

    # -- recovery --------------------------------------------------------------------------------------

    def ghost_echo(self, token: str) -> str:
        """Answers after everything that was queued before; marks the end of stale replies."""
        return token

    def ghost_leave(self) -> None:
        """Leave the groups, whether or not this rank has noticed that they are broken."""
        self._fault(FaultPoint.LEAVE)
        self._leave_groups()

    def _leave_groups(self) -> None:
        abandon_groups()  # before the graphs: one may be running
        drop_graphs(self.model_runner)
        leave_groups()

    def ghost_regroup(self, message: RegroupMessage) -> None:
        """A survivor: form the groups anew, with the newcomers.

        A rendezvous cannot be called off, so it starts when the newcomers are about to join it, and is short.
        """
        try:
            self._await_newcomers(message)
            self._fault(FaultPoint.REGROUP)
            if self._watch is not None:
                self._watch.groups_of(message.epoch)
            form_groups(
                self.vllm_config,
                rank=self.rank,
                local_rank=self.local_rank,
                init_method=message.init_method,
                timeout_s=message.rendezvous_timeout_s,
            )
        except Exception:
            # Seen at once by whoever waits for the newcomers, which wait for us.
            self._page.stamp(
                self.rank, epoch=message.epoch, step=0, status=StampStatus.FAILED, now_s=monotonic_s()
            )
            raise

    def _await_newcomers(self, message: RegroupMessage) -> None:
        deadline_s = monotonic_s() + message.start_timeout_s
        while not all(Mark.IMPORTS_DONE in self._page.marks(rank) for rank in message.newcomers):
            if self._page.epoch != message.epoch:
                raise StaleEpoch(f"rank {self.rank}: the regroup of epoch {message.epoch} was given up")
            if monotonic_s() > deadline_s:
                raise TimeoutError(f"rank {self.rank}: no newcomer within {message.start_timeout_s:g} s")
            sleep_s(NEWCOMER_POLL_S)

    def ghost_join(self, message: JoinMessage) -> None:
        """After the regroup: newcomers get their KV memory; all warm up compiled code and capture graphs together."""
        newcomer = self.rank in message.newcomers
        with set_current_vllm_config(self.vllm_config):
            if newcomer:
                self.get_kv_cache_spec()  # type: ignore[attr-defined]
            if message.warm_up and self.vllm_config.compilation_config.mode != CompilationMode.NONE:
                warm_up(self.model_runner, v2=self.use_v2_model_runner)
            if newcomer:
                self.initialize_from_config(message.kv_cache_configs[self.rank])
            capture_graphs(self.model_runner, v2=self.use_v2_model_runner)
        if newcomer and message.geometry is not None:
            self.ghost_layout()
            # Not ghost_map: its first record of random states would take the place of one that is needed now.
            assert self._shadow is not None
            self._shadow.map_arena(message.geometry)
        self._page.mark(self.rank, Mark.KV_READY, monotonic_s())

    def ghost_random_state(self) -> bytes:
        """This rank's random states now; needed only where those after the last step were not recorded."""
        return self._requests.capture(self.model_runner).encode()

    def ghost_state(self, message: StateMessage) -> None:
        """Take on the request state before the failed step; steps of the new epoch are accepted again."""
        self._fault(FaultPoint.STATE)
        self._requests.restore(self.model_runner, message)
        self._gate.reformed(epoch=message.epoch)
        self._rolled_back = True

    def ghost_export(self, items: list[BlockRestore]) -> None:
        """A survivor's share of a decode."""
        self._fault(FaultPoint.EXPORT)
        assert self._shadow is not None
        self._shadow.export(items)

    def ghost_adopt(self, newcomer: int, items: list[BlockRestore]) -> RestoreReport | None:
        """Restore a newcomer's KV; None on every other rank."""
        if self.rank != newcomer:
            return None
        fault, began_s = self._fault(FaultPoint.ADOPT), monotonic_s()
        assert self._shadow is not None
        report = self._shadow.adopt(items)
        if fault is not None:
            faults.slow_down(fault, took_s=monotonic_s() - began_s)
        return report

    # -- the scrub, between steps ----------------------------------------------------------------------

    def ghost_scrub(self, checks: list[Check]) -> tuple[int, ...]:
        """The places in `checks` of blocks whose live KV differs here."""
        return self._scrub.wrong(checks)

    def ghost_repair(self, items: dict[int, BlockRestore]) -> RepairReport | None:
        """Put one block of live KV right on the ranks that `items` names; None on the others."""
        item = items.get(self.rank)
        return None if item is None else self._scrub.repair(item)

    def ghost_restore_mirror(self, ranks: frozenset[int], check: Check) -> RepairReport | None:
        """Put the mirror of one block right on these ranks; None on the others."""
        return self._scrub.restore_mirror(check) if self.rank in ranks else None

    def ghost_mirror(self, pieces: PackedPieces) -> bytes:
        """Mirror blocks from live KV outside of a step; their checksums."""
        assert self._shadow is not None
        return self._shadow.stage_now(pieces)

    def ghost_corrupt_kv(self, rank: int, slot: int) -> dict[str, Any] | None:
        """An injected fault, between steps: see `RankShadow.corrupt_kv`."""
        return self._shadow.corrupt_kv(slot) if self.rank == rank and self._shadow is not None else None

    def ghost_corrupt_tail(self, rank: int) -> dict[str, Any] | None:
        """An injected fault, between steps: see `RankShadow.corrupt_tail`."""
        return self._shadow.corrupt_tail() if self.rank == rank and self._shadow is not None else None

    @property
    def _scrub(self) -> RankScrub:
        assert self._shadow is not None
        assert self._shadow.scrub is not None
        return self._shadow.scrub

    def ghost_compiled(self) -> int:
        """Debugging: how many graphs this process has compiled itself."""
        return int(compilation_counter.num_aot_compiles)

    def ghost_digest(self) -> str:
        """Debugging: stands for what this rank believes of its requests; equal on all ranks between two steps."""
        requests = self._requests.output_ids(self.model_runner)
        states = self._requests.capture(self.model_runner).encode()
        return hashlib.blake2b(states + repr(sorted(requests.items())).encode()).hexdigest()


class GhostCpuWorker(GhostWorkerMixin, CPUWorker):
    """A rank on the CPU."""


class GhostGpuWorker(GhostWorkerMixin, Worker):
    """A rank on a CUDA device. Written device-agnostic; not measured yet."""
