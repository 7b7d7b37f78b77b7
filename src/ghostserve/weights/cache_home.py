"""Where the caches of this user lie, as the XDG specification has it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def cache_home(environment: Mapping[str, str] = os.environ) -> Path:
    """`$XDG_CACHE_HOME/ghostserve`; below `~/.cache` where that names no folder, or not by its whole path."""
    home = Path(environment.get("XDG_CACHE_HOME") or "")
    if not home.is_absolute():
        home = Path.home() / ".cache"
    return home / "ghostserve"
