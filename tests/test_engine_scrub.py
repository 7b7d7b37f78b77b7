"""The scrub with everything real but vLLM's ring and scheduler: ranks' KV, manifest, arena, keeper's work.

The oracle is the KV as it was written: after a scrub every block holds it on every rank, or was refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import struct
import threading
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ghostserve.arena.control import CONTROL_BYTES, LANE_ENGINE, ControlPage, Counter, Switch
from ghostserve.arena.frames import FramePool
from ghostserve.arena.memfd import Segment
from ghostserve.codec.choose import host_codec
from ghostserve.config import GhostConfig
from ghostserve.engine import scrub as engine_scrub
from ghostserve.engine import scrub_repair
from ghostserve.engine.budget import REBUILD_BLOCKS, GuardLimits
from ghostserve.engine.guard import Guard
from ghostserve.engine.messages import ArenaGeometry
from ghostserve.engine.rank_scrub import RankScrub
from ghostserve.engine.rebuild import Rebuild, RebuildResult
from ghostserve.engine.ring import RankRaised, RanksDied, RankSilent
from ghostserve.engine.scrub import Scrubber
from ghostserve.shadow.keeper_messages import Geometry
from ghostserve.shadow.keeper_work import KeeperWork
from ghostserve.shadow.manifest import BlockState, Manifest
from ghostserve.shadow.mirror import GroupMap, Mirror
from ghostserve.shadow.protection import Protection
from ghostserve.shadow.restore import BlockRestore, rebuild_log
from ghostserve.shadow.scrub import PATIENCE_S, Bursts
from ghostserve.shadow.step_plan import Write

BLOCKS, SIZE, WORDS = 8, 4, 16
LAYERS = (("layers.0", 6), ("layers.1", 10))
FRAME = SIZE * WORDS * 4
FRAMES = 64


@dataclass
class Rank:
    """One rank's KV memory and its side of the scrub."""

    number: int
    ranks: int
    mirror: Mirror
    parity_shards: int

    @property
    def scrub(self) -> RankScrub:
        return RankScrub(rank=self.number, mirror=self.mirror, decode=self.decode)

    def decode(self, mirror: Mirror, item: BlockRestore) -> np.ndarray:
        return rebuild_log(
            host_codec(self.ranks, self.parity_shards),
            rank=self.number,
            data=[
                mirror.frame(item.survivors[rank]) if rank in item.survivors else None
                for rank in range(self.ranks)
            ],
            parity=[mirror.frame(frame) for frame in item.parity],
            parity_checksums=item.parity_checksums,
            checksum=item.checksum,
        ).log

    def flip(self, block: int, slot: int = 1, word: int = 0) -> None:
        self.mirror.kv.view(BLOCKS, SIZE, WORDS)[block, slot, word] ^= 1 << 20

    def asked(self, method: str, *arguments: Any) -> Any:
        """As `engine.worker` does it."""
        match method, arguments:
            case "ghost_scrub", (checks,):
                return self.scrub.wrong(checks)
            case "ghost_repair", (items,):
                return self.scrub.repair(items[self.number]) if self.number in items else None
            case "ghost_restore_mirror", (ranks, check):
                return self.scrub.restore_mirror(check) if self.number in ranks else None
            case "ghost_export", (items,):
                for item in items:
                    if self.number in item.survivors:
                        self.mirror.export(block=item.block, group=0, frame=item.survivors[self.number])
                return None
            case "ghost_mirror", (pieces,):
                crcs = [
                    self.mirror.stage(block=p.block, group=0, start=p.start, stop=p.stop, frame=p.frame)
                    for p in pieces.of_rank(self.number)
                ]
                return struct.pack(f"<{len(crcs)}I", *crcs)
        raise AssertionError(method)


