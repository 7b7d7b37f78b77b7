"""`python -m ghostserve.engine.load_trials FD`: the process behind `ghostserve bench load`. Each trial is a fork of it, one process
for each rank: as fresh as a new process, with vLLM's imports done.

It talks over a socket of packets, one JSON object each. Asked `{"method": ..., "model": ..., "ranks": n, ...}` it answers `ready` from each
rank once the model is built, and waits for as many `go`; `loaded` from each once the weights are there, and waits for `go` again, so that
all ranks live while memory is counted; then the figures of each, and `ended`. Whoever asks decides when `go` is: the page cache is emptied
in between. It ends when the socket does.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import socket
import sys
import traceback
from typing import Any

PACKET_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1


class Line:
    """One end of the socket."""

    def __init__(self, fileno: int) -> None:
        self._socket = socket.socket(fileno=fileno)

    def say(self, kind: str, **what: Any) -> None:
        self._socket.send(json.dumps({"kind": kind, **what}).encode())

    def hear(self) -> dict[str, Any] | None:
        """The next packet; None once the other end is closed."""
        packet = self._socket.recv(PACKET_BYTES)
        return json.loads(packet) if packet else None

    def wait_for_go(self) -> None:
        if self.hear() is None:
            os._exit(1)  # nobody is interested any more


def main(argv: list[str]) -> int:
    """Serve trials until the socket ends."""
    line = Line(int(argv[0]))
    _preload()
    gc.collect()
    gc.freeze()  # as the engine's fork server: or each child would go through our heap while it loads
    line.say("started")
    while (task := line.hear()) is not None:
        children = [_fork(line, task, rank) for rank in range(task["ranks"])]
        line.say("ended", status=[os.waitpid(child, 0)[1] for child in children])
    return 0


def _preload() -> None:
    import ghostserve.engine.load_trial
    import ghostserve.engine.load_trial_raw
    import ghostserve.engine.loader
    import ghostserve.engine.preload  # noqa: F401


def _fork(line: Line, task: dict[str, Any], rank: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _trial(line, task, rank)
        status = 0
    except BaseException as error:
        traceback.print_exc()
        line.say("failed", rank=rank, error=f"{type(error).__name__}: {error}"[:2000])
    finally:
        sys.stderr.flush()
        os._exit(status)  # the model's memory needs no tidying


def _trial(line: Line, task: dict[str, Any], rank: int) -> None:
    """Say `ready` and wait, load, say `loaded` and wait, give the figures."""
    import torch

    from ghostserve.engine.load_meter import memory
    from ghostserve.engine.load_trial import model_trial
    from ghostserve.engine.load_trial_raw import raw_trial

    def when_ready() -> None:
        line.say("ready")
        line.wait_for_go()

    os.environ.update(task["environment"])
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // task["ranks"]))
    loaded, figures = raw_trial(task, when_ready) if task["raw"] else model_trial(task, rank, when_ready)
    line.say("loaded")
    line.wait_for_go()
    line.say("figures", rank=rank, **figures, **memory())
    del loaded  # not before its memory was counted


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
