"""When models are loaded by our loader, and how vLLM comes to know it. Imports nothing of vLLM by itself: every process reads this."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from ghostserve.config import GhostConfig
from ghostserve.errors import GhostserveError, UnsafeWeightsError
from ghostserve.weights.model_files import CONVERT, open_model, pickles_in

LOAD_FORMAT = "ghostserve"
STOCK = "auto"
LOADER_ENV = "GHOSTSERVE_LOADER"
"""Set where vLLM's own workers are to know our load format."""
NEWCOMER_KEY = "ghostserve_source"
"""In a replacement's `model_loader_extra_config`: the files that the server started with. Of no account for compiled graphs."""


def choose(arguments: Namespace, config: GhostConfig) -> str:
    """The load format for what the user gave, None for nothing. Raises UnsafeWeightsError where that could only fail.

    Whoever steers vLLM's own loader, or names what only that knows, gets it.
    """
    if arguments.load_format is not None:
        chosen = str(arguments.load_format).lower()
    elif config.protection == "none" or _only_for_vllm(arguments):
        chosen = STOCK
    else:
        chosen = LOAD_FORMAT
    if chosen == LOAD_FORMAT:
        _refuse_pickles(Path(str(arguments.model)))
    return chosen


def _only_for_vllm(arguments: Namespace) -> bool:
    model = str(arguments.model)
    return (
        bool(arguments.model_loader_extra_config)
        or arguments.safetensors_load_strategy is not None
        or "://" in model  # object storage
        or Path(model).is_file()
    )


def _refuse_pickles(folder: Path) -> None:
    """Before anything is started: a worker would say the same, in the middle of its traceback."""
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    if pickles := pickles_in(folder):
        raise UnsafeWeightsError(
            f"{folder}: has only pickled weights ({', '.join(pickles[:3])}), which could run code: {CONVERT}; or "
            f"give --load-format {STOCK} to have vLLM open them"
        )


def flaw(arguments: Namespace) -> str | None:
    """What is wrong with the files that our loader would have read; None if nothing is to be seen. Asked after a start that failed:
    the worker that says so says it in the middle of a traceback.
    """
    folder = Path(str(arguments.model))
    try:
        if arguments.load_format == LOAD_FORMAT and folder.is_dir():
            open_model(folder)
    except GhostserveError as error:
        return str(error)
    return None


def register() -> None:
    """Entry point of the `vllm.general_plugins` group. Costs a second of imports, so only where it was asked for."""
    if os.environ.get(LOADER_ENV) == "1":
        import ghostserve.engine.loader  # noqa: F401


def for_newcomer(load_config: Any, source: str | None) -> Any:
    """The same configuration for a process that takes a lost rank's place; `source`: what the server started with, if known."""
    if load_config.load_format != LOAD_FORMAT:
        return load_config
    from vllm.config import replace

    extra = {**load_config.model_loader_extra_config, NEWCOMER_KEY: source or ""}
    return replace(load_config, model_loader_extra_config=extra)
