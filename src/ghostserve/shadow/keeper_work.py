"""What the keeper does with frames: encode stripes, compare them with their checksums, and wipe. Knows the pool and the jobs, no socket.

Jobs come from another process, so everything about them is checked before a byte is touched. Nothing here
raises for a job: what goes wrong is in its answer, is logged and counted, and the next job is done.
"""

from __future__ import annotations

import logging
import os
import signal

from ghostserve.arena.control import ControlPage, Counter, FaultAction, FaultPoint
from ghostserve.arena.memfd import Segment
from ghostserve.clock import monotonic_s
from ghostserve.codec.base import Bytes, Codec
from ghostserve.codec.choose import host_codec
from ghostserve.errors import GhostserveError, ProtocolError
from ghostserve.native.checksum import crc32
from ghostserve.shadow.keeper_jobs import failure
from ghostserve.shadow.keeper_messages import (
    Answer,
    EncodeDone,
    EncodeJob,
    Geometry,
    Job,
    ScrubDone,
    ScrubJob,
    WipeDone,
    WipeJob,
)
from ghostserve.shadow.nonfinite import count_nonfinite

logger = logging.getLogger(__name__)

KEEPER_RANK = 0  # under which faults at KEEPER_ENCODING are armed
NONFINITE_EVERY_S = 10.0  # a model that has gone wrong does so in every block


