"""Which block is compared next, and what a difference means: pure."""

from __future__ import annotations

import random
import zlib

import numpy as np
import pytest

from ghostserve.arena.frames import FramePool
from ghostserve.shadow.manifest import BlockState, Manifest
from ghostserve.shadow.scrub import (
    PATIENCE_S,
    ROUND_S_MIN,
    Bursts,
    Check,
    Finding,
    Part,
    Place,
    Remedy,
    Round,
    difference,
    frames_check,
    kv_check,
    pause_s,
    remedy_for_frames,
    remedy_for_kv,
    subject_of,
)
from ghostserve.shadow.step_plan import Write

SIZE, SLOT_BYTES = 4, 10
BLOCK_BYTES = SIZE * SLOT_BYTES


def manifest_of(*, ranks: int = 2, parity_shards: int = 1, compact: bool = True) -> Manifest:
    return Manifest(
        ranks=ranks,
        parity_shards=parity_shards,
        block_sizes=(SIZE,),
        slot_bytes=(SLOT_BYTES,),
        pool=FramePool(200),
        compact=compact,
    )


def write(manifest: Manifest, block: int, *, start: int = 0, stop: int = SIZE) -> None:
    """A step that is accepted at once; checksums name block, rank and slots."""
    piece = manifest.plan(Write(block=block, group=0, start=start, stop=stop, whole=False))
    assert piece is not None
    manifest.commit(
        [piece], [(zlib.crc32(b"%d %d %d" % (block, rank, stop)),) for rank in range(manifest.ranks)]
    )


def code(manifest: Manifest, *, until_answered: bool = True) -> None:
    """Everything that is sealed goes to the keeper, and comes back."""
    while (job := manifest.next_job()) is not None:
        if until_answered:
            manifest.job_done(job.job, ok=True, parity_checksums=[7 + n for n in range(len(job.parity))])


def check_of(manifest: Manifest, block: int, part: Part) -> Check:
    entry = manifest.entries[block]
    check = kv_check(manifest, entry) if part is Part.KV else frames_check(manifest, entry)
    assert check is not None
    assert check.part is part
    return check


def everything(
    round_: Round, manifest: Manifest, *, now_s: float, idle: bool = True, bytes_max: int = 200
) -> list[Check]:
    """The rest of a round, batch by batch."""
    found: list[Check] = []
    while batch := round_.next_checks(manifest, bytes_max=bytes_max, now_s=now_s, idle=idle):
        assert sum(check.total_bytes for check in batch) <= bytes_max or len(batch) == 1
        found += batch
    return found


# -- which next ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_kv", [True, False])
@pytest.mark.parametrize("bytes_max", [1, 200, 10_000])
def test_a_round_looks_at_every_block_once(of_kv: bool, bytes_max: int) -> None:
    manifest, round_ = manifest_of(), Round(of_kv=of_kv)
    for block in (9, 3, 5, 1, 7):
        write(manifest, block)
    for now_s in (0.0, ROUND_S_MIN, 2 * ROUND_S_MIN):
        found = everything(round_, manifest, now_s=now_s, bytes_max=bytes_max)
        assert sorted(check.block for check in found) == [1, 3, 5, 7, 9]
        assert round_.progress == (5, 5)
        assert (
            round_.next_checks(manifest, bytes_max=bytes_max, now_s=now_s + 0.9 * ROUND_S_MIN, idle=True)
            == []
        )
    assert round_.rounds == 2, "the third is not left yet"


def test_rounds_over_nothing_are_not_counted() -> None:
    manifest, round_ = manifest_of(), Round(of_kv=True)
    for second in range(5):
        assert round_.next_checks(manifest, bytes_max=1, now_s=float(second), idle=True) == []
    assert round_.rounds == 0


def test_frames_of_a_job_are_bounded() -> None:
    manifest, round_ = manifest_of(ranks=3), Round(of_kv=False)
    for block in range(5):
        write(manifest, block)
    batch = round_.next_checks(manifest, bytes_max=10**9, now_s=0.0, idle=True, frames_max=7)
    assert [check.block for check in batch] == [0, 1]


def test_what_is_compared_follows_the_block() -> None:
    """Tail, sealed, with the keeper, coded: mirrors as far as they were committed, then the parity; KV always."""
    manifest = manifest_of(parity_shards=2)
    write(manifest, 1, stop=2)
    tail = check_of(manifest, 1, Part.MIRROR)
    assert (tail.slots, tail.nbytes, tail.frames) == (2, 2 * SLOT_BYTES, manifest.entries[1].mirrors)
    assert check_of(manifest, 1, Part.KV).nbytes == 2 * SLOT_BYTES
    write(manifest, 1, start=2)
    assert check_of(manifest, 1, Part.MIRROR).nbytes == BLOCK_BYTES
    code(manifest, until_answered=False)
    assert manifest.entries[1].state is BlockState.CODING
    assert check_of(manifest, 1, Part.MIRROR).frames == manifest.entries[1].mirrors
    manifest.job_done(1, ok=True, parity_checksums=(7, 8))
    coded = check_of(manifest, 1, Part.PARITY)
    assert (coded.frames, coded.checksums) == (manifest.entries[1].parity, (7, 8))
    assert coded.total_bytes == 2 * BLOCK_BYTES
    kv = check_of(manifest, 1, Part.KV)
    assert (kv.frames, kv.checksums, kv.slots) == ((), manifest.entries[1].checksums, SIZE)


