"""`ghostserve chaos` as a whole: it passes where it should, and can fail. Each run has a server of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ghostserve.testing.fault_plan import FaultPlan

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]


def chaos(*options: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, the JSON at the end, and what was told meanwhile."""
    command = [sys.executable, "-m", "ghostserve.cli.main", "chaos", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.stdout, done.stderr[-3000:]
    return done.returncode, json.loads(done.stdout), done.stderr


def test_faults_of_all_kinds() -> None:
    code, document, told = chaos("--faults", "34", "--seed", "7")
    assert code == 0, document["violations"] or told[-3000:]
    assert document["faults"] >= 34
    assert len(document["faults_by_kind"]) >= 15
    assert document["recoveries_by_path"]["rebuild"] > document["recoveries_by_path"].get("recompute", 0)
    assert document["requests"] > 20
    assert all(item["streams_in_mid_answer"] >= 1 for item in document["injections"] if item["counted"])


def test_a_plan_from_a_file(tmp_path: Path) -> None:
    plan = (
        FaultPlan()
        .crash(rank=1)
        .at_token(20)
        .then.crash(rank=1)
        .in_recovery("weights")
        .keeper_crash()
        .at_token(40)
    )
    (tmp_path / "plan.yaml").write_text(plan.to_yaml())
    code, document, told = chaos(
        "--plan", str(tmp_path / "plan.yaml"), "--minutes", "0.2", "--seed", "3", "--requests", "8"
    )
    assert code == 0, document["violations"] or told[-3000:]
    assert document["faults_by_kind"].keys() >= {"crash", "keeper_crash"}
    assert document["recoveries_by_path"]


@pytest.mark.parametrize(
    ("control", "said"),
    [("force_recompute", "were rebuilt"), ("skip_restore", "changed")],
)
def test_a_broken_server_is_found(control: str, said: str) -> None:
    """The negative controls: the mix is asserted, and so are the tokens."""
    code, document, _ = chaos(
        "--faults", "8", "--seed", "5", "--kinds", "crash,segfault", "--requests", "10", "--control", control
    )
    assert code == 1
    assert any(said in text for text in document["violations"]), document["violations"]