@dataclass
class World:
    """An executor, as far as the scrub looks at it."""

    ranks: list[Rank]
    guard: Guard
    work: KeeperWork
    page: ControlPage
    pool: Segment
    truth: torch.Tensor  # [ranks, blocks, slots, words]
    now_s: float = 1000.0
    asked: list[str] = field(default_factory=list)
    failing: Exception | None = None
    recovered: list[Exception] = field(default_factory=list)
    refused: set[int] = field(default_factory=set)
    jobs: deque[Any] = field(default_factory=deque)
    lock: Any = field(default_factory=threading.RLock)
    step_open: bool = False
    view: Any = None

    def __post_init__(self) -> None:
        self.world_size = len(self.ranks)
        self.scheduler = SimpleNamespace(open=False)
        self.session = SimpleNamespace(
            guard=self.guard, page=self.page, lock=self.lock, scheduler=self.scheduler
        )
        self.settings = SimpleNamespace(config=GhostConfig())
        self.ring, self.open_steps, self.is_failed = self, [], False
        self.performer = SimpleNamespace(phase=None, epoch=3, recover=self.recovered.append)
        self.watch = SimpleNamespace(costs=None)  # nothing is chosen by costs here
        self.scrubber = Scrubber(self)
        self.scrubber.bursts = Bursts(burst_s=1e9)  # when it may ask is another matter
        self.guard.on_scrubbed = self.scrubber._answers.append

    # The ring.

    def ask(self, method: str, *arguments: Any, ranks: Any, timeout_s: float) -> dict[int, Any]:
        self.asked.append(method)
        if self.failing is not None:
            failing, self.failing = self.failing, None
            raise failing
        return {rank.number: rank.asked(method, *arguments) for rank in self.ranks}

    def drain(self, ranks: Any, *, gone: Any, timeout_s: float) -> frozenset[int]:
        self.asked.append("drain")
        return frozenset()

    def dead(self) -> frozenset[int]:
        return frozenset()

    # The keeper.

    def submit(self, job: Any) -> None:
        self.jobs.append(job)

    def keep(self) -> None:
        """The keeper does everything it was asked for."""
        while self.jobs:
            self.guard._on_answer(self.work.do(self.jobs.popleft()))

    # Time.

    def turn(self, turns: int = 1) -> None:
        for _ in range(turns):
            self.now_s += 0.3
            self.scheduler.open = self.step_open
            self.scrubber.turn()
            self.keep()
            if self.guard.protection is not None and not self.guard.protection._held:
                self.guard.protection.check()

    def rounds(self, count: int = 1) -> None:
        """So many rounds over everything, and what is done about it."""
        self.turn(6 * count)

    # What is there.

    @property
    def manifest(self) -> Manifest:
        assert self.guard.manifest is not None
        return self.guard.manifest

    def kv(self, block: int) -> torch.Tensor:
        return torch.stack([rank.mirror.kv.view(BLOCKS, SIZE, WORDS)[block] for rank in self.ranks])

    def write(self, block: int, *, stop: int = SIZE) -> None:
        """A step writes the block's first slots on every rank, and is accepted."""
        piece = self.manifest.plan(Write(block=block, group=0, start=0, stop=stop, whole=False))
        assert piece is not None
        crcs = [
            (rank.mirror.stage(block=block, group=0, start=0, stop=stop, frame=piece.frames[rank.number]),)
            for rank in self.ranks
        ]
        self.manifest.commit([piece], crcs)

    def protect(self) -> None:
        """Blocks are written, sealed and, unless mirrors are kept, coded."""
        for block in range(1, BLOCKS):
            self.write(block)
        self.guard.sweep()
        self.keep()

    def frame(self, frame: int) -> np.ndarray:
        return self.pool.array[frame * FRAME : (frame + 1) * FRAME]

    def check(self) -> None:
        """Every block has its KV or was refused; what protects it is what its checksums say."""
        for block in range(1, BLOCKS):
            assert block in self.refused or torch.equal(self.kv(block), self.truth[:, block]), (
                f"block {block}"
            )
        for entry in self.manifest.entries.values():
            coded = entry.state is BlockState.CODED
            frames, crcs = (
                (entry.parity, entry.parity_checksums) if coded else (entry.mirrors, entry.checksums)
            )
            nbytes = entry.slots * WORDS * 4
            assert [zlib.crc32(self.frame(frame)[:nbytes].data) for frame in frames] == list(crcs), entry

    def count(self, name: str) -> int:
        return self.page.get(Counter[name])

    def findings(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.scrubber.document()["findings"]
        return found


def group_map() -> GroupMap:
    words = torch.arange(SIZE * WORDS).view(SIZE, WORDS)
    return GroupMap(words=words, stride_words=torch.full((WORDS,), SIZE * WORDS), layers=LAYERS)


@contextlib.contextmanager
def a_world(
    monkeypatch: pytest.MonkeyPatch,
    *,
    ranks: int = 2,
    parity_shards: int = 1,
    compact: bool = True,
    seed: int = 0,
) -> Iterator[World]:
    torch.manual_seed(seed)
    truth = torch.randint(-(2**31), 2**31, (ranks, BLOCKS, SIZE, WORDS), dtype=torch.int32)
    total = FRAMES + REBUILD_BLOCKS * (ranks - 1)
    control, pool = Segment.create("test-control", CONTROL_BYTES), Segment.create("test-pool", total * FRAME)
    ControlPage.format(control)
    page = ControlPage(control, lane=LANE_ENGINE)
    work = KeeperWork(pool=pool, control=page)
    work.configure(Geometry(frame_bytes=FRAME, frames=total, ranks=ranks, parity_shards=parity_shards))
    limits = GuardLimits(
        parity_shards=parity_shards, compact=compact, host_memory_bytes=1 << 30, max_requests=4,
        max_batched_tokens=64, backlog_blocks=8,
    )  # fmt: skip
    guard = Guard(page=page, segments={"pool": pool}, address="", limits=limits, ranks=ranks)
    guard.geometry = ArenaGeometry(
        frame_bytes=FRAME, frames=total, staging_ring=1, staging_record_bytes=1, layout_fingerprint="",
        parity_shards=parity_shards,
    )  # fmt: skip
    members = [
        Rank(
            number, ranks, parity_shards=parity_shards,
            mirror=Mirror(
                kv=truth[number].clone().view(-1), groups=(group_map(),), num_blocks=BLOCKS,
                frames=pool.array, frame_bytes=FRAME,
            ),
        )
        for number in range(ranks)
    ]  # fmt: skip
    world = World(members, guard, work, page, pool, truth)
    everything_lives = SimpleNamespace(
        is_live=lambda _: True, is_cached=lambda _: True, cached_only=lambda: iter(())
    )
    guard.protection = Protection(
        manifest=Manifest(
            ranks=ranks, parity_shards=parity_shards, block_sizes=(SIZE,), slot_bytes=(WORDS * 4,),
            pool=FramePool(FRAMES), compact=compact,
        ),
        tables=None, staged=SimpleNamespace(read=lambda *_: None), keeper=world, jobs_max=4, blocks=everything_lives,
        accepted=(3, 17),
    )  # fmt: skip

    def refuse(_self: Any, blocks: set[int], *, timeout_s: float) -> None:
        world.refused |= blocks
        for block in blocks:
            world.manifest.drop(block)

    monkeypatch.setattr(scrub_repair.Rebuild, "refuse", refuse)
    monkeypatch.setattr(engine_scrub, "monotonic_s", lambda: world.now_s)
    world.protect()
    world.turn(2)  # the first sees that steps were accepted
    try:
        yield world
    finally:
        control.close()
        pool.close()


KINDS = pytest.mark.parametrize(
    "kind",
    [
        {"ranks": 2, "parity_shards": 1},
        {"ranks": 2, "parity_shards": 2},
        {"ranks": 4, "parity_shards": 2},
        {"ranks": 2, "compact": False},
        {"ranks": 1, "parity_shards": 1},
    ],
    ids=lambda kind: "-".join(f"{name}{value}" for name, value in kind.items()),
)


@KINDS
def test_nothing_is_found_where_nothing_is_wrong(
    monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]
) -> None:
    with a_world(monkeypatch, **kind) as world:
        world.rounds(3)
        document = world.scrubber.document()
        assert document["kv"]["rounds"] >= 2
        assert document["frames"]["rounds"] >= 2
        assert document["bytes_total"] >= 2 * world.world_size * (BLOCKS - 1) * FRAME
        assert not document["findings"]
        assert not any(value for name, value in document.items() if name.endswith("mismatches_total"))
        assert set(world.asked) == {"ghost_scrub"}
        world.check()


