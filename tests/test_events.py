"""Events: their sentences and JSON, the log, stories, and the file. Pure but for the file."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ghostserve.arena.event_rings import News
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.errors import UsageError
from ghostserve.events import kinds
from ghostserve.events.file import EventFile, read_files
from ghostserve.events.follower import AFTER_ERROR_S, Follower
from ghostserve.events.kinds import KINDS, Event, event_of
from ghostserve.events.log import EventLog
from ghostserve.events.record import Record, at_seconds, at_text, pack, record_of, unpack
from ghostserve.events.sentences import text_of
from ghostserve.events.story import belongs_to, tell
from ghostserve.types import Phase

NAME = "cmpl-5f-0-0123abcd"
RECOVERY = kinds.RecoveryEnded(
    epoch=3, ranks=[1], path="rebuild", ok=True, reason="process of rank 1 exited", total_ms=870.4,
    phases_ms={phase.value: 96.7 for phase in Phase}, kv_blocks_from_parity=32, kv_blocks_from_mirrors=1,
    kv_bytes_rebuilt=4 << 20, tokens_recomputed=0, requests_recomputed=0, requests_resumed=2,
)  # fmt: skip
TOLD: list[tuple[Event, str]] = [
    (
        kinds.ServerStarted(pid=7, version="0.1", model="tiny", ranks=2),
        "ghostserve 0.1 starts tiny on 2 workers (process 7)",
    ),
    (kinds.ServerServing(start_s=12.34), "the server serves, 12.3 s after its start"),
    (kinds.ServerDraining(timeout_s=30), "the server was told to end; open requests have 30 s"),
    (kinds.ServerStopped(exit_status=0), "the server ended with exit status 0"),
    (kinds.ServerStopped(exit_status=3, reason="no port"), "the server ended with exit status 3: no port"),
    (kinds.ServerGaveUp(reason="no process"), "the server gives up: no process"),
    (
        kinds.FaultInjected(how="crash", rank=1, pid=9),
        "fault crash was asked for on rank 1 (process 9), to strike now",
    ),
    (
        kinds.RequestAdmitted(request=NAME, prompt_tokens=1, max_tokens=40),
        f"request {NAME} was admitted: 1 prompt token, at most 40 tokens to come",
    ),
    (
        kinds.RequestFinished(request=NAME, reason="stop", output_tokens=40, total_ms=1500),
        f"request {NAME} finished (stop) after 40 tokens in 1500 ms",
    ),
    (
        kinds.RequestAborted(request=NAME, output_tokens=1, total_ms=5.25),
        f"request {NAME} was aborted after 1 token in 5.2 ms",
    ),
    (
        kinds.RequestFailed(request=NAME, output_tokens=3, total_ms=61_000),
        f"request {NAME} ended with an error after 3 tokens in 61.0 s",
    ),
    (
        kinds.RequestRecomputed(request=NAME, tokens=77, reason="2 KV blocks could not be rebuilt"),
        f"request {NAME} computes 77 tokens again: 2 KV blocks could not be rebuilt",
    ),
    (
        kinds.RequestResumed(request=NAME, epoch=3, output_tokens=12, recovery_ms=870.4),
        f"request {NAME} goes on after 12 tokens; the recovery took 870 ms",
    ),
    (
        kinds.RankLost(rank=1, cause="crash", pid=9, reason="exit by SIGKILL"),
        "rank 1 (process 9) is lost (crash): exit by SIGKILL",
    ),
    (kinds.RankFenced(rank=1, pid=9), "rank 1 is fenced: SIGKILL to process 9"),
    (kinds.RankTaken(rank=1, pid=10, standby=True), "standby 10 takes rank 1"),
    (kinds.RankSlow(rank=0, reason="9 ms of work"), "rank 0 is slow: 9 ms of work"),
    (kinds.RankNotSlow(rank=0), "rank 0 is no longer slow"),
    (kinds.EpochRaised(epoch=3, reason="rank 1 exited"), "epoch 3 begins: rank 1 exited"),
    (kinds.PhaseBegun(phase="kv"), "phase kv begins"),
    (kinds.PhaseEnded(phase="kv", ms=51.2), "phase kv took 51 ms"),
    (kinds.PhaseFailed(phase="spawn", reason="no pid"), "phase spawn failed: no pid"),
    (
        RECOVERY,
        "rank 1 recovered by rebuild in 870 ms: 32 blocks from parity, 1 from mirrors (4.0 MiB), "
        "no token recomputed, 2 requests resumed",
    ),
    (kinds.StepRaised(reason="out of range"), "a step raised an error: out of range"),
    (
        kinds.StepFailed(reason="it raised again", requests=2),
        "a step is given up, 2 requests get an error: it raised again",
    ),
    (kinds.StandbyReady(pid=11, start_ms=230.0), "standby 11 is ready, 230 ms after its start"),
    (kinds.StandbyDied(pid=11, reason="ended"), "standby 11 ended"),
    (kinds.KeeperDied(pid=5, status=-9), "keeper 5 ended with status -9"),
    (kinds.KeeperRestarted(pid=6, restarts=1), "keeper 6 takes over: 1 restart so far"),
    (kinds.KeeperGivenUp(deaths=6, window_s=60.0), "the keeper died 6 times in 60 s: no parity for as long"),
    (
        kinds.ProtectionLost(reason="a step could not be planned"),
        "protection is off until nothing is served: a step could not be planned",
    ),
    (kinds.ProtectionRegained(), "protection is on again for what comes from here on"),
    (
        kinds.KvUnprotected(blocks=3, reason="--host-memory is full"),
        "3 KV blocks would be computed again after a loss: --host-memory is full",
    ),
    (kinds.KvProtected(), "all KV is protected again"),
    (
        kinds.ScrubFinding(
            rank=1, part="kv", block=8, repaired=True, remedy="rebuild", layers=["layers.0", "layers.1"]
        ),
        "kv of block 8, rank 1 (layers.0, layers.1), differs from its checksum and was repaired (rebuild)",
    ),
]  # fmt: skip


# -- events --------------------------------------------------------------------------------------------------------


def test_every_kind_is_told_here() -> None:
    assert {event.kind for event, _ in TOLD} == set(KINDS)


def test_every_kind_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "operations.md").read_text()
    assert [kind for kind in KINDS if f"`{kind}`" not in text] == []


@pytest.mark.parametrize(("event", "text"), TOLD, ids=lambda value: getattr(value, "kind", ""))
def test_the_sentence_of_a_kind(event: Event, text: str) -> None:
    assert text_of(event) == text


def test_sentences_that_depend_on_what_is_known() -> None:
    assert (
        text_of(kinds.FaultInjected(how="keeper_crash")) == "fault keeper_crash was asked for, to strike now"
    )
    assert text_of(kinds.RankTaken(rank=1, pid=10, standby=False)) == "new process 10 takes rank 1"
    failed = dataclasses.replace(RECOVERY, ok=False, ranks=[0, 1], reason="no process")
    assert text_of(failed) == "ranks 0, 1 not recovered after 870 ms: no process"
    again = dataclasses.replace(RECOVERY, ranks=[], path="recompute", tokens_recomputed=1, requests_resumed=1)
    assert text_of(again).startswith("a step recovered by recompute")
    assert text_of(again).endswith("1 token recomputed, 1 request resumed")
    parity = kinds.ScrubFinding(
        part="parity", block=8, shard=0, repaired=False, remedy="refuse", reason="no KV"
    )
    assert "parity of block 8, parity shard 0, differs" in text_of(parity)
    assert text_of(parity).endswith("could not be repaired (refuse): no KV")


def test_a_sentence_does_not_steer_a_terminal() -> None:
    """Ids and reasons come from outside."""
    event = kinds.RequestAborted(request="cmpl-\x1b[2J\n\x07x", output_tokens=0, total_ms=0)
    assert text_of(event).startswith("request cmpl- [2J  x was aborted")


@pytest.mark.parametrize("event", [event for event, _ in TOLD], ids=lambda event: event.kind)
def test_an_event_survives_shared_memory_and_json(event: Event) -> None:
    packed = pack(event, 12.5, bytes_max=1000)
    assert packed is not None
    assert unpack(packed) == (12.5, event)
    record = Record(7, 1_790_000_000.123456, event)
    doc = json.loads(record.to_json())
    assert list(doc) == ["seq", "at", "kind", "rank", "request", "text", "data"]
    assert (doc["seq"], doc["at"], doc["kind"]) == (7, "2026-09-21T14:13:20.123456Z", event.kind)
    assert (doc["rank"], doc["request"]) == (event.rank, event.request)
    assert doc["text"] == text_of(event)
    assert not {"rank", "request"} & doc["data"].keys()
    assert record_of(doc) == record


def test_kinds_and_fields_of_another_version() -> None:
    assert event_of("no_such_kind", {}) is None
    assert event_of("rank_fenced", {"rank": 1, "pid": 9, "new": 1}) == kinds.RankFenced(rank=1, pid=9)
    with pytest.raises(ValueError, match="rank_fenced: "):
        event_of("rank_fenced", {"rank": 1})
    for junk in (
        {},
        {"seq": 1, "at": "yesterday", "kind": "rank_fenced", "rank": 1, "request": None, "data": {}},
    ):
        with pytest.raises(ValueError):
            record_of(junk)


def test_long_texts_are_clipped_until_they_fit() -> None:
    event = kinds.RankSlow(rank=1, reason="ü" * 1000)
    packed = pack(event, 1.0, bytes_max=900)
    assert packed is not None
    assert len(packed) <= 900
    assert pack(event, 1.0, bytes_max=40) is None


def test_times_are_rfc_3339() -> None:
    assert at_seconds(at_text(1_790_000_000.000001)) == pytest.approx(1_790_000_000.000001, abs=1e-6)
    assert at_seconds("2026-11-22T13:00:00") == at_seconds("2026-11-22T14:00:00+01:00")


# -- the log -------------------------------------------------------------------------------------------------------


class Source:
    """Stands for the rings."""

    def __init__(self) -> None:
        self.news: list[News] = []
        self.time_s = 100.0

    def add(self, *events: Event, lost: int = 0) -> None:
        timed = []
        for event in events:
            self.time_s += 1
            timed.append((self.time_s, event))
        self.news.append(News(timed, lost))

    def look(self) -> News:
        return self.news.pop(0) if self.news else News([], 0)


def slow(number: int) -> Event:
    return kinds.RankSlow(rank=number, reason="")


def admitted(name: str) -> Event:
    return kinds.RequestAdmitted(request=name, prompt_tokens=1, max_tokens=1)


def seqs(records: Sequence[Record]) -> list[int]:
    return [record.seq for record in records]


def test_a_reader_goes_on_where_it_was() -> None:
    source = Source()
    log = EventLog(source.look)
    assert log.after(0, limit=10) == log.latest(10)
    source.add(slow(0), slow(1), slow(2))
    first = log.after(0, limit=2)
    assert (seqs(first.records), first.next, first.dropped) == ([1, 2], 2, 0)
    source.add(slow(3))
    second = log.after(first.next, limit=1)
    assert (seqs(second.records), second.next, second.dropped) == ([3], 3, 0)
    third = log.after(second.next, limit=2)
    assert (seqs(third.records), third.next) == ([4], 4)
    assert log.after(4, limit=2).records == ()
    assert seqs(log.latest(2).records) == [3, 4]
    ahead = log.after(99, limit=9)  # the place is of the server before this one
    assert (seqs(ahead.records), ahead.next) == ([1, 2, 3, 4], 4)


def test_numbers_grow_over_restarts() -> None:
    """A place in the log of the server before is behind all of this one's, however many events that had."""
    source = Source()
    log = EventLog(source.look, base=1000)
    assert (log.after(0, limit=9).next, log.latest(9).next) == (1000, 1000)
    source.add(slow(0), slow(1))
    for place in (0, 2, 999, 1000, 1003):
        excerpt = log.after(place, limit=9)
        assert (seqs(excerpt.records), excerpt.next, excerpt.dropped) == ([1001, 1002], 1002, 0)
    assert seqs(log.after(1001, limit=9).records) == [1002]


