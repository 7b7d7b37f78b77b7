"""What the guard publishes once protection was given up for an error: not that nothing is unprotected."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ghostserve.arena.control import CONTROL_BYTES, LANE_ENGINE, ControlPage, Counter
from ghostserve.arena.frames import FramePool
from ghostserve.arena.memfd import Segment
from ghostserve.engine.budget import GuardLimits
from ghostserve.engine.guard import Guard
from ghostserve.shadow.manifest import Manifest
from ghostserve.shadow.protection import Protection
from ghostserve.shadow.step_plan import BlockTables, Write

SIZE, FRAME_BYTES = 32, 4096


class BlockPool:
    """vLLM's: block 1 is a request's, block 2 in the prefix cache, block 3 free."""

    def __init__(self) -> None:
        self.blocks = [
            SimpleNamespace(ref_cnt=ref_cnt, block_hash=block_hash)
            for ref_cnt, block_hash in ((0, None), (1, None), (0, "hash"), (0, None))
        ]


@pytest.fixture
def guard() -> Iterator[Guard]:
    sizes = {"control": CONTROL_BYTES, "staging": 8192, "pool": 16 * FRAME_BYTES}
    segments = {name: Segment.create(name, size) for name, size in sizes.items()}
    ControlPage.format(segments["control"])
    limits = GuardLimits(
        parity_shards=1, compact=True, host_memory_bytes=1 << 20, max_requests=1, max_batched_tokens=SIZE,
        backlog_blocks=1,
    )  # fmt: skip
    guard = Guard(
        page=ControlPage(segments["control"], lane=LANE_ENGINE),
        segments=segments,
        address="",
        limits=limits,
        ranks=2,
    )
    guard.attach(BlockPool())
    geometry: Any = SimpleNamespace(frame_bytes=FRAME_BYTES)
    guard.geometry = geometry
    guard.protection = Protection(
        manifest=Manifest(ranks=2, parity_shards=1, block_sizes=(SIZE,), slot_bytes=(64,), pool=FramePool(8)),
        tables=BlockTables((SIZE,)),
        staged=SimpleNamespace(read=lambda *_: None),
        keeper=SimpleNamespace(submit=lambda _: None),
        jobs_max=1,
    )
    yield guard
    for segment in segments.values():
        segment.close()


def tokens(guard: Guard) -> tuple[int, ...]:
    guard.publish()
    return tuple(
        guard.page.get(counter)
        for counter in (Counter.PROTECTED_TOKENS, Counter.SHADOW_LAG_TOKENS, Counter.UNPROTECTED_TOKENS)
    )


def test_what_is_protected_in_flight_and_neither(guard: Guard) -> None:
    manifest = guard.manifest
    assert manifest is not None
    piece = manifest.plan(Write(block=1, group=0, start=0, stop=20, whole=False))
    manifest.plan(Write(block=2, group=0, start=5, stop=9, whole=False))
    assert tokens(guard) == (0, 20, 9)
    assert piece is not None
    manifest.commit([piece], [(1,), (2,)])
    assert tokens(guard) == (20, 0, 9)


def test_given_up_everything_in_use_is_unprotected(guard: Guard) -> None:
    assert guard.protection is not None
    guard.protection.give_up()
    assert tokens(guard) == (0, 0, 2 * SIZE)
    guard.start_again()
    assert tokens(guard) == (0, 0, 0)


def test_host_memory_is_what_the_kernel_gave(guard: Guard) -> None:
    def used() -> int:
        guard.publish()
        return guard.page.get(Counter.HOST_USED_BYTES)

    used()  # the page itself takes memory as it is first written and read
    before = used()
    guard.segments["pool"].array[: 3 * FRAME_BYTES] = 1
    assert used() - before == 3 * FRAME_BYTES
    guard.segments["pool"].punch(0, 3 * FRAME_BYTES)
    assert used() == before
