"""`ghostserve models pull`, as its own process, against servers of the test: interruptions, two at once, a full disk, offline."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from ghostserve.clock import monotonic_s, sleep_s
from model_server import COMMIT, MODEL, ModelServer, serving, tiny_model

pytestmark = [pytest.mark.real, pytest.mark.slow]
SOURCE = Path(__file__).parents[1] / "src"
WEIGHTS = "model.safetensors"
ONE_CHUNK = 8 * 2**20
FULL_AT = 16 * 2**20


@pytest.fixture
def world() -> Iterator[ModelServer]:
    with serving(ModelServer(tiny_model(30_000_001))) as made:
        yield made


class Command:
    """`ghostserve models ...` with a home of its own."""

    def __init__(self, home: Path, world: ModelServer) -> None:
        self.home = home
        hidden = {name for name in os.environ if name.startswith(("HF_", "AWS_", "XDG_"))}
        self.environment = {name: value for name, value in os.environ.items() if name not in hidden}
        self.environment |= {
            "PYTHONPATH": str(SOURCE),
            "XDG_CACHE_HOME": str(home / "cache"),
            "HF_HOME": str(home / "hf"),
            "HF_ENDPOINT": world.endpoint,
            "GHOSTSERVE_RUNTIME_DIR": str(home / "run"),
        }

    def start(self, *words: str, file_bytes_max: int | None = None, **more: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "ghostserve.cli.main", "models", *words]
        if file_bytes_max is not None:
            argv = ["prlimit", f"--fsize={file_bytes_max}", *argv]
        pipe = subprocess.PIPE
        return subprocess.Popen(argv, env=self.environment | more, stdout=pipe, stderr=pipe, text=True)

    def run(
        self, *words: str, file_bytes_max: int | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(*words, file_bytes_max=file_bytes_max, **more)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def partials(self) -> list[Path]:
        return list(self.home.rglob("*.partial"))

    def wait_partial(self, nbytes: int) -> int:
        """Until so much of a file lies on the disk; how much it is."""
        deadline_s = monotonic_s() + 40
        while (length := max(map(length_of, self.partials()), default=-1)) < nbytes:
            assert monotonic_s() < deadline_s, "nothing arrives"
            sleep_s(0.02)
        return length


def length_of(path: Path) -> int:
    """-1 for what has just got its name."""
    return path.stat().st_size if path.exists() else -1


@pytest.fixture
def command(tmp_path: Path, world: ModelServer) -> Command:
    return Command(tmp_path, world)


def source(kind: str, world: ModelServer) -> str:
    return world.url if kind == "url" else MODEL


def is_whole(folder: Path, world: ModelServer) -> bool:
    return all((folder / name).read_bytes() == data for name, data in world.files.items())


@pytest.mark.parametrize("kind", ["url", "hub"])
def test_a_pull_prints_the_folder_and_a_second_one_fetches_nothing(
    command: Command, world: ModelServer, kind: str
) -> None:
    done = command.run("pull", source(kind, world))
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert is_whole(folder, world)
    assert command.partials() == []
    sent = world.weights_sent
    again = command.run("pull", source(kind, world), "--json")
    answer = json.loads(again.stdout)
    assert (answer["path"], answer["fetched_bytes"]) == (str(folder), 0)
    assert world.weights_sent == sent
    assert "fetched" not in again.stderr  # and no bar, since nobody looks at a terminal
    assert "\r" not in done.stderr


@pytest.mark.parametrize("kind", ["url", "hub"])
def test_on_a_terminal_a_bar_shows_how_far_it_is(command: Command, world: ModelServer, kind: str) -> None:
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    argv = [sys.executable, "-m", "ghostserve.cli.main", "models", "pull", source(kind, world)]
    process = subprocess.Popen(
        argv, env=command.environment, stdout=subprocess.PIPE, stderr=theirs, text=True
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # as Linux ends a terminal that nobody writes to any more
        while data := os.read(ours, 65536):
            shown += data
    os.close(ours)
    out, _ = process.communicate(timeout=40)
    assert process.returncode == 0
    assert is_whole(Path(out.strip()), world)
    assert b"100%" in shown
    assert shown.count(b"\r") > 1


@pytest.mark.parametrize("kind", ["url", "hub"])
def test_a_pull_that_was_killed_goes_on_where_it_was(command: Command, world: ModelServer, kind: str) -> None:
    world.stall_after = 20_000_000
    killed = command.start("pull", source(kind, world))
    there = command.wait_partial(ONE_CHUNK)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=20)
    there = max(path.stat().st_size for path in command.partials())
    world.stall_after, world.weights_sent = None, 0
    world.go_on.set()
    done = command.run("pull", source(kind, world))
    assert done.returncode == 0, done.stderr
    assert is_whole(Path(done.stdout.strip()), world)
    assert (
        world.weights_sent <= len(world.files[WEIGHTS]) - there + 10 * 2**20
    )  # what stalled then is sent now
    ranges = [asked for method, name, asked in world.asked if method == "GET" and name == WEIGHTS and asked]
    assert any(asked.startswith(f"bytes={there}-") for asked in ranges)


@pytest.mark.parametrize("kind", ["url", "hub"])
def test_a_second_process_waits_and_fetches_nothing(command: Command, world: ModelServer, kind: str) -> None:
    world.stall_after = 20_000_000
    first = command.start("pull", source(kind, world))
    command.wait_partial(ONE_CHUNK)
    second = command.start("pull", source(kind, world), "--json")
    assert second.stderr is not None
    assert "another process is fetching" in second.stderr.readline()
    world.stall_after = None
    world.go_on.set()
    out, err = first.communicate(timeout=40)
    assert first.returncode == 0, err
    answer = json.loads(second.communicate(timeout=40)[0])
    assert second.returncode == 0
    assert (answer["path"], answer["fetched_bytes"]) == (out.strip(), 0)
    assert world.weights_sent == len(world.files[WEIGHTS])


@pytest.mark.parametrize("kind", ["url", "hub"])
def test_a_full_disk_is_an_error_that_names_the_place_and_keeps_what_is_there(
    command: Command, world: ModelServer, kind: str
) -> None:
    full = command.run("pull", source(kind, world), file_bytes_max=FULL_AT)
    assert full.returncode == 1
    assert full.stderr.count("ghostserve: error: ") == 1
    assert str(command.home) in full.stderr
    assert "make room" in full.stderr
    assert "Traceback" not in full.stderr
    (partial,) = command.partials()
    assert partial.stat().st_size == FULL_AT
    assert command.run("pull", source(kind, world), HF_HUB_OFFLINE="1").returncode == 2
    done = command.run("pull", source(kind, world))
    assert done.returncode == 0, done.stderr
    assert is_whole(Path(done.stdout.strip()), world)


@pytest.mark.parametrize("kind", ["url", "hub"])
def test_offline_takes_what_is_there_and_says_what_to_do_otherwise(
    command: Command, world: ModelServer, kind: str
) -> None:
    refused = command.run("pull", source(kind, world), HF_HUB_OFFLINE="1")
    assert refused.returncode == 2
    assert f"ghostserve models pull {source(kind, world)}" in refused.stderr
    assert "HF_HUB_OFFLINE" in refused.stderr
    assert world.asked == []
    folder = command.run("pull", source(kind, world)).stdout
    world.asked.clear()
    offline = command.run("pull", source(kind, world), HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout) == (0, folder)
    assert world.asked == []


def test_a_hub_that_stumbles_is_asked_again_and_wrong_bytes_are_fetched_again(
    command: Command, world: ModelServer
) -> None:
    world.errors, world.cuts, world.corrupt = 1, 1, 1
    done = command.run("pull", MODEL)
    assert done.returncode == 0, done.stderr
    assert (world.errors, world.cuts, world.corrupt) == (0, 0, 0)
    assert is_whole(Path(done.stdout.strip()), world)
    world.files[WEIGHTS] += b"x"  # another version
    world.corrupt = 1000
    refused = command.run("pull", MODEL)
    assert refused.returncode == 1
    assert "SHA-256" in refused.stderr
    assert command.partials() == []


def test_ctrl_c_ends_it_soon_and_keeps_what_is_there(command: Command, world: ModelServer) -> None:
    world.stall_after = 20_000_000
    process = command.start("pull", world.url)
    command.wait_partial(ONE_CHUNK)
    process.send_signal(signal.SIGINT)
    world.go_on.set()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.strip().endswith("ghostserve: interrupted")
    assert len(command.partials()) == 1


def test_a_model_of_the_hub_lies_where_serve_looks_for_it(command: Command, world: ModelServer) -> None:
    folder = Path(command.run("pull", MODEL, "--revision", "main").stdout.strip())
    assert folder == command.home / "hf/hub/models--ghost--tiny/snapshots" / COMMIT
    elsewhere = command.home / "elsewhere"
    done = command.run("pull", MODEL, "--download-dir", str(elsewhere))
    assert done.stdout.strip() == str(elsewhere / "models--ghost--tiny/snapshots" / COMMIT)
    code = (
        "import sys; from huggingface_hub import snapshot_download as get; "
        "print(get(sys.argv[1], allow_patterns='*.safetensors', cache_dir=sys.argv[2], local_files_only=True)); "
        "print(get(sys.argv[1], allow_patterns='*.json', local_files_only=True))"
    )
    argv = [sys.executable, "-c", code, MODEL, str(elsewhere)]
    found = subprocess.run(argv, env=command.environment, capture_output=True, text=True, timeout=60)
    assert found.stdout.split() == [done.stdout.strip(), str(folder)], found.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ghost/none"], "there is no such model"),
        (["{other}"], "neither a config.json nor weights"),
        (["{url}", "--revision", "main"], "--revision main"),
        (["http://user:word@127.0.0.1/x"], "credentials come from the environment"),
        (["http://127.0.0.1:9/x"], "http://127.0.0.1:9/x"),
        (["/no/such/folder/here"], "neither a folder nor a Hugging Face id"),
    ],
)
def test_what_cannot_be_had_is_one_line(
    command: Command, world: ModelServer, words: list[str], said: str
) -> None:
    done = command.run(
        "pull", *(word.format(url=world.url, other=world.endpoint + "/none") for word in words)
    )
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
