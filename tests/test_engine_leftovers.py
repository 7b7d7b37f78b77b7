"""Whether a server's front process is gone: only if the kernel says so."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ghostserve.engine import leftovers
from ghostserve.engine.leftovers import RUN_DIRECTORY_ENV, Leftovers
from ghostserve.engine.process import start_time


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run directory of this process, as a server of its own would have it."""
    made = tmp_path / f"ghostserve-{os.getpid()}-{leftovers._start_time(os.getpid())}"
    made.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv(RUN_DIRECTORY_ENV, str(made))
    return made


def no_descriptors(self: Path, *_: object, **__: object) -> str:
    raise OSError(errno.EMFILE, "Too many open files")


def test_out_of_descriptors_nobody_is_gone(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine core that believed it would end a server that is well; a sweep would take its directory away."""
    engine = Leftovers()
    assert not engine.server_gone()
    with monkeypatch.context() as broken:
        broken.setattr(Path, "read_text", no_descriptors)
        assert not engine.server_gone()
        leftovers.sweep()
    assert directory.is_dir()


def test_a_server_in_another_container_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pid names nobody here, or somebody else; what tells that it runs is its lock, and that ends with it."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    program = (
        "import time; from ghostserve.engine import leftovers; "
        "leftovers._start_time = lambda pid: '1'; "  # as seen from a namespace of its own
        "print(leftovers.make_run_directory(), flush=True); time.sleep(60)"
    )
    server = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        made = Path(server.stdout.readline().strip())
        assert leftovers._owner_gone(made), "negative control: by its pid it has ended"
        leftovers.sweep()
        assert made.is_dir()
        assert [found.name for found in tmp_path.iterdir()] == [made.name]
    finally:
        server.kill()
        server.wait()
    leftovers.sweep()
    assert not made.exists()


def test_who_is_stopped_is_ended_with_the_server() -> None:
    """Its engine core is gone, and it cannot notice; somebody else who has its number by now is left in peace."""
    workers = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
    stopped, standby, other = workers
    stopped.send_signal(signal.SIGSTOP)
    entries = [{"pid": worker.pid, "start_time": start_time(worker.pid)} for worker in workers]
    entries[2]["start_time"] = 1
    try:
        leftovers.end_processes({"ranks": [entries[0], entries[2]], "standbys": [entries[1]]})
        leftovers.end_processes(None)
        assert stopped.wait(10) == standby.wait(10) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def test_one_that_has_ended_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(["sleep", "60"])
    made = tmp_path / f"ghostserve-{process.pid}-{leftovers._start_time(process.pid)}"
    made.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv(RUN_DIRECTORY_ENV, str(made))
    assert not Leftovers().server_gone()
    process.kill()
    process.wait()
    assert Leftovers().server_gone()
    leftovers.sweep()
    assert not made.exists()
