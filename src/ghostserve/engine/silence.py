"""Who holds up a step that nobody answers: by the ranks' stamps, not by who was to answer."""

from __future__ import annotations

from typing import Any

from vllm import envs

from ghostserve.arena.control import StampStatus
from ghostserve.clock import monotonic_s
from ghostserve.engine.ring import RankSilent
from ghostserve.recovery.detector import RUNNING, RankView, dead_ranks, verdict


def who_is_silent(
    executor: Any, open_id: tuple[int, int], started_s: float, failure: RankSilent
) -> RankSilent:
    """The failure with the ranks that are to blame for it. `open_id`: epoch and number of the step."""
    limit_s = float(envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)
    epoch, step = open_id
    verdicts = verdict(
        monotonic_s(),
        [_view_of(executor, rank) for rank in range(executor.world_size)],
        epoch=epoch,
        step=step,
        step_started_at_s=started_s,
        deadline_s=limit_s,
        all_stuck_s=limit_s,
    )
    reason = "; ".join(f"rank {found.rank}: {found.reason}" for found in verdicts)
    return RankSilent(dead_ranks(verdicts) or failure.ranks, reason)


def _view_of(executor: Any, rank: int) -> RankView:
    stamp, process = executor.session.page.read_stamp(rank), executor.workers[rank].proc
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
