"""`ghostserve events` and `story` against the stand-in server and against files."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import httpx
import pytest

from fake_http import serving
from ghostserve.cli import events as cli_events
from ghostserve.cli import main as cli
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.errors import UsageError
from ghostserve.events import kinds
from ghostserve.events.file import EventFile
from ghostserve.events.record import Record
from ghostserve.testing.fake_engine import FakeEngine
from ghostserve.testing.server import ServerProcess, free_port
from ghostserve.web import events_client
from ghostserve.web.admin import AdminClient

pytestmark = pytest.mark.long

FAKE = [sys.executable, "-m", "ghostserve.testing.fake_server", "--token-s", "0.002", "--outage-s", "0.1"]
PHASES = {"detect": 1.0, "spawn": 200.0}
FILE = [
    Record(1, 1_790_000_000.0, kinds.RankSlow(rank=0, reason="busy")),
    Record(2, 1_790_000_060.0, kinds.RankLost(rank=1, cause="crash", pid=9, reason="gone")),
    Record(
        3,
        1_790_000_061.0,
        kinds.RecoveryEnded(
            epoch=1, ranks=[1], path="rebuild", ok=True, reason="gone", total_ms=500.0, phases_ms=PHASES,
            kv_blocks_from_parity=1, kv_blocks_from_mirrors=1, kv_bytes_rebuilt=10, tokens_recomputed=0,
            requests_recomputed=0, requests_resumed=0,
        ),
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """With a request that was interrupted by the loss of rank 1, and is over."""
    with ServerProcess(FAKE, log_dir=tmp_path_factory.mktemp("fake")) as server:
        server.start()
        server.wait_ready(timeout_s=60)
        server.kill_rank(1)
        ask(server)
        yield server


def ask(server: ServerProcess) -> None:
    with httpx.Client(trust_env=False, timeout=30) as http:
        http.post(
            f"{server.base_url}/v1/completions", json={"prompt": "a b", "max_tokens": 5}
        ).raise_for_status()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "events.jsonl"
    file = EventFile(path, max_bytes=1 << 20, files=2)
    file.write(FILE)
    file.close()
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str, expected: int = 0) -> list[str]:
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    assert code == expected, err
    return (out if expected == 0 else err).splitlines()


def kinds_of(lines: list[str]) -> list[str]:
    return [json.loads(line)["kind"] for line in lines]


# -- events --------------------------------------------------------------------------------------------------------


def test_events_of_a_server(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "events", "--url", server.base_url)
    assert any(
        "rank_lost" in line and line.endswith("is lost (crash): process of rank 1 exited") for line in lines
    )
    as_json = run(capsys, "events", "--url", server.base_url, "--json")
    assert [json.loads(line)["text"] for line in as_json] == [line.split("  ")[-1].strip() for line in lines]
    assert kinds_of(as_json)[0] == "fault_injected"


def test_events_are_chosen(server: ServerProcess, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = ("--url", server.base_url, "--json")
    assert set(kinds_of(run(capsys, "events", *url, "--kind", "rank_lost", "--kind", "rank_taken"))) == {
        "rank_lost", "rank_taken",
    }  # fmt: skip
    of_rank = kinds_of(run(capsys, "events", *url, "--rank", "1"))
    assert {"rank_lost", "rank_taken", "recovery_ended"} <= set(of_rank)
    assert "request_admitted" not in of_rank
    assert run(capsys, "events", *url, "--rank", "0") == []
    assert len(run(capsys, "events", *url, "--since", "1h")) > 5
    since = run(capsys, "events", "--json", "--file", str(file), "--since", "2026-09-21T14:14:00Z")
    assert kinds_of(since) == ["rank_lost", "recovery_ended"]


def test_since_is_a_span_or_a_time() -> None:
    assert cli_events.since_s("90s", 1000.0) == 910.0
    assert cli_events.since_s("1.5m", 1000.0) == 910.0
    assert cli_events.since_s("1970-01-01T00:01:00+00:00", 0.0) == 60.0
    for wrong in ("yesterday", "5", "-5m", ""):
        with pytest.raises(UsageError, match="--since"):
            cli_events.since_s(wrong, 0.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("events", "--follow", "--file", "x"), "tail -F"),
        (("events", "--kind", "no_such"), "invalid choice"),
        (("events", "--file", "/no/such/file"), "/no/such/file: No such file"),
        (("story", "rank", "9", "--file", "/no/such/file"), "No such file"),
        (("story",), "REQUEST|RANK"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = run(capsys, *arguments, expected=2)
    assert said in line


def test_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = run(capsys, "events", "--url", f"http://127.0.0.1:{free_port()}", expected=1)
    assert "no server answers" in line


def test_a_server_that_tells_on_and_on_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Page after page while they are full; then it is enough, though there is something new each time."""
    asked: list[int] = []

    def events(_self: AdminClient, *, after: int, limit: int) -> dict[str, object]:
        asked.append(after)
        count = limit if len(asked) < 3 else 1
        some = [FILE[0].as_dict() | {"seq": after + number + 1} for number in range(count)]
        return {"events": some, "next": after + count, "dropped": 0}

    monkeypatch.setattr(AdminClient, "events", events)
    records = [record.seq for record, _ in events_client.kept_events(AdminClient("http://127.0.0.1:1"))]
    assert records == list(range(1, 2002))
    assert asked == [0, 1000, 2000]


