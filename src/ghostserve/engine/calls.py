"""vLLM's remote calls on the ranks, bounded once the server is up. A rank that dies meanwhile is replaced."""

from __future__ import annotations

import math
from typing import Any

import cloudpickle
from vllm import envs

from ghostserve.engine.ring import RankRaised, RanksDied, RankSilent

WEIGHT_CHANGES = ("reload_weights", "update_weights", "load_model")


def call_ranks(
    executor: Any,
    method: Any,
    *,
    timeout_s: float | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rank: int | None,
) -> Any:
    """Call a worker's method on every rank, or on one; repeated once after a loss. Under the session's lock.

    Raises TimeoutError, RuntimeError as vLLM's own executor does, and EngineLost.
    """
    if method in WEIGHT_CHANGES and executor.session.scheduler is not None:
        executor.weights_changed_by = method
    try:
        return _call(executor, method, timeout_s, args, kwargs, rank)
    except (RanksDied, RankSilent) as failure:
        if executor.session.scheduler is None:
            raise RuntimeError(f"a worker ended while the server was starting: {failure}") from None
        executor.recover(failure)
        if isinstance(failure, RankSilent):
            raise TimeoutError(f"RPC call to {method} timed out: {failure}") from None
        return _call(executor, method, timeout_s, args, kwargs, rank)


def _call(
    executor: Any,
    method: Any,
    timeout_s: float | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rank: int | None,
) -> Any:
    _collect_replies(executor)
    name = method if isinstance(method, str) else cloudpickle.dumps(method)
    executor.rpc_broadcast_mq.enqueue((name, args, kwargs, rank))
    ranks = range(executor.world_size) if rank is None else [rank]
    serving = executor.session.scheduler is not None  # before that a model loads, for as long as it takes
    longest_s = envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS if serving else math.inf
    try:
        replies = executor.ring.collect(ranks, timeout_s=longest_s if timeout_s is None else timeout_s)
    except (RankRaised, RankSilent) as failure:
        # Replies that are on their way would be taken for answers to the next call.
        silent = executor.ring.drain(
            range(executor.world_size), gone=(), timeout_s=executor.settings.config.leave_timeout
        )
        if silent:
            guilty = executor.ring.at_fault(silent)
            raise RankSilent(guilty, f"ranks {sorted(guilty)} do not answer") from None
        if isinstance(failure, RankSilent):
            raise TimeoutError(f"RPC call to {method} timed out: {failure.reason}") from None
        raise RuntimeError(f"Worker failed with error '{failure.reason}'") from None
    return list(replies.values()) if rank is None else replies[rank]


def _collect_replies(executor: Any) -> None:
    """Steps in flight answer before the call does. Their answers are kept; accepting them is their owner's."""
    for step in executor.open_steps:
        while len(step.replies) < step.replies_due:
            try:
                step.replies.append(executor.wait_for_reply(step))
            except RankRaised as failure:
                step.replies.append(failure)
                raise RuntimeError(f"a step in flight failed: {failure.reason}") from None
