"""What the demo found, as one JSON object, and whether that is good enough. Pure; every figure was measured.

The keys are an interface: tests and scripts read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ghostserve.testing.oracle import Verdict, compare
from ghostserve.types import Phase, RecoveryPath

DISTINCT_RATIO_MIN = 0.3
"""An answer that repeats itself more than this may go on unchanged although its KV is lost."""

PARITY_BLOCKS_MIN = 2
"""Fewer sealed blocks back from parity would leave open whether parity works."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRun:
    """What was seen. `state` is the status after the run; `recovery` is None if none was reported for the
    kill.
    """

    killed_rank: int
    killed_pid: int
    killed_at_token: int
    kill_sent_s: float  # monotonic, as are the arrivals
    reference_ids: Sequence[int]
    faulted_ids: Sequence[int]
    arrivals_s: Sequence[float]  # one per faulted id
    stream_error: str | None
    recovery: Mapping[str, Any] | None
    state: Mapping[str, Any]
    model: str
    bound_held: bool


def recovery_of(state: Mapping[str, Any], pid: int) -> Mapping[str, Any] | None:
    """The latest finished recovery that names this process among the lost."""
    reports = [*state.get("recoveries", ()), *filter(None, [state.get("last_recovery")])]
    return next((report for report in reversed(reports) if pid in report["lost_pids"]), None)


def outage_ms(arrivals_s: Sequence[float], kill_sent_s: float) -> float | None:
    """The gap that a client saw: the longest wait for a token that arrived after the kill was sent.

        token   t  t  t      kill      t  t                    t  t  t
                                        └ under way, still sent └ outage ends here

    None if no token, or only the very first one, arrived after it.
    """
    gaps_s = [after - before for before, after in pairwise(arrivals_s) if after > kill_sent_s]
    return max(gaps_s) * 1e3 if gaps_s else None


def distinct_ratio(tokens: Sequence[int], length: int = 4) -> float:
    """Different runs of `length` tokens over all such runs: 1.0 if none repeats, near 0 in a loop."""
    runs = [tuple(tokens[at : at + length]) for at in range(len(tokens) - length + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def verdict_of(run: DemoRun) -> Verdict:
    """The oracle's judgement of this run."""
    return compare(run.reference_ids, run.faulted_ids)


def build_report(run: DemoRun) -> dict[str, Any]:
    """The object that `demo --json` prints. What was not reported is None, never a made-up figure."""
    verdict = verdict_of(run)
    recovery = run.recovery or {}
    phases_ms = recovery.get("phases_ms", {})
    # A stream that broke has no token that ends its outage.
    outage = None if run.stream_error is not None else outage_ms(run.arrivals_s, run.kill_sent_s)
    return {
        "tensor_parallel_size": run.state["tensor_parallel_size"],
        "killed_rank": run.killed_rank,
        "killed_pid": run.killed_pid,
        "killed_at_token": run.killed_at_token,
        "tokens_total": len(run.faulted_ids),
        "tokens_lost": verdict.tokens_lost,
        "tokens_duplicated": verdict.tokens_duplicated,
        "tokens_changed": verdict.tokens_changed,
        "identical": verdict.identical,
        "recovery_path": recovery.get("path"),
        "outage_ms": None if outage is None else round(outage, 1),
        "phases_ms": {phase.value: phases_ms.get(phase.value) for phase in Phase},
        "kv_blocks_from_parity": recovery.get("kv_blocks_from_parity"),
        "kv_blocks_from_mirrors": recovery.get("kv_blocks_from_mirrors"),
        "kv_bytes_rebuilt": recovery.get("kv_bytes_rebuilt"),
        "tokens_recomputed": recovery.get("tokens_recomputed"),
        "kv_bytes_protected": run.state["counters"]["kv_bytes_protected"],
        "parity_bytes": run.state["shadow"]["parity_bytes"],
        "mirror_bytes": run.state["shadow"]["mirror_bytes"],
        "model": run.model,
        "dtype": run.state["dtype"],
        "versions": {
            "ghostserve": run.state["version"],
            "vllm": run.state["vllm"],
            "torch": run.state["torch"],
        },
    }


def failures(report: Mapping[str, Any], run: DemoRun) -> list[str]:
    """Each reason for exit status 1, as a sentence; empty if all is well."""
    reasons = []
    if run.stream_error is not None:
        reasons.append(f"the stream broke: {run.stream_error}")
    if not report["identical"]:
        at = verdict_of(run).first_difference
        reasons.append(f"the answer differs from the unfailed one from token {at} on")
    elif not run.reference_ids:
        reasons.append("both answers are empty, so nothing was compared")
    elif distinct_ratio(run.reference_ids[run.killed_at_token :]) < DISTINCT_RATIO_MIN:
        reasons.append("the answer repeats itself after the kill, so that equality proves nothing")
    if run.recovery is None:
        reasons.append("the server reported no recovery for the killed process")
        return reasons
    if report["recovery_path"] != RecoveryPath.REBUILD.value:
        reasons.append(f"the recovery path was {report['recovery_path']}, not rebuild")
    if report["tokens_recomputed"]:
        reasons.append(f"{report['tokens_recomputed']} tokens were recomputed")
    if report["kv_blocks_from_parity"] < PARITY_BLOCKS_MIN:
        reasons.append(
            f"{report['kv_blocks_from_parity']} sealed blocks came back from parity, "
            f"at least {PARITY_BLOCKS_MIN} were expected"
        )
    if not run.bound_held:
        reasons.append("the shadow's memory bound did not hold within 2 s of the last token")
    return reasons


def headline(report: Mapping[str, Any]) -> str:
    """`recovered in N ms · 0 lost · 0 duplicated · identical ✓`, as measured."""
    outage = report["outage_ms"]
    recovered = outage is not None and report["recovery_path"] is not None
    parts = [
        f"recovered in {outage:.0f} ms" if recovered else "not recovered",
        f"{report['tokens_lost']} lost",
        f"{report['tokens_duplicated']} duplicated",
        *([f"{report['tokens_changed']} changed"] if report["tokens_changed"] else []),
        "identical ✓" if report["identical"] else "NOT identical ✗",
    ]
    return " · ".join(parts)
