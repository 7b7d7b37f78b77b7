"""A rank's parameters out of the pool, or into it: the way of one load.

    model built, parameters allocated
          │ open the rank's image
          ├─ it is there ─────▶ put below the parameters, private: no disk, no copy
          ├─ nobody has it, and a copy on the disk ─▶ read into the pool's memory, checked; then as above
          ├─ nobody has it ───▶ put below, shared; vLLM loads into it; compare; seal; private; published
          └─ anything else ───▶ vLLM loads into memory of its own; one line says why

What is published is what vLLM's `load_weights` left, before its post-processing, so that runs as always and nothing rounds differently.
Devices other than the CPU have memory of their own: there the image is copied (`device_image.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ghostserve.clock import monotonic_s
from ghostserve.engine.device_image import copy_in, copy_out
from ghostserve.engine.model_beside import Beside
from ghostserve.engine.model_memory import Below, layout_of, why_not
from ghostserve.errors import WeightsError
from ghostserve.weights import rank_file
from ghostserve.weights.bounded import STALL_S
from ghostserve.weights.mapping import Mapped
from ghostserve.weights.pool import Follow, Hit, Lease, Outcome, Pool, Refused
from ghostserve.weights.rank_image import Layout

logger = logging.getLogger(__name__)

FOLLOW_S = 60.0  # for another server that is loading the same rank at this moment
FOLLOW_IN_RECOVERY_S = 0.5
DISK_BYTES_PER_S = 1e9  # what an image costs to have again: they differ by their size

_KEPT: list[Hit] = []
"""As long as this process lives, the pool keeps what it uses: a replacement will want the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One rank's image. `unchanged`: whether the model's files are still those that `key` stands for."""

    key: str
    label: str
    in_recovery: bool
    unchanged: Callable[[], bool]


class _Plain(Exception):
    """Why the load goes on without an image."""


def load(model: nn.Module, pool: Pool | None, wanted: Wanted | None, fill: Callable[[], None]) -> None:
    """Have the parameters of `model`, which is freshly built, hold the model's weights; `fill` is vLLM's way to do so.

    Raises what `fill` raises, and nothing of the pool's.
    """
    began_s = monotonic_s()
    try:
        how = _through(model, pool, wanted, fill)
    except _Plain as reason:
        logger.info("weights: loaded for this process alone: %s", reason)
        fill()
        return
    logger.info("weights: %s, %.1f ms", how, (monotonic_s() - began_s) * 1e3)


def _through(model: nn.Module, pool: Pool | None, wanted: Wanted | None, fill: Callable[[], None]) -> str:
    if pool is None:
        raise _Plain("there is no pool")
    if wanted is None:
        raise _Plain("it is not known which files the model is made of")
    if (reason := why_not(model)) is not None:
        raise _Plain(reason)
    layout = layout_of(model)
    match _opened(pool, layout, wanted):
        case Hit() as hit:
            return _use(model, layout, hit)
        case Lease() as lease:
            if (kept := _kept_on_disk(layout, lease, wanted)) is not None:
                return _use(model, layout, kept)
            return _make(model, layout, lease, wanted, fill)
        case Refused() as refused:
            raise _Plain(refused.reason)
    raise _Plain("another process has been loading the same for too long")


def _opened(pool: Pool, layout: Layout, wanted: Wanted) -> Outcome | None:
    """What the pool has; None while another process still makes it."""
    opened: Outcome | None = pool.open(
        wanted.key,
        layout.nbytes,
        kind="rank",
        label=wanted.label,
        reload_cost_s=layout.nbytes / DISK_BYTES_PER_S,
    )
    deadline_s = monotonic_s() + (FOLLOW_IN_RECOVERY_S if wanted.in_recovery else FOLLOW_S)
    while isinstance(opened, Follow):
        follow = opened
        opened = follow.outcome(timeout_s=max(deadline_s - monotonic_s(), 0.001))
        if opened is None:
            follow.close()
    return opened


def _use(model: nn.Module, layout: Layout, hit: Hit) -> str:
    try:
        layout.refuse_other(hit.meta)
        if _on_cpu(model):
            Below(model, layout, hit.fd, shared=False).put(keep=False)
        else:
            copy_in(model, layout, hit.fd)
    except (WeightsError, OSError) as error:
        hit.close()
        raise _Plain(f"the pool's image is not used: {error}") from error
    _KEPT.append(hit)
    return f"{layout.nbytes / 1e6:.1f} MB out of the pool"


def _kept_on_disk(layout: Layout, lease: Lease, wanted: Wanted) -> Hit | None:
    """The image out of its copy on the disk (`models optimise`), as if the pool had had it; None if there is no copy of use."""
    try:
        kept = rank_file.find(wanted.key, stall_s=FOLLOW_IN_RECOVERY_S if wanted.in_recovery else STALL_S)
        if kept is None:
            return None
        kept.refuse_other(layout)
    except (WeightsError, OSError) as error:
        logger.warning("weights: the copy of this rank is not used; %s: %s", rank_file.AGAIN, error)
        return None
    try:
        mapped = Mapped(lease.fd, offset=0, length=layout.nbytes, shared=True)
        kept.read(mapped.array().data)
        mapped.make_private(lease.fd)
    except (WeightsError, OSError) as error:
        lease.abandon()  # what is in its memory now is nobody's weights
        logger.warning("weights: the copy of this rank is not used; %s: %s", rank_file.AGAIN, error)
        raise _Plain("the copy of this rank could not be read") from error
    published = lease.publish(layout.encode())
    if isinstance(published, Refused):
        raise _Plain(published.reason)
    return published


def _make(model: nn.Module, layout: Layout, lease: Lease, wanted: Wanted, fill: Callable[[], None]) -> str:
    """This process loads for all; whatever goes wrong with the image, the model is loaded all the same."""
    below = None
    try:
        if _on_cpu(model):
            below = Below(model, layout, lease.fd, shared=True)
            below.put(keep=True)
    except OSError as error:
        lease.abandon()
        raise _Plain(f"the pool's memory cannot be mapped: {error}") from error
    before = Beside.of(model)
    try:
        fill()
    except BaseException:
        lease.abandon()
        raise
    try:
        _demand_publishable(before.first_difference(Beside.of(model)), wanted)
        if below is None:
            copy_out(model, layout, lease.fd)
        else:
            below.make_private(lease.fd)
    except (WeightsError, OSError) as error:
        lease.abandon()  # the memory stays below this model, and is given to nobody else
        return f"loaded, and not left in the pool: {error}"
    published = lease.publish(layout.encode())
    if isinstance(published, Refused):
        return f"loaded, and not left in the pool: {published.reason}"
    _KEPT.append(published)
    return f"{layout.nbytes / 1e6:.1f} MB loaded, and left in the pool"


def _demand_publishable(changed: str | None, wanted: Wanted) -> None:
    if changed is not None:
        raise WeightsError(f"loading this model does more than fill parameters ({changed})")
    if not wanted.unchanged():
        raise WeightsError("the model's files changed meanwhile")


def _on_cpu(model: nn.Module) -> bool:
    return next(model.parameters()).device.type == "cpu"