def test_what_a_step_is_writing_is_left_alone() -> None:
    manifest = manifest_of()
    assert manifest.plan(Write(block=1, group=0, start=0, stop=2, whole=False)) is not None
    assert frames_check(manifest, manifest.entries[1]) is None, "nothing is committed"
    assert kv_check(manifest, manifest.entries[1]) is None
    write(manifest, 2, stop=2)
    assert manifest.plan(Write(block=2, group=0, start=2, stop=3, whole=False)) is not None
    assert kv_check(manifest, manifest.entries[2]) is None
    assert everything(Round(of_kv=True), manifest, now_s=0.0) == []


def test_tails_are_compared_in_idle_time_only() -> None:
    manifest = manifest_of()
    write(manifest, 1)
    write(manifest, 2, stop=3)
    assert [check.block for check in everything(Round(of_kv=False), manifest, now_s=0.0, idle=False)] == [1]
    assert [check.block for check in everything(Round(of_kv=False), manifest, now_s=0.0, idle=True)] == [1, 2]


# -- what a difference means -----------------------------------------------------------------------------------------------


def test_wrong_kv_is_a_loss_of_that_block_on_that_rank() -> None:
    manifest = manifest_of(ranks=3, parity_shards=2)
    write(manifest, 1)
    sealed = check_of(manifest, 1, Part.KV)
    every = frozenset({0, 1, 2})
    assert remedy_for_kv(manifest, sealed, wrong=every).choice is Remedy.FROM_MIRROR
    code(manifest)
    coded = check_of(manifest, 1, Part.KV)
    assert coded == sealed, "the KV is the same, whatever protects it"
    assert remedy_for_kv(manifest, sealed, wrong=frozenset({2})).choice is Remedy.FROM_PARITY
    assert remedy_for_kv(manifest, sealed, wrong=frozenset({0, 2})).choice is Remedy.FROM_PARITY
    refused = remedy_for_kv(manifest, sealed, wrong=every)
    assert refused.choice is Remedy.REFUSE
    assert "3 ranks lost, 2 parity shards" in refused.reason


def test_wrong_frames() -> None:
    manifest = manifest_of()
    write(manifest, 1)
    mirror = check_of(manifest, 1, Part.MIRROR)
    assert remedy_for_frames(manifest, mirror, idle=True, known_for_s=0.0).choice is Remedy.FROM_KV
    assert remedy_for_frames(manifest, mirror, idle=False, known_for_s=0.0).choice is Remedy.WAIT
    assert remedy_for_frames(manifest, mirror, idle=False, known_for_s=PATIENCE_S).choice is Remedy.GIVE_UP
    code(manifest, until_answered=False)
    assert remedy_for_frames(manifest, mirror, idle=True, known_for_s=9.0).choice is Remedy.WAIT, (
        "the keeper refuses it"
    )
    manifest.job_done(1, ok=True, parity_checksums=(7,))
    assert remedy_for_frames(manifest, mirror, idle=True, known_for_s=9.0).choice is Remedy.FORGET
    parity = check_of(manifest, 1, Part.PARITY)
    assert remedy_for_frames(manifest, parity, idle=True, known_for_s=0.0).choice is Remedy.PROTECT_ANEW
    assert remedy_for_frames(manifest, parity, idle=False, known_for_s=0.0).choice is Remedy.WAIT
    assert remedy_for_frames(manifest, parity, idle=False, known_for_s=PATIENCE_S).choice is Remedy.GIVE_UP


def test_a_wrong_tail_waits_for_idle_time_however_long() -> None:
    """A tail that is given up is unprotected until it is whole; the keeper refuses it then anyway."""
    manifest = manifest_of()
    write(manifest, 1, stop=2)
    tail = check_of(manifest, 1, Part.MIRROR)
    assert remedy_for_frames(manifest, tail, idle=False, known_for_s=1e9).choice is Remedy.WAIT
    assert remedy_for_frames(manifest, tail, idle=True, known_for_s=0.0).choice is Remedy.FROM_KV


