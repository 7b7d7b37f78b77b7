"""The manifest: lives of blocks, who may be restored from what, and that it is true down to the bytes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from ghostserve.arena.frames import FramePool, FrameState
from ghostserve.shadow.manifest import BlockState, Entry, Manifest, Piece, Source
from ghostserve.shadow.step_plan import Write
from shadow_world import OpenStep, World

SIZE = 4
RANKS = 2
FIRST = frozenset({0})


def manifest(frames: int = 100, *, compact: bool = True) -> Manifest:
    return Manifest(
        ranks=RANKS,
        parity_shards=1,
        block_sizes=(SIZE,),
        slot_bytes=(10,),
        pool=FramePool(frames),
        compact=compact,
    )


def write(block: int, start: int, stop: int, *, whole: bool = False) -> Write:
    return Write(block=block, group=0, start=start, stop=stop, whole=whole)


def commit(shadow: Manifest, *pieces: Piece | None) -> None:
    known = [piece for piece in pieces if piece is not None]
    shadow.commit(known, [[100 * rank + piece.stop for piece in known] for rank in range(RANKS)])


def protect(shadow: Manifest, block: int, slots: int = SIZE) -> Piece:
    """A block with this many slots committed."""
    piece = shadow.plan(write(block, 0, slots))
    assert piece is not None
    commit(shadow, piece)
    return piece


def code(shadow: Manifest, block: int) -> Entry:
    """A block whose parity is done."""
    protect(shadow, block)
    job = shadow.next_job()
    assert job is not None
    assert job.block == block
    shadow.job_done(job.job, ok=True, parity_checksums=(7,))
    return shadow.entries[block]


def released(shadow: Manifest) -> tuple[int, ...]:
    """Wipe what is retired."""
    frames = shadow.take_retired()
    shadow.pool.release(frames)
    return frames


# ---- a block's life --------------------------------------------------------------------------------------------------


def test_from_the_first_slot_to_parity() -> None:
    shadow = manifest()
    piece = shadow.plan(write(5, 0, 3))
    assert piece is not None
    assert (piece.block, piece.generation, piece.start, piece.stop) == (5, 1, 0, 3)
    entry = shadow.entries[5]
    assert (entry.state, entry.planned, entry.slots) == (BlockState.MIRRORED, 3, 0)
    commit(shadow, piece)
    assert (entry.state, entry.slots, entry.checksums) == (BlockState.MIRRORED, 3, (3, 103))
    assert shadow.next_job() is None, "it is not full"

    last = shadow.plan(write(5, 3, SIZE))
    assert last is not None
    assert (last.frames, last.generation) == (piece.frames, 1), "the log goes on in the same frames"
    commit(shadow, last)
    assert entry.state is BlockState.SEALED

    job = shadow.next_job()
    assert job is not None
    assert (job.block, job.generation, job.nbytes) == (5, 1, SIZE * 10)
    assert (job.mirrors, job.checksums) == (piece.frames, (4, 104))
    assert not set(job.parity) & set(job.mirrors)
    assert entry.state is BlockState.CODING
    assert shadow.open_jobs() == 1
    assert shadow.next_job() is None

    shadow.job_done(job.job, ok=True, parity_checksums=(42,))
    assert (entry.state, entry.mirrors, entry.parity) == (BlockState.CODED, (), job.parity)
    assert (entry.parity_checksums, entry.checksums) == ((42,), (4, 104))
    assert shadow.take_retired() == piece.frames
    assert shadow.take_retired() == (), "each is told once"
    shadow.check()


def test_statistics_follow_a_block() -> None:
    shadow = manifest()
    protect(shadow, 1, slots=2)
    protect(shadow, 2)
    assert shadow.next_job() is not None
    told = shadow.statistics()
    assert (told.tail_blocks, told.sealed_blocks, told.coded_blocks) == (1, 1, 0)
    assert (told.mirror_frames, told.parity_frames) == (2 * RANKS, 1)
    shadow.job_done(1, ok=True, parity_checksums=(1,))
    told = shadow.statistics()
    assert (told.tail_blocks, told.sealed_blocks, told.coded_blocks) == (1, 0, 1)
    assert (told.mirror_frames, told.parity_frames, told.unprotected_blocks) == (RANKS, 1, 0)


def test_sealed_blocks_are_coded_in_the_order_they_were_sealed() -> None:
    shadow = manifest()
    for block in (3, 1, 2):
        protect(shadow, block)
    jobs = [shadow.next_job() for _ in range(3)]
    assert [job.block for job in jobs if job] == [3, 1, 2]


def test_replicas_are_never_coded() -> None:
    shadow = manifest(compact=False)
    protect(shadow, 1)
    assert shadow.next_job() is None
    assert shadow.source(1, needed=SIZE, lost=frozenset(range(RANKS))).choice is Source.MIRROR
    shadow.check()


# ---- reuse and rewriting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [BlockState.MIRRORED, BlockState.SEALED, BlockState.CODED])
def test_a_reused_block_is_a_new_generation_in_frames_of_its_own(state: BlockState) -> None:
    shadow = manifest()
    if state is BlockState.CODED:
        code(shadow, 5)
    else:
        protect(shadow, 5, slots=2 if state is BlockState.MIRRORED else SIZE)
    assert shadow.entries[5].state is state
    before = {*shadow.entries[5].mirrors, *shadow.entries[5].parity}
    piece = shadow.plan(write(5, 0, 1))
    assert piece is not None
    assert piece.generation == 2
    assert not set(piece.frames) & before
    assert before <= set(shadow.take_retired())
    assert shadow.source(5, needed=1, lost=FIRST).choice is Source.LOST, "not before the step is accepted"
    shadow.check()


def test_a_write_of_an_older_plan_does_not_commit_into_the_new_generation() -> None:
    shadow = manifest()
    old = shadow.plan(write(5, 0, SIZE))
    new = shadow.plan(write(5, 0, 1))
    commit(shadow, old)
    assert shadow.entries[5].slots == 0
    assert shadow.current([p for p in (old, new) if p]) == (new,)


@pytest.mark.parametrize("whole", [True, False])
def test_a_rewrite_is_mirrored_from_its_first_slot(whole: bool) -> None:
    """Copied or zeroed blocks changed before the write's start too; and so may what is written twice."""
    shadow = manifest()
    protect(shadow, 5, slots=3)
    piece = shadow.plan(write(5, 3 if whole else 1, SIZE, whole=whole))
    assert piece is not None
    assert (piece.start, piece.stop, piece.generation) == (0, SIZE, 2)