@KINDS
@pytest.mark.parametrize("wrong_ranks", [1, 2, 3])
def test_wrong_kv(monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any], wrong_ranks: int) -> None:
    """As many ranks as there are parities are put right, any number from mirrors; more are refused."""
    with a_world(monkeypatch, **kind) as world:
        if wrong_ranks > world.world_size:
            return
        for rank in world.ranks[-wrong_ranks:]:
            rank.flip(3, slot=2, word=6 + rank.number)
        assert not torch.equal(world.kv(3), world.truth[:, 3])
        world.rounds(2)
        repairable = not kind.get("compact", True) or wrong_ranks <= kind["parity_shards"]
        assert world.refused == (set() if repairable else {3})
        assert world.count("SCRUB_KV_MISMATCHES_TOTAL") == wrong_ranks
        assert world.count("SCRUB_REPAIRED_TOTAL") == wrong_ranks * repairable
        assert world.count("SCRUB_REFUSED_TOTAL") == wrong_ranks * (not repairable)
        findings = world.findings()
        assert [finding["index"] for finding in findings] == list(range(world.world_size))[-wrong_ranks:]
        assert {(finding["part"], finding["block"], finding["repaired"]) for finding in findings} == {
            ("kv", 3, repairable)
        }
        if repairable:
            assert all((f["layers"], f["slots"]) == (["layers.1"], [2]) for f in findings)
        world.check()


