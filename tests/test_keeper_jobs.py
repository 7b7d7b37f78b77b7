"""Which jobs are open, and the messages about them: pure."""

from __future__ import annotations

import json
import random

import pytest

from ghostserve.errors import ProtocolError
from ghostserve.shadow.keeper_jobs import SENT_MAX, OpenJobs, failure, is_answer_to
from ghostserve.shadow.keeper_messages import (
    WIPE_FRAMES_MAX,
    EncodeDone,
    EncodeJob,
    Geometry,
    KeeperError,
    Message,
    WipeDone,
    WipeJob,
    from_json,
    job_of,
    to_json,
)


def wipe(number: int) -> WipeJob:
    return WipeJob(job=number, frames=(number,))


def encode(number: int) -> EncodeJob:
    return EncodeJob(
        job=number, block=1, generation=2, mirrors=(0, 1), parity=(2,), nbytes=9, checksums=(3, 4)
    )


def sent(jobs: OpenJobs) -> list[int]:
    numbers = []
    while (job := jobs.next_to_send()) is not None:
        numbers.append(job.job)
        jobs.sent(now_s=0.0)
    return numbers


def test_jobs_go_out_in_order_and_not_too_many_at_once() -> None:
    jobs = OpenJobs(attempts_max=3)
    for number in range(SENT_MAX + 2):
        jobs.add(wipe(number))
    assert sent(jobs) == list(range(SENT_MAX))
    jobs.answered(0, now_s=1.0)
    assert sent(jobs) == [SENT_MAX]
    assert len(jobs) == SENT_MAX + 1
    jobs.check()


def test_after_a_break_everything_unanswered_goes_out_again_in_order() -> None:
    jobs = OpenJobs(attempts_max=3)
    for number in range(5):
        jobs.add(wipe(number))
    assert sent(jobs) == [0, 1, 2, 3, 4]
    jobs.answered(0, now_s=1.0)
    jobs.answered(1, now_s=1.0)
    assert jobs.broken() == []
    jobs.add(wipe(9))
    jobs.check()
    assert sent(jobs) == [2, 3, 4, 9]


def test_only_the_job_keepers_die_over_is_given_up() -> None:
    jobs = OpenJobs(attempts_max=2)
    for number in range(3):
        jobs.add(wipe(number))
    sent(jobs)
    assert jobs.broken() == []
    assert jobs.broken() == []  # nothing was sent in between: nobody's fault
    sent(jobs)
    assert jobs.broken() == [wipe(0)]
    assert sent(jobs) == [1, 2]
    assert jobs.broken() == []
    assert sent(jobs) == [1, 2]


def test_progress_is_since_the_last_answer() -> None:
    jobs = OpenJobs(attempts_max=2)
    assert jobs.progress_s() is None
    jobs.add(wipe(1))
    jobs.add(wipe(2))
    assert jobs.progress_s() is None
    jobs.sent(now_s=5.0)
    jobs.sent(now_s=6.0)
    assert jobs.progress_s() == 5.0
    jobs.answered(1, now_s=8.0)
    assert jobs.progress_s() == 8.0
    jobs.answered(2, now_s=9.0)
    assert jobs.progress_s() is None


@pytest.mark.parametrize("seed", range(30))
def test_every_job_is_answered_once_or_given_up(seed: int) -> None:
    rng = random.Random(seed)
    jobs = OpenJobs(attempts_max=rng.randrange(1, 4))
    at_keeper: list[int] = []
    ended: list[int] = []
    for number in range(200):
        jobs.add(wipe(number))
        while rng.random() < 0.6:
            match rng.randrange(3):
                case 0:
                    at_keeper += sent(jobs)
                case 1 if at_keeper:
                    number_done = at_keeper.pop(0)
                    assert jobs.sent_job(number_done) == wipe(number_done)
                    jobs.answered(number_done, now_s=0.0)
                    assert jobs.sent_job(number_done) is None
                    ended.append(number_done)
                case _:
                    ended += [job.job for job in jobs.broken()]
                    at_keeper.clear()
            jobs.check()
    assert len(ended) + len(jobs) == 200
    assert ended == sorted(set(ended))


def test_forms_of_answers() -> None:
    assert is_answer_to(encode(1), EncodeDone(job=1, ok=True, parity_checksums=(5,)))
    assert not is_answer_to(encode(1), EncodeDone(job=1, ok=True))
    assert not is_answer_to(encode(1), WipeDone(job=1))
    assert not is_answer_to(wipe(1), EncodeDone(job=1, ok=True, parity_checksums=(5,)))
    for job in (encode(1), wipe(1)):
        answer = failure(job, "why")
        assert is_answer_to(job, answer)
        assert not answer.ok
        assert answer.reason == "why"


MESSAGES: list[Message] = [
    Geometry(frame_bytes=4096, frames=9, ranks=2, parity_shards=1),
    encode(7),
    WipeJob(job=3, frames=(1, 2, 5)),
    WipeJob(job=3, frames=()),
    EncodeDone(job=7, ok=True, parity_checksums=(2**32 - 1,)),
    EncodeDone(job=7, ok=False, bad_ranks=(1,), reason="checksum"),
    WipeDone(job=3),
    KeeperError(job=None, reason="what?"),
    KeeperError(job=4, reason="no"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_survive_the_wire(message: Message) -> None:
    assert from_json(to_json(message)) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_with_anything_wrong_are_refused(message: Message) -> None:
    good = json.loads(to_json(message))
    for key in good:
        without = {name: value for name, value in good.items() if name != key}
        with pytest.raises(ProtocolError):
            from_json(json.dumps(without).encode())
        wrongs: list[object] = [-1, 1.5, {}, [-1], ["x"], True]
        for wrong in wrongs:
            if isinstance(good[key], bool) and wrong is True:
                continue
            with pytest.raises(ProtocolError):
                from_json(json.dumps({**good, key: wrong}).encode())
    with pytest.raises(ProtocolError):
        from_json(json.dumps({**good, "more": 1}).encode())


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\xff\xfe", b"[]", b"1", b"{}", b"[" * 20000])
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        from_json(data)
    assert job_of(data) is None


def test_the_job_of_a_bad_message() -> None:
    assert job_of(b'{"kind":"encode","job":5}') == 5
    assert job_of(b'{"kind":"encode","job":"5"}') is None


def test_the_largest_wipe_fits_a_packet() -> None:
    job = WipeJob(job=10**9, frames=tuple(range(10**9, 10**9 + WIPE_FRAMES_MAX)))
    assert from_json(to_json(job)) == job
    with pytest.raises(ProtocolError, match="at most"):
        to_json(WipeJob(job=1, frames=tuple(range(10**9, 10**9 + 3 * WIPE_FRAMES_MAX))))
