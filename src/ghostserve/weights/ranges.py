"""Which pieces of a file are read in which order so that the ranges wanted arrive. Pure.

    file      ...|--------|--------|--------|--------|--------|...      aligned to `align_bytes`
    ranges          [  a )        [ b )[c)              [  d  )
    reads        [---------------)[--------)         [---------)        each a Chunk: cut at multiples of `chunk_bytes`
    pieces          [  a )        [ b )[c)              [  d  )         what of a chunk goes where

Disks want large aligned reads, several at a time. A gap that takes less time to read than to go around is read and thrown away.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ALIGN_BYTES = 4096
"""Enough for direct reads from every disk in use, in file and memory; whoever wants more answers EINVAL and is read otherwise."""
CHUNK_BYTES = 8 << 20
DEPTH = 4
"""Reads in flight. Not tuned finely: from two reads of 4 MiB on, what was measured differs less between settings than between runs of
one (bench/weights_reader.py); a single read, or 1 MiB, tends to be slower."""
GAP_BYTES = 128 << 10


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes `begin` to `end` of the file are wanted at `at` of the destination."""

    begin: int
    end: int
    at: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a chunk that is wanted."""

    source: int
    """Where it begins in the chunk."""
    target: int
    """Where it begins in the destination."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """One read."""

    offset: int
    nbytes: int
    """A multiple of the alignment, but at the end of the file."""
    pieces: tuple[Piece, ...]
    ready: int
    """How many of the bytes wanted are there once this chunk and all before it are."""

    @property
    def whole(self) -> int | None:
        """Where in the destination it belongs if all of it is wanted in one piece."""
        piece = self.pieces[0] if self.pieces else None
        return piece.target if piece is not None and piece.nbytes == self.nbytes else None


def packed(spans: Iterable[tuple[int, int]]) -> tuple[Range, ...]:
    """The spans (begin, end) one behind the other in the destination."""
    ranges, at = [], 0
    for begin, end in spans:
        ranges.append(Range(begin, end, at))
        at += end - begin
    return tuple(ranges)


def plan(
    ranges: Sequence[Range],
    *,
    file_bytes: int,
    chunk_bytes: int = CHUNK_BYTES,
    align_bytes: int = ALIGN_BYTES,
) -> tuple[Chunk, ...]:
    """The reads, in the order of the file. ValueError if the ranges are not ascending, apart and inside the file.

    `chunk_bytes` is rounded up to a multiple of `align_bytes`.
    """
    ranges = [wanted for wanted in ranges if wanted.begin != wanted.end]
    at = 0
    for wanted in ranges:
        if not at <= wanted.begin < wanted.end <= file_bytes or wanted.at < 0:
            raise ValueError(f"{wanted} after byte {at} of {file_bytes}: not ascending, or not in the file")
        at = wanted.end
    chunk_bytes = _up(max(chunk_bytes, 1), align_bytes)
    chunks: list[Chunk] = []
    ready = first = 0
    for begin, end in _spans(ranges, file_bytes=file_bytes, align_bytes=align_bytes):
        offset = begin
        while offset < end:
            stop = min(end, offset - offset % chunk_bytes + chunk_bytes)
            while first < len(ranges) and ranges[first].end <= offset:
                first += 1
            pieces = _pieces(ranges, first, offset, stop)
            ready += sum(piece.nbytes for piece in pieces)
            chunks.append(Chunk(offset, stop - offset, pieces, ready))
            offset = stop
    return tuple(chunks)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _spans(ranges: Sequence[Range], *, file_bytes: int, align_bytes: int) -> list[tuple[int, int]]:
    """What is read at all: the ranges, widened to the alignment, those close together as one."""
    spans: list[tuple[int, int]] = []
    for wanted in ranges:
        begin = wanted.begin - wanted.begin % align_bytes
        end = min(_up(wanted.end, align_bytes), file_bytes)
        if spans and begin - spans[-1][1] < GAP_BYTES:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((begin, end))
    return spans


def _pieces(ranges: Sequence[Range], first: int, begin: int, end: int) -> tuple[Piece, ...]:
    """What of bytes `begin` to `end` is wanted, by the ranges from index `first` on."""
    pieces = []
    for wanted in itertools.islice(ranges, first, None):
        if wanted.begin >= end:
            break
        start, stop = max(begin, wanted.begin), min(end, wanted.end)
        pieces.append(Piece(start - begin, wanted.at + start - wanted.begin, stop - start))
    return tuple(pieces)