def test_a_sealed_block_that_is_rewritten_is_not_sealed_any_more() -> None:
    shadow = manifest()
    protect(shadow, 5)
    shadow.plan(write(5, 2, 3))
    assert shadow.next_job() is None
    shadow.check()


def test_a_gap_leaves_a_block_unprotected() -> None:
    shadow = manifest()
    assert shadow.plan(write(5, 2, 3)) is None
    assert shadow.unprotected == {5: (0, 3)}
    assert shadow.plan(write(5, 3, SIZE)) is None
    assert shadow.unprotected == {5: (0, SIZE)}
    assert shadow.source(5, needed=SIZE, lost=FIRST).choice is Source.LOST


# ---- the keeper's jobs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ok", [True, False])
def test_frames_of_an_open_job_stay_until_it_is_answered(ok: bool) -> None:
    shadow = manifest()
    protect(shadow, 5)
    job = shadow.next_job()
    assert job is not None
    shadow.drop(5)
    assert shadow.take_retired() == ()
    shadow.check()
    new = shadow.plan(write(5, 0, 1))
    assert new is not None
    assert not set(new.frames) & {*job.mirrors, *job.parity}
    shadow.check()
    shadow.job_done(job.job, ok=ok, parity_checksums=())
    assert sorted(shadow.take_retired()) == sorted((*job.mirrors, *job.parity))
    assert shadow.entries[5].state is BlockState.MIRRORED, "the answer is not for the new generation"
    assert shadow.encode_failures == 0
    shadow.check()