def test_what_was_lost_is_a_gap() -> None:
    source = Source()
    log = EventLog(source.look)
    source.add(slow(0))
    log.collect()
    source.add(slow(1), lost=5)
    excerpt = log.after(1, limit=10)
    assert (seqs(excerpt.records), excerpt.next, excerpt.dropped) == ([7], 7, 5)
    assert log.lost_total == 5
    source.add(lost=2)
    nothing = log.after(7, limit=10)
    assert (seqs(nothing.records), nothing.next, nothing.dropped) == ([], 9, 2)
    latest = log.latest(10)
    assert (seqs(latest.records), latest.next, latest.dropped) == ([1, 7], 9, 7)


def test_requests_do_not_push_out_the_rest() -> None:
    source = Source()
    log = EventLog(source.look, kept_max=3, kept_of_requests_max=4)
    source.add(slow(0), *(admitted(str(number)) for number in range(10)), slow(1))
    excerpt = log.after(0, limit=100)
    assert seqs(excerpt.records) == [1, 8, 9, 10, 11, 12]
    assert (excerpt.next, excerpt.dropped) == (12, 6)


# -- stories -------------------------------------------------------------------------------------------------------


def records_of(*events: Event, start_s: float = 1000.0) -> list[Record]:
    return [Record(number + 1, start_s + number / 4, event) for number, event in enumerate(events)]


