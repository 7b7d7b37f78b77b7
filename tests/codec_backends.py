"""The backends that this machine has, and how to make arrays for each: what the contract test runs over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ghostserve.codec.base import Backend, Bytes
from ghostserve.codec.isal_backend import IsalBackend, find_isal
from ghostserve.codec.native_backend import NativeBackend
from ghostserve.codec.numpy_backend import NumpyBackend
from ghostserve.codec.reference import ReferenceBackend
from ghostserve.native import load


@dataclass(frozen=True)
class Candidate:
    """A backend, and its arrays to and from numpy. `to` may share memory, `back` may, too."""

    label: str
    make: Callable[[], Backend[Any]]
    to: Callable[[Bytes], Any] = lambda array: array
    back: Callable[[Any], Bytes] = lambda array: array


def _torch(array: Bytes) -> Any:
    import torch

    return torch.from_numpy(array)


def candidates() -> list[Candidate]:
    """All that can work here. The native library is part of every install, so that it is missing is an error."""
    found = [
        Candidate("reference", ReferenceBackend),
        Candidate("numpy", NumpyBackend),
        *(
            Candidate(f"native-{path.name.lower()}", lambda path=path: NativeBackend(path=path))
            for path in load().paths
        ),
        Candidate("native-threads", lambda: NativeBackend(threads=2)),
        Candidate("torch", _torch_backend, to=_torch, back=lambda tensor: tensor.numpy()),
    ]
    if find_isal() is not None:
        found.append(Candidate("isal", IsalBackend))
    return found


def _torch_backend() -> Backend[Any]:
    from ghostserve.codec.torch_backend import TorchBackend

    return TorchBackend()


def random_bytes(count: int, length: int, *seed: int) -> list[Bytes]:
    """`count` arrays of random bytes, the same for the same arguments."""
    rng = np.random.default_rng([count, length, *seed])
    return [rng.integers(0, 256, length, dtype=np.uint8) for _ in range(count)]
