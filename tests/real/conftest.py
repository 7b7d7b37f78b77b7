"""Servers for the real-process tests: one per configuration, shared by its cases, counted at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from real import kit

SERVERS_MAX = 12


@pytest.fixture(scope="session", autouse=True)
def _few_servers(request: pytest.FixtureRequest) -> Iterator[None]:
    """`make test` must stay cheap: a start takes 15-60 s. The slow tests need not."""
    yield
    if not any(item.get_closest_marker("slow") for item in request.session.items):
        assert len(kit.STARTED) <= SERVERS_MAX, kit.STARTED


def _serving(
    tmp_path_factory: pytest.TempPathFactory, name: str, *flags: str, serving: str
) -> Iterator[kit.Served]:
    served = kit.serve(tmp_path_factory.mktemp(name), name, *flags, serving=serving)
    try:
        yield served
    finally:
        served.server.stop()
        if served.server.poll() != 0:
            print(served.server.log_tail(lines=80))


@pytest.fixture(scope="session")
def float32(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[kit.Served]:
    """Two batches in flight unless asked for something else: with one there is less to go wrong."""
    serving = pytestconfig.getoption("--serving")
    yield from _serving(tmp_path_factory, "float32", "--dtype", "float32", "--enforce-eager", serving=serving)


@pytest.fixture
def unscrubbed(float32: kit.Served) -> Iterator[None]:
    """For a test about corruption that is met before the scrub finds it."""
    with float32.unscrubbed():
        yield