OTHER = "cmpl-77-0-aaaaaaaa"
HISTORY = records_of(
    kinds.ServerServing(start_s=1),
    admitted(OTHER),
    kinds.RequestFinished(request=OTHER, reason="stop", output_tokens=1, total_ms=1),
    kinds.StandbyReady(pid=4, start_ms=1),
    admitted(NAME),
    kinds.RankLost(rank=1, cause="crash", pid=9, reason="gone"),
    kinds.EpochRaised(epoch=3, reason="gone"),
    kinds.PhaseEnded(phase="kv", ms=5),
    kinds.RankTaken(rank=1, pid=10, standby=True),
    kinds.RequestResumed(request=NAME, epoch=3, output_tokens=12, recovery_ms=870.4),
    RECOVERY,
    kinds.KeeperDied(pid=5, status=1),
    kinds.RequestFinished(request=NAME, reason="stop", output_tokens=40, total_ms=1500),
    kinds.RankLost(rank=0, cause="crash", pid=8, reason="gone"),
    kinds.PhaseEnded(phase="state", ms=5),
)  # fmt: skip


def test_the_story_of_a_request() -> None:
    """Its own events, and what it waited for; not what came before or after."""
    story = tell("cmpl-5f", HISTORY)
    assert [record.event.kind for record in story.records] == [
        "request_admitted", "rank_lost", "epoch_raised", "phase_ended", "rank_taken", "request_resumed",
        "recovery_ended", "request_finished",
    ]  # fmt: skip
    lines = story.lines()
    assert lines[0] == f"request {NAME}, from 1970-01-01T00:16:41.000000Z"
    assert lines[1].split(maxsplit=2)[:2] == ["+0.000", "s"]
    assert lines[-1].split(maxsplit=2) == ["+2.000", "s", text_of(HISTORY[12].event)]
    doc: dict[str, Any] = story.as_dict()
    assert doc["subject"] == f"request {NAME}"
    assert [event["since_start_s"] for event in doc["events"]] == [0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0]


