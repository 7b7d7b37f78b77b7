"""Performs the scrub that `shadow/scrub.py` decides: compares live KV, mirrors and parity with their checksums, all the
time and slowly, and makes right what differs.

    frames     the keeper compares them, at low priority, whether or not steps run
    live KV    the ranks compare it, in bursts, only while no step is open: a batch holds the session's lock for a few
               milliseconds
    repairs    as live KV, for they need the ranks; a frame that finds no idle time is given up and caught up by a step

One thread, `--scrub-rate` bytes per second. Fails open: an error here is logged and counted, serving goes on.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ghostserve.arena.control import Counter, Switch
from ghostserve.clock import monotonic_s
from ghostserve.engine.messages import RepairReport
from ghostserve.engine.ring import RanksDied, RankSilent
from ghostserve.engine.scrub_repair import MISMATCHES, ScrubRepair
from ghostserve.errors import EngineLost
from ghostserve.shadow.keeper_messages import ScrubDone
from ghostserve.shadow.manifest import Manifest
from ghostserve.shadow.scrub import Bursts, Check, Part, Remedy, Round, pause_s, remedy_for_frames, subject_of

logger = logging.getLogger(__name__)

KV_BATCH_BYTES = 512 << 10  # on each rank; a request that arrives meanwhile waits for it
FRAMES_BATCH_BYTES = 2 << 20  # of one job of the keeper
FRAMES_PER_JOB = 1024  # so that the job fits a packet
MENDED_MAX = 4  # wrong frames put right under one hold of the lock
QUIET_S = 0.1  # no step was accepted for so long: idle
SHORTEST_PAUSE_S = 0.005
NOTHING_DUE_S = 0.25
AFTER_ERROR_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Suspect:
    """Frames that differ: `wrong` of the check's, and since when it is known."""

    check: Check
    wrong: tuple[int, ...]
    since_s: float