def test_a_refused_stripe_is_given_up_and_may_be_caught_up() -> None:
    shadow = manifest()
    protect(shadow, 5)
    job = shadow.next_job()
    assert job is not None
    shadow.job_done(job.job, ok=False, parity_checksums=())
    assert shadow.entries == {}
    assert shadow.unprotected == {5: (0, SIZE)}
    assert shadow.encode_failures == 1
    assert sorted(shadow.take_retired()) == sorted((*job.mirrors, *job.parity))
    shadow.check()


def test_an_answer_that_was_given_before_is_nothing() -> None:
    shadow = manifest()
    entry = code(shadow, 5)
    shadow.job_done(1, ok=False, parity_checksums=())
    shadow.job_done(99, ok=True, parity_checksums=())
    assert entry.state is BlockState.CODED
    shadow.check()


def test_a_pool_full_of_mirrors_can_still_be_compacted() -> None:
    """Else it would stay full for ever: parity needs a frame before the mirrors give theirs back."""
    shadow = manifest(frames=3 * RANKS)
    pieces = [shadow.plan(write(block, 0, SIZE)) for block in range(4)]
    assert [piece is not None for piece in pieces] == [True, True, False, False]
    commit(shadow, *pieces)
    for _ in range(2):
        job = shadow.next_job()
        assert job is not None
        shadow.job_done(job.job, ok=True, parity_checksums=(0,))
        released(shadow)
        shadow.check()
    assert shadow.statistics().coded_blocks == 2
    assert shadow.plan_catch_up(2) is not None, "there is room again"


def test_tokens_are_counted_by_whether_they_could_be_restored() -> None:
    shadow = manifest()
    code(shadow, 1)
    protect(shadow, 2, slots=3)
    in_flight = shadow.plan(write(2, 3, SIZE))
    shadow.plan(write(3, 1, 3))
    told = shadow.statistics()
    assert (told.protected_slots, told.lag_slots, told.unprotected_slots) == (SIZE + 3, 1, 3)
    commit(shadow, in_flight)
    shadow.evict(iter([2]), frames=1)
    told = shadow.statistics()
    assert (told.protected_slots, told.lag_slots, told.unprotected_slots) == (SIZE, 0, 3 + SIZE)


# ---- giving up and catching up ---------------------------------------------------------------------------------------


def test_a_full_pool_leaves_a_block_unprotected_and_counted() -> None:
    shadow = manifest(frames=RANKS)
    assert shadow.plan(write(1, 0, SIZE)) is None
    assert shadow.statistics().unprotected_blocks == 1
    assert shadow.plan_catch_up(1) is None
    assert shadow.unprotected == {1: (0, SIZE)}
    shadow.check()


def test_a_block_reused_without_protection_is_not_marked_by_an_older_step() -> None:
    """Two steps in flight: the first fills the block, in the second it is another request's, and no frame is free."""
    shadow = manifest(frames=RANKS + 1)
    first = shadow.plan(write(1, 0, SIZE))
    assert shadow.plan(write(1, 0, 2)) is None
    assert shadow.unprotected == {1: (0, 2)}
    commit(shadow, first)
    assert shadow.unprotected == {1: (0, 2)}, "slots that nobody wrote would be caught up"
    shadow.check()


def test_catching_up_protects_from_the_step_on() -> None:
    shadow = manifest()
    shadow.plan(write(5, 2, SIZE))
    piece = shadow.plan_catch_up(5)
    assert piece is not None
    assert (piece.start, piece.stop) == (0, SIZE)
    assert shadow.source(5, needed=SIZE, lost=FIRST).choice is Source.LOST
    commit(shadow, piece)
    assert shadow.source(5, needed=SIZE, lost=FIRST).choice is Source.MIRROR
    assert shadow.unprotected == {}
    shadow.check()


def test_a_block_still_being_written_is_not_caught_up() -> None:
    shadow = manifest()
    shadow.plan(write(5, 2, 3))
    with pytest.raises(AssertionError, match="still being written"):
        shadow.plan_catch_up(5)


