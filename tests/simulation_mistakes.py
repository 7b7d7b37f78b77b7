"""Known mistakes, to be planted one at a time into the product: as replacements of its functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from ghostserve.arena.control import Stamp, StampStatus
from ghostserve.arena.staging import StagingArea
from ghostserve.shadow import commit_rule, restore
from ghostserve.shadow.commit_rule import StepGate
from ghostserve.shadow.manifest import BlockState, Job, Manifest, Piece
from ghostserve.shadow.protection import Protection
from ghostserve.shadow.restore import BlockRestore
from ghostserve.shadow.step_plan import Write
from ghostserve.shadow.unwritten import Start, Unwritten
from ghostserve.testing.simulation.report import run_quietly
from ghostserve.types import Decision

Plant = Callable[[pytest.MonkeyPatch], None]


def frees_mirrors_before_the_parity_is_committed(patch: pytest.MonkeyPatch) -> None:
    right = Manifest.next_job

    def next_job(self: Manifest) -> Job | None:
        job = right(self)
        if job is not None:
            entry = self.entries[job.block]
            self._retire_frames(entry.mirrors)
            entry.mirrors, entry.state, entry.job = (), BlockState.CODED, None
        return job

    patch.setattr(Manifest, "next_job", next_job)


def ignores_the_generation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Manifest, "_entry_of", lambda self, piece: self.entries.get(piece.block))


def trusts_stamps_of_an_older_epoch(patch: pytest.MonkeyPatch) -> None:
    def has_finished(stamp: Stamp, *, epoch: int, step: int) -> bool:
        return stamp.step > step or (stamp.step == step and stamp.status is StampStatus.DONE)

    patch.setattr(commit_rule, "has_finished", has_finished)


def trusts_checksums_of_an_older_epoch(patch: pytest.MonkeyPatch) -> None:
    right = StagingArea.read

    def read(self: StagingArea, rank: int, step: int, epoch: int) -> bytes | None:
        found = (right(self, rank, step, of) for of in range(epoch, -1, -1))
        return next((record for record in found if record is not None), None)

    patch.setattr(StagingArea, "read", read)


def commits_without_all_acks(patch: pytest.MonkeyPatch) -> None:
    right = commit_rule.first_unfinished

    def first_unfinished(read: Any, ranks: Iterable[int], *, epoch: int, step: int) -> int | None:
        return right(read, list(ranks)[:1], epoch=epoch, step=step)

    patch.setattr(commit_rule, "first_unfinished", first_unfinished)


def reuses_a_block_before_it_is_invalidated(patch: pytest.MonkeyPatch) -> None:
    right = Manifest.plan

    def plan(self: Manifest, write: Write) -> Piece | None:
        entry = self.entries.get(write.block)
        if write.start == 0 and entry is not None and entry.state is BlockState.CODED:
            return None
        return right(self, write)

    patch.setattr(Manifest, "plan", plan)


def encodes_while_the_block_is_still_written(patch: pytest.MonkeyPatch) -> None:
    right = Manifest.commit

    def commit(self: Manifest, pieces: Sequence[Piece], checksums: Sequence[Sequence[int]]) -> None:
        right(self, pieces, checksums)
        for entry in self.entries.values():
            whole = entry.planned == self.block_sizes[entry.group]
            if entry.state is BlockState.MIRRORED and entry.slots and whole:
                entry.state = BlockState.SEALED
                self._sealed[entry.block] = None

    patch.setattr(Manifest, "commit", commit)


def skips_the_checksum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(restore, "check_log", lambda log, *, block, checksum: None)


def restores_a_mirror_of_the_wrong_step(patch: pytest.MonkeyPatch) -> None:
    """As far as it was planned, not as far as it was accepted."""
    right = restore.restores

    def restores(manifest: Manifest, *args: Any, **kwargs: Any) -> list[BlockRestore]:
        for entry in manifest.entries.values():
            entry.slots = entry.planned
        return right(manifest, *args, **kwargs)

    patch.setattr(restore, "restores", restores)


def reuses_a_mirror_slot_named_in_an_open_job(patch: pytest.MonkeyPatch) -> None:
    right = Manifest.drop

    def drop(self: Manifest, block: int) -> None:
        entry = self.entries.get(block)
        if entry is not None and entry.job is not None:
            self._jobs.pop(entry.job)
            entry.job = None
        right(self, block)

    patch.setattr(Manifest, "drop", drop)


def runs_a_step_of_an_old_epoch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StepGate, "refusal", lambda self, *, epoch: None if self.failed_at is None else "failed")


def runs_on_after_a_failed_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StepGate, "refusal", lambda self, *, epoch: None if epoch == self.epoch else "epoch")


def overwrites_a_block_that_an_unaccepted_step_reads(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(commit_rule, "defers_frees", lambda batches: Decision(choice=False, reason="planted"))


def hands_frames_out_unwiped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Protection, "_wipe", lambda self: self.manifest.pool.release(self.manifest.take_retired()))


def frees_mirrors_that_are_being_restored_from(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Protection, "hold", lambda self: None)


def believes_blocks_that_are_still_to_be_written(patch: pytest.MonkeyPatch) -> None:
    right = Unwritten.blocks

    def blocks(self: Unwritten, requests: Any = None) -> dict[int, int]:
        return {} if requests is None else right(self, requests)

    patch.setattr(Unwritten, "blocks", blocks)


def forgets_the_old_blocks_of_a_request_started_over(patch: pytest.MonkeyPatch) -> None:
    """A mistake that was really there."""
    right = Unwritten.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[Unwritten], *args: Any) -> Unwritten:
        coming: Unwritten = right(cls, *args)
        starts: dict[str, tuple[Start, ...]] = {name: found[-1:] for name, found in coming.starts.items()}
        return Unwritten(writes=coming.writes, starts=starts, scheduled=coming.scheduled)

    patch.setattr(Unwritten, "of", classmethod(of))


def catches_up_what_was_never_written(patch: pytest.MonkeyPatch) -> None:
    """A mistake that was really there."""
    patch.setattr(Protection, "withdraw", lambda self, pieces, blocks: self.manifest.withdraw(pieces))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """`shows`: what the simulation must say, as a regular expression; anything else is not what was planted.

    `soon`: among the first `QUICK_SEEDS` schedules.
    """

    plant: Plant
    shows: str
    soon: bool = True

    @property
    def name(self) -> str:
        return self.plant.__name__


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The first schedule that finds a mistake."""

    seed: int
    violation: str


