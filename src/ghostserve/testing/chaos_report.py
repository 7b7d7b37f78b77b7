"""What a chaos run found, what of it must not be, and how it is told. Pure.

Violations are of the promise (a token lost, repeated or changed, a request that failed, a server that does not come
back), of cleanliness (something of it stays or grows), and of the mix: a server that answers every loss by computing
anew gives the same tokens, and is not what this is about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ghostserve.arena.fault_kinds import FaultKind
from ghostserve.testing.oracle import Verdict, compare_choices
from ghostserve.types import RecoveryPath

REBUILD_SHARE_MIN = (
    0.8  # of losses of one rank with nothing else wrong; catching up after another fault takes time
)
SINGLE_LOSSES_MIN = 3  # fewer say nothing about a share
DESCRIPTORS_SLACK = 12  # log files, sockets of a request just ended
MEMORY_SLACK_BYTES = 256 << 20

Tokens = Mapping[int, Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One injection: what of it struck, with how many streams in mid-answer, and what the server did."""

    kinds: tuple[FaultKind, ...]  # that struck and count
    told: str  # for people: the plan
    at_s: float
    settled_s: float
    decoding: int
    single_loss: bool
    recoveries: tuple[Mapping[str, Any], ...]

    @property
    def lost_ranks(self) -> int:
        return sum(len(report["lost_ranks"]) for report in self.recoveries)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What the server holds when nothing runs. By process title, of those that live from start to end."""

    processes: int
    orphaned_names: int  # of shared memory, that no process of it maps any more
    descriptors: Mapping[str, int]
    memory_bytes: Mapping[str, int]


@dataclass(slots=True)
class Tally:
    """Grows while the run goes on."""

    requests: int = 0
    requests_left: int = 0  # whose client went away
    tokens: int = 0
    tokens_lost: int = 0
    tokens_duplicated: int = 0
    tokens_changed: int = 0
    differences: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # requests with an error, and what ended the run
    outcomes: list[Outcome] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    before: Resources | None = None
    after: Resources | None = None
    left_behind: list[str] = field(default_factory=list)  # after the server's end

    def judge(
        self, number: int, reference: Tokens, tokens: Tokens, *, error: str | None, aborted: bool
    ) -> None:
        """One answer, against that of the same request without faults; one that was left is judged by what it has."""
        self.requests += 1
        self.tokens += sum(map(len, tokens.values()))
        if error is not None:
            self.failures.append(f"request {number}: {error}")
            return
        if aborted:
            self.requests_left += 1
            reference = {
                index: reference[index][: len(ids)] for index, ids in tokens.items() if index in reference
            }
        self._note(number, compare_choices(reference, tokens))

    def _note(self, number: int, verdict: Verdict) -> None:
        self.tokens_lost += verdict.tokens_lost
        self.tokens_duplicated += verdict.tokens_duplicated
        self.tokens_changed += verdict.tokens_changed
        if not verdict.identical:
            self.differences.append(
                f"request {number}: from token {verdict.first_difference} on {verdict.tokens_lost} lost, "
                f"{verdict.tokens_duplicated} duplicated, {verdict.tokens_changed} changed"
            )

    # -- figures ---------------------------------------------------------------------------------------

    def faults(self) -> Counter[FaultKind]:
        """Those that count, by kind."""
        return Counter(kind for outcome in self.outcomes for kind in outcome.kinds)

    def paths(self) -> Counter[str]:
        """Recoveries from a loss, by how the KV came back."""
        return Counter(
            str(report["path"])
            for outcome in self.outcomes
            for report in outcome.recoveries
            if report["lost_ranks"]
        )

    def rebuild_share(self) -> tuple[int, int]:
        """Of recoveries from a single loss with nothing else wrong: (by rebuild, all)."""
        reports = [
            report
            for outcome in self.outcomes
            if outcome.single_loss
            for report in outcome.recoveries
            if report["lost_ranks"]
        ]
        return sum(report["path"] == RecoveryPath.REBUILD.value for report in reports), len(reports)

    def outages_s(self) -> list[float]:
        """The longest silence of any stream around each injection that lost a rank, shortest first."""
        found = []
        for outcome in self.outcomes:
            if not outcome.lost_ranks:
                continue
            around = [
                until_s - since_s
                for since_s, until_s in self.gaps
                if since_s < outcome.settled_s and until_s > outcome.at_s
            ]
            if around:
                found.append(max(around))
        return sorted(found)


def violations(tally: Tally) -> list[str]:
    """What must not be, as sentences; empty if all is well."""
    found = [*tally.failures, *tally.differences]
    rebuilt, losses = tally.rebuild_share()
    if losses >= SINGLE_LOSSES_MIN and rebuilt < REBUILD_SHARE_MIN * losses:
        found.append(
            f"of {losses} losses of one rank only {rebuilt} were rebuilt, {REBUILD_SHARE_MIN:.0%} are expected: the "
            "server computes anew what it could restore"
        )
    found += [f"left behind: {name}" for name in tally.left_behind]
    if tally.before is not None and tally.after is not None:
        found += _growth(tally.before, tally.after)
    return found


def _growth(before: Resources, after: Resources) -> list[str]:
    found = []
    if after.processes > before.processes:
        found.append(f"{after.processes} processes where there were {before.processes}")
    if after.orphaned_names > before.orphaned_names:
        found.append(
            f"{after.orphaned_names} names of shared memory that nobody uses, before {before.orphaned_names}"
        )
    for title, count in after.descriptors.items():
        if count > before.descriptors.get(title, count) + DESCRIPTORS_SLACK:
            found.append(f"{title}: {count} descriptors where there were {before.descriptors[title]}")
    for title, size in after.memory_bytes.items():
        if size > before.memory_bytes.get(title, size) + MEMORY_SLACK_BYTES:
            grown_mib = (size - before.memory_bytes[title]) >> 20
            found.append(f"{title}: {grown_mib} MiB more memory than before")
    return found


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest of the sorted values that `share` of them do not exceed; None if there are none."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else None


def as_document(tally: Tally, *, seed: int, wall_s: float) -> dict[str, Any]:
    """All of it as plain values."""
    outages_s = tally.outages_s()
    rebuilt, losses = tally.rebuild_share()
    return {
        "ok": not violations(tally),
        "violations": violations(tally),
        "seed": seed,
        "wall_s": round(wall_s, 1),
        "requests": tally.requests,
        "requests_left_by_their_client": tally.requests_left,
        "requests_failed": len(tally.failures),
        "tokens": tally.tokens,
        "tokens_lost": tally.tokens_lost,
        "tokens_duplicated": tally.tokens_duplicated,
        "tokens_changed": tally.tokens_changed,
        "faults": sum(tally.faults().values()),
        "faults_by_kind": {kind.value: count for kind, count in sorted(tally.faults().items())},
        "recoveries_by_path": dict(sorted(tally.paths().items())),
        "single_losses": losses,
        "single_losses_rebuilt": rebuilt,
        "outage_s": {
            "count": len(outages_s),
            **{name: percentile(outages_s, share) for name, share in _PERCENTILES.items()},
        },
        "outages_s": [round(value, 3) for value in outages_s],
        "resources": {
            name: None
            if held is None
            else {
                "processes": held.processes,
                "orphaned_names": held.orphaned_names,
                "descriptors": dict(held.descriptors),
                "memory_bytes": dict(held.memory_bytes),
            }
            for name, held in (("before", tally.before), ("after", tally.after))
        },
        "injections": [
            {
                "plan": outcome.told,
                "counted": [kind.value for kind in outcome.kinds],
                "streams_in_mid_answer": outcome.decoding,
                "seconds": round(outcome.settled_s - outcome.at_s, 3),
                "paths": [report["path"] for report in outcome.recoveries if report["lost_ranks"]],
            }
            for outcome in tally.outcomes
        ],
    }


_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def as_text(document: Mapping[str, Any]) -> str:
    """The summary, for people."""
    outage, held = document["outage_s"], document["resources"]
    kinds = ", ".join(f"{name} {count}" for name, count in document["faults_by_kind"].items()) or "none"
    paths = ", ".join(f"{name} {count}" for name, count in document["recoveries_by_path"].items()) or "none"
    lines = [
        f"requests    {document['requests']} ({document['requests_left_by_their_client']} left by their client), "
        f"{document['tokens']} tokens",
        f"faults      {document['faults']}: {kinds}",
        f"recoveries  {paths}; of single losses {document['single_losses_rebuilt']} of "
        f"{document['single_losses']} rebuilt",
        f"tokens      {document['tokens_lost']} lost, {document['tokens_duplicated']} duplicated, "
        f"{document['tokens_changed']} changed; {document['requests_failed']} requests failed",
    ]
    if outage["count"]:
        told = ", ".join(f"{name} {outage[name]:.2f} s" for name in _PERCENTILES)
        lines.append(f"outage      {told} (longest silence of a stream, {outage['count']} losses)")
    if held["before"] and held["after"]:
        names = {"processes": "processes", "orphaned_names": "unused names of shared memory"}
        told = ", ".join(f"{held['before'][n]} → {held['after'][n]} {what}" for n, what in names.items())
        grown = sum(held["after"]["descriptors"].values()) - sum(held["before"]["descriptors"].values())
        grown_mib = (
            sum(held["after"]["memory_bytes"].values()) - sum(held["before"]["memory_bytes"].values())
        ) / 2**20
        lines.append(f"leaks       {told}, {grown:+d} descriptors, {grown_mib:+.0f} MiB")
    lines += [f"VIOLATION   {text}" for text in document["violations"]]
    verdict = "no violation" if document["ok"] else f"{len(document['violations'])} violations"
    lines.append(f"{verdict} · seed {document['seed']} · {document['wall_s']:.0f} s")
    return "\n".join(lines)
