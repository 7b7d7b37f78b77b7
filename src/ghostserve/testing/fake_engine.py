"""A stand-in for engine and control page: real processes to kill, made-up tokens, no vLLM.

The workers are `sleep` processes. Tokens are a function of prompt and position alone, so a failure-free
answer is reproducible; a dead worker holds every stream up until it is replaced. With `skip_restore` on,
what follows a loss is other text; with `force_recompute` the recovery reports that path.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

from ghostserve.arena.event_rings import RINGS_BYTES, EventRings, Teller
from ghostserve.arena.ledger import LEDGER_BYTES, Ledger
from ghostserve.arena.names import Counter, Fault, Progress, Stamp, StampStatus, Switch
from ghostserve.clock import monotonic_s, sleep_s, wall_s
from ghostserve.events import kinds
from ghostserve.events.log import EventLog
from ghostserve.types import FailureKind, Phase, RecoveryOutcome, RecoveryPath
from ghostserve.web.processes import read_start_time_ticks

WORDS = ("def", "return", "self", "for", "in", "if", "not", "import", "class", "path", "=", "(", ")", "\n")
FRAME_BYTES = 65536
BLOCK_TOKENS = 32


class FakeEngine:
    """Implements `web.routes.Page`, and is the engine behind it as well."""

    def __init__(
        self,
        *,
        ranks: int = 2,
        token_s: float = 0.012,
        outage_s: float = 1.2,
        exit_code_at_loss: int | None = None,
        standbys: int = 0,
    ) -> None:
        self.token_s = token_s
        self.outage_s = outage_s
        self.exit_code_at_loss = exit_code_at_loss
        self.epoch = 0
        self.losses = 0
        self.tokens = 0
        self.recoveries: list[dict[str, Any]] = []
        self.switches = dict.fromkeys(Switch, False)
        self.faults: list[Fault] = []
        self.corrupt = False
        self.keeper_given_up = False
        self.ledger = Ledger(memoryview(bytearray(LEDGER_BYTES)))
        self.state = "serving"
        self.recovering_since_s: float | None = None
        self.last_step_s: float | None = None
        self.errored = False
        self.open_streams = 0
        self.ended_because: str | None = None
        self.lock = threading.Lock()
        self.open: dict[str, int] = {}  # tokens shown, by request
        self.memory = memoryview(bytearray(RINGS_BYTES))
        self.events = EventRings(self.memory, teller=Teller.ENGINE)
        self.log = EventLog(EventRings(self.memory, teller=None).look, base=int(wall_s() * 1e6))
        self._requests = itertools.count()
        self.workers = [self._spawn() for _ in range(ranks)]
        self.standbys = [self._spawn() for _ in range(standbys)]
        self.keeper = self._spawn()

    def _spawn(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "600"])

    def close(self) -> None:
        """End the stand-ins."""
        for process in (*self.workers, *self.standbys, self.keeper):
            process.kill()
            process.wait()

    # -- the page -----------------------------------------------------------------------------------------

    def read_state(self) -> dict[str, Any] | None:
        ranks = [
            {
                "rank": rank,
                "pid": worker.pid,
                "start_time": read_start_time_ticks(worker.pid) or 0,
                "state": "lost" if worker.poll() is not None else "alive",
                "title": f"VLLM::Worker_TP{rank}",
                "device": "cpu",
                "kv_bytes": 1024 * FRAME_BYTES,
            }
            for rank, worker in enumerate(self.workers)
        ]
        return {
            "version": "0.0.0",
            "vllm": "0.32.0",
            "torch": "2.13.0",
            "model": "tiny-llama",
            "dtype": "float32",
            "tensor_parallel_size": len(ranks),
            "block_size": BLOCK_TOKENS,
            "max_model_len": 4096,
            "epoch": self.epoch,
            "state": self.state,
            "phase": "spawn" if self.state == "recovering" else None,
            "recovering_since_s": self.recovering_since_s,
            "ranks": ranks,
            "standbys": [
                {"pid": standby.pid, "state": "ready", "memory_bytes": 96 << 20} for standby in self.standbys
            ],
            "keeper": {"pid": self.keeper.pid, "restarts": 0},
            "weights_bytes": 5 << 20,
            "shadow": self._shadow(),
            "scrub": self._scrub(),
            "recoveries_total": len(self.recoveries),
            "last_recovery": self.recoveries[-1] if self.recoveries else None,
            "recoveries": self.recoveries[-16:],
        }

    def _shadow(self) -> dict[str, Any]:
        blocks = self.tokens // BLOCK_TOKENS
        return {
            "protection": "parity",
            "parity_shards": 1,
            "frame_bytes": FRAME_BYTES,
            "parity_bytes": blocks * FRAME_BYTES,
            "mirror_bytes": 2 * FRAME_BYTES,
            "budget_bytes": 256 << 20,
            "sealed_blocks": blocks,
            "coded_blocks": blocks,
            "tail_blocks": 1,
            "unprotected_blocks": 0,
            "backlog_blocks": 0,
            "bound_bytes": (blocks + 6) * FRAME_BYTES,
            "bound_holds": True,
        }

    def _scrub(self) -> dict[str, Any]:
        blocks = self.tokens // BLOCK_TOKENS
        progress = {"rounds": 1, "blocks_done": blocks, "blocks": blocks}
        names = (
            "kv_mismatches",
            "mirror_mismatches",
            "parity_mismatches",
            "repaired",
            "refused",
            "kv_nan",
            "kv_inf",
        )
        return {
            "rate_bytes_s": 16 << 20,
            "kv": progress,
            "frames": progress,
            "bytes_total": 3 * blocks * FRAME_BYTES,
            "blocks_total": 2 * blocks,
            **{f"{name}_total": 0 for name in names},
            "waiting": 0,
            "findings": [],
        }

    def counters(self) -> dict[str, int]:
        blocks = self.tokens // BLOCK_TOKENS
        values = {
            Counter.KV_BYTES_PROTECTED: 2 * blocks * FRAME_BYTES,
            Counter.STEPS_TOTAL: self.tokens,
            Counter.PROTECTED_TOKENS: self.tokens,
            Counter.REQUESTS_OPEN: self.open_streams,
            Counter.ENCODE_BYTES_TOTAL: blocks * FRAME_BYTES,
        }
        return {counter.name.lower(): values.get(counter, 0) for counter in Counter}

    @property
    def keeper_pid(self) -> int:
        return self.keeper.pid

    def arm_fault(self, fault: Fault) -> int:
        self.faults.append(fault)
        return len(self.faults) - 1

    def disarm_faults(self) -> None:
        self.faults.clear()

    def armed_faults(self) -> list[Fault]:
        return list(self.faults)

    def get_switch(self, switch: Switch) -> bool:
        return self.switches[switch]

    def set_switch(self, switch: Switch, on: bool) -> None:
        self.switches[switch] = on

    def read_stamp(self, rank: int) -> Stamp:
        return Stamp(
            epoch=self.epoch, step=self.tokens, status=StampStatus.DONE, at_s=self.last_step_s or 0.0
        )

    def progress(self, rank: int) -> Progress:
        in_steps_s = self.tokens * self.token_s
        return Progress(
            met=self.tokens, waited_s=0.0, waiting=False, in_steps_s=in_steps_s, steps=self.tokens
        )

    # -- the engine ---------------------------------------------------------------------------------------

    def step(self) -> None:
        """One token's time; heals a dead worker first, as the engine's own thread does."""
        sleep_s(self.token_s)
        with self.lock:
            lost = [rank for rank, worker in enumerate(self.workers) if worker.poll() is not None]
            if lost:
                self._recover(lost)
            self.tokens += 1
            self.last_step_s = monotonic_s()

    def _recover(self, lost: list[int]) -> None:
        began_s, self.state = monotonic_s(), "recovering"
        self.recovering_since_s = began_s
        if self.exit_code_at_loss is not None:
            self.close()
            os._exit(self.exit_code_at_loss)
        pids = [self.workers[rank].pid for rank in lost]
        for rank, pid in zip(lost, pids, strict=True):
            self.events.tell(
                kinds.RankLost(rank=rank, cause="crash", pid=pid, reason=f"process of rank {rank} exited")
            )
        sleep_s(self.outage_s)
        for rank in lost:
            self.workers[rank] = self._spawn()
            self.events.tell(kinds.RankTaken(rank=rank, pid=self.workers[rank].pid, standby=False))
        self.epoch += 1
        self.losses += 1
        self.corrupt = self.switches[Switch.SKIP_RESTORE]
        recompute = self.switches[Switch.FORCE_RECOMPUTE]
        blocks = 0 if self.corrupt or recompute else self.tokens // BLOCK_TOKENS
        total_ms = (monotonic_s() - began_s) * 1e3
        share_ms = total_ms / 10
        phases_ms = dict.fromkeys((phase.value for phase in Phase), share_ms) | {"spawn": 2 * share_ms}
        self.recoveries.append(
            {
                "epoch": self.epoch,
                "lost_ranks": lost,
                "lost_pids": pids,
                "path": "recompute" if recompute else "rebuild",
                "ok": True,
                "reason": "a worker process ended",
                "phases_ms": phases_ms,
                "total_ms": total_ms,
                "kv_blocks_from_parity": blocks,
                "kv_blocks_from_mirrors": 1,
                "kv_bytes_rebuilt": blocks * FRAME_BYTES,
                "tokens_recomputed": self.tokens if recompute else 0,
                "requests_recomputed": int(recompute),
            }
        )
        self._tally(lost, recompute=recompute, phases_ms=phases_ms)
        self._tell_end(self.recoveries[-1], began_s)
        self.state, self.recovering_since_s = "serving", None

    def get_num_unfinished_requests(self) -> int:
        """As of vLLM's engine client."""
        return self.open_streams

    async def generate_one_token(self, _client: Any) -> None:
        """For /health_generate: a step like any other, so that it waits for a recovery."""
        await asyncio.get_running_loop().run_in_executor(None, self.step)

    def _tally(self, lost: list[int], *, recompute: bool, phases_ms: dict[str, float]) -> None:
        for _ in lost:
            self.ledger.count_failure(FailureKind.CRASH)
        path = RecoveryPath.RECOMPUTE if recompute else RecoveryPath.REBUILD
        self.ledger.count_recovery(path, RecoveryOutcome.RECOVERED)
        self.ledger.observe(None, sum(phases_ms.values()) / 1e3)
        for name, took_ms in phases_ms.items():
            self.ledger.observe(Phase(name), took_ms / 1e3)

    def _tell_end(self, report: dict[str, Any], began_s: float) -> None:
        ended_s = began_s
        for phase, ms in report["phases_ms"].items():
            ended_s += ms / 1e3
            self.events.tell(kinds.PhaseEnded(phase=phase, ms=ms), at_monotonic_s=ended_s)
        for name, shown in self.open.items():
            self.events.tell(
                kinds.RequestResumed(
                    request=name, epoch=self.epoch, output_tokens=shown, recovery_ms=report["total_ms"]
                )
            )
        names = {item.name for item in dataclasses.fields(kinds.RecoveryEnded)}
        told = {name: value for name, value in report.items() if name in names}
        self.events.tell(
            kinds.RecoveryEnded(**told, ranks=report["lost_ranks"], requests_resumed=len(self.open))
        )

    def stream(self, prompt: str, max_tokens: int) -> Iterator[str]:
        """The server-sent events of one answer; ends with an error when the server is told to end and time is up."""
        self.open_streams += 1
        try:
            yield from self._events(prompt, max_tokens)
        finally:
            self.open_streams -= 1

    async def end_open(self, reason: str) -> None:
        """Have every stream end with this error."""
        self.ended_because = reason

    def _events(self, prompt: str, max_tokens: int) -> Iterator[str]:
        self.corrupt = False
        began_s, name = monotonic_s(), f"cmpl-{next(self._requests)}-0-{0:08x}"
        self.open[name] = 0
        self.events.tell(
            kinds.RequestAdmitted(request=name, prompt_tokens=len(prompt.split()), max_tokens=max_tokens)
        )
        try:
            yield from self._tokens(name, prompt, max_tokens)
        finally:
            shown, took_ms = self.open.pop(name), (monotonic_s() - began_s) * 1e3
            if shown == max_tokens:
                ended: kinds.Event = kinds.RequestFinished(
                    request=name, reason="length", output_tokens=shown, total_ms=took_ms
                )
            else:
                ended = kinds.RequestAborted(request=name, output_tokens=shown, total_ms=took_ms)
            self.events.tell(ended)

    def _tokens(self, name: str, prompt: str, max_tokens: int) -> Iterator[str]:
        good, wrong = random.Random(prompt), random.Random(prompt + "!")
        for index in range(max_tokens):
            self.step()
            if self.ended_because is not None:
                error = {"message": self.ended_because, "type": "Service Unavailable", "code": 503}
                yield f"data: {json.dumps({'error': error})}\n\n"
                break
            self.open[name] += 1
            drawn = good.randrange(len(WORDS)), wrong.randrange(len(WORDS))
            token = drawn[1] if self.corrupt else drawn[0]
            choice = {
                "index": 0,
                "text": " " + WORDS[token],
                "token_ids": [token],
                "finish_reason": "length" if index + 1 == max_tokens else None,
            }
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
        yield "data: [DONE]\n\n"
