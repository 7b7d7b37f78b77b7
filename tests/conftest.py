"""What holds for every test: order, a sign of life, and fixtures that several files share.

Fast tests run first and tests marked `real` last, so that a simple mistake shows in seconds. While a test is silent for
long (a server starts), a line on the terminal says which one is running.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ghostserve.arena.control import CONTROL_BYTES, LANE_ENGINE, ControlPage
from ghostserve.arena.memfd import Segment
from ghostserve.weights import pool_start, runtime_dir
from weights_pool_kit import Place

SILENCE_MAX_S = 8.0
TERMINAL = pytest.StashKey[int]()
RUNTIME_DIR = pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--serving",
        default="v1-async",
        help="model runner and scheduling of the server that has the whole matrix",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Keep a way to the terminal that capturing, which redirects descriptor 1, does not close; take Ctrl-C as in a terminal."""
    config.stash[TERMINAL] = os.dup(1)
    # A shell's background ignores Ctrl-C, and nohup hanging up; servers under test would inherit that.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    # Weights in host memory are kept for this session's servers alone, and end with it.
    config.stash[RUNTIME_DIR] = Path(tempfile.mkdtemp(prefix="ghostserve-tests-"))
    os.environ[runtime_dir.RUNTIME_DIR_ENV] = str(config.stash[RUNTIME_DIR])


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[TERMINAL])
    pool_start.stop_holder(config.stash[RUNTIME_DIR])
    shutil.rmtree(config.stash[RUNTIME_DIR], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast, then real, then slow; within each as collected, so that tests sharing a server stay together."""
    items.sort(
        key=lambda item: (
            item.get_closest_marker("slow") is not None,
            item.get_closest_marker("real") is not None,
        )
    )


@contextlib.contextmanager
def sign_of_life(what: str, descriptor: int, silence_max_s: float = SILENCE_MAX_S) -> Iterator[None]:
    """Write a line every `silence_max_s` for as long as the body runs."""
    done = threading.Event()

    def tell() -> None:
        waited_s = 0.0
        while not done.wait(silence_max_s):
            waited_s += silence_max_s
            os.write(descriptor, f"\n  ... {what}: {waited_s:.0f} s\n".encode())

    teller = threading.Thread(target=tell, name="sign-of-life", daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """Importing torch takes its time. What it left is here to stay: a garbage collection need not walk it again."""
    with sign_of_life("collecting tests", session.config.stash[TERMINAL]):
        collected = yield
    gc.freeze()
    return collected


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Say which test is running, while it is."""
    with sign_of_life(item.nodeid, item.config.stash[TERMINAL]):
        return (yield)


@pytest.fixture
def page() -> Iterator[ControlPage]:
    """A real control page, as the engine core writes it."""
    segment = Segment.create("test", CONTROL_BYTES)
    ControlPage.format(segment)
    yield ControlPage(segment, lane=LANE_ENGINE)
    segment.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A runtime directory for a holder of its own, which ends with the test."""
    place = Place(tmp_path / "run")
    yield place
    place.close()