@KINDS
def test_wrong_parity_or_mirror_in_idle_time(monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]) -> None:
    with a_world(monkeypatch, **kind) as world:
        entry = world.manifest.entries[5]
        part = "parity" if entry.parity else "mirror"
        world.frame((entry.parity or entry.mirrors)[-1])[70] ^= 4
        world.rounds(2)
        (finding,) = world.findings()
        assert (finding["part"], finding["block"], finding["repaired"]) == (part, 5, True)
        if part == "mirror":
            assert (finding["layers"], finding["slots"], finding["index"]) == (["layers.0"], [1], 1)
        assert world.count(f"SCRUB_{part.upper()}_MISMATCHES_TOTAL") == 1
        assert not world.manifest.unprotected
        assert world.manifest.entries[5].state is (
            BlockState.CODED if part == "parity" else BlockState.SEALED
        )
        world.check()
        world.rounds()
        assert len(world.findings()) == 1, "and it stays right"


def test_what_nobody_reads_is_not_compared_on_a_newcomer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead block that the manifest still knows is not restored: its KV there is anything, and no corruption."""
    with a_world(monkeypatch) as world:
        world.scheduler.needed_slots = lambda *_: ({}, {})
        monkeypatch.setattr(Rebuild, "_unwritten", lambda _: None)
        monkeypatch.setattr(Rebuild, "_restore_needed", lambda *_, **__: RebuildResult())
        world.guard.protection.blocks = SimpleNamespace(  # type: ignore[union-attr]
            is_live=lambda block: block != 3, is_cached=lambda _: True, cached_only=lambda: iter(())
        )
        world.ranks[1].flip(3)
        Rebuild(world, lost=frozenset({1}), epoch=4).restore_kv(timeout_s=1.0)
        world.rounds(2)
        assert world.count("SCRUB_KV_MISMATCHES_TOTAL") == 0
        world.ranks[1].flip(4)
        world.rounds(2)
        assert world.count("SCRUB_KV_MISMATCHES_TOTAL") == 1, "the others are compared"


@pytest.mark.parametrize("compact", [True, False])
def test_a_wrong_frame_while_steps_run_is_given_up_after_a_while(
    monkeypatch: pytest.MonkeyPatch, compact: bool
) -> None:
    with a_world(monkeypatch, compact=compact) as world:
        world.step_open, world.asked = True, []
        entry = world.manifest.entries[5]
        world.frame((*entry.parity, *entry.mirrors)[0])[70] ^= 4
        world.turn(4)
        assert world.scrubber.document()["waiting"] == 1, "idle time may come"
        assert world.manifest.entries[5] is entry
        world.turn(int(PATIENCE_S / 0.3) + 2)
        assert world.manifest.unprotected == {5: (0, SIZE)}, "a step will catch up on it"
        assert [finding["remedy"] for finding in world.findings()] == ["given up"]
        assert world.scrubber.document()["waiting"] == 0
        assert not world.asked, "live KV is left alone while steps run"


def test_a_wrong_parity_is_left_out_when_kv_is_put_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parities: one wrong, and one rank's KV wrong as well."""
    with a_world(monkeypatch, ranks=3, parity_shards=2) as world:
        world.ranks[1].flip(4)
        world.frame(world.manifest.entries[4].parity[0])[5] ^= 1
        world.rounds(2)
        assert sorted(finding["part"] for finding in world.findings()) == ["kv", "parity"]
        assert all(finding["repaired"] for finding in world.findings())
        world.check()