def test_the_story_of_a_rank() -> None:
    for subject in ("rank 1", "1", "rank=1", "rank1"):
        story = tell(subject, HISTORY)
        assert [record.event.kind for record in story.records] == [
            "rank_lost", "epoch_raised", "phase_ended", "rank_taken", "recovery_ended",
        ]  # fmt: skip
    assert [record.event.kind for record in tell("rank 0", HISTORY).records] == ["rank_lost", "phase_ended"]


def test_a_phase_that_has_ended_is_one_line() -> None:
    """One that has not is the last that is known."""
    history = records_of(
        kinds.RankLost(rank=1, cause="crash", pid=9, reason="gone"),
        kinds.PhaseBegun(phase="leave"),
        kinds.PhaseEnded(phase="leave", ms=5),
        kinds.PhaseBegun(phase="spawn"),
    )
    story = tell("1", history)
    assert len(story.records) == 4
    assert [line.split("  ")[-1] for line in story.lines()[2:]] == [
        "phase leave took 5.0 ms",
        "phase spawn begins",
    ]


def test_the_order_is_that_of_time() -> None:
    assert tell("1", HISTORY[::-1]) == tell("1", HISTORY)


@pytest.mark.parametrize(
    ("subject", "said"),
    [
        ("cmpl-", r"2 requests begin with 'cmpl-': cmpl-5f-0-0123abcd, cmpl-77-0-aaaaaaaa"),
        ("chatcmpl-1", "no request 'chatcmpl-1' is known"),
        ("rank 7", "nothing is known of rank 7"),
        (" ", "no request '' is known"),
    ],
)
def test_a_story_that_cannot_be_told(subject: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        tell(subject, HISTORY)


def test_all_parts_of_a_response_are_one_story() -> None:
    """Several prompts, or several answers: requests of their own in the engine."""
    parts = [admitted(name) for name in ("0_cmpl-9-0-0123abcd", "1_cmpl-9-0-0123abcd", "cmpl-9-1-0123abcd")]
    story = tell("cmpl-9", records_of(*parts, admitted("cmpl-99-0-0123abcd")))
    assert len(story.records) == 3
    assert story.title == "request cmpl-9"


@pytest.mark.parametrize(
    ("engine_id", "response_id", "belongs"),
    [
        ("cmpl-a-0-0123abcd", "cmpl-a", True),
        ("2_cmpl-a-0-0123abcd", "cmpl-a", True),
        ("chatcmpl-a-0123abcd", "chatcmpl-a", True),
        ("cmpl-a-0", "cmpl-a", True),  # VLLM_DISABLE_REQUEST_ID_RANDOMIZATION
        ("cmpl-a-b-0-0123abcd", "cmpl-a", False),
        ("chatcmpl-a-1-0123abcd", "chatcmpl-a", False),
        ("cmpl-ab-0-0123abcd", "cmpl-a", False),
        ("cmpl-xa-0-0123abcd", "cmpl-.a", False),
    ],
)
def test_which_request_a_response_is_of(engine_id: str, response_id: str, belongs: bool) -> None:
    assert belongs_to(engine_id, response_id) is belongs


# -- the file ------------------------------------------------------------------------------------------------------

LINE = len(HISTORY[0].to_json()) + 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


@pytest.fixture
def file(path: Path) -> Iterator[EventFile]:
    file = EventFile(path, max_bytes=4 * LINE, files=3)
    yield file
    file.close()


def one(number: int) -> list[Record]:
    return [Record(number, 1000.0 + number, HISTORY[0].event)]


def test_the_file_has_a_line_per_event(file: EventFile, path: Path) -> None:
    file.write(HISTORY)
    lines = path.read_text().splitlines()
    assert [record_of(json.loads(line)) for line in lines] == HISTORY
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(read_files(path)) == HISTORY


def test_the_file_is_rotated(file: EventFile, path: Path) -> None:
    for number in range(1, 15):
        file.write(one(number))
    names = sorted(found.name for found in path.parent.iterdir())
    assert names == ["events.jsonl", "events.jsonl.1", "events.jsonl.2"]
    assert all(found.stat().st_size <= 4 * LINE + 8 for found in path.parent.iterdir())
    kept = seqs(list(read_files(path)))
    assert kept == list(range(kept[0], 15))  # oldest first, without a gap
    assert 8 <= len(kept) <= 12


def test_a_single_file_begins_anew(path: Path) -> None:
    file = EventFile(path, max_bytes=2 * LINE, files=1)
    for number in range(1, 6):
        file.write(one(number))
    file.close()
    assert [found.name for found in path.parent.iterdir()] == ["events.jsonl"]
    assert seqs(list(read_files(path)))[-1] == 5


def test_what_was_there_stays(file: EventFile, path: Path) -> None:
    file.write(one(1))
    again = EventFile(path, max_bytes=4 * LINE, files=3)
    again.write(one(2))
    again.close()
    assert seqs(list(read_files(path))) == [1, 2]


def test_a_file_that_was_moved_is_made_anew(file: EventFile, path: Path) -> None:
    file.write(one(1))
    path.rename(path.with_name("kept"))
    file.write(one(2))
    assert seqs(list(read_files(path))) == [2]
    path.unlink()
    file.write(one(3))
    assert seqs(list(read_files(path))) == [3]


def test_a_torn_line_takes_no_other_with_it(path: Path) -> None:
    """Of a server that was killed while it wrote."""
    path.write_text('{"seq":1,"at"')
    file = EventFile(path, max_bytes=4096, files=2)
    records = records_of(kinds.ServerStopped(exit_status=0), kinds.KeeperDied(pid=1, status=9))
    for record in records:
        file.write([record])
    file.close()
    assert list(read_files(path)) == records
    assert path.read_text().count("\n") == 3, "only the torn line was ended"


def test_what_is_no_event_is_passed_over(path: Path) -> None:
    good = records_of(kinds.ServerStopped(exit_status=0))
    doc = good[0].to_json()
    junk = [
        "5",
        "[]",
        "null",
        doc.replace('"seq":1', '"seq":1e400'),
        "[" * 100_000,
        doc.replace('"data":{', '"data":5,"x":{'),
    ]
    assert doc not in junk
    path.write_text("\n".join([*junk, doc, ""]))
    assert list(read_files(path)) == good


def test_a_pipe_that_nobody_reads_is_not_waited_for(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(UsageError, match=r"--event-log .*events.jsonl: No such device"):
        EventFile(path, max_bytes=9999, files=2)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        file = EventFile(path, max_bytes=9999, files=2)
        file.write(records_of(kinds.ServerStopped(exit_status=0)))
        file.close()
        assert os.read(reader, 4096).endswith(b"}\n")
    finally:
        os.close(reader)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--event-log .*no-such/events.jsonl: No such file or directory"):
        EventFile(tmp_path / "no-such" / "events.jsonl", max_bytes=9999, files=2)
    with pytest.raises(UsageError, match="Is a directory"):
        EventFile(tmp_path, max_bytes=9999, files=2)
    with pytest.raises(UsageError, match=r"nothing.jsonl: No such file"):
        list(read_files(tmp_path / "nothing.jsonl"))


def test_lines_that_are_no_events_are_passed_over(path: Path) -> None:
    path.write_text(f"{HISTORY[0].to_json()}\nhalf a li\n{{}}\n[]\n3\n\n{HISTORY[1].to_json()}\n")
    assert list(read_files(path)) == HISTORY[:2]


class FullDisk:
    """`os.write` that lets through half of it and then says that there is no room, while `full`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full, self.left = False, 0
        self._write = os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, fd: int, data: Any) -> int:
        if not self.full:
            return self._write(fd, data)
        if self.left == 0:
            self.left = len(data) // 2
            return self._write(fd, bytes(data)[: self.left])
        self.left = 0
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_no_half_lines(
    file: EventFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch)
    file.write(one(1))
    disk.full = True
    with pytest.raises(OSError, match="No space"):
        file.write(one(2))
    assert path.read_text() == one(1)[0].to_json() + "\n"
    disk.full = False
    file.write(one(2))
    assert seqs(list(read_files(path))) == [1, 2]


def test_a_follower_goes_on_once_the_disk_has_room(
    file: EventFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told once; the log collects meanwhile, and nothing is missing in the end."""
    disk = FullDisk(monkeypatch)
    source = Source()
    log = EventLog(source.look)
    errors: list[bool] = []
    failed = threading.Event()

    def on_error(error: Exception, first: bool) -> None:
        errors.append(first)
        if len(errors) == 2:
            failed.set()

    disk.full = True
    source.add(slow(0))
    follower = Follower(log, file.write, name="test", on_error=on_error)
    try:
        assert failed.wait(10 * AFTER_ERROR_S)
        source.add(slow(1))
        assert seqs(log.after(0, limit=9).records) == [1, 2]
        disk.full = False
        deadline_s = monotonic_s() + 10 * AFTER_ERROR_S
        while not (path.exists() and path.read_text().count("\n") == 2):
            assert monotonic_s() < deadline_s
            sleep_s(0.02)
        assert errors[0] is True
        assert not any(errors[1:])
        source.add(slow(2))
    finally:
        follower.close(timeout_s=5)
    assert seqs(list(read_files(path))) == [1, 2, 3]  # the end is handed on, too


def test_a_sink_that_hangs_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    source, release = Source(), threading.Event()
    entered = threading.Event()

    def hang(records: Sequence[Record]) -> None:
        entered.set()
        release.wait(30)

    source.add(slow(0))
    log = EventLog(source.look)
    follower = Follower(log, hang, name="hanging", on_error=lambda error, first: None)
    assert entered.wait(10)
    source.add(slow(1))
    assert seqs(log.after(0, limit=9).records) == [1, 2]  # nobody waits for it
    follower.close(timeout_s=0.05)
    assert "hanging did not end within 0.05 s" in caplog.text
    release.set()
    follower.close(timeout_s=10)
