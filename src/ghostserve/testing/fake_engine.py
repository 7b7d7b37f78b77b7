"""A stand-in for engine and control page: real processes to kill, made-up tokens, no vLLM.

The workers are `sleep` processes. Tokens are a function of prompt and position alone, so a failure-free
answer is reproducible; a dead worker holds every stream up until it is replaced. With `skip_restore` on,
what follows a loss is other text; with `force_recompute` the recovery reports that path.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

from ghostserve.arena.names import Counter, Fault, Progress, Stamp, StampStatus, Switch
from ghostserve.clock import monotonic_s, sleep_s
from ghostserve.testing.fake_events import FakeEvents
from ghostserve.types import Phase
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
        self.state = "serving"
        self.lock = threading.Lock()
        self.requests_open = 0
        self.stepped_at_s = 0.0
        self.events = FakeEvents()
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
            Counter.REQUESTS_OPEN: self.requests_open,
            Counter.ENCODE_BYTES_TOTAL: blocks * FRAME_BYTES,
        }
        return {counter.name.lower(): values.get(counter, 0) for counter in Counter}

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
        return Stamp(epoch=self.epoch, step=self.tokens, status=StampStatus.DONE, at_s=self.stepped_at_s)

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
            self.stepped_at_s = monotonic_s()

    def _recover(self, lost: list[int]) -> None:
        began_s, self.state = monotonic_s(), "recovering"
        if self.exit_code_at_loss is not None:
            self.close()
            os._exit(self.exit_code_at_loss)
        pids = [self.workers[rank].pid for rank in lost]
        for rank, pid in zip(lost, pids, strict=True):
            self.events.add("rank_lost", f"rank {rank}, pid {pid}, was lost: its process ended", rank=rank)
        sleep_s(self.outage_s)
        for rank in lost:
            self.workers[rank] = self._spawn()
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
        self.state = "serving"
        self.events.add("recovery_ended", f"recovered in {total_ms:.0f} ms by {self.recoveries[-1]['path']}")

    def stream(self, prompt: str, max_tokens: int) -> Iterator[str]:
        """The server-sent events of one answer."""
        self.requests_open += 1
        try:
            yield from self._tokens(prompt, max_tokens)
        finally:
            self.requests_open -= 1

    def _tokens(self, prompt: str, max_tokens: int) -> Iterator[str]:
        self.corrupt = False
        good, wrong = random.Random(prompt), random.Random(prompt + "!")
        for index in range(max_tokens):
            self.step()
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
