"""One kill in the middle of a stream, as the event log, the stories, the file, the spans and the response tell it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.events.file import read_files
from ghostserve.types import Phase
from otlp_collector import Collector
from real import kit
from real.kit import PROMPTS

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BODY = {"model": "tiny", "prompt": PROMPTS["json-dump"], "max_tokens": 160, "temperature": 0.0}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def log_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("events") / "events.jsonl"


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, collector: Collector, log_file: Path
) -> Iterator[kit.Served]:
    served = kit.serve(
        tmp_path_factory.mktemp("server"), "events", "--dtype", "float32", "--enforce-eager",
        "--chat-template", "{% for message in messages %}{{ message.content }}{% endfor %}",
        "--enable-per-request-metrics", "--event-log", str(log_file), "--otlp-traces-endpoint", collector.url,
        env={"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_BSP_SCHEDULE_DELAY": "200"},
    )  # fmt: skip
    try:
        yield served
    finally:
        served.server.stop()


def post(served: kit.Served, *, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    """A whole answer."""
    with httpx.Client(timeout=60, trust_env=False) as http:
        answer = http.post(served.server.base_url + path, json={**BODY, **body})
        answer.raise_for_status()
        doc: dict[str, Any] = answer.json()
        return doc


def stream(served: kit.Served, *, path: str = "/v1/completions", **more: Any) -> list[dict[str, Any]]:
    """The chunks of a stream with the metrics in its last one."""
    body = {**BODY, **more, "stream": True, "stream_options": {"include_usage": True}}
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
    with (
        httpx.Client(timeout=60, trust_env=False) as http,
        http.stream("POST", served.server.base_url + path, json=body, headers=headers) as answer,
    ):
        return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]


def tell(served: kit.Served, *arguments: str) -> str:
    """What the command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "ghostserve.cli.main", *arguments, "--url", served.server.base_url],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def kinds_in(story: str) -> list[str]:
    return [event["kind"] for event in json.loads(story)["events"]]


@pytest.fixture(scope="module")
def killed(served: kit.Served) -> tuple[str, list[dict[str, Any]]]:
    """(id, chunks) of a stream in which rank 1 was killed."""
    before = served.recoveries()
    served.kill_after(40, 1)
    chunks = stream(served)
    assert served.recovery(after=before)["ok"]
    return chunks[0]["id"], chunks


def test_an_undisturbed_answer_says_that_nothing_was_recovered(served: kit.Served) -> None:
    """In the stream and in the whole answer, beside vLLM's own numbers. Runs before the kill."""
    assert served.recoveries() == 0
    for metrics in (stream(served)[-1]["metrics"], post(served, max_tokens=20)["metrics"]):
        assert (metrics["recoveries"], metrics["recovery_time_ms"]) == (0, 0)
        assert metrics["time_to_first_token_ms"] > 0
    answer = post(served, max_tokens=1, n=2, temperature=0.5)
    assert answer["metrics"] is None  # vLLM gives none to several answers


def test_the_response_says_what_it_waited_for(
    served: kit.Served, killed: tuple[str, list[dict[str, Any]]]
) -> None:
    _, chunks = killed
    metrics = chunks[-1]["metrics"]
    report = served.server.status()["last_recovery"]
    assert metrics["recoveries"] == 1
    assert metrics["recovery_time_ms"] == pytest.approx(report["total_ms"], abs=0.01)
    assert metrics["generation_time_ms"] > metrics["recovery_time_ms"]
    assert not any("metrics" in chunk for chunk in chunks[:-1])


def test_the_story_of_the_request(served: kit.Served, killed: tuple[str, list[dict[str, Any]]]) -> None:
    name, _ = killed
    found = kinds_in(tell(served, "story", name, "--json"))
    assert (found[0], found[-1]) == ("request_admitted", "request_finished")
    order = ["rank_lost", "rank_fenced", "epoch_raised", "rank_taken", "request_resumed", "recovery_ended"]
    assert [kind for kind in found if kind in order] == order
    lines = tell(served, "story", name).splitlines()
    assert lines[0].startswith(f"request {name}-0-")
    assert lines[1].split()[0] == "+0.000"
    assert "is lost (crash)" in "\n".join(lines)
    assert "recovered by rebuild in" in "\n".join(lines)
    assert "finished (length) after 160 tokens" in lines[-1]


def test_the_story_of_the_rank(served: kit.Served, killed: tuple[str, list[dict[str, Any]]]) -> None:
    story = json.loads(tell(served, "story", "rank", "1", "--json"))
    phases = [event for event in story["events"] if event["kind"] == "phase_ended"]
    assert [event["data"]["phase"] for event in phases] == [phase.value for phase in Phase]
    (ended,) = [event for event in story["events"] if event["kind"] == "recovery_ended"]
    spent_ms = sum(event["data"]["ms"] for event in phases)
    assert spent_ms == pytest.approx(ended["data"]["total_ms"], abs=0.1)
    begun = [event["data"]["phase"] for event in story["events"] if event["kind"] == "phase_begun"]
    assert sorted(begun) == sorted(phase.value for phase in Phase)
    pids = {event["kind"]: event["data"]["pid"] for event in story["events"] if "pid" in event["data"]}
    assert pids["rank_lost"] == pids["rank_fenced"] != pids["rank_taken"]
    assert pids["rank_taken"] == served.server.status()["ranks"][1]["pid"]


