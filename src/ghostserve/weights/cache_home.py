"""Where the caches of this user lie, as the XDG specification has it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

NO_HOME = Path("/nonexistent")
"""As Debian's passwd has it."""


def cache_home(environment: Mapping[str, str] = os.environ) -> Path:
    """`$XDG_CACHE_HOME/ghostserve`; below `~/.cache` where that names no folder, or not by its whole path."""
    cache = Path(environment.get("XDG_CACHE_HOME") or "")
    if not cache.is_absolute():
        cache = user_home() / ".cache"
    return cache / "ghostserve"


def user_home() -> Path:
    """For a user without one (an id of a container's, and no HOME) it is where nothing is found and nothing can be kept."""
    try:
        return Path.home()
    except RuntimeError:
        return NO_HOME
