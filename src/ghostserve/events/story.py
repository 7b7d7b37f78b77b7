"""Everything that happened to one request or one rank, in order. Pure.

The story of a request has its own events and, of what happened to the server while it was open, what it had to wait
for: losses, recoveries with their phases, failed steps. The story of a rank has its own events and the recoveries that
gave it to another process.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ghostserve.errors import UsageError
from ghostserve.events.kinds import Event, PhaseBegun, PhaseEnded, RankLost, RecoveryEnded
from ghostserve.events.record import Record, at_text
from ghostserve.events.sentences import text_of

WAITED_FOR = frozenset(
    {
        *("rank_lost", "rank_fenced", "rank_taken", "epoch_raised", "recovery_ended", "server_gave_up"),
        *("phase_begun", "phase_ended", "phase_failed", "step_raised", "step_failed"),
    }
)
_RECOVERY = WAITED_FOR - {"rank_lost", "rank_fenced", "rank_taken"}
_ENDS = frozenset({"request_finished", "request_aborted", "request_failed"})
_NAMED_MAX = 5
_CHILD = re.compile(r"^\d+_")  # vLLM numbers the answers of a request with n > 1 in front


@dataclass(frozen=True, slots=True)
class Story:
    """`title` says whose; `records` by time, the first one is its beginning."""

    title: str
    records: Sequence[Record]

    def lines(self) -> list[str]:
        """For people: seconds since the beginning, then the sentence. The beginning of a phase whose end follows is left out:
        that says how long it took.
        """
        start_s = self.records[0].at_s
        shown = (f"{record.at_s - start_s:>+11.3f} s  {text_of(record.event)}" for record in self._shown())
        return [f"{self.title}, from {at_text(start_s)}", *shown]

    def _shown(self) -> list[Record]:
        ended: set[str] = set()
        shown = []
        for record in reversed(self.records):
            if isinstance(record.event, PhaseEnded):
                ended.add(record.event.phase)
            if not (isinstance(record.event, PhaseBegun) and record.event.phase in ended):
                shown.append(record)
        return shown[::-1]

    def as_dict(self) -> dict[str, object]:
        start_s = self.records[0].at_s
        return {
            "subject": self.title,
            "start": at_text(start_s),
            "events": [
                {**record.as_dict(), "since_start_s": round(record.at_s - start_s, 6)}
                for record in self.records
            ],
        }


def tell(subject: str, records: Iterable[Record]) -> Story:
    """`rank 1`, `1`, or a request's id or its beginning. UsageError if there is nothing, or more than one is meant."""
    in_order = sorted(records, key=lambda record: (record.at_s, record.seq))
    rank = re.fullmatch(r"(?:rank[ =]?)?(\d+)", subject.strip())
    return _of_rank(int(rank[1]), in_order) if rank else _of_request(subject.strip(), in_order)


def belongs_to(engine_id: str, response_id: str) -> bool:
    """Whether the engine's request is (part of) the one with that id in the response.

    vLLM appends the prompt's index to the id of a completion, and eight random characters to every one.
    """
    index = "" if response_id.startswith("chatcmpl-") else r"(?:-\d+)?"
    pattern = rf"{re.escape(response_id)}{index}(?:-[0-9a-f]{{8}})?"
    return re.fullmatch(pattern, _CHILD.sub("", engine_id)) is not None


def _of_rank(rank: int, records: Sequence[Record]) -> Story:
    chosen = []
    being_replaced = False
    for record in records:
        event = record.event
        if isinstance(event, RankLost) and event.rank == rank:
            being_replaced = True
        if event.rank == rank or (being_replaced and event.kind in _RECOVERY) or _was_lost(event, rank):
            chosen.append(record)
        if isinstance(event, RecoveryEnded):
            being_replaced = False
    if not chosen:
        raise UsageError(f"nothing is known of rank {rank}: nothing happened to it, or it is no longer kept")
    return Story(f"rank {rank}", chosen)


def _was_lost(event: Event, rank: int) -> bool:
    return isinstance(event, RecoveryEnded) and rank in event.ranks


def _of_request(subject: str, records: Sequence[Record]) -> Story:
    names = _requests_of(subject, records)
    open_now: set[str] = set()
    chosen = []
    for record in records:
        event = record.event
        if event.request in names:
            chosen.append(record)
            if event.kind in _ENDS:
                open_now.discard(event.request)
            else:
                open_now.add(event.request)
        elif open_now and event.kind in WAITED_FOR:
            chosen.append(record)
    return Story(f"request {subject if len(names) > 1 else next(iter(names))}", chosen)


def _requests_of(subject: str, records: Sequence[Record]) -> set[str]:
    """The engine's requests that are meant."""
    known = dict.fromkeys(record.event.request for record in records if record.event.request is not None)
    exact = {name for name in known if belongs_to(name, subject)}
    found = exact or {
        name for name in known if name.startswith(subject) or _CHILD.sub("", name).startswith(subject)
    }
    if not subject or not found:
        raise UsageError(f"no request {subject!r} is known: it may be no longer kept, or have another id")
    if not exact and len(found) > 1:
        some = ", ".join(sorted(found)[:_NAMED_MAX])
        raise UsageError(
            f"{len(found)} requests begin with {subject!r}: {some}{' ...' if len(found) > _NAMED_MAX else ''}"
        )
    return found
