"""The control page: the live state of a server, readable by any of its processes without asking another.

A segment of fixed size. Reading never waits for a writer, so `status`, `/ui` and metrics answer during an
outage. Each item has one writer at a time; counters have a lane per process instead, so that adding needs no
lock between processes and no count is lost.

        0  magic · version · epoch · keeper pid · keeper given up · last step
      128  switches            u64 each
      512  faults
     4096  stamps              a shared record per rank
    12288  marks               16 f64 per rank
    20480  counters            a lane of 64 u64 per writer
    57344  state document      a shared record
   262144  progress            8 u64 per rank
   266240  ledger              counts by label, histograms (`ledger.py`)
   270336  events              a ring per writer and class (`event_rings.py`)
"""

from __future__ import annotations

import json
import struct
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from ghostserve.arena.event_rings import RINGS_BYTES, EventRings, Teller
from ghostserve.arena.faults import TABLE_BYTES, FaultTable
from ghostserve.arena.ledger import LEDGER_BYTES, Ledger
from ghostserve.arena.memfd import Segment
from ghostserve.arena.names import (
    Counter,
    Fault,
    FaultAction,
    FaultPoint,
    Mark,
    Progress,
    Stamp,
    StampStatus,
    Switch,
)
from ghostserve.arena.records import SharedRecord, fence
from ghostserve.arena.shared_group import PROGRESS_WORDS
from ghostserve.errors import ProtocolError, UsageError

__all__ = [
    "CONTROL_BYTES", "LANE_ENGINE", "LANE_FRONT", "LANE_KEEPER", "RANKS_MAX", "STATE_MAX_BYTES",
    "ControlPage", "Counter", "Fault", "FaultAction", "FaultPoint", "Mark", "Progress", "Stamp", "StampStatus", "Switch",
]  # fmt: skip

