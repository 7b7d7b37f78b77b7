"""The file of `--uds`: whose goes, and whose stays."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ghostserve.engine.unix_socket import is_stale, owned


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


def bind(path: str) -> socket.socket:
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(path)
    return bound


def test_what_was_bound_inside_goes(path: str) -> None:
    for _ in range(2):
        with owned(path), bind(path):
            assert os.path.exists(path)
        assert not os.path.exists(path)
    with owned(None):
        pass


def test_the_file_of_a_server_that_was_killed_goes(path: str) -> None:
    bind(path).close()
    with pytest.raises(OSError, match="in use"):
        bind(path)
    assert is_stale(path)
    with owned(path), bind(path):
        assert not is_stale(path), "it starts: it has bound, and does not listen yet"


def test_what_is_anothers_stays(path: str, tmp_path: Path) -> None:
    """A server's, before and after it listens; and what is no socket."""
    with bind(path) as other:
        for _ in range(2):
            with pytest.raises(OSError, match="in use"), owned(path), bind(path):
                pass
            assert os.path.exists(path)
            other.listen()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="in use"), owned(str(tmp_path / "file")), bind(str(tmp_path / "file")):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_where_it_cannot_be_known_it_stays(path: str, tmp_path: Path) -> None:
    bind(path).close()
    assert not is_stale(path, bound=tmp_path / "no-such-list")
