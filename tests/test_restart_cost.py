"""What a restart costs: when it is refused, what it says meanwhile, what stays. The real start is in tests/real/test_page.py."""

from __future__ import annotations

import os
import threading
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from ghostserve.cli import doctor, restart_cost
from ghostserve.cli.restart_cost import SecondServer, lack_of_memory, memory_of_this_server, obstacle
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.testing.fake_engine import FakeEngine
from ghostserve.testing.fake_server import build_app
from ghostserve.web.injection import NotNow


@pytest.fixture
def second() -> SecondServer:
    return SecondServer(["model"], {}, api_key=None, obstacle=None)


def settled(second: SecondServer) -> dict[str, Any]:
    deadline_s = monotonic_s() + 10
    while (found := second.describe())["state"] == "running":
        assert monotonic_s() < deadline_s
        sleep_s(0.01)
    return found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (Namespace(uds=None, ssl_certfile=None), None),
        (Namespace(uds="/run/x", ssl_certfile=None), "Unix socket"),
        (Namespace(uds=None, ssl_certfile="cert.pem"), "TLS"),
    ],
)
def test_which_servers_are_not_started_twice(arguments: Namespace, said: str | None) -> None:
    found = obstacle(arguments)
    assert found is None if said is None else said in str(found)


def test_its_events_go_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file belongs to this server; what the other one is started with is read as that will read it."""
    commands: list[list[str]] = []

    def started(command: list[str], **_more: Any) -> None:
        commands.append(command)
        raise OSError("seen")

    monkeypatch.setattr(restart_cost, "ServerProcess", started)
    monkeypatch.setenv("GHOSTSERVE_RUN_DIRECTORY", str(tmp_path))
    file = tmp_path / "config.yaml"
    file.write_text(f"event-log: {tmp_path / 'events.jsonl'}")
    for argv in (["m", "--event-log", str(tmp_path / "events.jsonl")], ["m", "--config", str(file)]):
        second = SecondServer(argv, {}, api_key=None, obstacle=None)
        second.start()
        assert "seen" in settled(second)["reason"]
        subject, _, _ = doctor.parse(commands.pop()[4:])
        assert subject.config.event_log == os.devnull


def test_a_second_server_must_fit() -> None:
    assert lack_of_memory(needed_bytes=1 << 30, available_bytes=2 << 30) is None
    assert lack_of_memory(needed_bytes=1 << 30, available_bytes=1 << 30) == (
        "a second server needs about 1024 MiB of memory, and 1024 MiB are available"
    )
    assert memory_of_this_server() > 1 << 20


def test_the_result_stays(second: SecondServer, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def start_and_ask(_self: SecondServer) -> float:
        assert release.wait(10)
        return 12.3456

    monkeypatch.setattr(SecondServer, "_start_and_ask", start_and_ask)
    assert second.describe() == {
        "state": "none",
        "elapsed_s": 0.0,
        "seconds": None,
        "reason": "not measured",
    }
    second.start()
    assert second.describe()["state"] == "running"
    with pytest.raises(NotNow, match="already"):
        second.start()
    release.set()
    assert settled(second) == {"state": "done", "elapsed_s": 0.0, "seconds": 12.346, "reason": ""}


def test_a_failure_is_the_result_and_not_more(
    second: SecondServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_self: SecondServer) -> float:
        raise OSError("no more processes\nwith a log behind it")

    monkeypatch.setattr(SecondServer, "_start_and_ask", broken)
    second.start()
    assert settled(second)["reason"] == "not measured: no more processes"
    assert "could not be measured" in caplog.text


def test_an_obstacle_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    second = SecondServer(["model"], {}, api_key=None, obstacle="a server with TLS is not started twice")
    second.start()
    assert settled(second)["reason"] == "not measured: a server with TLS is not started twice"
    monkeypatch.setattr(restart_cost, "MEMORY_SPARE", 1e9)
    second = SecondServer(["model"], {}, api_key=None, obstacle=None)
    second.start()
    assert "MiB are available" in settled(second)["reason"]


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.close()


@pytest.mark.parametrize(("fault_injection", "status"), [(True, 202), (False, 403)])
def test_the_route_goes_with_fault_injection(engine: FakeEngine, fault_injection: bool, status: int) -> None:
    app = build_app(engine, fault_injection=fault_injection)
    client = TestClient(app, base_url="http://127.0.0.1:8000", client=("127.0.0.1", 50000))
    assert client.post("/ghostserve/measure-restart", json={}).status_code == status
    shown = client.get("/ghostserve/status").json().get("restart", {}).get("state")
    assert shown == ("running" if fault_injection else None)
