"""What a loader may rely on, whichever way the weights come: one contract, and every way is held to it.

At the end the contract meets ways that break it. What needs a process that dies or stands still is in test_weights_pooled_file.py and
test_weights_faults.py.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weights_tiers_promises as promises
from ghostserve.engine.loader_files import FileBytes
from ghostserve.errors import BadWeightsFileError, MissingShardError, WeightsReadError
from ghostserve.weights import arriving, blocks, checksum_file, checksums, own_file, ranges, reader, source
from ghostserve.weights.checksums import Checksums
from ghostserve.weights.destination import Bytes
from ghostserve.weights.model_files import WeightsFile
from ghostserve.weights.recycled import Recycler
from s3_kit import serving
from weights_pool_kit import Place
from weights_tiers_kit import LARGE, WAYS, Files, Remotes, Spans, Tier, Way, make_files
from weights_tiers_promises import CHANGES, KIB, Change, Pread

pytestmark = pytest.mark.long

Make = Callable[..., Tier]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("made"), seed=1)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A model of the same names, types and shapes, with other bytes."""
    return make_files(tmp_path_factory.mktemp("made"), seed=9)


@pytest.fixture(scope="module")
def shared_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One holder for all; each test forgets what it put there."""
    place = Place(tmp_path_factory.mktemp("holder") / "run")
    yield place
    place.close()


@pytest.fixture(scope="module")
def remotes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remotes]:
    with contextlib.ExitStack() as ended:

        @functools.cache
        def server() -> str:
            pytest.importorskip("boto3")
            return ended.enter_context(serving())

        yield Remotes(tmp_path_factory.mktemp("pulled"), server)


@pytest.fixture
def make(tmp_path: Path, shared_place: Place, remotes: Remotes) -> Iterator[Make]:
    """Makes a way, or one that breaks its promises, ready for use."""
    with contextlib.ExitStack() as ended:

        def make(way: Way, kind: type[Tier] = Tier) -> Tier:
            return ended.enter_context(contextlib.closing(kind(way, tmp_path, shared_place, remotes)))

        yield make


@pytest.fixture(params=WAYS, ids=[way.name for way in WAYS])
def tier(request: pytest.FixtureRequest, make: Make) -> Tier:
    return make(request.param)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 KiB, 96 KiB ahead, checksums of 32 KiB, reads of 16 KiB: with a small model all borders are met."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64 * KIB)
    monkeypatch.setattr(own_file, "AHEAD_BYTES", 96 * KIB)
    monkeypatch.setattr(ranges, "GAP_BYTES", 4 * KIB)
    for module in (checksums, checksum_file, reader):
        monkeypatch.setattr(module, "CELL_BYTES", 32 * KIB)
    read = functools.partial(arriving.read_ranges, chunk_bytes=16 * KIB)
    monkeypatch.setattr(arriving, "read_ranges", read)


# ---- every way keeps every promise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["all", "some"])
def test_every_tensor_is_right(tier: Tier, files: Files, wanted: str) -> None:
    promises.every_tensor_is_right(tier, files, lambda name: wanted == "all" or len(name) % 2 == 0)


def test_every_tensor_is_right_in_pieces_of_usual_size(
    tier: Tier, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    promises.every_tensor_is_right(tier, files)


def test_each_tensor_is_its_users_own(tier: Tier, files: Files) -> None:
    promises.each_tensor_is_its_users_own(tier, files)


def test_what_is_kept_stays_as_it_was(tier: Tier, files: Files, others: Files) -> None:
    promises.what_is_kept_stays_as_it_was(tier, files, others)


def test_who_stops_in_the_middle_leaves_nothing(tier: Tier, files: Files) -> None:
    promises.who_stops_in_the_middle_leaves_nothing(tier, files)


@pytest.mark.parametrize("place", [-1, 300 * KIB, 2 * KIB], ids=["last", "middle", "first"])
def test_a_flipped_byte_is_refused(tier: Tier, files: Files, place: int) -> None:
    promises.a_flipped_byte_is_refused(tier, files, place % len(files[LARGE]))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_changed_is_refused(tier: Tier, files: Files, change: Change) -> None:
    promises.a_file_that_changed_is_refused(tier, files, change)


def test_a_file_that_changes_meanwhile_does_no_harm(tier: Tier, files: Files) -> None:
    promises.a_file_that_changes_meanwhile_does_no_harm(tier, files)


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (promises.input_output_error, "Input/output error at byte"),
        (promises.early_end, "no more bytes at byte"),
    ],
)
def test_a_read_error_is_named(tier: Tier, files: Files, fail: Pread, words: str) -> None:
    promises.a_read_error_is_named(tier, files, fail, words)


@pytest.mark.parametrize("odd", [promises.short_reads, promises.no_direct_reads_after_all])
def test_a_disk_that_is_only_odd_is_read_exactly(
    tier: Tier, files: Files, odd: Pread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source.os, "preadv", odd)
    promises.every_tensor_is_right(tier, files)


@pytest.mark.parametrize(
    ("gone", "kind"), [("half is gone", BadWeightsFileError), ("removed", MissingShardError)]
)
def test_a_shard_that_is_not_whole_is_refused_at_once(
    tier: Tier, files: Files, gone: str, kind: type[Exception]
) -> None:
    folder = tier.put(files)
    CHANGES[gone](folder / LARGE)
    with pytest.raises(kind) as refused:
        tier.model(folder)
    assert str(folder / LARGE) in str(refused.value)


@pytest.mark.parametrize("way", WAYS[:3], ids=[way.name for way in WAYS[:3]])
def test_the_disk_is_read_in_the_way_that_is_named(
    make: Make, files: Files, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the pool gives, `Tier.open` demands at each file."""
    ways: set[bool] = set()
    real = source.Source._read_direct

    def read_direct(*arguments: Any) -> int:
        ways.add(True)
        return real(*arguments)

    monkeypatch.setattr(source.Source, "_read_direct", read_direct)
    monkeypatch.setattr(source.Source, "_is_cached", lambda *_: False)
    tier = make(way)
    folder = tier.put(files)
    opened = source.Source(folder / LARGE, direct=True)
    has_direct = opened.direct
    opened.leave()
    list(tier.load(tier.model(folder)))
    assert ways == ({True} if has_direct and way.direct is not False else set())