def test_eviction_takes_the_first_victims_and_counts_frames() -> None:
    shadow = manifest()
    code(shadow, 1)
    protect(shadow, 2, slots=1)
    protect(shadow, 3)
    protect(shadow, 4)
    job = shadow.next_job()
    assert job is not None
    assert job.block == 3
    freed = shadow.evict(iter([9, 3, 1, 2, 4]), frames=2)
    assert freed == 1 + RANKS
    assert set(shadow.entries) == {3, 4}, "unknown ones and those in a job are passed over"
    assert shadow.unprotected == {1: (0, SIZE), 2: (0, 1)}
    shadow.check()


def test_drop_all_forgets_everything_but_open_jobs() -> None:
    shadow = manifest()
    code(shadow, 1)
    protect(shadow, 2)
    job = shadow.next_job()
    protect(shadow, 3, slots=1)
    shadow.plan(write(4, 1, 2))
    shadow.drop_all()
    assert not shadow.entries
    assert not shadow.unprotected
    assert job is not None
    assert all(shadow.pool.state(f) is FrameState.USED for f in (*job.mirrors, *job.parity))
    shadow.check()


# ---- torn steps ------------------------------------------------------------------------------------------------------


def test_a_step_that_is_withdrawn_leaves_what_was_committed() -> None:
    shadow = manifest()
    protect(shadow, 1, slots=2)
    tail = shadow.plan(write(1, 2, 3))
    fresh = shadow.plan(write(2, 0, 1))
    shadow.plan(write(3, 1, SIZE))
    again = shadow.plan_catch_up(3)
    assert tail
    assert fresh
    assert again
    shadow.withdraw([tail, fresh, again])
    assert (shadow.entries[1].slots, shadow.entries[1].planned) == (2, 2)
    assert 2 not in shadow.entries, "nothing was written there"
    assert 2 not in shadow.unprotected
    assert shadow.unprotected == {3: (0, SIZE)}, "still data, still without protection, still counted"
    assert shadow.current([tail, fresh, again]) == (tail,)
    shadow.check()


def test_withdrawing_an_older_generation_does_nothing() -> None:
    shadow = manifest()
    old = shadow.plan(write(1, 0, 2))
    protect(shadow, 1, slots=1)
    assert old is not None
    shadow.withdraw([old])
    assert shadow.entries[1].slots == 1


@pytest.mark.parametrize("died", ["before staging", "while staging", "after staging"])
def test_a_rank_that_dies_in_a_step_costs_nothing_that_was_committed(died: str) -> None:
    world = World(random.Random(1), block_sizes=(SIZE,))
    world.accept(world.plan([world.write(1, 0, 2), world.write(2, 0, SIZE)]))
    world.pump()
    world.keeper_encodes()  # block 2 is coded
    step = world.plan([world.write(1, 2, 3), world.write(3, 0, 1)])
    for rank in (1, 2):
        world.run(step, rank)
        world.stage(step, rank)
    if died != "before staging":
        world.run(step, 0)
        world.tear(step, 0, pieces=1 if died == "while staging" else 2)
    world.check()
    source = {
        block: world.manifest.source(block, needed=world.written(block), lost=FIRST) for block in (1, 2)
    }
    assert (source[1].choice, source[2].choice) == (Source.MIRROR, Source.PARITY)
    assert world.manifest.source(1, needed=3, lost=FIRST).choice is Source.LOST, "what the step wrote is not"
    assert world.manifest.source(3, needed=1, lost=FIRST).choice is Source.LOST
    world.lose(0)
    world.accept(step)  # the retry, from the same slots
    world.check()
    assert world.manifest.source(1, needed=3, lost=FIRST).choice is Source.MIRROR


class HandsFramesOfOpenStepsBack(Manifest):
    """Does not wait for the steps in flight before it gives a dropped block's frames away."""

    def drop(self, block: int) -> None:
        if (entry := self.entries.get(block)) is not None:
            entry.open_pieces = 0
        Manifest.drop(self, block)


