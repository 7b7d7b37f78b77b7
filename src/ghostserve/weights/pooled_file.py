"""One weights file by way of the pool: of the processes that want it at once, one reads it, and all use its bytes.

    lease     read the whole file into the pool's memory, say how far it is, publish it
    follow    use what is ready; if the reader dies, become it; if it stands still, read alone
    hit       all of it is there
    refused   read alone

What is handed out lies in a private mapping: whoever changes a tensor in place changes a copy.
"""

from __future__ import annotations

import hashlib
import json
import logging

from ghostserve.errors import PoolError
from ghostserve.weights.arriving import Arriving
from ghostserve.weights.bounded import STALL_S as BOUND_S
from ghostserve.weights.bounded import answer_within
from ghostserve.weights.checksums import Checksums
from ghostserve.weights.destination import Bytes, Memory
from ghostserve.weights.mapping import Mapped
from ghostserve.weights.model_files import WeightsFile
from ghostserve.weights.own_file import OwnFile
from ghostserve.weights.pool import Follow, Hit, Lease, Outcome, Pool, Refused
from ghostserve.weights.ranges import Range
from ghostserve.weights.recycled import Recycler
from ghostserve.weights.source import Source
from ghostserve.weights.watermark import Watermark

logger = logging.getLogger(__name__)

STALL_S = 10.0
"""How long a reader in another process may make no progress; then its file is read a second time rather than waited for."""
SUCCESSION_S = 2.0  # until the holder has seen that the reader is gone
DISK_BYTES_PER_S = 1e9  # what a file would cost to have again: files differ by their size


def file_key(file: WeightsFile) -> str:
    """The name of its image in the pool: other bytes, another name."""
    text = json.dumps([file.name, file.nbytes, file.mtime_ns, file.inode, file.header.digest])
    return f"file-{hashlib.sha256(text.encode()).hexdigest()}"


def demand_unchanged(file: WeightsFile) -> None:
    """Raise a WeightsError unless the file is as it was when its header was read: who read it for us may not live to say so."""

    def look() -> None:
        source = Source(file.path, direct=False)
        try:
            source.check_unchanged(nbytes=file.nbytes, mtime_ns=file.mtime_ns)
        finally:
            source.leave()

    answer_within(BOUND_S, look, file.path)


class PooledFile:
    """See `engine.loader_files.FileBytes`."""

    def __init__(
        self,
        pool: Pool,
        file: WeightsFile,
        spans: list[tuple[int, int]],
        *,
        label: str,
        verify: Checksums | None,
        readers: int = 1,
        recycler: Recycler | None = None,
    ) -> None:
        """`spans`: the tensors that will be asked for, ascending. `readers`: so many processes load the same, this one included.

        `recycler`: for what is read alone; one of its own.
        """
        self._file, self._spans, self._verify = file, spans, verify
        self._recycler = recycler or Recycler()
        self._reading: Arriving | OwnFile | None = None
        self._shared: Mapped | None = None
        self._watermark: Watermark | None = None
        self._view: Bytes | None = None
        self._held: Hit | Lease | Follow | None = None
        cost_s = file.nbytes / DISK_BYTES_PER_S
        key = file_key(file)
        self._take(
            pool.open(key, file.nbytes, kind="file", label=label, reload_cost_s=cost_s, readers=readers)
        )

    @property
    def in_pool(self) -> bool:
        """Whether the pool has it, or is getting it, rather than this process alone."""
        return self._held is not None

    def get(self, begin: int, end: int) -> Bytes:
        while isinstance(self._held, Follow):
            assert self._watermark is not None
            if self._watermark.wait(end, timeout_s=STALL_S):
                break
            self._succeed()
        if isinstance(self._reading, OwnFile):
            return self._reading.get(begin, end)
        if self._reading is not None and begin < end:
            self._reading.until(end)
        assert self._view is not None
        return self._view[begin:end]

    @property
    def arrived(self) -> bool:
        """Whether all that was wanted is there."""
        if isinstance(self._held, Follow):
            return self._watermark is not None and self._watermark.ready_bytes == self._file.nbytes
        return self._reading is None or self._reading.arrived

    def wait(self) -> None:
        if self._reading is not None:
            self._reading.wait()
        else:
            demand_unchanged(self._file)
        if isinstance(self._held, Lease):
            self._publish(self._held)

    def settle(self) -> None:
        """Until it stays with the pool or will not: who has all bytes from another process may be ahead of its last word.

        For who wants it kept; loaders need no more than `wait`. Raises WeightsError.
        """
        while isinstance(self._held, Follow):
            self.get(self._file.nbytes - 1, self._file.nbytes)  # which may have made us the reader
            if isinstance(self._held, Follow):
                outcome = self._held.outcome(timeout_s=STALL_S)
                if outcome is None or isinstance(outcome, Refused):
                    return
                self._held = None
                self.close()
                self._take(outcome)
            self.wait()

    def close(self) -> None:
        if self._reading is not None:
            self._reading.close()
        if self._watermark is not None:
            self._watermark.close()
        if self._held is not None:
            self._held.close()
        self._held = self._watermark = self._view = self._shared = None

    # -- the four ways -----------------------------------------------------------------------------------------------

    def _take(self, opened: Outcome) -> None:
        if isinstance(opened, Refused):
            self._read_alone(opened.reason)
            return
        self._held = opened
        try:
            self._view = Mapped(opened.fd, offset=0, length=self._file.nbytes, shared=False).array()
            if isinstance(opened, Follow):
                self._watermark = opened.watermark()
            elif isinstance(opened, Lease):
                self._lead(opened)
        except (PoolError, OSError) as error:
            self.close()
            self._read_alone(str(error))

    def _lead(self, lease: Lease) -> None:
        self._shared = Mapped(lease.fd, offset=0, length=self._file.nbytes, shared=True)
        self._watermark = lease.watermark()
        self._reading = Arriving(
            self._file,
            [Range(0, self._file.nbytes, 0)],
            Memory(self._shared.array().data),
            direct=None,
            verify=self._verify,
            on_ready=self._watermark.advance,
        )

    def _succeed(self) -> None:
        """The reader makes no progress: it is gone, or not to be waited for."""
        follow = self._held
        assert isinstance(follow, Follow)
        outcome = follow.outcome(timeout_s=SUCCESSION_S)
        if outcome is not None:
            self._held = None  # what it held is that of the outcome now
        self.close()
        self._take(outcome or Refused(reason="the process that reads it stands still"))

    def _read_alone(self, reason: str) -> None:
        logger.info("weights: %s is read by this process alone: %s", self._file.name, reason)
        # Others may be doing the same: by way of the page cache the disk is asked once.
        self._reading = OwnFile(self._file, self._spans, self._recycler, direct=False, verify=self._verify)

    def _publish(self, lease: Lease) -> None:
        """Let go of the right to write, and have the pool keep it for who comes next."""
        assert self._watermark is not None
        assert self._shared is not None
        self._watermark.close()
        try:
            self._shared.make_private(lease.fd)
        except OSError as error:
            logger.info("weights: %s is not kept in the pool: %s", self._file.name, error)
            return
        published = lease.publish()
        if isinstance(published, Refused):
            logger.info("weights: %s is not kept in the pool: %s", self._file.name, published.reason)
            self._held = None
        else:
            self._held = published