@pytest.mark.parametrize("part", list(Part))
@pytest.mark.parametrize("wrong_frames_idle", [True, False])
def test_a_reused_block_is_never_judged_by_an_old_checksum(part: Part, wrong_frames_idle: bool) -> None:
    manifest = manifest_of()
    write(manifest, 1)
    if part is Part.PARITY:
        code(manifest)
    old = check_of(manifest, 1, part)
    assert subject_of(manifest, old) is not None
    write(manifest, 1)  # reused, with the same checksums even: only the generation tells
    if part is Part.PARITY:
        code(manifest)
    assert manifest.entries[1].generation == old.generation + 1
    assert subject_of(manifest, old) is None
    if part is Part.KV:
        assert remedy_for_kv(manifest, old, wrong=frozenset({1})).choice is Remedy.FORGET
    else:
        decision = remedy_for_frames(manifest, old, idle=wrong_frames_idle, known_for_s=9.0)
        assert decision.choice is Remedy.FORGET
    manifest.drop(1)
    assert subject_of(manifest, old) is None


def test_kv_that_grew_since_is_not_judged() -> None:
    manifest = manifest_of()
    write(manifest, 1, stop=2)
    old = check_of(manifest, 1, Part.KV)
    write(manifest, 1, start=2, stop=3)
    assert remedy_for_kv(manifest, old, wrong=frozenset({0})).choice is Remedy.FORGET


def test_random_lives_never_judge_another_generation() -> None:
    """Checks that are answered late: whenever the block was touched in between, nothing is done."""
    rng = random.Random(5)
    forgotten = judged = 0
    for _ in range(300):
        manifest = manifest_of(parity_shards=rng.choice([1, 2]))
        for block in range(4):
            write(manifest, block, stop=rng.choice([2, SIZE]))
        if rng.random() < 0.5:
            code(manifest)
        of_kv = rng.random() < 0.5
        checks = everything(Round(of_kv=of_kv), manifest, now_s=0.0)
        touched: set[int] = set()
        for _ in range(rng.randrange(4)):
            block = rng.randrange(4)
            touched.add(block)
            if rng.random() < 0.5:
                manifest.drop(block)
            write(manifest, block)
        for check in checks:
            if of_kv:
                decision = remedy_for_kv(manifest, check, wrong=frozenset({0}))
            else:
                decision = remedy_for_frames(manifest, check, idle=True, known_for_s=0.0)
            assert (decision.choice is Remedy.FORGET) is (check.block in touched), (check, decision)
            forgotten += check.block in touched
            judged += check.block not in touched
    assert forgotten > 100
    assert judged > 100


# -- how fast --------------------------------------------------------------------------------------------------------------


def test_the_rate_holds() -> None:
    def pause(spent: int, rate: int) -> float:
        return pause_s(spent, rate_bytes_s=rate, shortest_s=0.01, nothing_due_s=0.5)

    assert pause(1 << 20, 16 << 20) == 1 / 16
    assert pause(1 << 20, 1 << 40) == 0.01, "others get the lock in between"
    assert pause(0, 16 << 20) == 0.5


# -- where exactly ---------------------------------------------------------------------------------------------------------


def test_the_place_of_a_difference() -> None:
    layers = [("a", 2), ("b", 3), ("c", 1)]
    right = np.arange(4 * 6 * 4, dtype=np.uint8)  # 4 slots of 6 words of 4 bytes

    def flipped(*places: tuple[int, int]) -> np.ndarray:
        log = right.copy()
        for slot, word in places:
            log[(slot * 6 + word) * 4 + 3] ^= 1
        return log

    def place(log: np.ndarray) -> Place:
        return difference(log, right, word_bytes=4, layers=layers)

    assert place(flipped((2, 0))) == Place(layers=("a",), slots=(2,), words=1)
    assert place(flipped((2, 1))).layers == ("a",)
    assert place(flipped((0, 2))).layers == ("b",)
    assert place(flipped((0, 4), (3, 5), (3, 4))) == Place(layers=("b", "c"), slots=(0, 3), words=3)
    assert place(right) == Place(layers=(), slots=(), words=0)


def test_a_finding_says_rank_block_and_layer() -> None:
    finding = Finding(
        part="kv", block=17, index=1, layers=("model.layers.3",), slots=(0, 1, 2, 9), remedy="from its mirror",
        repaired=True, reason="",
    )  # fmt: skip
    assert str(finding) == (
        "kv of block 17, rank 1, differs from its checksum (layer model.layers.3, slots 0-2, 9): "
        "repaired (from its mirror)"
    )
    assert finding.as_dict()["slots"] == [0, 1, 2, 9]


def test_live_kv_is_compared_in_bursts() -> None:
    """An idle machine is left alone for most of the time; whoever was told to stop may begin at once again."""
    bursts = Bursts(burst_s=2.0, period_s=60.0)
    asked = [at_s for at_s in range(200) if bursts.allowed(float(at_s))]
    assert asked == [0, 1, 60, 61, 120, 121, 180, 181]
    bursts.start_over()
    assert bursts.allowed(199.5)
