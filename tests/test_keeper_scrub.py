"""What the keeper finds in frames while it codes and scrubs them. The process itself: `test_keeper.py`."""

from __future__ import annotations

import itertools
import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest

from ghostserve.arena.control import CONTROL_BYTES, LANE_KEEPER, ControlPage, Counter
from ghostserve.arena.memfd import Segment
from ghostserve.shadow import keeper_work
from ghostserve.shadow.keeper_jobs import failure, is_answer_to
from ghostserve.shadow.keeper_messages import (
    MESSAGE_MAX_BYTES,
    EncodeJob,
    Geometry,
    ScrubDone,
    ScrubJob,
    from_json,
    to_json,
)
from ghostserve.shadow.keeper_work import NONFINITE_EVERY_S, KeeperWork

FRAME, FRAMES, RANKS = 4096, 12, 2
GEOMETRY = Geometry(frame_bytes=FRAME, frames=FRAMES, ranks=RANKS, parity_shards=1, element="float32")


@dataclass
class Keeper:
    """A keeper's hands, and its pool full of numbers."""

    pool: Segment
    page: ControlPage
    work: KeeperWork

    def frame(self, frame: int) -> np.ndarray:
        return self.pool.array[frame * FRAME : (frame + 1) * FRAME]

    def numbers(self, frame: int) -> np.ndarray:
        return self.frame(frame).view(np.float32)

    def scrub_job(self, frames: tuple[int, ...], nbytes: tuple[int, ...]) -> ScrubJob:
        checksums = tuple(
            zlib.crc32(self.frame(frame)[:length].data) for frame, length in zip(frames, nbytes, strict=True)
        )
        return ScrubJob(job=5, frames=frames, nbytes=nbytes, checksums=checksums)

    def encode(self, block: int, mirrors: tuple[int, ...] = (0, 1)) -> bool:
        checksums = tuple(zlib.crc32(self.frame(mirror).data) for mirror in mirrors)
        job = EncodeJob(
            job=block, block=block, generation=1, mirrors=mirrors, parity=(9,), nbytes=FRAME, checksums=checksums
        )  # fmt: skip
        return self.work.do(job).ok


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    control, pool = Segment.create("test-control", CONTROL_BYTES), Segment.create("test-pool", FRAME * FRAMES)
    ControlPage.format(control)
    page = ControlPage(control, lane=LANE_KEEPER)
    pool.array[:].view(np.float32)[:] = np.random.default_rng(2).standard_normal(FRAME * FRAMES // 4)
    work = KeeperWork(pool=pool, control=page)
    work.configure(GEOMETRY)
    yield Keeper(pool, page, work)
    control.close()
    pool.close()


def test_frames_that_differ_are_named(keeper: Keeper) -> None:
    job = keeper.scrub_job((3, 7, 1, 4), (FRAME, 100, FRAME, 1))
    assert keeper.work.do(job) == ScrubDone(job=5)
    before = keeper.pool.array.copy()
    for frame, place in ((3, FRAME - 1), (4, 0), (7, 100)):  # the last one is beyond what is compared
        keeper.frame(frame)[place] ^= 0x10
    assert keeper.work.do(job) == ScrubDone(job=5, wrong=(0, 3))
    assert np.count_nonzero(keeper.pool.array != before) == 3, "nothing is written"
    assert keeper.page.get(Counter.SCRUBBED_BYTES_TOTAL) == 2 * (2 * FRAME + 101)


@pytest.mark.parametrize(
    "wrong",
    [
        {"frames": (FRAMES,)},
        {"frames": (1, 1), "nbytes": (1, 1), "checksums": (0, 0)},
        {"nbytes": (0,)},
        {"nbytes": (FRAME + 1,)},
        {"nbytes": (1, 1)},
        {"checksums": ()},
    ],
)
def test_a_scrub_that_cannot_be_is_refused(keeper: Keeper, wrong: dict[str, tuple[int, ...]]) -> None:
    job = replace(keeper.scrub_job((1,), (FRAME,)), **wrong)
    answer = keeper.work.do(job)
    assert isinstance(answer, ScrubDone)
    assert not answer.ok
    assert answer.reason
    assert not answer.wrong


def test_the_messages() -> None:
    """They come back as they were, at most as long as a packet, and belong together."""
    many = tuple(range(1024))
    job = ScrubJob(job=7, frames=many, nbytes=(1 << 24,) * 1024, checksums=(2**32 - 1,) * 1024)
    for message in (job, ScrubDone(job=7, wrong=many), ScrubDone(job=7, ok=False, reason="no")):
        assert len(to_json(message)) <= MESSAGE_MAX_BYTES
        assert from_json(to_json(message)) == message
    assert is_answer_to(job, ScrubDone(job=7, wrong=many))
    assert not is_answer_to(job, ScrubDone(job=7, wrong=(1024,))), "no such frame was asked for"
    assert failure(job, "gone") == ScrubDone(job=7, ok=False, reason="gone")


@pytest.mark.parametrize(
    ("numbers", "nan", "inf"),
    [([], 0, 0), ([np.nan], 1, 0), ([np.inf, -np.inf], 0, 2), ([np.nan, 1.0, np.inf, np.nan], 2, 1)],
)
def test_no_numbers_are_counted_as_a_stripe_is_coded(
    keeper: Keeper, numbers: list[float], nan: int, inf: int
) -> None:
    keeper.numbers(1)[40 : 40 + len(numbers)] = numbers
    assert keeper.encode(3), "they are data like any other"
    assert keeper.page.get(Counter.KV_NAN_TOTAL) == nan
    assert keeper.page.get(Counter.KV_INF_TOTAL) == inf


def test_of_bytes_that_are_no_floats_nothing_is_counted(keeper: Keeper) -> None:
    keeper.work.configure(replace(GEOMETRY, element=""))
    keeper.frame(0)[:] = 0xFF
    assert keeper.encode(3)
    assert keeper.page.get(Counter.KV_NAN_TOTAL) == 0


def test_the_log_names_rank_and_block_and_does_not_flood(
    keeper: Keeper, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = itertools.count(100.0)
    monkeypatch.setattr(keeper_work, "monotonic_s", lambda: next(now_s))
    keeper.numbers(1)[7] = np.nan
    keeper.numbers(1)[9:11] = np.inf
    with caplog.at_level(logging.WARNING):
        for block in range(30):  # two readings of the clock for the first, one for each of the others
            assert keeper.encode(block)
    said = [record.getMessage() for record in caplog.records]
    assert (
        said[0]
        == "block 0 holds KV that is no number: rank 1: 1 NaN, 2 infinite (1 such blocks since the last word)"
    )
    assert 2 <= len(said) <= 1 + 32 // NONFINITE_EVERY_S
    assert sum(int(line.split("(")[1].split()[0]) for line in said) <= 30
    assert keeper.page.get(Counter.KV_NAN_TOTAL) == 30