WRONG_SHADOW = r"Violation: block \d+: (mirror of rank|parity shard|checksums|\d+ slots are protected)"
WRONG_TOKEN = r"Violation: r\d+ is shown \d+ as token \d+; without failures it is"
NOT_FINISHED = r"Violation: step \d+ is accepted, rank \d+ has not finished it"
NOT_EMPTY = r"Violation: frame \d+ is free and not empty"
REFUSED = r"Violation: the keeper refuses block \d+: .*nothing was corrupted"
OWN_CHECK = r"AssertionError: (Entry\(|\d+ frames in use)"  # `Manifest.check`
NO_END = r"Violation: (a recovery has not ended|not at rest)"

MISTAKES = (
    Mistake(plant=frees_mirrors_before_the_parity_is_committed, shows=WRONG_SHADOW),
    Mistake(plant=ignores_the_generation, shows=rf"{OWN_CHECK}|{WRONG_SHADOW}|\d+ of \d+ frames came back"),
    Mistake(plant=trusts_stamps_of_an_older_epoch, shows=NOT_FINISHED),
    Mistake(plant=trusts_checksums_of_an_older_epoch, shows=WRONG_SHADOW, soon=False),
    Mistake(plant=commits_without_all_acks, shows=NOT_FINISHED),
    Mistake(plant=reuses_a_block_before_it_is_invalidated, shows=WRONG_SHADOW),
    Mistake(plant=encodes_while_the_block_is_still_written, shows=rf"{REFUSED}|{OWN_CHECK}"),
    Mistake(plant=skips_the_checksum, shows=r"Violation: rank \d+, block \d+: .*not what was lost"),
    Mistake(plant=restores_a_mirror_of_the_wrong_step, shows=WRONG_SHADOW),
    Mistake(plant=reuses_a_mirror_slot_named_in_an_open_job, shows=REFUSED, soon=False),
    Mistake(plant=runs_a_step_of_an_old_epoch, shows=rf"{WRONG_SHADOW}|{NOT_EMPTY}"),
    Mistake(plant=runs_on_after_a_failed_step, shows=NO_END),
    Mistake(plant=overwrites_a_block_that_an_unaccepted_step_reads, shows=WRONG_TOKEN),
    Mistake(plant=hands_frames_out_unwiped, shows=NOT_EMPTY),
    Mistake(plant=frees_mirrors_that_are_being_restored_from, shows=r"Violation: .*its mirrors are gone"),
    Mistake(
        plant=believes_blocks_that_are_still_to_be_written,
        shows=f"{WRONG_TOKEN}|not what was written",
        soon=False,
    ),
    Mistake(plant=forgets_the_old_blocks_of_a_request_started_over, shows=WRONG_SHADOW, soon=False),
    Mistake(plant=catches_up_what_was_never_written, shows=WRONG_SHADOW, soon=False),
)


def search(name: str | None, seeds: range) -> Found | None:
    """The first of these schedules that violates anything with the mistake of this name; None: without any."""
    with pytest.MonkeyPatch.context() as patch:
        for mistake in MISTAKES:
            if mistake.name == name:
                mistake.plant(patch)
        for seed in seeds:
            violation = run_quietly(seed).violation
            if violation is not None:
                return Found(seed=seed, violation=violation)
    return None
