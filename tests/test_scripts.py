"""The helpers around the tests: the watchdog that bounds CI, and the runner that is never silent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import progress

ROOT = Path(__file__).parents[1]

SCRIPTS = Path(__file__).parents[1] / "scripts"


def start_watchdog(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start the watchdog as CI does; both outputs come by `stdout`."""
    argv = [sys.executable, SCRIPTS / "watchdog.py", "--grace-s", "2", *arguments]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def alive(pid: int) -> bool:
    """Whether a process with this id runs."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize(("command", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)])
def test_watchdog_passes_the_exit_status_on(command: str, status: int) -> None:
    watchdog = start_watchdog("--", "bash", "-c", command)
    assert watchdog.communicate(timeout=30) == ("", None)
    assert watchdog.returncode == status


@pytest.mark.real
def test_watchdog_ends_what_runs_too_long_with_everything_below_it(tmp_path: Path) -> None:
    (tmp_path / "server.log").write_text("first\n" * 100 + "the last words\n")
    stubborn = (
        f"setsid bash -c 'trap : INT; echo $$ > {tmp_path}/pid; while :; do sleep 0.1; done' & sleep 600"
    )
    watchdog = start_watchdog("--minutes", "0.02", "--logs", tmp_path / "*.log", "--", "bash", "-c", stubborn)
    output, _ = watchdog.communicate(timeout=120)
    assert watchdog.returncode == 124
    assert "is not done after 0.0 minutes; running now:" in output
    assert "sleep 600" in output
    assert "  | the last words" in output
    assert not alive(int((tmp_path / "pid").read_text()))


@pytest.mark.real
def test_watchdog_kills_and_names_what_was_left_behind(tmp_path: Path) -> None:
    orphan = f"(setsid bash -c 'echo $$ > {tmp_path}/pid; exec sleep 601' &); sleep 0.5"
    watchdog = start_watchdog("--", "bash", "-c", orphan)
    output, _ = watchdog.communicate(timeout=60)
    assert watchdog.returncode == 0
    assert "left behind and killed" in output
    assert "sleep 601" in output
    assert not alive(int((tmp_path / "pid").read_text()))


def test_watchdog_that_is_ended_itself_ends_the_command(tmp_path: Path) -> None:
    watchdog = start_watchdog("--", "bash", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 602")
    end = time.monotonic() + 20
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    watchdog.send_signal(signal.SIGTERM)
    watchdog.communicate(timeout=60)
    assert watchdog.returncode == 143
    assert not alive(int((tmp_path / "pid").read_text()))


def test_progress_speaks_while_the_command_is_silent() -> None:
    seen: list[str] = []
    told: list[str] = []
    script = "import time; print('one'); time.sleep(0.5); print('two', end='')"
    status = progress.run(
        [sys.executable, "-u", "-c", script], label="x", sink=seen.append, tell=told.append, silence_max_s=0.1
    )
    assert status == 0
    assert seen == ["one", "two"]
    assert told
    assert all(line.startswith("  ... x: ") for line in told)


def test_progress_tells_how_far_a_command_is_that_fills_a_log() -> None:
    told: list[str] = []
    script = "import time; print('step 1'); print('WARNING: noise'); time.sleep(0.5)"
    argv = [sys.executable, "-u", "-c", script]
    progress.run(
        argv, label="x", sink=lambda line: None, tell=told.append, sink_is_seen=False, silence_max_s=0.1
    )
    assert told[-1].endswith("s  step 1")


def test_progress_tells_how_the_command_ended() -> None:
    argv = [sys.executable, SCRIPTS / "progress.py", "x"]
    assert subprocess.run([*argv, "bash", "-c", "exit 3"], timeout=20).returncode == 3
    assert subprocess.run([*argv, "bash", "-c", f"kill -{signal.SIGKILL:d} $$"], timeout=20).returncode == 137
    assert subprocess.run(argv, capture_output=True, timeout=20, env=os.environ).returncode == 1


@pytest.mark.parametrize(("taken", "status"), [(95, 0), (94, 1)])
def test_too_few_branches_taken_fail(taken: int, status: int) -> None:
    report = json.dumps({"totals": {"covered_branches": taken, "num_branches": 100}})
    argv = [sys.executable, ROOT / "scripts" / "branches.py", "95"]
    done = subprocess.run(argv, input=report, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (status, f"{taken} of 100 branches were taken: {taken}.0 %\n")
