"""The keeper and the client that talks to it: the product's work and open jobs, with a wire that can be cut.

Protection ─submit─▶ OpenJobs ─send─▶ wire ─▶ KeeperWork ─▶ wire ─▶ OpenJobs ─▶ Protection.answer
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ghostserve.arena.control import ControlPage
from ghostserve.shadow.keeper_jobs import OpenJobs, failure, is_answer_to
from ghostserve.shadow.keeper_messages import Answer, EncodeJob, Geometry, Job, WipeDone
from ghostserve.shadow.keeper_work import KeeperWork
from ghostserve.testing.simulation.memory import PlainSegment
from ghostserve.testing.simulation.setup import Setup

ATTEMPTS_MAX = 3
JOB_DEADLINE_S = 10.0


@dataclass(slots=True)
class SimulatedKeeper:
    """`tell` takes the answers, as the client's callback does."""

    setup: Setup
    pool: PlainSegment
    page: ControlPage
    rng: random.Random
    tell: Callable[[Job, Answer], None]
    jobs: OpenJobs = field(default_factory=lambda: OpenJobs(attempts_max=ATTEMPTS_MAX))
    alive: bool = True
    hung: bool = False
    refuses_wipes: int = 0
    _work: KeeperWork = field(init=False)
    _inbox: deque[Job] = field(default_factory=deque)
    _outbox: deque[Answer] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._work = KeeperWork(pool=self.pool, control=self.page)
        self._work.configure(
            Geometry(
                frame_bytes=self.setup.block_bytes,
                frames=self.setup.reserve.stop,
                ranks=self.setup.ranks,
                parity_shards=max(1, self.setup.parity_shards),
            )
        )
        self.alive, self.hung = True, False

    @property
    def busy(self) -> bool:
        return len(self.jobs) > 0

    # -- the client ------------------------------------------------------------------------------------

    def submit(self, message: Job, /) -> None:
        self.jobs.add(message)

    def goes_on(self, now_s: float) -> bool:
        """Something that can happen between the two happens; whether anything could."""
        can = []
        if self.alive and self.jobs.next_to_send() is not None:
            can.append(self._send)
        if self.alive and not self.hung and self._inbox:
            can.append(self._work_once)
        if self._outbox:
            can.append(self._receive)
        if not can:
            return False
        self.rng.choice(can)(now_s)
        return True

    def _send(self, now_s: float) -> None:
        while (job := self.jobs.next_to_send()) is not None:
            self._inbox.append(job)
            self.jobs.sent(now_s=now_s)

    def _work_once(self, now_s: float) -> None:
        job = self._inbox.popleft()
        if self.refuses_wipes and not isinstance(job, EncodeJob):
            self.refuses_wipes -= 1
            self._outbox.append(WipeDone(job=job.job, ok=False, reason="a fault was injected"))
        else:
            self._outbox.append(self._work.do(job))

    def _receive(self, now_s: float) -> None:
        answer = self._outbox.popleft()
        job = self.jobs.sent_job(answer.job)
        assert job is not None, f"an answer to {answer.job}, which was not sent"
        assert is_answer_to(job, answer), (job, answer)
        self.jobs.answered(answer.job, now_s=now_s)
        self.tell(job, answer)

    # -- what happens to it ----------------------------------------------------------------------------

    def dies(self) -> None:
        """In the middle of its job: of a parity half is there, of a wipe some frames."""
        if not self.alive:
            return
        self.alive = False
        if self._inbox and self.rng.random() < 0.7:
            job = self._inbox[0]
            frames = job.parity if isinstance(job, EncodeJob) else job.frames[: len(job.frames) // 2]
            for frame in frames:
                at = frame * self.setup.block_bytes
                size = self.setup.block_bytes // 2
                garbage = self.rng.randbytes(size) if isinstance(job, EncodeJob) else bytes(size)
                self.pool.array.data[at : at + size] = garbage

    def overdue(self, now_s: float) -> bool:
        """Whether the client has waited for too long."""
        since_s = self.jobs.progress_s()
        return since_s is not None and now_s - since_s >= JOB_DEADLINE_S

    def restarts(self, now_s: float) -> None:
        """Another takes its place: what was on the wire is gone, the client sends again what is not answered."""
        self._inbox.clear()
        self._outbox.clear()
        for job in self.jobs.broken():
            self.tell(job, failure(job, "keepers were lost over this job"))
        self._start()
