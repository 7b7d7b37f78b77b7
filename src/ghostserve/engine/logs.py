"""Our messages appear where vLLM's do, in its format and at its level."""

from __future__ import annotations

import logging


def join_vllm() -> None:
    """In every process of the server, once vLLM has set up its own logging."""
    ours, theirs = logging.getLogger("ghostserve"), logging.getLogger("vllm")
    if theirs.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
        ours.propagate = False
