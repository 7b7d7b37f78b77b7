"""Which backend computes in host memory when nobody names one."""

from __future__ import annotations

import logging

from ghostserve.codec.base import Backend, Bytes
from ghostserve.codec.erasure import ErasureCodec
from ghostserve.codec.native_backend import NativeBackend
from ghostserve.codec.numpy_backend import NumpyBackend

logger = logging.getLogger(__name__)

_warned: set[str] = set()


def host_backend(*, threads: int | None = 1) -> Backend[Bytes]:
    """The native library, or numpy where it is missing or broken: that is said once."""
    try:
        return NativeBackend(threads=threads)
    except OSError as error:
        reason = str(error)
    if reason not in _warned:
        _warned.add(reason)
        logger.warning(
            "the native codec library is not usable (%s): parity is computed with numpy, "
            "which is slow with --parity-shards above 1. Remedy: python -m ghostserve.native.build",
            reason,
        )
    return NumpyBackend()


def host_codec(n: int, m: int, *, threads: int | None = 1) -> ErasureCodec[Bytes]:
    """The code with n data and m parity shards in host memory. UsageError if there is none."""
    return ErasureCodec(n, m, host_backend(threads=threads))
