"""Reading weights while the disk, the file system or somebody else misbehaves: real processes, real files.

What goes wrong in a read is put there by a library that is preloaded into the reader (tests/native/faulty_reads.c); each
fault has its control, the same read without it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from external import not_run
from ghostserve.weights.checksums import CELL_BYTES
from ghostserve.weights.ranges import ALIGN_BYTES
from weights_kit import flip_byte, open_files, write_bytes_file

pytestmark = pytest.mark.long

TESTS = Path(__file__).parent
CHUNK = 64 << 10
NBYTES = 20 * CHUNK + 777
SMALL = {"chunk_bytes": CHUNK, "depth": 2}


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cc = shutil.which("gcc") or shutil.which("cc") or not_run("there is no C compiler for the faults")
    library = tmp_path_factory.mktemp("faults") / "faulty_reads.so"
    source = TESTS / "native" / "faulty_reads.c"
    words = [cc, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library), str(source), "-ldl"]
    subprocess.run(words, check=True, timeout=120)
    return library


@pytest.fixture
def file(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    path = tmp_path / "model.safetensors"
    yield path, hashlib.sha256(write_bytes_file(path, NBYTES)).hexdigest()
    path.unlink(missing_ok=True)


def start(path: Path, library: Path | None, fault: str, **order: Any) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "FAULTY_READS": fault}
    if library is not None:
        env["LD_PRELOAD"] = str(library)
    words = [sys.executable, str(TESTS / "weights_child.py"), str(path), json.dumps({**SMALL, **order})]
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(child: subprocess.Popen[str]) -> dict[str, Any]:
    """Its last words; that it comes to an end is part of every test."""
    try:
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 0, err
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    return answer


def read(path: Path, library: Path | None, fault: str, **order: Any) -> dict[str, Any]:
    return finish(start(path, library, fault, **order))


# ---- a failing disk --------------------------------------------------------------------------------------------------

AT = 10 * CHUNK + 5
ERRORS = {  # fault, whether past the page cache, what is said
    "EIO": (f"errno:{AT}:{errno.EIO}", True, "Input/output error at byte 655360; the disk or its connection is failing"),
    "EIO, buffered": (f"errno:{AT}:{errno.EIO}", False, "Input/output error at byte 655360"),
    "EIO in the tail": (f"errno:{NBYTES - 1}:{errno.EIO}", True, f"Input/output error at byte {NBYTES - NBYTES % ALIGN_BYTES}"),
    "EIO in the header": (f"errno:3:{errno.EIO}", True, "Input/output error at byte 0"),
    "ESTALE": (f"errno:{AT}:{errno.ESTALE}", False, "replaced on its server: start again"),
    "EACCES": (f"errno:{AT}:{errno.EACCES}", True, "permissions"),
    "ENOMEM": (f"errno:{AT}:{errno.ENOMEM}", True, "at byte 655360; check the disk or file system"),
    "an end that is none": (f"end:{AT}:0", True, "no more bytes at byte "),
    "an end that is none, buffered": (f"end:{AT}:0", False, "no more bytes at byte "),
    "hang": (f"hang:{AT}:0", True, "nothing was read for 1 s, from byte 655360 on"),
    "hang in the header": ("hang:3:0", True, "did not answer for 1 s"),
    "hang in opening": ("open:0:0", True, "did not answer for 1 s"),
}  # fmt: skip


@pytest.mark.parametrize(("fault", "direct", "words"), ERRORS.values(), ids=ERRORS.keys())
def test_a_read_error_names_file_place_and_remedy(
    file: tuple[Path, str], faults: Path, fault: str, direct: bool, words: str
) -> None:
    stall_s = 1.0 if fault.startswith(("hang", "open")) else 30.0
    answer = read(file[0], faults, f"model.safetensors:{fault}", direct=direct, stall_s=stall_s)
    assert answer["error"] == "WeightsReadError"
    assert words in answer["message"]
    assert str(file[0]) in answer["message"]
    assert answer["took_s"] < 20


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_faults_of_another_file_change_nothing(file: tuple[Path, str], faults: Path, direct: bool) -> None:
    """The control: all of them at once, for a file that is not read."""
    every = ";".join(f"another.safetensors:{fault}" for fault, *_ in ERRORS.values())
    assert read(file[0], faults, every, direct=direct)["sha256"] == file[1]


@pytest.mark.parametrize(
    "fault",
    [
        "short:0:4096",
        "short:0:5000",  # not a multiple of anything
        "short:0:100",  # below a block: what a direct read cannot go on from
        "direct:0:0",
        f"direct:{9 * CHUNK}:0",  # refused in the middle
        "slow:0:5",
    ],
)
def test_what_is_only_odd_is_read_exactly(file: tuple[Path, str], faults: Path, fault: str) -> None:
    path, digest = file
    size = {"chunk_bytes": 4 * CHUNK} if "slow" in fault else {}
    answer = read(path, faults, f"model.safetensors:{fault}", direct=True, **size)
    assert answer["sha256"] == digest
    direct = NBYTES - NBYTES % ALIGN_BYTES
    refused = {"short:0:100", "direct:0:0", f"direct:{9 * CHUNK}:0"}
    assert (answer["direct"] < direct) is (fault in refused)  # the fault did strike, and where


def test_slow_is_not_stuck(file: tuple[Path, str], faults: Path) -> None:
    """It takes longer than the bound altogether, but something moves all the time."""
    path, digest = file
    answer = read(path, faults, "model.safetensors:slow:0:100", stall_s=1.0, depth=1)
    assert answer["sha256"] == digest


# ---- somebody writes to it -------------------------------------------------------------------------------------------


def append(path: Path) -> None:
    with path.open("ab") as opened:
        opened.write(b"more")


def overwrite(path: Path) -> None:
    with path.open("r+b") as opened:
        opened.seek(NBYTES - 5)
        opened.write(b"xxxxx")


CHANGES: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "truncated": (lambda path: os.truncate(path, 15 * CHUNK), f"has {15 * CHUNK} bytes now, and had {NBYTES}"),
    "emptied": (lambda path: os.truncate(path, 0), f"has 0 bytes now, and had {NBYTES}"),
    "growing": (append, f"has {NBYTES + 4} bytes now, and had {NBYTES}"),
    "rewritten": (overwrite, "was written to since"),
    "replaced": (lambda path: os.replace(shutil.copy(path, f"{path}.new"), path), None),
    "removed": (lambda path: path.unlink(), None),
    "control": (lambda path: None, None),
}  # fmt: skip


@pytest.mark.parametrize(
    ("direct", "name"), [*((True, name) for name in CHANGES), (False, "truncated"), (False, "emptied")]
)
def test_a_file_that_changes_while_it_is_read(
    file: tuple[Path, str], faults: Path, name: str, direct: bool
) -> None:
    path, digest = file
    change, words = CHANGES[name]
    child = start(path, faults, "model.safetensors:slow:0:100", direct=direct)
    assert child.stdout is not None
    assert child.stdout.readline().startswith("ready ")
    change(path)
    answer = finish(child)
    if words is None:  # what is open stays what it was
        assert answer["sha256"] == digest
    else:
        assert answer["error"] == "WeightsChangedError"
        assert words in answer["message"]
        assert "wait until the download or copy has ended" in answer["message"]


# ---- a reader is killed ----------------------------------------------------------------------------------------------


def test_a_reader_that_is_killed_leaves_nothing_behind(tmp_path: Path, faults: Path) -> None:
    """It hangs in its third cell meanwhile, so that it cannot be done before."""
    path = tmp_path / "model.safetensors"
    digest = hashlib.sha256(write_bytes_file(path, 3 * CELL_BYTES)).hexdigest()
    child = start(path, faults, f"model.safetensors:hang:{2 * CELL_BYTES + 5}:0", checked=True)
    assert child.stdout is not None
    assert child.stdout.readline().startswith("ready ")
    used = Path(f"/proc/{child.pid}/maps").read_text(), *(name for _, name in open_files(child.pid))
    assert not any("/dev/shm/" in place for place in used)  # memory with a name would stay
    child.send_signal(signal.SIGKILL)
    assert child.wait(30) == -signal.SIGKILL
    child.communicate()
    assert not (path.parent / "sums").exists()  # half a file has no checksums
    assert read(path, None, "", checked=True)["sha256"] == digest
    assert len(list((path.parent / "sums").glob("*.json"))) == 1


def test_readers_that_are_killed_while_they_save_leave_whole_files(tmp_path: Path) -> None:
    write_bytes_file(tmp_path / "model.safetensors", 5 << 20)
    program = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[2:]\n"
        "from ghostserve.weights.checksum_file import ChecksumFile\n"
        "from ghostserve.weights.model_files import open_model\n"
        "book = ChecksumFile(open_model(Path(sys.argv[1])), folder=Path(sys.argv[1]) / 'sums')\n"
        "print('ready', flush=True)\n"
        "while True: book.save()\n"
    )
    for delay_s in (0.0, 0.011, 0.023):
        words = [sys.executable, "-c", program, str(tmp_path), *sys.path]
        child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        killer = threading.Timer(delay_s, child.kill)
        killer.start()
        child.wait(30)
        child.communicate()
        killer.join()
        for kept in (tmp_path / "sums").glob("*.json"):
            assert json.loads(kept.read_text())["format"] == 1
    answer = read(tmp_path / "model.safetensors", None, "", checked=True)  # and nobody holds the lock
    assert "sha256" in answer


# ---- wrong bytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("direct", "offset"),
    [(True, 300), (False, 6 << 20), (True, (9 << 20) - 1)],
    ids=["first", "middle", "last"],
)
def test_a_flipped_byte_is_refused(tmp_path: Path, offset: int, direct: bool) -> None:
    path = tmp_path / "model.safetensors"
    digest = hashlib.sha256(write_bytes_file(path, 9 << 20)).hexdigest()
    order = {"chunk_bytes": 4 << 20, "direct": direct}
    assert read(path, None, "", checked=True, **order)["sha256"] == digest  # makes the checksums
    assert read(path, None, "", checked=True, **order)["sha256"] == digest  # control: nothing flipped
    flip_byte(path, offset)
    answer = read(path, None, "", checked=True, **order)
    assert answer["error"] == "WeightsChecksumError"
    cell = offset // (4 << 20) * (4 << 20)
    assert f"{path}: bytes {cell} to {min(cell + (4 << 20), 9 << 20)} are not" in answer["message"]
    assert "download the model again" in answer["message"]
    blind = read(path, None, "", checked=False, **order)
    assert blind["sha256"] != digest  # control: without checksums the wrong bytes come in