class Scrubber:
    """One per executor; a thread while the server is up and the rate is not 0."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self._session = executor.session
        self._guard = executor.session.guard
        self._page = executor.session.page
        self._rate_bytes_s = executor.settings.config.scrub_rate
        self.bursts = Bursts()
        self._kv, self._frames = Round(of_kv=True), Round(of_kv=False)
        self._asked: tuple[int, list[Check]] | None = None  # the keeper's open job
        self._answers: deque[ScrubDone] = deque()
        self._suspects: dict[tuple[Part, int, int], _Suspect] = {}  # by part, block and generation
        self._repair = ScrubRepair(executor)
        self._accepted: tuple[int, int] | None = None
        self._quiet_since_s = monotonic_s()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="ghostserve-scrub")

    def start(self) -> None:
        """The server is up."""
        self._guard.on_scrubbed = self._answers.append
        if self._rate_bytes_s:
            self._thread.start()

    def stop(self) -> None:
        """Before workers are told to end."""
        self._stopping.set()

    def document(self) -> dict[str, Any]:
        """For the status: how far it is, and what it found last. Any thread may ask."""
        kv, frames = self._kv.progress, self._frames.progress
        counted = {
            name: self._page.get(counter)
            for name, counter in (
                ("bytes_total", Counter.SCRUBBED_BYTES_TOTAL),
                ("blocks_total", Counter.SCRUBBED_BLOCKS_TOTAL),
                ("kv_mismatches_total", Counter.SCRUB_KV_MISMATCHES_TOTAL),
                ("mirror_mismatches_total", Counter.SCRUB_MIRROR_MISMATCHES_TOTAL),
                ("parity_mismatches_total", Counter.SCRUB_PARITY_MISMATCHES_TOTAL),
                ("repaired_total", Counter.SCRUB_REPAIRED_TOTAL),
                ("refused_total", Counter.SCRUB_REFUSED_TOTAL),
                ("kv_nan_total", Counter.KV_NAN_TOTAL),
                ("kv_inf_total", Counter.KV_INF_TOTAL),
            )
        }
        return {
            "rate_bytes_s": self._rate_bytes_s,
            "kv": {"rounds": self._kv.rounds, "blocks_done": kv[0], "blocks": kv[1]},
            "frames": {"rounds": self._frames.rounds, "blocks_done": frames[0], "blocks": frames[1]},
            **counted,
            "waiting": len(self._suspects),
            "findings": [finding.as_dict() for finding in list(self._repair.findings)],
        }

    # -- the thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = NOTHING_DUE_S
        while not self._stopping.wait(pause):
            try:
                pause = self.turn()
            except Exception:
                logger.exception("the scrub failed")
                self._page.add(Counter.SHADOW_ERRORS_TOTAL)
                pause = AFTER_ERROR_S

    def turn(self) -> float:
        """One batch of everything that may be looked at now; how many seconds to wait after it."""
        manifest: Manifest | None = self._guard.manifest
        if manifest is None or self._page.get_switch(Switch.SKIP_SCRUB):
            self.bursts.start_over()
            return NOTHING_DUE_S
        now_s = monotonic_s()
        self._take_answers(manifest, now_s)
        compared = 0
        with self._idle(now_s) as idle:
            if idle and self.bursts.allowed(now_s):
                compared = self._scrub_kv(manifest, now_s)
            self._mend_frames(manifest, now_s, idle=idle)
        spent = self._ask_keeper(manifest, now_s, idle=idle)
        if compared:
            return SHORTEST_PAUSE_S
        return pause_s(
            spent,
            rate_bytes_s=self._rate_bytes_s,
            shortest_s=SHORTEST_PAUSE_S,
            nothing_due_s=NOTHING_DUE_S,
        )

    @contextlib.contextmanager
    def _idle(self, now_s: float) -> Iterator[bool]:
        """Whether no step is open; if so, none is opened before the end. What ranks die of here is repaired here."""
        protection = self._guard.protection
        accepted = None if protection is None else protection.accepted
        if accepted != self._accepted:
            self._accepted, self._quiet_since_s = accepted, now_s
        quiet = now_s - self._quiet_since_s >= QUIET_S
        if not quiet or not self._session.lock.acquire(blocking=False):
            yield False
            return
        try:
            yield self._nothing_open()
        except (RanksDied, RankSilent) as failure:
            self._repair_group(failure)
        finally:
            self._session.lock.release()

    def _nothing_open(self) -> bool:
        executor, scheduler = self._executor, self._session.scheduler
        return not (
            self._stopping.is_set()
            or scheduler is None
            or scheduler.open
            or executor.open_steps
            or executor.is_failed
            or executor.performer.phase is not None
            or executor.ring.dead()
        )

    def _repair_group(self, failure: RanksDied | RankSilent) -> None:
        """As the monitor does it: no step is open, and the lock is ours."""
        if self._stopping.is_set():
            return
        try:
            self._executor.performer.recover(failure)
        except EngineLost:  # given up, and told why
            pass
        except Exception as error:
            logger.exception("a repair in idle time failed")
            self._executor.give_up(f"a repair in idle time failed: {error}")

    # -- live KV ---------------------------------------------------------------------------------------

    def _scrub_kv(self, manifest: Manifest, now_s: float) -> int:
        """Compare the next batch on all ranks; the bytes that were read."""
        with self._guard.lock:
            checks = self._kv.next_checks(
                manifest, bytes_max=KV_BATCH_BYTES * self._executor.world_size, now_s=now_s, idle=True
            )
        if not checks:
            return 0
        spent = sum(check.total_bytes for check in checks)
        for check, wrong in self._repair.compare_kv(checks):
            self._repair.mend_kv(manifest, check, wrong)
        return spent

    # -- frames ----------------------------------------------------------------------------------------

    def _ask_keeper(self, manifest: Manifest, now_s: float, *, idle: bool) -> int:
        """Hand the keeper the next batch, if it has answered the one before; how many bytes it is."""
        if self._asked is not None:
            return 0
        with self._guard.lock:
            checks = self._frames.next_checks(
                manifest, bytes_max=FRAMES_BATCH_BYTES, now_s=now_s, idle=idle, frames_max=FRAMES_PER_JOB
            )
            if not checks:
                return 0
            job = self._guard.protection.scrub(checks)
            self._asked = (job, checks)
        return sum(check.total_bytes for check in checks)

    def _take_answers(self, manifest: Manifest, now_s: float) -> None:
        while self._answers:
            answer = self._answers.popleft()
            if self._asked is None or answer.job != self._asked[0]:
                continue
            (_, checks), self._asked = self._asked, None
            if not answer.ok:
                logger.warning("frames were not scrubbed: %s", answer.reason)
                continue
            self._page.add(Counter.SCRUBBED_BLOCKS_TOTAL, len(checks))
            owners = [(check, index) for check in checks for index in range(len(check.frames))]
            for check in dict.fromkeys(owners[place][0] for place in answer.wrong):
                wrong = tuple(owners[place][1] for place in answer.wrong if owners[place][0] is check)
                self._suspect(manifest, check, wrong, now_s)

    def _suspect(self, manifest: Manifest, check: Check, wrong: tuple[int, ...], now_s: float) -> None:
        key = (check.part, check.block, check.generation)
        with self._guard.lock:
            if key in self._suspects or subject_of(manifest, check) is None:
                return
        self._page.add(MISMATCHES[check.part], len(wrong))
        self._suspects[key] = _Suspect(check=check, wrong=wrong, since_s=now_s)

    def _mend_frames(self, manifest: Manifest, now_s: float, *, idle: bool) -> None:
        """Wrong frames, a few at a time, the oldest first."""
        mended = 0
        for key, suspect in list(self._suspects.items()):
            check = suspect.check
            with self._guard.lock:
                remedy = remedy_for_frames(manifest, check, idle=idle, known_for_s=now_s - suspect.since_s)
                if remedy.choice is Remedy.GIVE_UP:
                    manifest.evict(iter([check.block]), frames=1)
            if remedy.choice is Remedy.WAIT:
                continue
            del self._suspects[key]
            report = RepairReport(ok=False, reason=remedy.reason)
            done: dict[int, RepairReport] = dict.fromkeys(suspect.wrong, report)
            if remedy.choice is Remedy.FROM_KV:
                done = self._repair.restore_mirrors(check, frozenset(suspect.wrong))
            elif remedy.choice is Remedy.PROTECT_ANEW:
                done = dict.fromkeys(suspect.wrong, self._repair.protect_anew(manifest, check))
            for index, report in sorted(done.items()):
                self._repair.note(check, index, remedy.choice, report)
            mended += 1
            if mended == MENDED_MAX:
                return