# -- story ---------------------------------------------------------------------------------------------------------


def test_the_story_of_a_request_and_of_a_rank(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    head, *lines = run(capsys, "story", "cmpl-0", "--url", server.base_url)
    assert head.startswith("request cmpl-0-0-00000000, from 2")
    assert lines[0].split(maxsplit=2)[:2] == ["+0.000", "s"]
    assert [line.split("  ")[-1] for line in lines if "goes on after" in line]
    assert "finished (length) after 5 tokens" in lines[-1]
    doc = json.loads(run(capsys, "story", "rank", "1", "--json", "--url", server.base_url)[0])
    assert doc["subject"] == "rank 1"
    assert [event["kind"] for event in doc["events"]][-1] == "recovery_ended"
    (line,) = run(capsys, "story", "cmpl-77", "--url", server.base_url, expected=2)
    assert "no request 'cmpl-77' is known" in line


def test_a_story_from_a_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "story", "1", "--file", str(file))
    assert lines == [
        "rank 1, from 2026-09-21T14:14:20.000000Z",
        "     +0.000 s  rank 1 (process 9) is lost (crash): gone",
        "     +1.000 s  rank 1 recovered by rebuild in 500 ms: 1 block from parity, 1 from mirrors (10 B), "
        "no token recomputed, 0 requests resumed",
    ]


def test_what_is_no_longer_kept_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    doc = {"events": [FILE[1].as_dict()], "next": 9, "dropped": 8}
    monkeypatch.setattr(AdminClient, "_ask", lambda *_: doc)
    assert cli.main(["events"]) == 0
    out, err = capsys.readouterr()
    assert "rank_lost" in out
    assert err == "ghostserve: 8 events before 2026-09-21T14:14:20.000000Z are no longer kept\n"


# -- following -----------------------------------------------------------------------------------------------------


class Following:
    """`ghostserve events --follow --json` as a process; its lines come in as they are printed."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, "-m", "ghostserve.cli.main", "events", "--follow", "--json", "--url", url]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.out: list[str] = []
        self.err: list[str] = []
        self._threads = [
            threading.Thread(target=self._gather, args=(pipe, into), daemon=True)
            for pipe, into in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _gather(pipe: IO[str] | None, into: list[str]) -> None:
        assert pipe is not None
        with pipe:
            into.extend(iter(pipe.readline, ""))

    def wait_for(self, kind: str, *, times: int) -> None:
        deadline_s = monotonic_s() + 30
        while sum(f'"kind":"{kind}"' in line for line in self.out) < times:
            assert self.process.poll() is None, self.err
            assert monotonic_s() < deadline_s, (kind, self.out, self.err)
            sleep_s(0.02)

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        code = self.process.wait(20)
        for thread in self._threads:
            thread.join(10)
        return code


def test_following_survives_a_restart_of_the_server() -> None:
    """What the next server tells is shown from its beginning; Ctrl-C ends it, with 130."""
    port = free_port()
    following: Following | None = None
    try:
        for life in (1, 2):
            engine = FakeEngine(token_s=0.001)
            try:
                with serving(engine, port=port) as (url, _):
                    following = following or Following(url)
                    with httpx.Client(trust_env=False) as http:
                        asked = http.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 5})
                        assert asked.is_success
                    following.wait_for("request_finished", times=life)
            finally:
                engine.close()
        assert following is not None
        assert following.end(signal.SIGINT) == 130
    finally:
        if following is not None:
            following.process.kill()
            following.process.wait(10)
    told = [json.loads(line) for line in following.out]
    assert [event["kind"] for event in told] == ["request_admitted", "request_finished"] * 2
    assert [event["seq"] for event in told] == sorted({event["seq"] for event in told})
    trouble = [line for line in following.err if "trying again" in line]
    assert 1 <= len(trouble) <= 2, following.err  # once for each server that left, not for each attempt


def test_the_pause_between_attempts_grows_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    class Enough(Exception):
        pass

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 7:
            raise Enough

    monkeypatch.setattr(events_client, "sleep_s", sleep)
    told: list[str] = []
    admin = AdminClient(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(Enough):
        next(events_client.follow(admin, after=0, on_break=told.append))
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    assert told == ["no connection (ConnectError)"]


def test_following_ends_where_waiting_does_not_help(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    other = AdminClient(f"{server.base_url}/nowhere")
    with pytest.raises(Exception, match="has no ghostserve routes"):
        next(events_client.follow(other, after=0, on_break=lambda why: None))
