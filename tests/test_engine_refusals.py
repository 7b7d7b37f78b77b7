"""What only the engine core can find wrong with the flags: the front process, which ends last, must say it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from ghostserve.arena.control import CONTROL_BYTES, LANE_ENGINE, ControlPage
from ghostserve.arena.memfd import Segment
from ghostserve.engine.budget import FrameCount, GuardLimits, count_frames
from ghostserve.engine.status import StatusWriter, why_refused
from ghostserve.errors import CorruptionError, UsageError

LIMITS = GuardLimits(
    parity_shards=1, compact=True, host_memory_bytes=1, max_requests=4, max_batched_tokens=64, backlog_blocks=8
)  # fmt: skip


def test_what_full_protection_takes_is_known_whatever_the_budget_is() -> None:
    layout = SimpleNamespace(block_sizes=(16,), num_blocks=64, frame_bytes=4096)

    def count(budget: int) -> FrameCount:
        return count_frames(replace(LIMITS, host_memory_bytes=budget), layout, ranks=2)  # type: ignore[arg-type]

    plenty = count(1 << 30)
    assert plenty.frames == plenty.wanted
    assert count(plenty.needed_bytes) == plenty, "it is enough"
    short = count(plenty.needed_bytes - 1)
    assert short.frames == plenty.wanted - 1, "and no more than enough"
    assert short.needed_bytes == plenty.needed_bytes


def test_a_refusal_in_the_engine_core_is_known_in_front() -> None:
    segment = Segment.create("test-control", CONTROL_BYTES)
    ControlPage.format(segment)
    core, front = ControlPage(segment, lane=LANE_ENGINE), ControlPage(segment)
    status = object.__new__(StatusWriter)  # without a model
    status._fixed, status._executor = {"model": "tiny"}, SimpleNamespace(session=SimpleNamespace(page=core))
    assert why_refused(front) is None
    with pytest.raises(CorruptionError), status.refusal_told():
        raise CorruptionError("rank 1 lays out its KV differently")
    assert why_refused(front) is None, "not the user's doing"
    layout = SimpleNamespace(block_sizes=(16,), num_blocks=8, frame_bytes=4096)
    with pytest.raises(UsageError), status.refusal_told():
        count_frames(LIMITS, layout, ranks=2)  # type: ignore[arg-type]
    said = why_refused(front)
    assert said is not None
    assert said.startswith("--host-memory 1 leaves no room")
    assert "give at least" in said
    segment.close()
