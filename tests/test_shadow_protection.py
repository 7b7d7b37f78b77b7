"""The engine core's side of the shadow, with a keeper and a block pool that a test moves by hand."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from ghostserve.arena.frames import FramePool
from ghostserve.shadow.keeper_messages import EncodeDone, EncodeJob, Job, WipeDone, WipeJob
from ghostserve.shadow.manifest import BlockState, Manifest, Piece
from ghostserve.shadow.protection import Protection
from ghostserve.shadow.staging_keys import ack_key, random_key
from ghostserve.shadow.step_plan import BlockTables, RequestStep, StepIncrement

SIZE, RANKS = 4, 2


@dataclass
class Parts:
    """What a `Protection` works with."""

    records: dict[tuple[int, int, int], bytes] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    live: set[int] = field(default_factory=lambda: set(range(1, 100)))
    cached: set[int] = field(default_factory=set)
    free: list[int] = field(default_factory=list)

    def read(self, rank: int, step: int, epoch: int) -> bytes | None:
        return self.records.get((rank, step, epoch))

    def submit(self, message: Job, /) -> None:
        self.jobs.append(message)

    def is_live(self, block: int) -> bool:
        return block in self.live

    def is_cached(self, block: int) -> bool:
        return block in self.cached

    def cached_only(self) -> Iterator[int]:
        yield from self.free

    def stage(self, step: int, pieces: tuple[Piece, ...], *, epoch: int = 0) -> None:
        for rank in range(RANKS):
            self.records[rank, ack_key(step), epoch] = struct.pack(f"<{len(pieces)}I", *[7] * len(pieces))


def protection(parts: Parts, *, frames: int = 60, jobs_max: int = 8, parity: int = 1) -> Protection:
    return Protection(
        manifest=Manifest(
            ranks=RANKS,
            parity_shards=parity,
            block_sizes=(SIZE,),
            slot_bytes=(1,),
            pool=FramePool(frames),
        ),
        tables=BlockTables((SIZE,)),
        staged=parts,
        keeper=parts,
        jobs_max=jobs_max,
        blocks=parts,
    )


def start(name: str, *blocks: int, scheduled: int, finished: tuple[str, ...] = ()) -> StepIncrement:
    request = RequestStep(request_id=name, computed=0, scheduled=scheduled, blocks=(blocks,), replaces=True)
    return StepIncrement(requests=(request,), finished=frozenset(finished))


def accepted(shadow: Protection, parts: Parts, step: int, increment: StepIncrement) -> tuple[Piece, ...]:
    pieces = shadow.plan(increment)
    parts.stage(step, pieces)
    shadow.commit(epoch=0, step=step, pieces=pieces)
    return pieces


def test_a_step_that_one_rank_did_not_stage_protects_nothing() -> None:
    parts = Parts()
    shadow = protection(parts)
    pieces = shadow.plan(start("a", 1, scheduled=2))
    parts.stage(1, pieces)
    del parts.records[1, ack_key(1), 0]
    shadow.commit(epoch=0, step=1, pieces=pieces)
    assert not shadow.manifest.entries
    assert shadow.accepted == (0, 1), "it is accepted all the same"


def test_checksums_of_another_epoch_are_not_taken() -> None:
    parts = Parts()
    shadow = protection(parts)
    pieces = shadow.plan(start("a", 1, scheduled=2))
    parts.stage(1, pieces, epoch=0)
    shadow.commit(epoch=1, step=1, pieces=pieces)
    assert not shadow.manifest.entries


def test_sealed_blocks_go_to_the_keeper_at_most_so_many_at_a_time() -> None:
    parts = Parts()
    shadow = protection(parts, jobs_max=2)
    accepted(shadow, parts, 1, start("a", 1, 2, 3, scheduled=12))
    encodes = [job for job in parts.jobs if isinstance(job, EncodeJob)]
    assert [job.block for job in encodes] == [1, 2]
    trouble = shadow.answer(EncodeDone(job=encodes[0].job, ok=True, parity_checksums=(1,)))
    assert trouble is None
    assert shadow.manifest.entries[1].state is BlockState.CODED
    assert [job.block for job in parts.jobs if isinstance(job, EncodeJob)] == [1, 2, 3]
    wipes = [job for job in parts.jobs if isinstance(job, WipeJob)]
    assert len(wipes[0].frames) == RANKS, "its mirrors"
    shadow.answer(WipeDone(job=wipes[0].job))
    shadow.check()


def test_frames_that_could_not_be_wiped_are_never_used_again() -> None:
    parts = Parts()
    shadow = protection(parts)
    accepted(shadow, parts, 1, start("a", 1, scheduled=4))
    job = parts.jobs[0]
    shadow.answer(EncodeDone(job=job.job, ok=True, parity_checksums=(1,)))
    trouble = shadow.answer(WipeDone(job=parts.jobs[1].job, ok=False, reason="no"))
    assert trouble is not None
    assert "withheld" in trouble
    assert shadow.manifest.pool.retired_count == RANKS


def test_answers_wait_while_blocks_are_restored() -> None:
    parts = Parts()
    shadow = protection(parts)
    accepted(shadow, parts, 1, start("a", 1, scheduled=4))
    shadow.hold()
    assert shadow.answer(EncodeDone(job=parts.jobs[0].job, ok=False, reason="x")) is None
    shadow.sweep()
    assert shadow.manifest.entries[1].mirrors, "they are being read"
    assert shadow.release() == ["the keeper refused a stripe: x"]
    assert 1 not in shadow.manifest.entries


def test_room_is_made_before_it_is_needed() -> None:
    parts = Parts(free=[1])
    shadow = protection(parts, frames=7)
    accepted(shadow, parts, 1, start("a", 1, scheduled=3))
    shadow.plan(start("b", 2, scheduled=1))
    assert 1 not in shadow.manifest.entries, "only the prefix cache wanted it"
    assert shadow.manifest.unprotected[1] == (0, 3)


def test_a_block_that_lost_its_protection_is_caught_up_while_somebody_wants_it() -> None:
    parts = Parts()
    shadow = protection(parts)
    shadow.manifest.unprotected = {5: (0, SIZE), 6: (0, 1), 7: (0, SIZE)}
    parts.live.discard(5)
    pieces = shadow.plan(start("a", 1, scheduled=1))
    assert [(piece.block, piece.start, piece.stop) for piece in pieces] == [(1, 0, 1), (7, 0, SIZE)]


def test_blocks_of_a_finished_request_are_given_up_once_no_step_in_flight_uses_them() -> None:
    parts = Parts()
    shadow = protection(parts)
    accepted(shadow, parts, 1, start("a", 1, 2, scheduled=6))
    shadow.plan(start("b", 3, scheduled=1, finished=("a",)))
    assert {1, 2} <= shadow.manifest.entries.keys(), "still held for a step in flight"
    parts.live -= {1, 2}
    shadow.plan(start("c", 4, scheduled=1))
    assert not {1, 2} & shadow.manifest.entries.keys()


def test_what_was_never_written_is_not_caught_up() -> None:
    """A block that was planned when there was no frame for it, of a request that left its step: nobody wrote it."""
    parts = Parts()
    shadow = protection(parts, frames=0)
    pieces = shadow.plan(start("a", 1, scheduled=SIZE))
    assert pieces == ()
    assert shadow.manifest.unprotected == {1: (0, SIZE)}
    assert shadow.without_blocks(pieces, {1}) == ()
    assert shadow.manifest.unprotected == {}


def test_a_step_that_will_not_run_leaves_nothing_behind() -> None:
    parts = Parts()
    shadow = protection(parts)
    accepted(shadow, parts, 1, start("a", 1, scheduled=2))
    pieces = shadow.plan(start("b", 2, scheduled=SIZE))
    shadow.withdraw(pieces, {2})
    assert shadow.manifest.entries.keys() == {1}
    shadow.check()


def test_giving_up_believes_nothing_any_more() -> None:
    parts = Parts()
    shadow = protection(parts)
    accepted(shadow, parts, 1, start("a", 1, scheduled=2))
    shadow.give_up()
    assert not shadow.manifest.entries
    assert shadow.plan(start("b", 2, scheduled=1)) == ()


def test_once_nothing_is_open_it_begins_anew() -> None:
    parts = Parts()
    shadow = protection(parts)
    accepted(shadow, parts, 1, start("a", 1, scheduled=2))
    assert not shadow.start_again()  # it was not given up: what it knows stays
    assert shadow.manifest.entries.keys() == {1}
    shadow.give_up()
    assert shadow.start_again()
    accepted(shadow, parts, 2, start("b", 2, scheduled=2))
    assert shadow.manifest.entries.keys() == {2}
    shadow.check()


def test_random_states_are_those_after_the_last_accepted_step() -> None:
    parts = Parts()
    shadow = protection(parts)
    parts.records = {(0, random_key(1), 0): b"x", (1, random_key(1), 0): b"y", (1, random_key(2), 0): b"z"}
    shadow.accepted = (0, 1)
    assert shadow.random_records([1, 0]) == [b"y", b"x"]


def test_without_a_scheduler_nothing_is_known_to_be_dead() -> None:
    parts = Parts()
    shadow = protection(parts)
    shadow.blocks = None
    accepted(shadow, parts, 1, start("a", 1, scheduled=2))
    shadow.plan(start("b", 2, scheduled=1, finished=("a",)))
    shadow.sweep()
    assert 1 in shadow.manifest.entries
