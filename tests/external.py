"""Programs that some tests need and not every machine can have.

Outside CI a test without its program says "not run" with the reason; in CI, or with GHOSTSERVE_DEMAND_PROGRAMS=1, it fails:
there a check that silently did not happen would pass for one that did.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import pytest

import programs

DEMAND_ENV = "GHOSTSERVE_DEMAND_PROGRAMS"


def need(program: str, *, into: Path = programs.PROGRAMS, environment: Mapping[str, str] = os.environ) -> str:
    """Where the program is. Otherwise the test is skipped, or failed where programs are demanded."""
    found = programs.find(program, into)
    if found is None:
        note = into / f"{program}.missing"
        reason = note.read_text().strip() if note.is_file() else "run scripts/programs, which fetches it"
        not_run(f"there is no {program} here: {reason}", environment=environment)
    return found


def not_run(reason: str, *, environment: Mapping[str, str] = os.environ) -> NoReturn:
    """Skip the test with the reason; fail it where programs are demanded."""
    said = f"not run: {reason}"
    if environment.get("CI") or environment.get(DEMAND_ENV):
        pytest.fail(said, pytrace=False)
    pytest.skip(said)
