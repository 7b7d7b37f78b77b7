"""The definition: one table look-up for each byte and coefficient. Slow and clear; every backend equals it bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ghostserve.codec.base import Bytes
from ghostserve.codec.field import PRODUCTS, Elements
from ghostserve.codec.host import HostArrays


class ReferenceBackend(HostArrays):
    """`Backend` by tables."""

    name = "reference"

    def combine(
        self,
        matrix: Elements,
        sources: Sequence[Sequence[Bytes]],
        targets: Sequence[Sequence[Bytes]],
        *,
        accumulate: bool,
    ) -> None:
        """See `Backend.combine`."""
        for segment_sources, segment_targets in zip(sources, targets, strict=True):
            for row, target in zip(matrix, segment_targets, strict=True):
                total = target.copy() if accumulate else np.zeros_like(target)
                for coefficient, source in zip(row, segment_sources, strict=True):
                    total ^= PRODUCTS[coefficient, source]
                target[:] = total
