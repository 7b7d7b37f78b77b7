"""Ctrl-C and SIGTERM while the server starts, that is while the event loop is blocked in vLLM's constructors.

They wait in pyzmq's blocking poll, which swallows the first exception that a signal handler raises in it and goes
on waiting, for an engine core that the same Ctrl-C may have ended. So the signal is sent again until we are out.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

AGAIN_S = 0.2
_POLL = "zmq/sugar/poll.py"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def felt_at_once() -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM raises KeyboardInterrupt in the main thread, soon. Main thread only."""
    out = threading.Event()
    raised = False

    def interrupt(_signum: int, frame: FrameType | None) -> None:
        nonlocal raised
        still_polling = frame is not None and frame.f_code.co_filename.endswith(_POLL)
        if still_polling or not raised:  # anywhere else the first exception is on its way, cleaning up
            raised = True
            raise KeyboardInterrupt("terminated")

    main = threading.get_ident()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def again() -> None:
        signum = os.read(reader, 1)[0]
        while signum and not out.wait(AGAIN_S):
            signal.pthread_kill(main, signum)

    handlers = {signum: signal.signal(signum, interrupt) for signum in _SIGNALS}
    wakeup_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=again, daemon=True, name="ghostserve-interrupts")
    watcher.start()
    try:
        yield
    finally:
        out.set()
        signal.set_wakeup_fd(wakeup_fd)
        os.write(writer, b"\0")
        watcher.join()
        os.close(reader)
        os.close(writer)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