def test_the_fault_and_the_server_are_told(
    served: kit.Served, killed: tuple[str, list[dict[str, Any]]]
) -> None:
    lines = [json.loads(line) for line in tell(served, "events", "--json").splitlines()]
    found = [line["kind"] for line in lines]
    assert found[0] == "server_started"
    assert found.index("server_serving") < found.index("fault_injected") < found.index("recovery_ended")
    first = lines[0]["seq"]
    assert [line["seq"] for line in lines] == list(range(first, first + len(lines)))
    assert served.server.status()["counters"]["events_lost_total"] == 0


def test_spans_reach_a_collector(
    served: kit.Served, collector: Collector, killed: tuple[str, list[dict[str, Any]]]
) -> None:
    collector.wait_for("ghostserve.recovery", timeout_s=20)
    (recovery,) = collector.named("ghostserve.recovery")
    children = [span for span in collector.spans if span.parent_span_id == recovery.span_id]
    assert {span.name for span in children} == {f"ghostserve.recovery.{phase.value}" for phase in Phase}
    (link,) = recovery.links
    assert link.trace_id.hex() == TRACE_ID
    (paused,) = collector.named("ghostserve.request.paused")
    assert paused.trace_id.hex() == TRACE_ID
    assert paused.parent_span_id.hex() == PARENT_ID
    total_ms = served.server.status()["last_recovery"]["total_ms"]
    assert (recovery.end_time_unix_nano - recovery.start_time_unix_nano) / 1e6 == pytest.approx(
        total_ms, abs=1
    )


def test_a_chat_says_so_too(served: kit.Served, killed: tuple[str, list[dict[str, Any]]]) -> None:
    """A stream and a whole answer that wait for the same recovery, and one that waits for none."""
    message = {"role": "user", "content": PROMPTS["json-dump"]}
    chat = {"path": "/v1/chat/completions", "messages": [message], "ignore_eos": True}
    before = served.recoveries()
    served.post("/pause?mode=keep&clear_cache=false")
    served.kill_after(40, 1)
    with ThreadPoolExecutor(2) as pool:
        streamed = pool.submit(stream, served, max_tokens=200, **chat)
        whole = pool.submit(post, served, max_tokens=200, **chat)
        served.wait_for_open(2)
        served.post("/resume")
        chunks, answer = streamed.result(60), whole.result(60)
    report = served.recovery(after=before)
    assert answer["usage"]["completion_tokens"] == 200
    for name, metrics in (("stream", chunks[-1]["metrics"]), ("whole", answer["metrics"])):
        assert metrics["recoveries"] == 1, name
        assert metrics["recovery_time_ms"] == pytest.approx(report["total_ms"], abs=0.01)
    for metrics in (
        stream(served, max_tokens=5, **chat)[-1]["metrics"],
        post(served, max_tokens=5, **chat)["metrics"],
    ):
        assert (metrics["recoveries"], metrics["recovery_time_ms"]) == (0, 0)
    found = kinds_in(tell(served, "story", answer["id"], "--json"))
    assert {"request_admitted", "request_resumed", "request_finished"} <= set(found)
    counted = served.server.status()["counters"]["requests_resumed_total"]
    told = [
        json.loads(line)
        for line in tell(served, "events", "--kind", "request_resumed", "--json").splitlines()
    ]
    assert counted == len(told) == 3, "the metric counts what is told"


def test_since_when_kv_is_unprotected(served: kit.Served) -> None:
    """Here, where no earlier test has had memory run out: it is told once a minute at most."""
    told = tell(served, "events", "--json")
    assert "kv_unprotected" not in told, "negative control"
    served.server.admin.inflict("memory_exhausted", steps=0)
    try:
        post(served, max_tokens=80)
        deadline_s = monotonic_s() + 20
        while "kv_unprotected" not in (told := tell(served, "events", "--json")):
            assert monotonic_s() < deadline_s, told
    finally:
        served.server.admin.disarm_faults()
    (event,) = (json.loads(line) for line in told.splitlines() if "kv_unprotected" in line)
    assert event["data"]["blocks"] > 0
    assert event["data"]["reason"] == "--host-memory is full"


def test_the_file_has_it_all_and_a_stream_ends_with_the_server(
    served: kit.Served, log_file: Path, killed: tuple[str, list[dict[str, Any]]]
) -> None:
    """Last: it stops the server, with a client that follows the events."""
    follow = subprocess.Popen(
        [sys.executable, "-m", "ghostserve.cli.main", "events", "--follow", "--json", "--url", served.server.base_url],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert follow.stdout is not None
        assert json.loads(follow.stdout.readline())["kind"] == "server_started"
        for line in follow.stdout:
            if json.loads(line)["kind"] == "recovery_ended":
                break
        deadline_s = monotonic_s() + 10
        began_s = monotonic_s()
        assert served.server.terminate(timeout_s=30) == 0
        took_s = monotonic_s() - began_s
        assert took_s < 15, took_s
    finally:
        follow.kill()
        follow.communicate()
    while monotonic_s() < deadline_s and not log_file.exists():
        sleep_s(0.1)
    told = [record.event.kind for record in read_files(log_file)]
    assert told[0] == "server_started"
    assert told[-2:] == ["server_draining", "server_stopped"]
    name, _ = killed
    story = subprocess.run(
        [sys.executable, "-m", "ghostserve.cli.main", "story", name, "--file", str(log_file), "--json"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert story.returncode == 0, story.stderr
    assert {"request_admitted", "recovery_ended", "request_finished"} <= set(kinds_in(story.stdout))