@pytest.mark.parametrize("kind", [Manifest, HandsFramesOfOpenStepsBack])
def test_frames_of_a_block_that_was_given_up_are_not_anothers_before_its_step_has_run(
    kind: type[Manifest],
) -> None:
    """Block 3 is lost while a step catches it up: its frames must not become block 1's parity yet."""
    world = World(random.Random(2), block_sizes=(SIZE,), frames=7, kind=kind)
    world.accept(world.plan([world.write(1, 0, SIZE)]))
    world.manifest.unprotected[3] = (0, SIZE)
    world.committed[3] = [bytes(SIZE)] * world.ranks
    step = world.plan([], catch_up=True)
    world.lose(0)
    assert world.written(3) == 0, "it was lost"
    if retired := world.manifest.take_retired():
        world.wipes.append(retired)
        world.keeper_wipes()
    world.pump()
    taken = set(world.jobs[0].parity) & {frame for piece in step.pieces for frame in piece.frames}
    world.keeper_encodes()
    world.accept(step)
    if kind is Manifest:
        assert not taken
        world.check()
    else:
        assert taken
        with pytest.raises(AssertionError, match="fails its checksum"):
            world.check()


def test_a_step_with_pieces_of_blocks_that_were_given_up_is_sent_without_them() -> None:
    shadow = manifest()
    piece, other = shadow.plan(write(1, 0, 2)), shadow.plan(write(2, 0, 2))
    assert piece is not None
    assert other is not None
    shadow.drop(1)
    assert shadow.take_retired() == (), "a rank may still write there"
    assert shadow.current([piece, other]) == (other,)
    assert shadow.take_retired() == piece.frames
    shadow.check()


def test_two_steps_in_flight_commit_one_after_the_other() -> None:
    shadow = manifest()
    first, second = shadow.plan(write(1, 0, 2)), shadow.plan(write(1, 2, SIZE))
    assert (first, second) != (None, None)
    assert shadow.source(1, needed=1, lost=FIRST).choice is Source.LOST, "nothing is accepted"
    commit(shadow, first)
    assert shadow.source(1, needed=2, lost=FIRST).choice is Source.MIRROR
    assert shadow.source(1, needed=3, lost=FIRST).choice is Source.LOST
    shadow.check()
    commit(shadow, second)
    assert shadow.entries[1].state is BlockState.SEALED
    shadow.check()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_steps_in_flight_are_withdrawn_in_any_order(order: tuple[int, int]) -> None:
    shadow = manifest()
    protect(shadow, 1, slots=1)
    grown = [shadow.plan(write(1, 1, 2)), shadow.plan(write(1, 2, 3))]
    fresh = [shadow.plan(write(2, 0, 2)), shadow.plan(write(2, 2, 3))]
    for index in order:
        shadow.withdraw(piece for piece in (grown[index], fresh[index]) if piece is not None)
        shadow.check()
    assert (shadow.entries[1].slots, shadow.entries[1].planned) == (1, 1)
    assert 2 not in shadow.entries
    assert len(shadow.take_retired()) == RANKS


# ---- where a block can come from -------------------------------------------------------------------------------------


def test_sources_and_their_reasons() -> None:
    shadow = manifest()
    code(shadow, 1)
    protect(shadow, 2)
    protect(shadow, 3, slots=2)
    both = frozenset(range(RANKS))
    expected = {
        (0, 0, FIRST): (Source.NOTHING, "no slot"),
        (9, 1, FIRST): (Source.LOST, "unprotected"),
        (1, SIZE, FIRST): (Source.PARITY, "coded"),
        (1, SIZE, both): (Source.LOST, "2 ranks lost, 1 parity"),
        (2, SIZE, FIRST): (Source.MIRROR, "sealed"),
        (2, SIZE, both): (Source.MIRROR, "sealed"),
        (3, 2, both): (Source.MIRROR, "mirrored"),
        (3, 1, both): (Source.MIRROR, "mirrored"),
        (3, 3, FIRST): (Source.LOST, "2 of 3 slots"),
    }
    for (block, needed, lost), (choice, reason) in expected.items():
        decision = shadow.source(block, needed=needed, lost=lost)
        assert decision.choice is choice
        assert reason in decision.reason
    job = shadow.next_job()
    assert job is not None
    assert shadow.source(2, needed=SIZE, lost=both).reason.endswith("coding"), "its mirrors are still whole"