# ---- ways that break them --------------------------------------------------------------------------------------------


class Around:
    """A file's bytes as they should be; what is derived from it does one thing wrongly."""

    def __init__(self, inner: FileBytes, file: WeightsFile) -> None:
        self.inner, self.file = inner, file

    def get(self, begin: int, end: int) -> Bytes:
        return self.inner.get(begin, end)

    @property
    def arrived(self) -> bool:
        return self.inner.arrived

    def wait(self) -> None:
        self.inner.wait()

    def close(self) -> None:
        self.inner.close()


class WrongByte(Around):
    def get(self, begin: int, end: int) -> Bytes:
        got = super().get(begin, end)
        if end == self.file.nbytes:
            got[-1:] ^= 1
        return got


class OneForAll(Around):
    """All loads get the same memory."""

    kept: dict[Path, Bytes]

    def get(self, begin: int, end: int) -> Bytes:
        return self.kept.setdefault(self.file.path, np.fromfile(self.file.path, np.uint8))[begin:end]


class UsedAgain(Around):
    """The next tensor comes to where the last one was."""

    def __init__(self, inner: FileBytes, file: WeightsFile) -> None:
        super().__init__(inner, file)
        self._memory = np.empty(file.nbytes, np.uint8)

    def get(self, begin: int, end: int) -> Bytes:
        self._memory[: end - begin] = super().get(begin, end)
        return self._memory[: end - begin]


class Careless(Around):
    """Nobody looks whether it is still the same file."""

    def get(self, begin: int, end: int) -> Bytes:
        return np.fromfile(self.file.path, np.uint8)[begin:end]

    def wait(self) -> None:
        pass


class Zeros(Around):
    """What cannot be read is made up."""

    def get(self, begin: int, end: int) -> Bytes:
        with contextlib.suppress(WeightsReadError):
            return super().get(begin, end)
        return np.zeros(end - begin, np.uint8)

    def wait(self) -> None:
        pass


class NeverCloses(Around):
    def close(self) -> None:
        pass


class Breaking(Tier):
    """A way with one of these around each file."""

    kind: type[Around]
    checked = True

    def open(
        self, file: WeightsFile, spans: Spans, ours: Checksums, theirs: Checksums, recycler: Recycler
    ) -> FileBytes:
        sums = ours if self.checked else Checksums(file.path, file.nbytes)
        self.opened = [*getattr(self, "opened", []), super().open(file, spans, sums, theirs, recycler)]
        return self.kind(self.opened[-1], file)

    def close(self) -> None:
        for inner in self.opened:
            inner.close()
        super().close()


FLIP, WRITTEN, EIO = 300 * KIB, CHANGES["written to"], promises.input_output_error
CONTROLS: list[tuple[type[Around], Callable[[Tier, Files, Files], None]]] = [
    (WrongByte, lambda tier, files, _: promises.every_tensor_is_right(tier, files)),
    (OneForAll, lambda tier, files, _: promises.each_tensor_is_its_users_own(tier, files)),
    (UsedAgain, promises.what_is_kept_stays_as_it_was),
    (NeverCloses, lambda tier, files, _: promises.who_stops_in_the_middle_leaves_nothing(tier, files)),
    (Careless, lambda tier, files, _: promises.a_flipped_byte_is_refused(tier, files, FLIP)),
    (Careless, lambda tier, files, _: promises.a_file_that_changed_is_refused(tier, files, WRITTEN)),
    (Careless, lambda tier, files, _: promises.a_file_that_changes_meanwhile_does_no_harm(tier, files)),
    (Zeros, lambda tier, files, _: promises.a_read_error_is_named(tier, files, EIO, "Input/output")),
]


@pytest.mark.parametrize(("kind", "promise"), CONTROLS)
def test_a_way_that_breaks_a_promise_fails(
    make: Make, files: Files, others: Files, kind: type[Around], promise: Callable[[Tier, Files, Files], None]
) -> None:
    """And the same way without its fault does not."""
    OneForAll.kept = {}
    for broken, kept in ((Around, True), (kind, False)):
        tier = make(WAYS[2], type("Broken", (Breaking,), {"kind": broken}))
        if kept:
            promise(tier, files, others)
        else:
            with pytest.raises((AssertionError, pytest.fail.Exception)):
                promise(tier, files, others)


def test_a_way_that_does_not_check_fails(make: Make, files: Files) -> None:
    tier = make(WAYS[2], type("Broken", (Breaking,), {"kind": Around, "checked": False}))
    with pytest.raises(AssertionError, match="has wrong bytes"):
        promises.a_flipped_byte_is_refused(tier, files, FLIP)