class KeeperWork:
    """The keeper's hands: `configure` once, then `do` jobs one after the other."""

    def __init__(self, *, pool: Segment, control: ControlPage) -> None:
        self._pool = pool
        self._control = control
        self._geometry: Geometry | None = None
        self._codec: Codec | None = None
        self._nonfinite_blocks = 0  # since the last word about them
        self._nonfinite_told_s = float("-inf")

    def configure(self, geometry: Geometry) -> None:
        """Take a geometry. ProtocolError if the pool has no room for it, UsageError if no code fits."""
        self._pool.refresh()
        needed = geometry.frames * geometry.frame_bytes
        if needed > self._pool.size_bytes:
            raise ProtocolError(
                f"{geometry.frames} frames of {geometry.frame_bytes} bytes, pool of {self._pool.size_bytes}"
            )
        codec = host_codec(geometry.ranks, geometry.parity_shards)
        logger.info("%d + %d shards, codec: %s", codec.n, codec.m, codec.backend.name)
        self._codec = codec
        self._geometry = geometry

    def do(self, job: Job) -> Answer:
        """Do one job and say how it went."""
        try:
            if isinstance(job, WipeJob):
                self._wipe(job)
                return WipeDone(job=job.job)
            return self._scrub(job) if isinstance(job, ScrubJob) else self._encode(job)
        except ProtocolError as error:
            logger.warning("job %d refused: %s", job.job, error)
            reason = str(error)
        except Exception as error:  # whatever it is, it concerns this job only
            logger.exception("job %d failed", job.job)
            reason = f"{type(error).__name__}: {error}"
        self._control.add(Counter.SHADOW_ERRORS_TOTAL)
        return failure(job, reason)

    def _encode(self, job: EncodeJob) -> EncodeDone:
        mirrors, parity, codec = self._stripe(job)
        taken = self._control.take_fault(FaultPoint.KEEPER_ENCODING, KEEPER_RANK)
        fault = None if taken is None else taken.action
        if fault is FaultAction.CORRUPT_MIRROR:
            mirrors[0][0] ^= 1
        bad = tuple(
            rank
            for rank, (mirror, checksum) in enumerate(zip(mirrors, job.checksums, strict=True))
            if crc32(mirror) != checksum
        )
        if bad:
            logger.error("block %d: the mirrors of ranks %s differ from their checksums", job.block, bad)
            self._control.add(Counter.CHECKSUM_REFUSALS_TOTAL)
            return EncodeDone(job=job.job, ok=False, bad_ranks=bad, reason="checksum of a mirror")
        self._count_nonfinite(job.block, mirrors)
        half = job.nbytes // 2
        codec.encode([shard[:half] for shard in mirrors], [shard[:half] for shard in parity])
        _strike(fault)
        codec.encode([shard[half:] for shard in mirrors], [shard[half:] for shard in parity])
        checksums = tuple(crc32(shard) for shard in parity)
        if fault is FaultAction.CORRUPT_PARITY:
            for spare in parity[: max(1, len(parity) - 1)]:
                spare[0] ^= 1
        self._control.add(Counter.ENCODE_BYTES_TOTAL, job.nbytes * len(mirrors))
        return EncodeDone(job=job.job, ok=True, parity_checksums=checksums)

    def _count_nonfinite(self, block: int, mirrors: list[Bytes]) -> None:
        """Here rather than in a step: the bytes are about to be read anyway, and nobody waits."""
        element = self._known_geometry().element
        found = {rank: count for rank, log in enumerate(mirrors) if (count := count_nonfinite(log, element))}
        if not found:
            return
        self._control.add(Counter.KV_NAN_TOTAL, sum(count.nan for count in found.values()))
        self._control.add(Counter.KV_INF_TOTAL, sum(count.inf for count in found.values()))
        self._nonfinite_blocks += 1
        if monotonic_s() - self._nonfinite_told_s < NONFINITE_EVERY_S:
            return
        self._nonfinite_told_s = monotonic_s()
        logger.warning(
            "block %d holds KV that is no number: %s (%d such blocks since the last word)",
            block,
            ", ".join(f"rank {rank}: {count.nan} NaN, {count.inf} infinite" for rank, count in found.items()),
            self._nonfinite_blocks,
        )
        self._nonfinite_blocks = 0

    def _scrub(self, job: ScrubJob) -> ScrubDone:
        geometry = self._known_geometry()
        if not len(job.frames) == len(job.nbytes) == len(job.checksums):
            raise ProtocolError(
                f"{len(job.frames)} frames, {len(job.nbytes)} lengths, {len(job.checksums)} checksums"
            )
        if not all(0 < nbytes <= geometry.frame_bytes for nbytes in job.nbytes):
            raise ProtocolError(f"{job.nbytes[:16]} bytes of frames of {geometry.frame_bytes}")
        _check_frames(job.frames, geometry)
        wrong = tuple(
            place
            for place, (frame, nbytes) in enumerate(zip(job.frames, job.nbytes, strict=True))
            if crc32(self._shard(frame, nbytes)) != job.checksums[place]
        )
        self._control.add(Counter.SCRUBBED_BYTES_TOTAL, sum(job.nbytes))
        return ScrubDone(job=job.job, wrong=wrong)

    def _wipe(self, job: WipeJob) -> None:
        geometry = self._known_geometry()
        _check_frames(job.frames, geometry)
        for first, count in _runs(sorted(job.frames)):
            start, length = first * geometry.frame_bytes, count * geometry.frame_bytes
            if job.give_back:
                self._pool.punch(start, length)
            else:
                self._pool.array[start : start + length] = 0

    def _stripe(self, job: EncodeJob) -> tuple[list[Bytes], list[Bytes], Codec]:
        """The job's mirrors and parity, `nbytes` long each; ProtocolError if it asks for what cannot be."""
        geometry = self._known_geometry()
        codec = self._codec
        assert codec is not None
        if (len(job.mirrors), len(job.checksums), len(job.parity)) != (codec.n, codec.n, codec.m):
            raise ProtocolError(
                f"{len(job.mirrors)} mirrors, {len(job.checksums)} checksums and {len(job.parity)} parity "
                f"frames; {codec.n}, {codec.n} and {codec.m} expected"
            )
        if not 0 < job.nbytes <= geometry.frame_bytes:
            raise ProtocolError(f"{job.nbytes} bytes of frames of {geometry.frame_bytes}")
        _check_frames((*job.mirrors, *job.parity), geometry)
        return (
            [self._shard(frame, job.nbytes) for frame in job.mirrors],
            [self._shard(frame, job.nbytes) for frame in job.parity],
            codec,
        )

    def _shard(self, frame: int, nbytes: int) -> Bytes:
        start = frame * self._known_geometry().frame_bytes
        return self._pool.array[start : start + nbytes]

    def _known_geometry(self) -> Geometry:
        if self._geometry is None:
            raise ProtocolError("a job came before the geometry")
        return self._geometry


def _check_frames(frames: tuple[int, ...], geometry: Geometry) -> None:
    if len(set(frames)) != len(frames) or not all(0 <= frame < geometry.frames for frame in frames):
        raise ProtocolError(f"frames {frames[:16]}: twice, or not among {geometry.frames}")


def _runs(frames: list[int]) -> list[tuple[int, int]]:
    """(first, count) of each run of consecutive numbers; one system call wipes a run."""
    runs: list[tuple[int, int]] = []
    for frame in frames:
        if runs and sum(runs[-1]) == frame:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((frame, 1))
    return runs


def _strike(fault: FaultAction | None) -> None:
    """What a fault does to the keeper with half of the parity written."""
    match fault:
        case FaultAction.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        case FaultAction.HANG:
            os.kill(os.getpid(), signal.SIGSTOP)
        case FaultAction.RAISE:
            raise GhostserveError("a fault was armed")
        case _:
            pass
