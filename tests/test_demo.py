"""The demo from end to end against the stand-in server: what it prints, its exit codes, that it cleans up."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ghostserve.cli import demo, demo_run
from ghostserve.cli import main as cli
from ghostserve.testing.server import ServerProcess

pytestmark = pytest.mark.real
SHORT = ["--max-tokens", "150"]
Fake = Callable[..., None]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Have the demo start the stand-in, with these flags, instead of the real server."""

    def use(*flags: str, command: list[str] | None = None) -> None:
        stand_in = [
            sys.executable,
            "-m",
            "ghostserve.testing.fake_server",
            "--token-s",
            "0.003",
            "--outage-s",
            "0.3",
        ]

        def instead(_model: object, *demo_flags: str) -> list[str]:
            return command or [*stand_in, *flags, *demo_flags]

        monkeypatch.setattr(demo, "ghostserve_command", instead)

    use()
    return use


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ServerProcess]:
    """Every server that the demo starts."""
    servers: list[ServerProcess] = []
    make = demo.demo_server

    def remember(*args: Any) -> ServerProcess:
        servers.append(make(*args))
        return servers[-1]

    monkeypatch.setattr(demo, "demo_server", remember)
    return servers


def temporary_files() -> set[str]:
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("ghostserve-demo-")}


@pytest.mark.usefixtures("fake")
def test_one_json_object_on_one_line(
    capsys: pytest.CaptureFixture[str], started: list[ServerProcess]
) -> None:
    before = temporary_files()
    assert cli.main(["demo", "--json", "--rank", "0", "--at-token", "90", *SHORT]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    report = json.loads(captured.out)
    assert report["identical"] is True
    assert report["recovery_path"] == "rebuild"
    assert report["killed_rank"] == 0
    assert 90 <= report["killed_at_token"] < 150
    assert report["tokens_total"] == 150
    assert 300 <= report["outage_ms"] < 5000
    assert "recovered in" in captured.err
    (server,) = started
    assert not server.leaks().processes
    assert len(server.processes) >= 4  # the front, its workers and the replacement were seen, and are gone
    assert temporary_files() == before


@pytest.mark.usefixtures("fake")
def test_the_live_view(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    log = tmp_path / "logs" / "server.log"
    assert cli.main(["demo", "--log-file", str(log), *SHORT]) == 0
    out = capsys.readouterr().out
    assert "ready after" in out
    assert "✗ SIGKILL to rank 1" in out
    assert "0 lost · 0 duplicated · identical ✓" in out
    assert "detect" in out
    assert "nothing recomputed" in out
    assert "return" in out  # the streamed text
    assert log.exists()


@pytest.mark.usefixtures("fake")
def test_the_negative_control_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--json", "--no-restore", *SHORT]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["identical"] is False
    assert report["tokens_changed"] > 0
    assert "check failed: the answer differs" in captured.err


def test_a_start_that_fails_exits_3(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake(command=[sys.executable, "-c", "import sys; sys.exit('no such model')"])
    assert cli.main(["demo", *SHORT]) == 3
    assert "no such model" in capsys.readouterr().err


def test_an_engine_that_is_lost_exits_4(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake("--exit-code-at-loss", "4")
    assert cli.main(["demo", "--json", *SHORT]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "exited with status 4" in captured.err


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_demo_exits_130_and_stops_its_server(
    started: list[ServerProcess], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    interrupt = threading.Timer(0.5, os.kill, (os.getpid(), number))
    run = demo_run.run

    def run_interrupted(*args: Any, **options: Any) -> Any:
        interrupt.start()
        return run(*args, **options)

    monkeypatch.setattr(demo, "run", run_interrupted)
    assert cli.main(["demo", "--json", "--max-tokens", "3000"]) == 130
    assert not started[0].leaks().processes
    assert started[0].exit_code is not None
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.usefixtures("fake")
def test_stay_keeps_the_page_up_until_ctrl_c(
    capsys: pytest.CaptureFixture[str], started: list[ServerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    stay = demo.stay

    def stay_a_moment(server: ServerProcess, view: Any) -> None:
        assert server.status()["state"] == "serving"
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        stay(server, view)

    monkeypatch.setattr(demo, "stay", stay_a_moment)
    assert cli.main(["demo", "--stay", *SHORT]) == 0
    assert f"{started[0].base_url}/ui" in capsys.readouterr().out
    assert not started[0].leaks().processes
