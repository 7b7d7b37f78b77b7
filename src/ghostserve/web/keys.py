"""The keys of a server: from flags, from files, or from the environment, in this order. They are read once, at the start.

A flag is seen by every user of the machine (`/proc/PID/cmdline`), a variable by the server's own user, a file by whom its
permissions let. No message repeats a key, nor what else a file holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ghostserve.errors import UsageError
from ghostserve.web.security import demand_sendable_key

KEY_VARIABLE = "VLLM_API_KEY"
ADMIN_KEY_VARIABLE = "GHOSTSERVE_ADMIN_API_KEY"
FILE_BYTES_MAX = 1 << 20


def read_keys(file: str) -> list[str]:
    """The keys in a file, one a line, in its order; empty lines are passed over. Raises UsageError if there is none."""
    try:
        with Path(file).open("rb") as opened:
            content = opened.read(FILE_BYTES_MAX + 1)
        text = content.decode("ascii")
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{file}: a key must be printable ASCII, one a line") from None
    if len(content) > FILE_BYTES_MAX:
        raise UsageError(f"{file}: longer than {FILE_BYTES_MAX} bytes; write one key a line")
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if not keys:
        raise UsageError(f"{file}: no key in it; write one key a line")
    for key in keys:
        demand_sendable_key(key)
    return keys


def api_keys(
    given: str | Sequence[str | None] | None, file: str | None, environment: Mapping[str, str]
) -> list[str]:
    """The keys that vLLM's own routes accept; an empty one counts as none, as it does for vLLM.

    `given` are the values of `--api-key`. Raises UsageError for a key that no client could send.
    """
    flags = [given] if isinstance(given, str) else list(given or ())
    keys = [*flags, *(read_keys(file) if file else ())] or [environment.get(KEY_VARIABLE)]
    found = [key for key in keys if key]
    for key in found:
        demand_sendable_key(key)
    return found


def admin_key(given: str | None, file: str | None, environment: Mapping[str, str]) -> str | None:
    """The key for fault injection; None: an API key will do, or loopback. Raises UsageError."""
    if given and file:
        raise UsageError("--admin-api-key and --admin-api-key-file: give one of the two")
    if file:
        keys = read_keys(file)
        if len(keys) > 1:
            raise UsageError(f"{file}: {len(keys)} keys in it; there is one admin key")
        return keys[0]
    key = given or environment.get(ADMIN_KEY_VARIABLE) or None
    if key is not None:
        demand_sendable_key(key)
    return key