def test_a_bound_that_never_grows() -> None:
    """Any number of lives: generations only rise, and no frame is lost."""
    shadow = manifest(frames=12)
    for generation in range(1, 40):
        entry = code(shadow, 1)
        assert entry.generation == generation
        released(shadow)
        shadow.check()
    assert shadow.pool.free_count == 12 - 1


# ---- a random life ---------------------------------------------------------------------------------------------------


def some_writes(world: World, rng: random.Random) -> list[tuple[Write, list[bytes]]]:
    """What a scheduler might do: new blocks, tails that grow, whole blocks, rewrites."""
    writes = []
    for block in rng.sample(range(1, world.blocks), k=rng.randint(1, 4)):
        size, known = world.size(block), world.written(block)
        kind = rng.choices(["grow", "new", "rewrite"], weights=[6, 3, 1])[0]
        if kind == "grow" and 0 < known < size:
            writes.append(world.write(block, known, rng.randint(known + 1, size)))
        elif kind == "rewrite" and 0 < known < size:
            writes.append(world.write(block, known, rng.randint(known + 1, size), whole=True))
        else:
            writes.append(world.write(block, 0, rng.randint(1, size)))
    return writes


def more_writes(world: World, rng: random.Random, before: OpenStep) -> list[tuple[Write, list[bytes]]]:
    """What a scheduler might send while a step is in flight: its blocks grow, and others are begun."""
    writes = []
    for block in rng.sample(range(1, world.blocks), k=rng.randint(1, 4)):
        coming = next((write for write, _ in before.writes if write.block == block), None)
        size, known = world.size(block), world.written(block) if coming is None else coming.stop
        if 0 < known < size:
            writes.append(world.write(block, known, rng.randint(known + 1, size)))
        elif coming is None:
            writes.append(world.write(block, 0, rng.randint(1, size)))
    return writes


def take_steps(world: World, rng: random.Random) -> None:
    """One step, or two in flight; losses on the way; accepted in order."""
    steps = [world.plan(some_writes(world, rng), catch_up=rng.random() < 0.7)]
    if rng.random() < 0.5:
        world.check()
        steps.append(world.plan(more_writes(world, rng, steps[0]), catch_up=rng.random() < 0.3))
        world.seen.add("two in flight")
    for _ in range(rng.choices([0, 1, 2], weights=[8, 2, 1])[0]):
        torn(world, rng, steps)
    while steps:
        if rng.random() < 0.05:
            world.unstaged(steps.pop(0))
        else:
            world.accept(steps.pop(0))
        background(world, rng)
        world.check()
        if steps and rng.random() < 0.1:
            torn(world, rng, steps)


def torn(world: World, rng: random.Random, steps: list[OpenStep]) -> None:
    """Ranks get to different points of the steps, one dies; its block comes back and all are tried again."""
    for rank in range(world.ranks):
        for step in steps[: rng.randint(0, len(steps))]:
            world.run(step, rank)
            if rng.random() < 0.3:
                world.tear(step, rank, pieces=rng.randint(0, len(step.pieces)))
                break
            world.stage(step, rank)
    world.seen.add("torn")
    background(world, rng)
    world.check()
    world.lose(rng.randrange(world.ranks))
    # A tail whose earlier slots are gone cannot be written on: its request leaves the steps.
    for index, step in enumerate(steps):
        for write, _ in list(step.writes):
            starts = 0 if write.whole else write.start
            earlier = [w.stop for before in steps[:index] for w, _ in before.writes if w.block == write.block]
            if starts and max([world.written(write.block), *earlier]) < starts:
                world.take_out(steps, write.block)
    for step in steps:
        step.pieces = list(world.manifest.current(step.pieces))
    background(world, rng)
    world.check()


