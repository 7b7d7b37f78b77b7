"""`ghostserve status`: a running server's workers, shadow and recoveries. The rendering is pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ghostserve.cli.arguments import add_server_options, admin_of, new_parser
from ghostserve.cli.units import bytes_text, count_text, milliseconds_text
from ghostserve.types import Phase, RankState


def phases_line(phases_ms: Mapping[str, float | None]) -> str:
    """`detect 3.1 · fence 0.4 · ...`, in the order of Phase; phases that took no time are left out."""
    spent = ((phase.value, phases_ms.get(phase.value) or 0.0) for phase in Phase)
    shown = [f"{name} {milliseconds_text(ms).removesuffix(' ms')}" for name, ms in spent if ms >= 0.05]
    return " · ".join(shown) + " ms" if shown else "no phases were reported"


def rebuilt_line(recovery: Mapping[str, Any]) -> str:
    """Where the lost KV came back from, and what had to be recomputed."""
    recomputed = recovery.get("tokens_recomputed", 0)
    return (
        f"{count_text(recovery.get('kv_blocks_from_parity', 0), 'block')} from parity, "
        f"{recovery.get('kv_blocks_from_mirrors', 0)} from mirrors "
        f"({bytes_text(recovery.get('kv_bytes_rebuilt', 0))}) · "
        + (f"{count_text(recomputed, 'token')} recomputed" if recomputed else "nothing recomputed")
    )


def _server_lines(state: Mapping[str, Any]) -> list[str]:
    phase = f" ({state['phase']})" if state.get("phase") else ""
    draining = " · draining: no new requests are taken" if state.get("draining") else ""
    return [
        f"state     {state['state']}{phase}{draining} · epoch {state['epoch']}",
        *([f"          {state['failure']}"] if state.get("failure") else []),
        f"model     {state['model']} · {state['dtype']} · tensor parallel {state['tensor_parallel_size']} · "
        f"blocks of {count_text(state['block_size'], 'token')}",
        f"versions  ghostserve {state['version']} · vllm {state['vllm']} · torch {state['torch']}",
    ]


def _rank_lines(state: Mapping[str, Any]) -> list[str]:
    ranks = state["ranks"]
    lines = [f"{'rank':>4}  {'pid':>8}  {'state':<8}  title"]
    lines += [_rank_line(rank) for rank in ranks]
    keeper = state.get("keeper") or {}
    if keeper:
        how = "gone" if not keeper.get("pid") else count_text(keeper.get("restarts", 0), "restart")
        lines.append(f"{'':>4}  {keeper.get('pid') or '-':>8}  {'keeper':<8}  {how}")
    for standby in state.get("standbys", ()):
        memory = f" · {bytes_text(standby['memory_bytes'])}" if standby["memory_bytes"] else ""
        lines.append(f"{'':>4}  {standby['pid']:>8}  {'standby':<8}  {standby['state']}{memory}")
    return lines


def _rank_line(rank: Mapping[str, Any]) -> str:
    """One that lives may be slow, or under suspicion, with a reason."""
    alive = rank["state"] == RankState.ALIVE.value
    state = rank.get("health", rank["state"]) if alive else rank["state"]
    why = f" · {rank['health_reason']}" if alive and rank.get("health_reason") else ""
    return f"{rank['rank']:>4}  {rank['pid']:>8}  {state:<8}  {rank['title']}{why}"


def _shadow_lines(shadow: Mapping[str, Any]) -> list[str]:
    held = shadow["parity_bytes"] + shadow["mirror_bytes"]
    bound = "holds" if shadow["bound_holds"] else "DOES NOT HOLD"
    return [
        f"shadow    {shadow['protection']} · {bytes_text(shadow['parity_bytes'])} parity + "
        f"{bytes_text(shadow['mirror_bytes'])} mirrors of {bytes_text(shadow['budget_bytes'])}",
        f"          {count_text(shadow['sealed_blocks'], 'sealed block')}, {shadow['coded_blocks']} coded · "
        f"{shadow['tail_blocks']} tail · {shadow['backlog_blocks']} waiting · "
        f"{shadow['unprotected_blocks']} unprotected",
        f"          bound {bytes_text(held)} <= {bytes_text(shadow['bound_bytes'])}: {bound}",
    ]


def _weights_lines(state: Mapping[str, Any]) -> list[str]:
    """Where weights are: the model's on the disk, those of all models in memory."""
    disk, memory = state.get("weights_bytes", 0), state["weights"]["memory"]
    if memory is None:
        return [f"weights   {bytes_text(disk)} on disk · none kept in memory"]
    return [
        f"weights   {bytes_text(disk)} on disk · in memory, of all models, {bytes_text(memory['used_bytes'])} of "
        f"{bytes_text(memory['budget_bytes'])}: {bytes_text(memory['file_bytes'])} files, "
        f"{bytes_text(memory['rank_bytes'])} ranks",
        f"          {bytes_text(memory['referenced_bytes'])} in use, {bytes_text(memory['pinned_bytes'])} pinned · "
        f"{count_text(memory['hits_total'], 'hit')}, {memory['misses_total']} misses, {memory['evictions_total']} evictions",
    ]


