"""The demo's two runs on a server that is up: the unfailed answer, then the same with one worker killed.

Measures and returns; what it means is for `demo_report`, how it looks for `demo_view`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ghostserve.cli.demo_report import DemoRun, recovery_of
from ghostserve.cli.demo_view import View
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.errors import EngineLost, GhostserveError
from ghostserve.testing.client import StreamResult, stream_completion
from ghostserve.testing.server import ServerProcess
from ghostserve.types import ServerState

MODELS_DIR = Path(__file__).parents[1] / "models"
MODEL_NAME = "tiny-llama"
STREAM_TIMEOUT_S = 240.0
REPORT_TIMEOUT_S = 15.0
BOUND_TIMEOUT_S = 2.0
EXIT_TIMEOUT_S = 15.0


@dataclass(slots=True)
class Kill:
    """One kill, sent from a thread of its own so that it does not hold up the stream that it is timed
    against.
    """

    server: ServerProcess
    view: View
    rank: int
    at_token: int
    sent_s: float | None = None
    sent_at_token: int | None = None
    pid: int | None = None
    error: str | None = None
    _thread: threading.Thread | None = field(default=None, repr=False)

    def when_due(self, tokens_so_far: int) -> None:
        """Start the kill once the token is reached; further calls do nothing."""
        if self._thread is None and tokens_so_far >= self.at_token:
            self.sent_at_token = tokens_so_far
            self.sent_s = monotonic_s()
            self._thread = threading.Thread(target=self._send, name="demo-kill", daemon=True)
            self._thread.start()

    def wait_sent(self) -> tuple[int, float, int]:
        """The pid that was killed, when the kill was sent, and how many tokens had arrived then.

        Raises GhostserveError if the server refused or the token never came.
        """
        if self._thread is not None:
            self._thread.join()
        if self.error is not None:
            raise GhostserveError(f"the kill failed: {self.error}")
        if self.pid is None or self.sent_s is None or self.sent_at_token is None:
            raise GhostserveError(f"the stream ended before token {self.at_token}, so nothing was killed")
        return self.pid, self.sent_s, self.sent_at_token

    def _send(self) -> None:
        try:
            self.pid = int(self.server.admin.kill_rank(self.rank)["pid"])
        except GhostserveError as error:
            self.error = str(error)
            return
        with suppress(OSError):  # the reader is gone; the main thread finds out when it writes
            self.view.bad(f"✗ SIGKILL to rank {self.rank} (pid {self.pid}) after token {self.sent_at_token}")


def demo_prompt() -> str:
    """The first of the prompts that come with the model."""
    prompts = json.loads((MODELS_DIR / "prompts.json").read_text(encoding="utf-8"))
    return str(prompts[0]["prompt"])


def stream(
    server: ServerProcess, view: View, *, max_tokens: int, salt: str, kill: Kill | None
) -> StreamResult:
    """One greedy answer, shown as it comes; the kill is sent from within if there is one."""
    seen = 0

    def on_token(_index: int, token_ids: Sequence[int], text: str, _at_s: float) -> None:
        nonlocal seen
        seen += len(token_ids)
        view.token(text)
        if kill is not None:
            kill.when_due(seen)

    with view.filling_silence(lambda: f"{seen} of {max_tokens} tokens have arrived so far"):
        return stream_completion(
            server.base_url,
            prompt=demo_prompt(),
            max_tokens=max_tokens,
            model=MODEL_NAME,
            cache_salt=salt,
            on_token=on_token,
            timeout_s=STREAM_TIMEOUT_S,
        )


def wait_until(
    server: ServerProcess, condition: Callable[[dict[str, Any]], bool], *, timeout_s: float
) -> dict[str, Any]:
    """The first status for which the condition holds, or the last one when time is up."""
    deadline_s = monotonic_s() + timeout_s
    while True:
        state = server.status()
        if condition(state) or monotonic_s() >= deadline_s:
            return state
        sleep_s(0.05)


def is_settled(state: dict[str, Any]) -> bool:
    """The memory bound holds and no sealed block waits for its parity."""
    return bool(state["shadow"]["bound_holds"]) and not state["shadow"]["backlog_blocks"]


def run(
    server: ServerProcess, view: View, *, rank: int, at_token: int, max_tokens: int, restore: bool
) -> DemoRun:
    """Both answers and all that was measured.

    Raises EngineLost if the server is gone, and GhostserveError where there is nothing to judge.
    """
    view.step(f"1 of 2: {max_tokens} tokens, nobody is killed")
    reference = stream(server, view, max_tokens=max_tokens, salt="reference", kill=None)
    with view.filling_silence(lambda: "asking the server how it is"):
        raise_if_lost(server)
        if reference.error is not None:
            raise GhostserveError(f"the unfailed run broke: {reference.error}")
        if server.status()["recoveries_total"]:
            raise GhostserveError("a worker died in the run that was to be the unfailed one")
    view.step(
        f"2 of 2: the same request; rank {rank} is killed at token {at_token}"
        + ("" if restore else ", and its KV is not restored")
    )
    with view.filling_silence(lambda: "preparing the server for the kill"):
        server.set_switch("skip_restore", not restore)
        server.record_processes()
    kill = Kill(server, view, rank, at_token)
    faulted = stream(server, view, max_tokens=max_tokens, salt="faulted", kill=kill)
    with view.filling_silence(lambda: "waiting for the server's report of the recovery"):
        raise_if_lost(server)
        pid, sent_s, sent_at_token = kill.wait_sent()
        late_s = monotonic_s() + BOUND_TIMEOUT_S  # what a status says that was written later
        state = wait_until(
            server,
            lambda now: is_settled(now) or now.get("written_at_s", monotonic_s()) > late_s,
            timeout_s=REPORT_TIMEOUT_S,
        )
        bound_held = bool(state["shadow"]["bound_holds"])
        if recovery_of(state, pid) is None:
            state = wait_until(
                server, lambda now: recovery_of(now, pid) is not None, timeout_s=REPORT_TIMEOUT_S
            )
        server.set_switch("skip_restore", False)
    return DemoRun(
        killed_rank=rank,
        killed_pid=pid,
        killed_at_token=sent_at_token,
        kill_sent_s=sent_s,
        reference_ids=reference.token_ids.get(0, ()),
        faulted_ids=faulted.token_ids.get(0, ()),
        arrivals_s=faulted.arrivals_s.get(0, ()),
        stream_error=faulted.error,
        recovery=recovery_of(state, pid),
        state=state,
        model=MODEL_NAME,
        bound_held=bound_held,
    )


def raise_if_lost(server: ServerProcess) -> None:
    """Raise EngineLost if the server has ended, is ending, or has given up."""
    if server.poll() is None:
        try:
            lost = server.status()["state"] == ServerState.FAILED.value
        except GhostserveError:
            lost = True  # it answers during an outage, so one that does not is on its way out
        if not lost:
            return
    code = server.wait_exit(timeout_s=EXIT_TIMEOUT_S)
    end = "does not answer any more" if code is None else f"exited with status {code}"
    raise EngineLost(f"the server {end}\n{server.log_tail()}")
