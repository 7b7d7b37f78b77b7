"""The only file that reads the time; everything else is handed a float."""

import time


def monotonic_s() -> float:
    """Seconds on CLOCK_MONOTONIC: comparable between the processes of one machine."""
    return time.monotonic()


def wall_s() -> float:
    """Seconds since the epoch, for people; never used for a decision."""
    return time.time()


def sleep_s(seconds: float) -> None:
    """Block this thread."""
    time.sleep(seconds)


def cpu_s() -> float:
    """CPU seconds that this process has used."""
    return time.process_time()


def thread_cpu_s() -> float:
    """CPU seconds that this thread has used."""
    return time.thread_time()