def _scrub_lines(scrub: Mapping[str, Any]) -> list[str]:
    """What was compared with its checksums, and what came of it."""
    if not scrub["rate_bytes_s"]:
        return ["scrub     off"]
    kv, frames = scrub["kv"], scrub["frames"]
    wrong = {part: scrub[f"{part}_mismatches_total"] for part in ("kv", "mirror", "parity")}
    lines = [
        f"scrub     {bytes_text(scrub['bytes_total'])} compared, at most {bytes_text(scrub['rate_bytes_s'])}/s · "
        f"live KV {kv['rounds']} times and {kv['blocks_done']}/{kv['blocks']} blocks · "
        f"mirrors and parity {frames['rounds']} times and {frames['blocks_done']}/{frames['blocks']}",
        f"          wrong: {wrong['kv']} KV, {wrong['mirror']} mirrors, {wrong['parity']} parity · "
        f"{scrub['repaired_total']} repaired, {scrub['refused_total']} given up, {scrub['waiting']} waiting",
    ]
    if scrub["kv_nan_total"] or scrub["kv_inf_total"]:
        lines.append(f"          KV holds {scrub['kv_nan_total']} NaN and {scrub['kv_inf_total']} infinities")
    return lines


def _recovery_lines(state: Mapping[str, Any]) -> list[str]:
    total, last = state["recoveries_total"], state.get("last_recovery")
    if not last:
        return ["recovered never"]
    ranks = ", ".join(map(str, last["lost_ranks"]))
    outcome = "" if last["ok"] else " · FAILED"
    return [
        f"recovered {count_text(total, 'time')}; last: rank {ranks} by {last['path']} in "
        f"{milliseconds_text(last['total_ms'])}{outcome}",
        *([f"          {last['reason']}"] if last.get("reason") else []),
        f"          {phases_line(last['phases_ms'])}",
        f"          {rebuilt_line(last)}",
    ]


def render(state: Mapping[str, Any]) -> str:
    """The table for people."""
    blocks = [
        _server_lines(state),
        _rank_lines(state),
        _shadow_lines(state["shadow"]),
        *([_weights_lines(state)] if "weights" in state else []),
        *([_scrub_lines(state["scrub"])] if "scrub" in state else []),
        _recovery_lines(state),
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks)


def main(argv: Sequence[str]) -> int:
    """Run the verb; raises GhostserveError."""
    parser = new_parser(
        "status", "Show a running server's workers, shadow and recoveries; works during an outage."
    )
    add_server_options(parser)
    options = parser.parse_args(argv)
    state = admin_of(options).status()
    print(json.dumps(state, separators=(",", ":")) if options.json else render(state))
    return 0
