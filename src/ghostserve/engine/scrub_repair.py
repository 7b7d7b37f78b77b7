"""Carries out what the scrub decided about a block that differs from its checksums. In idle time, under the session's lock.

A wrong block of live KV is a loss of just that block on just that rank: it comes back as after the loss of a rank, but
no process is replaced.
"""

from __future__ import annotations

import logging
import struct
from collections import deque
from typing import Any

from ghostserve.arena.control import Counter
from ghostserve.engine.messages import RepairReport
from ghostserve.engine.rebuild import Rebuild
from ghostserve.engine.ring import RankRaised, RankSilent
from ghostserve.errors import GhostserveError
from ghostserve.events.kinds import ScrubFinding
from ghostserve.shadow.manifest import Manifest
from ghostserve.shadow.packed_pieces import pack_pieces
from ghostserve.shadow.restore import restores
from ghostserve.shadow.scrub import Check, Finding, Part, Remedy, kv_check, remedy_for_kv, subject_of

logger = logging.getLogger(__name__)

FINDINGS_KEPT = 16
LAYERS_TOLD = 8
PATIENCE_FACTOR = (
    2.0  # times --hang-timeout, for milliseconds of work, and as long again before a rank is fenced
)
MISMATCHES = {
    Part.KV: Counter.SCRUB_KV_MISMATCHES_TOTAL,
    Part.MIRROR: Counter.SCRUB_MIRROR_MISMATCHES_TOTAL,
    Part.PARITY: Counter.SCRUB_PARITY_MISMATCHES_TOTAL,
}


def event_of(finding: Finding) -> ScrubFinding:
    """For the event log."""
    of_parity = finding.part == Part.PARITY.value
    return ScrubFinding(
        rank=None if of_parity else finding.index,
        shard=finding.index if of_parity else None,
        part=finding.part,
        block=finding.block,
        repaired=finding.repaired,
        remedy=finding.remedy,
        reason=finding.reason,
        layers=list(finding.layers[:LAYERS_TOLD]),
    )


class NotScrubbed(GhostserveError):
    """A rank could not do what it was asked for; all of them are alive and answer."""