def background(world: World, rng: random.Random) -> None:
    """What the keeper's thread does meanwhile; wipes and jobs overtake each other."""
    for _ in range(rng.randint(0, 6)):
        happens = rng.choice(["pump", "encode", "wipe"])
        if happens == "pump":
            world.pump()
        elif happens == "encode" and world.jobs:
            world.keeper_encodes(dies=rng.random() < 0.1)
        elif happens == "wipe" and world.wipes:
            world.keeper_wipes()


def give_up_something(world: World, rng: random.Random) -> None:
    coding = [job.block for job in world.jobs if job.block in world.manifest.entries]
    block = rng.choice(coding) if coding else rng.randrange(1, world.blocks)
    if coding or rng.random() < 0.5:
        world.forget(block)
    elif block in world.manifest.entries:
        world.manifest.evict(iter([block]), frames=1)


def random_life(seed: int, *, kind: type[Manifest] = Manifest, operations: int = 80) -> set[str]:
    rng = random.Random(seed)
    world = World(rng, frames=rng.choice([8, 14, 25, 60]), compact=rng.random() < 0.85, kind=kind)
    for _ in range(operations):
        happens: Callable[[World, random.Random], None] = rng.choices(
            [take_steps, background, give_up_something], weights=[6, 5, 2]
        )[0]
        happens(world, rng)
        world.check()
    for _ in range(100):  # everything comes to rest, and nothing has leaked
        world.pump()
        while world.jobs:
            world.keeper_encodes()
        while world.wipes:
            world.keeper_wipes()
    world.check()
    world.manifest.drop_all()
    world.pump()
    while world.wipes:
        world.keeper_wipes()
    assert world.manifest.pool.free_count == world.frames
    return world.seen


def test_random_lives() -> None:
    seen: set[str] = set()
    for seed in range(50):
        seen |= random_life(seed)
    assert seen >= {"mirror", "parity", "lost", "torn", "encoded", "caught up", "two in flight"}
    assert "refused" not in seen, "no mirror ever differs from its checksum"


# ---- and the walk finds planted bugs ---------------------------------------------------------------------------------


class KeepsReusedBlocks(Manifest):
    """Believes the old generation of a block that is written anew, where it finds no room for the new one."""

    def plan(self, write: Write) -> Piece | None:
        old = self.entries.get(write.block)
        piece = Manifest.plan(self, write)
        if piece is None and old is not None and old.mirrors == () and old.job is None and not old.parity:
            return None
        if piece is None and old is not None:
            self.entries[write.block] = old
            self.unprotected.pop(write.block, None)
        return piece


class CommitsTornSteps(Manifest):
    """Counts slots as mirrored once they are planned."""

    def plan(self, write: Write) -> Piece | None:
        piece = Manifest.plan(self, write)
        if piece is not None:
            self.entries[piece.block].slots = piece.stop
        return piece


class HandsFramesBackAtOnce(Manifest):
    """Does not wait for the keeper's answer before it gives a dropped block's frames away."""

    def drop(self, block: int) -> None:
        entry = self.entries.get(block)
        if entry is not None and entry.job is not None:
            self._jobs.pop(entry.job)
            entry.job = None
        Manifest.drop(self, block)


class ExtendsRewrites(Manifest):
    """Takes the write of a copied block for one that only goes on."""

    def plan(self, write: Write) -> Piece | None:
        return Manifest.plan(self, replace(write, whole=False))


@pytest.mark.parametrize(
    "kind", [KeepsReusedBlocks, CommitsTornSteps, HandsFramesBackAtOnce, ExtendsRewrites]
)
def test_a_planted_bug_is_found(kind: type[Manifest]) -> None:
    for seed in range(400):
        try:
            random_life(seed, kind=kind)
        except (AssertionError, KeyError):
            return
    pytest.fail(f"{kind.__doc__} and nobody noticed")
