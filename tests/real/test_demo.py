"""The demo as a user runs it: the command in a process of its own, its one JSON object, its exit status.

Two of the servers that a test run may start: one for the demo, one for its negative control.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from real import kit

pytestmark = [pytest.mark.real, pytest.mark.timeout(420)]

KEYS = {
    "tensor_parallel_size", "killed_rank", "killed_pid", "killed_at_token", "tokens_total", "tokens_lost",
    "tokens_duplicated", "tokens_changed", "identical", "recovery_path", "outage_ms", "phases_ms",
    "kv_blocks_from_parity", "kv_blocks_from_mirrors", "kv_bytes_rebuilt", "tokens_recomputed",
    "kv_bytes_protected", "parity_bytes", "mirror_bytes", "model", "dtype", "versions",
}  # fmt: skip


def demo(*flags: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, the JSON object, and what went to standard error."""
    kit.STARTED.append("demo " + " ".join(flags))
    command = [sys.executable, "-m", "ghostserve.cli.main", "demo", "--json", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert done.stdout.count("\n") == 1, done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def test_the_demo_holds_what_it_promises() -> None:
    code, report, told = demo(
        "--rank", "0", "--max-tokens", "300", "--at-token", "200"
    )  # `make demo` has the defaults
    assert code == 0, told
    assert set(report) == KEYS
    assert report["identical"] is True
    assert (report["tokens_lost"], report["tokens_duplicated"], report["tokens_changed"]) == (0, 0, 0)
    assert report["recovery_path"] == "rebuild"
    assert report["tokens_recomputed"] == 0
    assert report["kv_blocks_from_parity"] >= 2
    assert report["kv_bytes_rebuilt"] > 0
    assert report["tokens_total"] == 300
    assert 200 <= report["killed_at_token"] < 300
    assert 0 < report["outage_ms"] < 60_000
    assert sum(report["phases_ms"].values()) > 0
    assert report["kv_bytes_protected"] > report["parity_bytes"] > 0


@pytest.mark.slow  # test_ladder.py has the same control on a running server
def test_without_the_restore_the_answer_changes() -> None:
    code, report, told = demo("--no-restore", "--max-tokens", "400", "--at-token", "100")
    assert code == 1, told
    assert report["identical"] is False
    assert report["tokens_changed"] > 0
    assert report["tokens_total"] == 400
    assert "check failed" in told