class ScrubRepair:
    """Asks the ranks, and keeps what was found. The manifest is touched under the guard's lock only."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self._guard = executor.session.guard
        self._page = executor.session.page
        self.findings: deque[Finding] = deque(maxlen=FINDINGS_KEPT)

    def _ask(self, method: str, *arguments: Any) -> dict[int, Any]:
        """Every rank's answer. Raises RanksDied or RankSilent for the group, NotScrubbed where only this call failed."""
        ring, ranks = self._executor.ring, range(self._executor.world_size)
        config = self._executor.settings.config
        # A request that arrives meanwhile waits for us, so a rank that hangs is not waited for as long as vLLM would.
        timeout_s = PATIENCE_FACTOR * config.hang_timeout or config.leave_timeout
        try:
            answers: dict[int, Any] = ring.ask(method, *arguments, ranks=ranks, timeout_s=timeout_s)
        except (RankRaised, RankSilent) as failure:
            # Replies that are on their way would be taken for answers to the next call.
            silent = ring.drain(ranks, gone=(), timeout_s=timeout_s)
            if silent:
                raise RankSilent(silent, f"ranks {sorted(silent)} do not answer the scrub") from None
            raise NotScrubbed(str(failure)) from None
        return answers

    # -- live KV ---------------------------------------------------------------------------------------

    def compare_kv(self, checks: list[Check]) -> list[tuple[Check, frozenset[int]]]:
        """The checks that do not hold, each with the ranks whose live KV differs."""
        answers = self._ask("ghost_scrub", checks)
        self._page.add(Counter.SCRUBBED_BYTES_TOTAL, sum(check.total_bytes for check in checks))
        self._page.add(Counter.SCRUBBED_BLOCKS_TOTAL, len(checks))
        places = sorted({place for wrong in answers.values() for place in wrong})
        return [
            (checks[place], frozenset(rank for rank, wrong in answers.items() if place in wrong))
            for place in places
        ]

    def mend_kv(self, manifest: Manifest, check: Check, wrong: frozenset[int]) -> None:
        """Live KV of these ranks differs: rebuild just this block on them, or have nobody use it any more."""
        with self._guard.held():  # what the decision is about stays as it is
            with self._guard.lock:
                remedy = remedy_for_kv(manifest, check, wrong=wrong)
            if remedy.choice is Remedy.FORGET:
                return
            self._page.add(MISMATCHES[Part.KV], len(wrong))
            if remedy.choice is Remedy.REFUSE:
                reports = {rank: RepairReport(ok=False, reason=remedy.reason) for rank in wrong}
            else:
                reports = self._rebuild(manifest, check, wrong)
        for rank, report in sorted(reports.items()):
            self.note(check, rank, remedy.choice if report.ok else Remedy.REFUSE, report)
        if not all(report.ok for report in reports.values()):
            self._refuse(check.block)

    def _rebuild(self, manifest: Manifest, check: Check, wrong: frozenset[int]) -> dict[int, RepairReport]:
        """Each wrong rank's block from its mirror, or from the others' live KV and the parity."""
        sound = [rank for rank in range(self._executor.world_size) if rank not in wrong]
        with self._guard.lock:
            reserve = self._guard.export_frames()
            items = {
                rank: item
                for rank in wrong
                for item in restores(manifest, [check.block], rank=rank, survivors=sound, reserve=reserve)
            }
        exported = next(iter(items.values()))
        try:
            if exported.survivors:
                self._ask("ghost_export", [exported])
            answers = self._ask("ghost_repair", items)
        finally:
            if exported.survivors:
                self._guard.wipe_exports()
        return {rank: answers[rank] for rank in wrong}

    def _refuse(self, block: int) -> None:
        """Rung 3 for the requests that use the block; the prefix cache forgets it.

        A rank that raises there holds neither the old request state nor the new one, and its peers' answers are on their way: it
        is replaced, and the recovery discards them. Raises RanksDied or RankSilent.
        """
        rebuild = Rebuild(self._executor, lost=frozenset(), epoch=self._executor.performer.epoch)
        try:
            rebuild.refuse({block}, timeout_s=self._executor.settings.config.restore_timeout)
        except RankRaised as failure:
            reason = f"rank {failure.rank} did not take on the request state: {failure.reason}"
            raise RankSilent(frozenset({failure.rank}), reason) from None

    # -- frames ----------------------------------------------------------------------------------------

    def restore_mirrors(self, check: Check, ranks: frozenset[int]) -> dict[int, RepairReport]:
        """Copy them again from live KV. Where that differs as well, nobody may use the block any more."""
        answers = self._ask("ghost_restore_mirror", ranks, check)
        if not all(answers[rank].ok for rank in ranks):
            self._refuse(check.block)
        return {rank: answers[rank] for rank in ranks}

    def protect_anew(self, manifest: Manifest, check: Check) -> RepairReport:
        """Mirror a coded block again, from live KV that has the recorded checksums; the keeper codes it again.

        Live KV comes first: once the parity is given up, nothing could make it right any more.
        """
        with self._guard.lock:
            entry = subject_of(manifest, check)
            before = None if entry is None else kv_check(manifest, entry)
        if before is None:
            return RepairReport(ok=False, reason="it was given up meanwhile")
        for kv, wrong in self.compare_kv([before]):
            self.mend_kv(manifest, kv, wrong)
        with self._guard.lock:
            if subject_of(manifest, check) is None:
                return RepairReport(ok=False, reason="its live KV could not be put right")
            manifest.evict(iter([check.block]), frames=1)
            piece = manifest.plan_catch_up(check.block)
        if piece is None:
            return RepairReport(ok=False, reason="no frames are free; a later step catches up")
        try:
            answers = self._ask("ghost_mirror", pack_pieces([piece], ranks=self._executor.world_size))
        except BaseException:
            with self._guard.lock:
                manifest.withdraw([piece])
            raise
        found = [struct.unpack("<1I", answers[rank]) for rank in range(self._executor.world_size)]
        if tuple(crc for (crc,) in found) != before.checksums:
            with self._guard.lock:
                manifest.withdraw([piece])
            self._refuse(check.block)
            return RepairReport(ok=False, reason="its live KV changed while it was copied")
        with self._guard.lock:
            manifest.commit([piece], found)
        self._guard.sweep()  # hands it to the keeper
        return RepairReport(ok=True)

    # -- what was found --------------------------------------------------------------------------------

    def note(self, check: Check, index: int, remedy: Remedy, report: RepairReport) -> None:
        """Count, keep and log one difference and its end."""
        finding = Finding(
            part=check.part.value,
            block=check.block,
            index=index,
            layers=report.layers,
            slots=report.slots,
            remedy=remedy.value,
            repaired=report.ok,
            reason=report.reason,
        )
        self.findings.append(finding)
        self._page.events.tell(event_of(finding))
        if report.ok:
            self._page.add(Counter.SCRUB_REPAIRED_TOTAL)
        elif remedy is not Remedy.FORGET:
            self._page.add(Counter.SCRUB_REFUSED_TOTAL)
        logger.log(logging.WARNING if report.ok else logging.ERROR, "scrub: %s", finding)
