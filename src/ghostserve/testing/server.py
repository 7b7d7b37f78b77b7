"""A real server under test: started, waited for, asked, hurt, stopped, and searched for what it left behind.

The server gets a session of its own, so that Ctrl-C of the caller's terminal does not reach it, and is sent
SIGTERM by the kernel when the thread that started it ends: start it from the main thread.
"""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.errors import GhostserveError, StartError
from ghostserve.testing.leaks import Leaks, NamesBefore, ProcessMark, family_of, session_of
from ghostserve.web.admin import NO_TLS, AdminClient, Tls

OFFLINE_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_API_KEY": "",
    "GHOSTSERVE_ADMIN_API_KEY": "",
}
"""No look-up of models, no reports, none of the 1.5 s that Dynamo takes for one helper in each process, and
no key of the caller's own, which our client would not send.
"""

NOT_INHERITED = frozenset({"VLLM_USE_V2_MODEL_RUNNER", "VLLM_PLUGINS"})
"""What the caller may have set for servers of their own, and ours refuses or cannot start with."""

HOST = "127.0.0.1"
POLL_S = 0.1
PROGRESS_S = 4.0
LOG_TAIL_LINES = 40

# Run before the server takes over this pid: ask the kernel for SIGTERM on the parent's death (prctl 1), and
# leave at once if the parent is gone already.
_TIE_TO_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)


def free_port() -> int:
    """A TCP port that nobody listens on now; the kernel does not hand it out again soon."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def ghostserve_command(model: str | Path, *flags: str) -> list[str]:
    """The command line of our server."""
    return [sys.executable, "-m", "ghostserve.cli.main", "serve", str(model), *flags]


def stock_command(model: str | Path, *flags: str) -> list[str]:
    """The command line of vLLM's own server."""
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *flags]


