"""The client, the server under test and the command line's verbs, against the stand-in server."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import httpx
import pytest

from ghostserve.cli import main as cli
from ghostserve.errors import GhostserveError, StartError, UsageError
from ghostserve.testing.client import StopStreaming, first_model, stream_completion
from ghostserve.testing.oracle import compare_choices
from ghostserve.testing.server import OFFLINE_ENV, ServerProcess, free_port, server_environment
from ghostserve.web.admin import AdminClient, error_sentence

pytestmark = pytest.mark.long

FAKE = [sys.executable, "-m", "ghostserve.testing.fake_server", "--token-s", "0.002", "--outage-s", "0.2"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    command = [*FAKE, "--api-key", "secret"]
    with ServerProcess(command, log_dir=tmp_path_factory.mktemp("server"), api_key="secret") as server:
        server.start()
        server.wait_ready(timeout_s=60)
        yield server


def test_a_stream_is_taken_whole(server: ServerProcess) -> None:
    assert first_model(server.base_url, api_key="secret") == "tiny-llama"
    seen: list[int] = []

    def on_token(index: int, token_ids: Sequence[int], _text: str, _at_s: float) -> None:
        assert index == 0
        seen.extend(token_ids)

    result = stream_completion(
        server.base_url, api_key="secret", prompt="p", max_tokens=20, on_token=on_token
    )
    assert (result.error, result.aborted, result.tokens_total) == (None, False, 20)
    assert list(result.token_ids[0]) == seen
    assert result.finish_reasons == {0: "length"}
    assert len(result.arrivals_s[0]) == 20
    assert list(result.arrivals_s[0]) == sorted(result.arrivals_s[0])
    assert result.text[0].strip()


def test_a_client_may_go_away(server: ServerProcess) -> None:
    def on_token(_index: int, _token_ids: Sequence[int], _text: str, _at_s: float) -> None:
        raise StopStreaming

    result = stream_completion(
        server.base_url, api_key="secret", prompt="p", max_tokens=500, on_token=on_token
    )
    assert (result.error, result.aborted, result.tokens_total) == (None, True, 1)


def test_a_stream_that_breaks_is_a_value(server: ServerProcess) -> None:
    refused = stream_completion(server.base_url, api_key="secret", prompt="p", max_tokens=5000)
    assert refused.error == "HTTP 400: max_tokens is too large"
    late = stream_completion(server.base_url, api_key="secret", prompt="p", max_tokens=4000, timeout_s=1.0)
    assert late.error == "the request ran past its time limit"
    assert late.tokens_total < 4000
    nobody = stream_completion(f"http://127.0.0.1:{free_port()}", prompt="p", max_tokens=5)
    assert nobody.error is not None
    assert "ConnectError" in nobody.error


def test_streams_may_run_in_threads(server: ServerProcess) -> None:
    results = {}

    def one(name: int) -> None:
        results[name] = stream_completion(server.base_url, api_key="secret", prompt="p", max_tokens=15)

    threads = [threading.Thread(target=one, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert compare_choices(results[0].token_ids, results[1].token_ids).identical
    assert compare_choices(results[0].token_ids, results[2].token_ids).identical


def test_a_rank_is_killed_and_replaced(server: ServerProcess) -> None:
    before = server.status()
    answer = server.kill_rank(1)
    assert answer["pid"] == before["ranks"][1]["pid"]
    stream_completion(server.base_url, api_key="secret", prompt="p", max_tokens=2)
    after = server.wait_status(
        lambda now: now["recoveries_total"] == before["recoveries_total"] + 1, timeout_s=10, what="a recovery"
    )
    assert after["last_recovery"]["lost_pids"] == [answer["pid"]]
    with pytest.raises(GhostserveError, match="never: not within"):
        server.wait_status(lambda _now: False, timeout_s=0.1, what="never")


def test_faults_and_switches(server: ServerProcess) -> None:
    server.arm_fault(point="staged", rank=0, action="kill", skip=2)
    server.set_switch("debug_copy", True)
    status = server.status()
    assert status["armed_faults"] == [
        {"point": "staged", "rank": 0, "action": "kill", "skip": 2, "argument": 0, "count": 1}
    ]
    assert status["switches"]["debug_copy"] is True
    server.admin.disarm_faults()
    server.set_switch("debug_copy", False)
    with pytest.raises(UsageError, match="before_model"):
        server.arm_fault(point="nowhere", rank=0, action="kill")


def test_the_key_is_needed(server: ServerProcess) -> None:
    with pytest.raises(GhostserveError, match="--api-key"):
        AdminClient(server.base_url).status()


def test_status_and_kill_verbs(
    server: ServerProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GHOSTSERVE_URL", server.base_url)
    assert cli.main(["status"]) == 1
    assert "--api-key" in capsys.readouterr().err
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert cli.main(["status", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    pid = json.loads(out)["ranks"][0]["pid"]
    assert cli.main(["status"]) == 0
    assert str(pid) in capsys.readouterr().out
    assert cli.main(["kill", "--rank", "7"]) == 2
    assert "ranks are 0 to 1" in capsys.readouterr().err
    assert cli.main(["kill", "--rank", "0"]) == 0
    assert f"process {pid}" in capsys.readouterr().out
    assert cli.main(["kill", "--rank", "0", "--json"]) == 1
    assert "not alive" in capsys.readouterr().err
    stream_completion(server.base_url, api_key="secret", prompt="p", max_tokens=2)


def test_a_server_of_somebody_else(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SOMEBODY_ELSE]
    with ServerProcess(command, log_dir=tmp_path) as server:
        server.start()
        server.wait_ready(timeout_s=60)
        with pytest.raises(GhostserveError, match=r"not run by ghostserve.*--protection none"):
            server.status()
        with pytest.raises(GhostserveError, match=r"no TLS connection.*(?i:wrong.version|record)"):
            AdminClient(server.base_url.replace("http:", "https:")).status()


SOMEBODY_ELSE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


def test_a_start_that_fails_shows_the_log(tmp_path: Path) -> None:
    server = ServerProcess([sys.executable, "-c", "import sys; sys.exit('no such model')"], log_dir=tmp_path)
    server.start()
    with pytest.raises(StartError, match=r"(?s)status 1.*no such model"):
        server.wait_ready(timeout_s=60)
    assert server.stop() == 1
    assert not server.leaks().processes


def test_a_start_that_hangs_is_given_up(tmp_path: Path) -> None:
    with ServerProcess([sys.executable, "-c", "import time; time.sleep(600)"], log_dir=tmp_path) as server:
        server.start()
        with pytest.raises(StartError, match="not ready"):
            server.wait_ready(timeout_s=0.3)
    assert server.exit_code == -15


def test_a_tls_failure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As httpx raises it: the cause is two errors deep."""

    def refuse(*_args: object, **_options: object) -> None:
        try:
            refused = ssl.SSLCertVerificationError(1, "certificate verify failed")
            refused.verify_message = "self-signed certificate"
            raise refused
        except ssl.SSLError as error:
            raise httpx.ConnectError("[SSL]") from error

    monkeypatch.setattr(httpx.Client, "request", refuse)
    with pytest.raises(GhostserveError, match=r"no TLS connection to https://localhost:1: self-signed"):
        AdminClient("https://localhost:1").status()


