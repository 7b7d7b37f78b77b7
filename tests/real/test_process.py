"""The server as a process: exit codes, refusals at start, and a loss that cannot be repaired."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ghostserve.cli import main as cli
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.events.file import read_files
from ghostserve.events.kinds import ServerStarted, ServerStopped
from ghostserve.testing.server import ServerProcess
from real import families, kit
from real.kit import TINY, Ask, Hurt

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]


def ghostserve(*arguments: str, timeout_s: float = 100) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "ghostserve.cli.main", *arguments],
        capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--no-such-flag",), "no-such-flag"),
        (("--host-memory", "lots"), "--host-memory: 'lots' is not an amount of memory"),
        (("--scrub-rate", "fast"), "--scrub-rate: 'fast' is not an amount of memory"),
        (("--event-log", "/no/such/folder/events"), "--event-log /no/such/folder/events: No such file"),
        (("--event-log", "x", "--protection", "none"), "--event-log needs --protection parity or replica"),
        (("--parity-shards", "0"), "--parity-shards 0"),
        (("--parity-shards", "255"), "--parity-shards 255"),
        (("--pipeline-parallel-size", "2"), "--pipeline-parallel-size > 1"),
        (("--worker-cls", "some.Worker"), "--worker-cls some.Worker"),
        (("--scheduler-cls", "some.Scheduler"), "--scheduler-cls"),
        (("--distributed-executor-backend", "ray"), "--distributed-executor-backend ray"),
        (("--kv-transfer-config", '{"kv_connector":"X","kv_role":"kv_both"}'), "--kv-transfer-config"),
        (("--data-parallel-size", "2"), "--data-parallel-size > 1"),
    ],
)
def test_refused_flags(flags: tuple[str, ...], says: str, capfd: pytest.CaptureFixture[str]) -> None:
    """At once, with exit status 2 and a sentence that names the value. (In this process: vLLM is imported once.)"""
    assert cli.main(["serve", str(TINY), "--tensor-parallel-size", "2", *flags]) == 2
    assert says in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_what_the_engine_core_refuses() -> None:
    """How much host memory is needed is known once the KV cache has been laid out: what we say last names value and remedy."""
    done = ghostserve(
        "serve", str(TINY), "--tensor-parallel-size", "2", "--enforce-eager", "--max-model-len", "512",
        "--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--kv-cache-memory-bytes", str(4 << 20),
        "--host-memory", "1",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-800:]
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("ghostserve: error: ")]
    assert "--host-memory 1 leaves no room" in said
    assert "give at least" in said


def test_a_refusal_as_a_process() -> None:
    done = ghostserve("serve", str(TINY), "--tensor-parallel-size", "2", "--worker-cls", "some.Worker")
    assert done.returncode == 2, done.stderr[-800:]
    assert "--worker-cls" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no-such.yaml"),
        ("tensor-parallel-size: [", "config"),
        ("pipeline-parallel-size: 2", "pipeline"),
    ],
)
def test_a_bad_configuration_file(
    tmp_path: Path, text: str | None, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / ("no-such.yaml" if text is None else "config.yaml")
    if text is not None:
        file.write_text(text)
    assert cli.main(["serve", str(TINY), f"--config={file}"]) == 2
    assert says in capfd.readouterr().err


@pytest.mark.slow
def test_ctrl_c_while_starting(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        command = kit.ghostserve_command(TINY, "--enforce-eager", "--kv-cache-memory-bytes", "268435456")
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        deadline_s = monotonic_s() + 60
        while "Initializing a V1 LLM engine" not in (tmp_path / "log").read_text():
            assert monotonic_s() < deadline_s, (tmp_path / "log").read_text()[-2000:]
            sleep_s(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(60) == 130, (tmp_path / "log").read_text()[-2000:]


def end_in(event_log: Path) -> ServerStopped:
    """What a server that did not start left in its event log; it has been told of before."""
    first, *_, last = (record.event for record in read_files(event_log))
    assert isinstance(first, ServerStarted)
    assert isinstance(last, ServerStopped)
    return last


def test_a_missing_model(tmp_path: Path) -> None:
    log, uds = tmp_path / "events.jsonl", tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(uds))
    done = ghostserve(
        "serve", "/no/such/model", "--tensor-parallel-size", "2", "--enforce-eager",
        "--event-log", str(log), "--uds", str(uds),
    )  # fmt: skip
    assert done.returncode == 2
    assert "/no/such/model" in done.stderr.splitlines()[-1]
    assert end_in(log).exit_status == 2
    assert "/no/such/model" in end_in(log).reason
    assert not uds.exists(), "what a killed server left was in nobody's way, and nothing is left now"


def test_an_unsupported_model_is_refused(tmp_path: Path) -> None:
    """Mamba state is rewritten by every step: refused before a process is started for it."""
    model = families.build("mamba", tmp_path / "model")
    done = ghostserve("serve", str(model), "--tensor-parallel-size", "2", "--enforce-eager")
    assert done.returncode == 2, done.stderr[-800:]
    assert "Mamba" in done.stderr


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = ghostserve("serve", str(TINY), "--enforce-eager", "--port", port, "--event-log", str(log))
    assert done.returncode == 3, done.stderr[-800:]
    assert port in done.stderr.splitlines()[-1]
    assert end_in(log).exit_status == 3
    assert f"cannot listen on 127.0.0.1:{port}" in end_in(log).reason


def assert_nothing_left(server: ServerProcess) -> None:
    """Of a server that has ended."""
    leaks = server.leaks(settle_s=10)
    assert not leaks.processes
    assert not leaks.shared_memory


def test_a_loss_that_cannot_be_repaired(tmp_path: Path) -> None:
    """The weights are gone when a replacement needs them: clients get an error, the process exits 4, soon."""
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    served = kit.serve(
        tmp_path,
        "unrepairable",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--recovery-attempts",
        "2",
        model=model,
    )
    server = served.server
    try:
        assert ghostserve("status", "--url", server.base_url).returncode == 0
        as_json = ghostserve("status", "--json", "--url", server.base_url)
        assert json.loads(as_json.stdout)["state"] == "serving"

        def ruin() -> None:
            (model / "model.safetensors").unlink()
            killed = ghostserve("kill", "--rank", "1", "--url", server.base_url)
            assert killed.returncode == 0, killed.stderr

        result = served.run(Ask(max_tokens=3900), on_token=Hurt(20, ruin), timeout_s=120)
        assert result.error is not None
        assert server.wait_exit(timeout_s=60) == 4, server.log_tail()
        assert_nothing_left(server)
    finally:
        server.stop()


@pytest.mark.slow
def test_sigterm_in_the_middle_of_a_recovery(tmp_path: Path) -> None:
    """The engine cannot tell its streams any more that it ends; the server does not wait until their clients leave."""
    served = kit.serve(
        tmp_path, "terminated", "--dtype", "float32", "--enforce-eager", "--hang-timeout", "30"
    )
    server = served.server
    try:
        served.arm(point="weights", rank=1, action="hang")
        codes: list[int | None] = []

        def end() -> None:
            served.kill(1)
            server.wait_status(lambda status: status["phase"] == "spawn", timeout_s=10, what="a recovery")
            codes.append(server.terminate(timeout_s=30))

        thread = threading.Thread(target=end)
        result = served.run(Ask(max_tokens=3900), on_token=Hurt(20, thread.start), timeout_s=60)
        thread.join(40)
        assert result.error is not None
        assert codes == [0], server.log_tail()
        assert_nothing_left(server)
    finally:
        server.stop()


@pytest.mark.slow
def test_kernels_are_registered_once() -> None:
    """vLLM's CPU platform looks through every module each time, 0.4 s; a forked replacement has them already."""
    script = """
from vllm.platforms import current_platform
from vllm.triton_utils import dispatcher
current_platform.register_triton_kernel_overrides()
before = dict(dispatcher._registry)
current_platform.register_triton_kernel_overrides()
assert before and all(before[name] is entry for name, entry in dispatcher._registry.items()), type(current_platform)
"""
    for platform, ends in (("1", 0), ("0", 1)):  # negative control: vLLM's own platform does it again
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "GHOSTSERVE_PLATFORM": platform},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == ends, done.stderr