@pytest.mark.parametrize("parity_shards", [1, 2])
def test_live_kv_is_looked_at_before_its_parity_is_given_up(
    monkeypatch: pytest.MonkeyPatch, parity_shards: int
) -> None:
    """It went wrong after its own turn; the sound parity that is left is what puts it right."""
    with a_world(monkeypatch, parity_shards=parity_shards) as world:
        world.rounds()
        world.asked, world.now_s = [], world.now_s + 10.0  # both rounds are due
        world.scrubber.turn()
        assert world.asked == ["ghost_scrub"], "KV was compared"
        assert world.jobs, "the keeper is about to"
        world.ranks[1].flip(4)
        world.frame(world.manifest.entries[4].parity[0])[5] ^= 1
        world.keep()
        world.turn(2)
        assert {finding["part"] for finding in world.findings()} == {"kv", "parity"}
        assert world.refused == ({4} if parity_shards == 1 else set())
        assert world.count("SCRUB_REPAIRED_TOTAL") == (0 if parity_shards == 1 else 2)
        world.check()


@pytest.mark.parametrize("compact", [True, False])
def test_kv_and_all_that_protects_it_wrong_is_refused(monkeypatch: pytest.MonkeyPatch, compact: bool) -> None:
    with a_world(monkeypatch, compact=compact) as world:
        entry = world.manifest.entries[4]
        world.ranks[1].flip(4)
        world.frame(entry.parity[0] if compact else entry.mirrors[1])[5] ^= 1
        before = world.kv(4)
        world.rounds(2)
        assert world.refused == {4}
        assert torch.equal(world.kv(4), before), "nothing without a proof is written"
        assert world.count("SCRUB_REPAIRED_TOTAL") == 0
        assert "not the recorded" in world.findings()[0]["reason"]
        world.check()


def test_a_checksum_that_is_wrong_itself_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """KV, mirrors and parity are right, the record is not: nothing proves that, so the block is recomputed."""
    with a_world(monkeypatch) as world:
        entry = world.manifest.entries[4]
        entry.checksums = (entry.checksums[0] ^ 1, entry.checksums[1])
        world.rounds(2)
        assert world.refused == {4}
        world.check()


def test_a_tail_is_put_right_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    with a_world(monkeypatch) as world:
        world.write(6, stop=2)
        world.ranks[0].flip(6, slot=1)
        world.ranks[1].flip(6, slot=3)  # no accepted step wrote there
        world.frame(world.manifest.entries[6].mirrors[1])[3] ^= 1
        world.rounds(2)
        assert sorted((f["part"], f["index"], f["slots"][0]) for f in world.findings()) == [
            ("kv", 0, 1),
            ("mirror", 1, 0),
        ]
        assert torch.equal(world.kv(6)[:, :2], world.truth[:, 6, :2])
        assert not torch.equal(world.kv(6)[1, 3], world.truth[1, 6, 3]), "nobody's business"


def test_without_room_for_mirrors_the_block_stays_unprotected(monkeypatch: pytest.MonkeyPatch) -> None:
    with a_world(monkeypatch) as world:
        assert world.manifest.pool.allocate(world.manifest.pool.free_count) is not None
        world.frame(world.manifest.entries[5].parity[0])[70] ^= 4
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Protection, "check", lambda _: None)  # it does not know whose the frames are
            world.rounds(2)
        assert world.manifest.unprotected == {5: (0, SIZE)}
        assert "no frames are free" in world.findings()[0]["reason"]
        assert not world.refused


# -- when it may ---------------------------------------------------------------------------------------------------------


def test_kv_is_asked_for_in_idle_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with a_world(monkeypatch) as world:
        protection = world.guard.protection
        assert protection is not None
        world.asked = []
        for step in range(20):  # between two steps nothing is open either
            protection.accepted = (3, 100 + step)
            world.now_s += 0.3
            world.scrubber.turn()
            world.keep()
        assert not world.asked
        assert world.scrubber.document()["frames"]["rounds"] > 0, "frames are compared all the same"
        world.turn(2)
        assert world.asked


def test_it_does_not_wait_for_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    with a_world(monkeypatch) as world:
        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with world.lock:
                held.set()
                done.wait(20)

        thread = threading.Thread(target=hold)
        thread.start()
        assert held.wait(20)
        world.asked = []
        world.rounds(2)
        assert not world.asked
        done.set()
        thread.join()
        world.rounds()
        assert world.asked


