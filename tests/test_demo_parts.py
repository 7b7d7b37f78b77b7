"""The demo's parts without a server: signals, the log file, leftovers, and an end that nobody reads."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from ghostserve.cli import demo, demo_run, demo_scratch, demo_view
from ghostserve.cli import main as cli
from ghostserve.cli.demo_view import View
from ghostserve.cli.signals import signals_like_ctrl_c
from ghostserve.errors import EngineLost, UsageError
from ghostserve.testing.server import ServerProcess


class StandIn:
    """As much of a server as its end takes."""

    def __init__(self, during_stop: Callable[[], None] = lambda: None) -> None:
        self.calls: list[str] = []
        self._during_stop = during_stop

    def stop(self) -> None:
        self.calls.append("stop")
        self._during_stop()

    def kill_tree(self) -> None:
        self.calls.append("kill_tree")

    def poll(self) -> int:
        return 4

    def wait_exit(self, *, timeout_s: float) -> int:
        time.sleep(min(timeout_s, 0.6))
        return 4

    def log_tail(self) -> str:
        return "the log"

    def status(self) -> dict[str, Any]:
        return {"recoveries_total": 0}


class Gone(io.StringIO):
    def write(self, _text: str) -> int:
        raise BrokenPipeError


def end(stand_in: StandIn, out: io.StringIO) -> None:
    demo.stop(cast(ServerProcess, stand_in), View(out, show_text=False, colour=False))


def test_the_server_is_stopped_though_nobody_reads() -> None:
    server = StandIn()
    end(server, Gone())
    assert server.calls[0] == "stop"


def test_a_second_interrupt_kills_the_server() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    server = StandIn(interrupt)
    with pytest.raises(KeyboardInterrupt):
        end(server, io.StringIO())
    assert server.calls == ["stop", "kill_tree"]


def test_a_slow_end_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_view, "SILENCE_MAX_S", 0.1)
    out = io.StringIO()
    end(StandIn(lambda: time.sleep(0.6)), out)
    assert "still stopping the server" in out.getvalue()


def test_a_lost_server_is_not_waited_for_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_view, "SILENCE_MAX_S", 0.1)
    monkeypatch.setattr(demo_run, "stream", lambda *_args, **_options: None)
    out = io.StringIO()
    view = View(out, show_text=False, colour=False)
    with pytest.raises(EngineLost):
        demo_run.run(cast(ServerProcess, StandIn()), view, rank=0, at_token=1, max_tokens=2, restore=True)
    assert "asking the server how it is" in out.getvalue()


def test_a_silence_that_nobody_hears_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_view, "SILENCE_MAX_S", 0.0)
    failed: list[object] = []
    monkeypatch.setattr("threading.excepthook", failed.append)
    with View(Gone(), show_text=False, colour=False).filling_silence(lambda: "x"):
        time.sleep(0.4)
    assert not failed


@pytest.fixture
def handlers_kept() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers_kept")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_unwind_like_ctrl_c(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_DFL)
    with pytest.raises(KeyboardInterrupt), signals_like_ctrl_c():
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.usefixtures("handlers_kept")
def test_a_second_hangup_does_not_cut_the_end_short() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with signals_like_ctrl_c():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)


@pytest.mark.usefixtures("handlers_kept")
def test_nohup_is_respected() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals_like_ctrl_c():
        signal.raise_signal(signal.SIGHUP)


@pytest.mark.parametrize("name", ["", "file/server.log", "file/deeper/server.log"])
def test_a_log_file_that_cannot_be_is_a_usage_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    options = demo.parse(["--log-file", str(tmp_path / name)])
    with pytest.raises(UsageError, match="--log-file"):
        demo.demo_server(options, tmp_path)


def test_a_log_file_that_cannot_be_exits_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["demo", "--log-file", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def gone_pid() -> int:
    """The pid of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_killed_demos_left_is_removed(tmp_path: Path, gone_pid: int) -> None:
    left = tmp_path / f"ghostserve-demo-{gone_pid}-abc_123"
    left.mkdir()
    (left / "server.log").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    kept = [
        tmp_path / f"ghostserve-demo-{os.getpid()}-abc",
        tmp_path / "ghostserve-demo-1-abc",
        tmp_path / "ghostserve-demo-abc",
        tmp_path / "ghostserve-demo-0-abc",
        tmp_path / f"ghostserve-demo-{'9' * 30}-abc",
        elsewhere,
    ]
    for directory in kept[:-1]:
        directory.mkdir()
    link = tmp_path / f"ghostserve-demo-{gone_pid}-link"
    link.symlink_to(elsewhere)
    file = tmp_path / f"ghostserve-demo-{gone_pid}-file"
    file.touch()
    demo_scratch.sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*kept, link, file])
    assert (elsewhere / "kept").exists()


def test_directories_of_others_stay(tmp_path: Path, gone_pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / f"ghostserve-demo-{gone_pid}-abc"
    left.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: left.stat().st_uid + 1)
    demo_scratch.sweep(tmp_path)
    assert left.exists()


def test_the_scratch_directory_names_its_process(
    tmp_path: Path, gone_pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"ghostserve-demo-{gone_pid}-abc").mkdir()
    with demo_scratch.scratch_directory() as directory:
        assert list(tmp_path.iterdir()) == [directory]
        assert demo_scratch._NAME.fullmatch(directory.name)
        assert directory.name.startswith(f"ghostserve-demo-{os.getpid()}-")
    assert not list(tmp_path.iterdir())