def server_environment(inherited: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The environment of a server under test; `own` wins over everything."""
    kept = {name: value for name, value in inherited.items() if name not in NOT_INHERITED}
    return {**kept, **OFFLINE_ENV, **own}


class ServerProcess:
    """One server from start to stop; a context manager that stops it.

    `command` is completed by `--host` and `--port`; its output goes to `server-PORT.log` in `log_dir`, or to
    `log_file`. `env` is laid over the caller's environment, less NOT_INHERITED, and OFFLINE_ENV; `whole_env` is all that it
    gets. `tls`: the server speaks TLS, with a certificate that its `cacert` vouches for.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log_dir: Path,
        log_file: Path | None = None,
        port: int | None = None,
        env: Mapping[str, str] | None = None,
        whole_env: Mapping[str, str] | None = None,
        api_key: str | None = None,
        admin_key: str | None = None,
        tls: Tls = NO_TLS,
    ) -> None:
        self.port = port or free_port()
        self.base_url = f"{'https' if tls.given else 'http'}://{HOST}:{self.port}"
        self.log_file = log_file or log_dir / f"server-{self.port}.log"
        self.api_key = api_key
        self.admin = AdminClient(self.base_url, api_key=api_key, admin_key=admin_key, tls=tls)
        self._verify: ssl.SSLContext | bool = tls.context() if tls.given else True
        self.exit_code: int | None = None
        self._command = [*command, "--host", HOST, "--port", str(self.port)]
        self._env = server_environment(os.environ, env or {}) if whole_env is None else dict(whole_env)
        self._process: subprocess.Popen[bytes] | None = None
        self._family: set[ProcessMark] = set()
        self._before = NamesBefore.now()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The pid of the front process; valid once started."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def processes(self) -> frozenset[ProcessMark]:
        """All processes that were seen to belong to this server so far."""
        return frozenset(self._family)

    def start(self) -> None:
        """Start the process and return at once; `wait_ready` follows."""
        assert self._process is None, "started already"
        command = [sys.executable, "-c", _TIE_TO_PARENT, str(os.getpid()), *self._command]
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
            )

    def wait_ready(
        self, *, timeout_s: float = 180.0, on_progress: Callable[[float, str], None] | None = None
    ) -> None:
        """Return once `/health` answers 200. Raises StartError with the log's end if it exits or time is up.

        `on_progress(seconds so far, last line of the log)` is called every PROGRESS_S seconds.
        """
        started_s = told_s = monotonic_s()
        with httpx.Client(base_url=self.base_url, timeout=1.0, trust_env=False, verify=self._verify) as http:
            while not self._is_healthy(http):
                now_s = monotonic_s()
                code = self.poll()
                if code is not None:
                    raise StartError(f"the server exited with status {code}\n{self.log_tail()}")
                if now_s - started_s > timeout_s:
                    raise StartError(f"the server is not ready after {timeout_s:.0f} s\n{self.log_tail()}")
                if on_progress is not None and now_s - told_s >= PROGRESS_S:
                    told_s = now_s
                    on_progress(now_s - started_s, self.log_tail(lines=1))
                sleep_s(POLL_S)
        self.record_processes()

    def _is_healthy(self, http: httpx.Client) -> bool:
        try:
            return http.get("/health").status_code == 200
        except httpx.HTTPError:
            return False

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        assert self._process is not None, "not started"
        if self.exit_code is None:
            self.exit_code = self._process.poll()
        return self.exit_code

    def wait_exit(self, *, timeout_s: float) -> int | None:
        """Wait for the process to end by itself; None if it did not."""
        assert self._process is not None, "not started"
        try:
            self.exit_code = self._process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return None
        return self.exit_code

    def log_tail(self, *, lines: int = LOG_TAIL_LINES) -> str:
        """The last lines of the log that are not blank."""
        try:
            text = self.log_file.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])

    def record_processes(self) -> None:
        """Remember who belongs to the server now; call it before anything that ends some of them."""
        running = self.poll() is None
        self._family |= family_of(self.pid) if running else session_of(self.pid)

    # -- asking and hurting -----------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The state document, with counters."""
        return self.admin.status()

    def kill_rank(self, rank: int) -> dict[str, Any]:
        """SIGKILL the worker of this rank, by the server's own route; the answer names the pid."""
        self.record_processes()
        return self.admin.kill_rank(rank)

    def arm_fault(self, *, point: str, rank: int, action: str, skip: int = 0) -> None:
        """Have a rank suffer `action` once it has passed `point` `skip` times."""
        self.record_processes()
        self.admin.arm_fault(point=point, rank=rank, action=action, skip=skip)

    def set_switch(self, name: str, on: bool) -> None:
        """Turn a run-time switch on or off; names as in `arena.names.Switch`, lower case."""
        self.admin.set_switch(name, on)

    def wait_status(
        self, condition: Callable[[dict[str, Any]], bool], *, timeout_s: float, what: str
    ) -> dict[str, Any]:
        """The first status for which `condition` holds; raises GhostserveError naming `what` when time is
        up.
        """
        deadline_s = monotonic_s() + timeout_s
        while True:
            status = self.status()
            if condition(status):
                return status
            if monotonic_s() > deadline_s:
                raise GhostserveError(f"{what}: not within {timeout_s:g} s")
            sleep_s(POLL_S / 2)

    # -- stopping ---------------------------------------------------------------------------------------

    def terminate(self, *, timeout_s: float = 30.0) -> int | None:
        """SIGTERM and nothing more, so that one sees what it leaves; the exit status, None if it goes on."""
        assert self._process is not None, "not started"
        self.record_processes()
        self._process.send_signal(signal.SIGTERM)
        return self.wait_exit(timeout_s=timeout_s)

    def stop(self, *, timeout_s: float = 20.0) -> int | None:
        """SIGTERM, then SIGKILL for whoever is left of the family; the front's exit status. May be repeated.

        None if it was never started. A server that is stopped in time exits 0.
        """
        if self._process is None:
            return None
        if self.poll() is None:
            self.record_processes()
            self._process.send_signal(signal.SIGTERM)
            self.wait_exit(timeout_s=timeout_s)
        return self.kill_tree()

    def kill_tree(self) -> int | None:
        """SIGKILL everything that belongs to the server and wait for it to be gone."""
        if self._process is None:
            return None
        self.record_processes()
        if self.poll() is None:
            self._process.kill()
            self.wait_exit(timeout_s=10.0)
        for mark in self._family:
            mark.kill()
        deadline_s = monotonic_s() + 10.0
        while any(mark.is_running() for mark in self._family) and monotonic_s() < deadline_s:
            sleep_s(POLL_S)
        return self.exit_code

    def leaks(self, *, settle_s: float = 0.0) -> Leaks:
        """What is there now and was not before this object was made, and which processes survive.

        Right after `stop` no process is left, since it kills them; to see whether the server cleans up by
        itself, send its signal, `wait_exit`, then ask. With `settle_s`, processes and segments have that long
        to go: what waits for a pipe of the server to close, as Python's resource tracker does, ends after it.
        """
        deadline_s = monotonic_s() + settle_s
        while True:
            leaks = self._before.leaks(self._family)
            if not (leaks.processes or leaks.shared_memory) or monotonic_s() >= deadline_s:
                return leaks
            sleep_s(POLL_S)