def test_the_switch_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: what would have been put right stays wrong."""
    with a_world(monkeypatch) as world:
        world.page.set_switch(Switch.SKIP_SCRUB, True)
        world.ranks[0].flip(2)
        world.rounds(3)
        assert not torch.equal(world.kv(2), world.truth[:, 2])
        assert not world.findings()
        world.page.set_switch(Switch.SKIP_SCRUB, False)
        world.rounds(2)
        world.check()


@pytest.mark.parametrize("rate", [0, 1 << 20])
def test_a_rate_of_nothing_starts_no_thread(monkeypatch: pytest.MonkeyPatch, rate: int) -> None:
    with a_world(monkeypatch) as world:
        world.settings.config = dataclasses.replace(GhostConfig(), scrub_rate=rate)
        scrubber = Scrubber(world)
        scrubber.start()
        try:
            assert scrubber._thread.is_alive() is bool(rate)
            assert scrubber.document()["rate_bytes_s"] == rate
        finally:
            scrubber.stop()
            if rate:
                scrubber._thread.join(20)
        assert not scrubber._thread.is_alive()


# -- what may go wrong -----------------------------------------------------------------------------------------------------


def test_a_rank_that_dies_meanwhile_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with a_world(monkeypatch) as world:
        world.failing = RanksDied(frozenset({1}), "process of rank 1 exited")
        world.rounds()
        assert [str(failure) for failure in world.recovered] == ["process of rank 1 exited"]
        world.rounds()
        assert world.lock.acquire(blocking=False), "the lock is free again"
        world.lock.release()


@pytest.mark.parametrize("part", ["kv", "parity"])
def test_a_rank_that_raises_leaves_no_reply_behind(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """The replies of the others are thrown away, the manifest is whole, and later it works."""
    with a_world(monkeypatch) as world:
        world.asked = []
        if part == "kv":
            world.ranks[0].flip(2)
        else:
            world.frame(world.manifest.entries[2].parity[0])[1] ^= 1
        world.failing = RankRaised(0, "no")
        with pytest.raises(scrub_repair.NotScrubbed):
            world.rounds()
        assert world.asked[-1] == "drain"
        world.rounds(3)
        assert all(finding["repaired"] for finding in world.findings())
        assert not world.recovered
        world.check()


def test_a_rank_that_raises_while_a_block_is_refused_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its peers' answers would be taken for those to the next step, and its request state is neither old nor new."""

    def refuse(self: Any, blocks: set[int], *, timeout_s: float) -> None:
        raise RankRaised(1, "no memory")

    with a_world(monkeypatch) as world:
        world.ranks[1].flip(4)
        world.frame(world.manifest.entries[4].parity[0])[5] ^= 1
        monkeypatch.setattr(scrub_repair.Rebuild, "refuse", refuse)
        world.rounds(2)
        (failure, *_) = world.recovered
        assert isinstance(failure, RankSilent)
        assert failure.ranks == {1}
        assert "did not take on the request state: no memory" in failure.reason


def test_a_copy_that_fails_half_way_leaves_the_block_to_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    with a_world(monkeypatch) as world:
        world.frame(world.manifest.entries[2].parity[0])[1] ^= 1
        plain = world.ask

        def ask(method: str, *arguments: Any, **how: Any) -> dict[int, Any]:
            if method == "ghost_mirror":
                world.failing = RankRaised(1, "no")
            return plain(method, *arguments, **how)

        monkeypatch.setattr(world, "ask", ask)
        with pytest.raises(scrub_repair.NotScrubbed):
            world.rounds(2)
        assert world.manifest.unprotected == {2: (0, SIZE)}
        assert world.guard.protection is not None
        world.guard.protection.check()


@pytest.mark.parametrize("seed", range(40))
def test_anything_anywhere(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Random flips in KV, mirrors and parity, idle or not: in the end every block is right or refused."""
    rng = random.Random(seed)
    ranks, shards, compact = rng.randint(1, 4), rng.randint(1, 3), rng.random() < 0.7
    with a_world(monkeypatch, ranks=ranks, parity_shards=shards, compact=compact, seed=seed) as world:
        for _ in range(rng.randint(1, 6)):
            block = rng.randrange(1, BLOCKS)
            entry = world.manifest.entries.get(block)
            if rng.random() < 0.6:
                rng.choice(world.ranks).flip(block, rng.randrange(SIZE), rng.randrange(WORDS))
            elif entry is not None:
                world.frame(rng.choice(entry.mirrors or entry.parity))[rng.randrange(FRAME)] ^= (
                    1 << rng.randrange(8)
                )
            world.step_open = rng.random() < 0.3
            world.turn(rng.randrange(4))
        world.step_open = False
        world.rounds(4)
        world.check()
        assert world.scrubber.document()["waiting"] == 0