def test_the_environment_of_a_server() -> None:
    theirs = {"VLLM_API_KEY": "x", "VLLM_PLUGINS": "a", "VLLM_USE_V2_MODEL_RUNNER": "1", "PATH": "/bin"}
    inherited = server_environment(theirs, {})
    assert inherited == {**OFFLINE_ENV, "PATH": "/bin"}
    assert inherited["VLLM_API_KEY"] == ""
    assert server_environment(theirs, {"VLLM_PLUGINS": "b"})["VLLM_PLUGINS"] == "b"


LEAKY = """
import os, subprocess, sys, tempfile
subprocess.Popen(["sleep", "600"])
open(os.path.join(tempfile.gettempdir(), "ghostserve-test-leak-" + sys.argv[-1]), "w").close()
"""


def test_leaks_are_found(tmp_path: Path) -> None:
    server = ServerProcess([sys.executable, "-c", LEAKY], log_dir=tmp_path)
    server.start()
    assert server.wait_exit(timeout_s=30) == 0
    server.record_processes()
    leaks = server.leaks()
    leaked = Path(tempfile.gettempdir()) / f"ghostserve-test-leak-{server.port}"
    try:
        assert leaks
        assert [mark.title for mark in leaks.processes] == ["sleep 600"]
        assert leaked.name in leaks.temporary_files
    finally:
        leaked.unlink()
        server.kill_tree()
    assert not server.leaks().processes


def test_memory_of_another_server_is_no_leak(tmp_path: Path) -> None:
    server = ServerProcess([sys.executable, "-c", "pass"], log_dir=tmp_path)
    server.start()
    assert server.wait_exit(timeout_s=30) == 0
    segment = SharedMemory(create=True, size=4096)
    try:
        assert segment.name not in server.leaks().shared_memory, "this process has mapped it"
        segment.close()
        assert segment.name in server.leaks().shared_memory, "nobody has"
    finally:
        segment.unlink()


@pytest.mark.parametrize("mine", [True, False])
def test_a_semaphore_of_another_server_is_no_leak(tmp_path: Path, mine: bool) -> None:
    server = ServerProcess([sys.executable, "-c", "pass"], log_dir=tmp_path)
    server.start()
    server.record_processes()
    assert server.wait_exit(timeout_s=30) == 0
    semaphore = Path(f"/dev/shm/sem.ghostserve-{server.pid if mine else os.getpid()}-1-{server.port}")
    semaphore.touch()
    try:
        assert (semaphore.name in server.leaks().shared_memory) is mine
    finally:
        semaphore.unlink()


ORPHANING = """
import os, signal, sys
from pathlib import Path
from ghostserve.testing.server import ServerProcess
server = ServerProcess([sys.executable, "-c", "import time; time.sleep(600)"], log_dir=Path(sys.argv[1]))
server.start()
print(server.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_server_ends_with_its_parent(tmp_path: Path) -> None:
    """A killed test run or demo must not leave a server behind."""
    killed = subprocess.run(
        [sys.executable, "-c", ORPHANING, str(tmp_path)],
        stdout=subprocess.PIPE,
        check=False,
        timeout=60,
    )
    assert killed.returncode == -signal.SIGKILL
    with contextlib.suppress(ProcessLookupError):
        orphan = os.pidfd_open(int(killed.stdout))
        try:
            assert select.select([orphan], [], [], 10)[0], "it still runs"
        finally:
            os.close(orphan)


def test_error_sentences() -> None:
    assert error_sentence('{"error": {"message": "a"}}') == "a"
    assert error_sentence(b'{"detail": "b"}') == "b"
    assert error_sentence('{"error": "c"}') == "c"
    assert error_sentence("<html>") == "<html>"
    assert error_sentence("[1]") == "[1]"
