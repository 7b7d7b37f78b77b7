"""Which keeper jobs are open, and how far they are. Pure: no socket, no time, no lock.

    add ──▶ waiting ──sent──▶ sent ──answered──▶ gone
               ▲               │
               └────broken─────┘  (the first of them: one attempt more; too many: given up)

The keeper works in order, so the first job sent and not answered is the one it was at when the connection
broke. A job that keepers die over again and again must be given up, or it brings down one after the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from ghostserve.shadow.keeper_messages import (
    Answer,
    EncodeDone,
    EncodeJob,
    Job,
    Message,
    ScrubDone,
    ScrubJob,
    WipeDone,
    WipeJob,
)

SENT_MAX = 16  # the rest waits here rather than in the kernel's buffers, which would fill up


def failure(job: Job, reason: str) -> Answer:
    """The answer to a job that no keeper did."""
    match job:
        case WipeJob():
            return WipeDone(job=job.job, ok=False, reason=reason)
        case ScrubJob():
            return ScrubDone(job=job.job, ok=False, reason=reason)
        case EncodeJob():
            return EncodeDone(job=job.job, ok=False, reason=reason)


def is_answer_to(job: Job, message: Message) -> bool:
    """Whether `message` has the form of an answer to `job`."""
    if isinstance(job, EncodeJob):
        expected = len(job.parity)
        return isinstance(message, EncodeDone) and (
            not message.ok or len(message.parity_checksums) == expected
        )
    if isinstance(job, ScrubJob):
        return isinstance(message, ScrubDone) and all(place < len(job.frames) for place in message.wrong)
    return isinstance(message, WipeDone)


@dataclass(slots=True)
class _Open:
    job: Job
    attempts: int = 0  # keepers lost while this was the job they were at


class OpenJobs:
    """Jobs from `add` to their answer, in order. Not thread-safe: the owner holds a lock."""

    def __init__(self, *, attempts_max: int) -> None:
        assert attempts_max >= 1, attempts_max
        self._attempts_max = attempts_max
        self._waiting: deque[_Open] = deque()
        self._sent: dict[int, _Open] = {}  # by job number, in the order sent
        self._progress_s = 0.0  # when the first of `_sent` became the first

    def __len__(self) -> int:
        return len(self._waiting) + len(self._sent)

    def add(self, job: Job) -> None:
        self._waiting.append(_Open(job))

    def next_to_send(self) -> Job | None:
        """The job to send now; None if none waits or enough are on their way."""
        return self._waiting[0].job if self._waiting and len(self._sent) < SENT_MAX else None

    def sent(self, *, now_s: float) -> None:
        """The job that `next_to_send` named is on its way."""
        if not self._sent:
            self._progress_s = now_s
        item = self._waiting.popleft()
        self._sent[item.job.job] = item

    def give_up_next(self) -> None:
        """The job that `next_to_send` named cannot be sent at all."""
        self._waiting.popleft()

    def sent_job(self, number: int | None) -> Job | None:
        """The job of that number if it was sent and is not answered."""
        item = None if number is None else self._sent.get(number)
        return item.job if item else None

    def answered(self, number: int, *, now_s: float) -> None:
        del self._sent[number]
        self._progress_s = now_s

    def progress_s(self) -> float | None:
        """Since when the keeper is at its job; None if it has none."""
        return self._progress_s if self._sent else None

    def broken(self) -> list[Job]:
        """The connection is gone: everything sent waits again. Returns the jobs given up."""
        given_up: list[Job] = []
        sent = list(self._sent.values())
        self._sent.clear()
        if sent:
            sent[0].attempts += 1
            if sent[0].attempts >= self._attempts_max:
                given_up.append(sent.pop(0).job)
        self._waiting.extendleft(reversed(sent))
        return given_up

    def check(self) -> None:
        """Invariants, for tests and for idle time."""
        numbers = [item.job.job for item in self._everything()]
        assert len(set(numbers)) == len(numbers), f"job numbers {numbers} repeat"
        assert all(item.attempts < self._attempts_max for item in self._everything())
        assert len(self._sent) <= SENT_MAX

    def _everything(self) -> Iterator[_Open]:
        yield from self._sent.values()
        yield from self._waiting
