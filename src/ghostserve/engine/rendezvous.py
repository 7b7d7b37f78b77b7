"""Where ranks meet to form their groups: a key-value store in the engine core, on loopback, gone afterwards.

torch's file store is polled every 10 ms, and a group takes several rounds through it: vLLM's twenty groups took 130 ms
to form, with this one a quarter of that. torch's own `tcp://` would make rank 0 the host, which may be the one that died.
"""

from __future__ import annotations

import datetime
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.rendezvous import register_rendezvous_handler

SCHEME = "ghostserve"
HOST = "127.0.0.1"


class Meeting:
    """The store for one formation of the groups. `url` is what ranks take as their init method."""

    def __init__(self, ranks: int) -> None:
        with socket.socket() as listener:  # by hand: the store itself would listen on all addresses
            listener.bind((HOST, 0))
            listener.listen(2 * ranks)
            port = listener.getsockname()[1]
            self._store: Store | None = TCPStore(
                HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
            )
        self.url = f"{SCHEME}://{HOST}:{port}"

    def close(self) -> None:
        """Everybody has met, or nobody will: whoever still waits gets an error. May be called again."""
        self._store = None


def _join(url: str, timeout: datetime.timedelta, **_: Any) -> Iterator[tuple[Store, int, int]]:
    """torch's rendezvous handler for our scheme; torch adds rank and world size to the URL."""
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    rank, ranks = int(query["rank"][0]), int(query["world_size"][0])
    assert parts.hostname is not None
    assert parts.port is not None
    yield TCPStore(parts.hostname, parts.port, ranks, is_master=False, timeout=timeout), rank, ranks
    raise RuntimeError("ranks meet once; to meet again they are given another address")


register_rendezvous_handler(SCHEME, _join)