CONTROL_BYTES = (264 << 10) + -(-RINGS_BYTES // 4096) * 4096
RANKS_MAX = 64
STATE_MAX_BYTES = 96 << 10
LANE_FRONT, LANE_ENGINE, LANE_KEEPER = range(RANKS_MAX, RANKS_MAX + 3)  # lanes below are the ranks'

VERSION = 7
_MAGIC = int.from_bytes(b"ghostsrv", "little")
_MASK = (1 << 64) - 1
_MAGIC_WORD, _VERSION_WORD, _EPOCH_WORD, _KEEPER_PID_WORD, _KEEPER_OFF_WORD, _LAST_STEP_WORD = range(6)
_TELLERS = {LANE_ENGINE: Teller.ENGINE, LANE_FRONT: Teller.FRONT}
_SWITCHES, _FAULTS, _STAMPS, _MARKS, _COUNTERS, _STATE, _PROGRESS, _LEDGER, _EVENTS = (
    128,
    512,
    4096,
    12288,
    20480,
    57344,
    262144,
    266240,
    270336,
)
_STAMP_BYTES, _MARKS_PER_RANK, _LANE_WORDS, _LANES, _PROGRESS_WORDS = 128, 16, 64, RANKS_MAX + 3, 8
_STAMP = struct.Struct("<QQQd")  # epoch, step, status, at_s


class ControlPage:
    """A process's view of the control segment.

    `lane` says who counts: a rank's number, LANE_FRONT, LANE_ENGINE or LANE_KEEPER; None: it only reads.
    """

    def __init__(self, segment: Segment, *, lane: int | None = None) -> None:
        """ProtocolError unless `segment` was formatted by this version."""
        if segment.size_bytes != CONTROL_BYTES:
            raise ProtocolError(f"a control page of {segment.size_bytes} bytes, {CONTROL_BYTES} expected")
        view = segment.array.data
        self._words = view.cast("Q")
        magic, version = self._words[_MAGIC_WORD], self._words[_VERSION_WORD]
        if magic != _MAGIC or version != VERSION:
            raise ProtocolError(
                f"a control page of magic {magic:016x}, version {version}; {VERSION} expected"
            )
        if lane is not None and not 0 <= lane < _LANES:
            raise UsageError(f"lane {lane}; 0 to {_LANES - 1} exist")
        self._lane = lane
        self._lock = threading.Lock()
        self._faults = FaultTable(view[_FAULTS : _FAULTS + TABLE_BYTES])
        self._stamps = [
            SharedRecord(view[at : at + _STAMP_BYTES], payload_max_bytes=_STAMP.size)
            for at in range(_STAMPS, _MARKS, _STAMP_BYTES)
        ]
        self._marks = view[_MARKS:_COUNTERS].cast("d")
        lanes = segment.array[_COUNTERS : _COUNTERS + 8 * _LANE_WORDS * _LANES]
        self._counters: npt.NDArray[np.uint64] = lanes.view(np.uint64).reshape(_LANES, _LANE_WORDS)
        progress = segment.array[_PROGRESS : _PROGRESS + 8 * _PROGRESS_WORDS * RANKS_MAX]
        self._progress: npt.NDArray[np.uint64] = progress.view(np.uint64).reshape(RANKS_MAX, _PROGRESS_WORDS)
        self.events = EventRings(
            view[_EVENTS : _EVENTS + RINGS_BYTES], teller=None if lane is None else _TELLERS.get(lane)
        )
        state_bytes = SharedRecord.required_bytes(STATE_MAX_BYTES)
        self.ledger = Ledger(view[_LEDGER : _LEDGER + LEDGER_BYTES])
        self._state = SharedRecord(view[_STATE : _STATE + state_bytes], payload_max_bytes=STATE_MAX_BYTES)

    @staticmethod
    def format(segment: Segment) -> None:
        """Make a fresh segment of CONTROL_BYTES a control page: done once, by the process that created it."""
        words = segment.array.data.cast("Q")
        words[_VERSION_WORD] = VERSION
        fence()
        words[_MAGIC_WORD] = _MAGIC

    # -- single values, each with one writer -----------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Raised by the engine core at each loss."""
        return self._words[_EPOCH_WORD]

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._words[_EPOCH_WORD] = epoch

    @property
    def keeper_pid(self) -> int | None:
        """The keeper process; None while there is none. Written by the front process."""
        return self._words[_KEEPER_PID_WORD] or None

    @keeper_pid.setter
    def keeper_pid(self, pid: int | None) -> None:
        self._words[_KEEPER_PID_WORD] = pid or 0

    @property
    def keeper_given_up(self) -> bool:
        """The keeper died too often and is left alone for a while: sealed blocks stay mirrored, none is coded, no frame
        that was given up comes back.
        """
        return bool(self._words[_KEEPER_OFF_WORD])

    @keeper_given_up.setter
    def keeper_given_up(self, given_up: bool) -> None:
        self._words[_KEEPER_OFF_WORD] = int(given_up)

    @property
    def last_step_s(self) -> float | None:
        """Monotonic time at which a step was accepted last; None before the first. Written by the engine core."""
        return self._words[_LAST_STEP_WORD] / 1e9 or None

    @last_step_s.setter
    def last_step_s(self, now_s: float) -> None:
        self._words[_LAST_STEP_WORD] = int(now_s * 1e9)

    def get_switch(self, switch: Switch) -> bool:
        return bool(self._words[_SWITCHES // 8 + switch])

    def set_switch(self, switch: Switch, on: bool) -> None:
        self._words[_SWITCHES // 8 + switch] = int(on)

    # -- counters --------------------------------------------------------------------------------------

    def get(self, counter: Counter) -> int:
        """The sum over all lanes."""
        return int(self._counters[:, counter].sum())

    def set(self, counter: Counter, value: int) -> None:
        """Write a counter that no other process writes; with others it is `add` only."""
        self._own_lane()[counter] = value & _MASK

    def add(self, counter: Counter, amount: int = 1) -> None:
        """Add to this process's lane; any thread of it may."""
        lane = self._own_lane()
        with self._lock:
            lane[counter] = (int(lane[counter]) + amount) & _MASK

    def counters(self) -> dict[str, int]:
        """All counters by lower-case name."""
        sums = self._counters.sum(axis=0)
        return {counter.name.lower(): int(sums[counter]) for counter in Counter}

    # -- state document --------------------------------------------------------------------------------

    def write_state(self, doc: dict[str, Any]) -> None:
        """Publish a document for `status` and `/ui`; one process does. BudgetExceeded if too long."""
        self._state.write(json.dumps(doc, separators=(",", ":")).encode())

    def read_state(self) -> dict[str, Any] | None:
        """The last whole document; None if there is none yet. Never torn, never waits for the writer."""
        payload = self._state.read()
        if payload is None:
            return None
        doc: dict[str, Any] = json.loads(payload)
        return doc

    # -- ranks -----------------------------------------------------------------------------------------

    def stamp(self, rank: int, *, epoch: int, step: int, status: StampStatus, now_s: float) -> None:
        """Written by the rank itself, after what it speaks of (mirrors, staged records) was written."""
        fence()
        self._stamps[rank].write(_STAMP.pack(epoch, step, status, now_s))

    def read_stamp(self, rank: int) -> Stamp:
        """The rank's last whole stamp; it survives the rank, also one that died while stamping."""
        payload = self._stamps[rank].read()
        if payload is None:
            return Stamp(epoch=0, step=0, status=StampStatus.NONE, at_s=0.0)
        epoch, step, status, at_s = _STAMP.unpack(payload)
        return Stamp(epoch=epoch, step=step, status=StampStatus(status), at_s=at_s)

    def progress_words(self, rank: int) -> npt.NDArray[np.uint64]:
        """Where the rank's collectives note how far it is: the first `shared_group.PROGRESS_WORDS` of its line."""
        return self._progress[rank, :PROGRESS_WORDS]

    def add_step_time(self, rank: int, step_s: float) -> None:
        """Written by the rank itself: a step took so long there, waiting for peers included."""
        at = _PROGRESS // 8 + rank * _PROGRESS_WORDS + PROGRESS_WORDS
        self._words[at] += int(step_s * 1e9)
        self._words[at + 1] += 1

    def progress(self, rank: int) -> Progress:
        """How far a rank is, as it says itself; no word is torn, but they may be of different moments."""
        met, waited_ns, waiting, in_steps_ns, steps = self._progress[rank, : PROGRESS_WORDS + 2].tolist()
        return Progress(
            met=met,
            waited_s=waited_ns / 1e9,
            waiting=bool(waiting),
            in_steps_s=in_steps_ns / 1e9,
            steps=steps,
        )

    def clear_progress(self, rank: int) -> None:
        """Before a new process takes the rank."""
        self._progress[rank] = 0

    def mark(self, rank: int, mark: Mark, now_s: float) -> None:
        """Note when this start of the rank reached `mark`."""
        self._marks[rank * _MARKS_PER_RANK + mark] = now_s

    def marks(self, rank: int) -> dict[Mark, float]:
        """The marks reached, in seconds of monotonic time."""
        found = {mark: self._marks[rank * _MARKS_PER_RANK + mark] for mark in Mark}
        return {mark: at_s for mark, at_s in found.items() if at_s}

    def clear_marks(self, rank: int) -> None:
        """Before a new process takes the rank."""
        for index in range(rank * _MARKS_PER_RANK, (rank + 1) * _MARKS_PER_RANK):
            self._marks[index] = 0.0

    # -- faults ----------------------------------------------------------------------------------------

    def arm_fault(self, fault: Fault) -> int:
        """Arm a fault (front process only) and return its entry; see `FaultTable`."""
        return self._faults.arm(fault)

    def take_fault(self, point: FaultPoint, rank: int) -> Fault | None:
        """What the caller has to do to itself here, if anything; counted as having struck."""
        fault = self._faults.take(point, rank)
        if fault is not None and self._lane is not None:
            self.add(Counter.FAULTS_STRUCK_TOTAL)
        return fault

    def disarm_faults(self) -> None:
        self._faults.disarm()

    def armed_faults(self) -> list[Fault]:
        return self._faults.armed()

    def _own_lane(self) -> npt.NDArray[np.uint64]:
        if self._lane is None:
            raise UsageError("this control page was opened without a lane, so it cannot count")
        lane: npt.NDArray[np.uint64] = self._counters[self._lane]
        return lane
