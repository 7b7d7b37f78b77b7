"""A model that lies at a URL, from the first byte on: pulled, warmed, served offline, a rank lost; then removed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ghostserve.weights.pool_start import stop_holder
from model_server import ModelServer, serving
from real import kit
from real.kit import SEEDED, TINY, Served

pytestmark = [pytest.mark.real, pytest.mark.slow]
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
FLAGS = ("--dtype", "float32", "--enforce-eager")


@dataclass
class Home:
    """A user's folders, and a server that has the tiny model."""

    path: Path
    world: ModelServer

    @property
    def environment(self) -> dict[str, str]:
        return {"GHOSTSERVE_RUNTIME_DIR": str(self.path / "run")}

    def models(self, *words: str) -> str:
        argv = [
            sys.executable,
            "-m",
            "ghostserve.cli.main",
            "models",
            *words,
            "--download-dir",
            str(self.path / "models"),
        ]
        done = subprocess.run(
            argv,
            env=os.environ | self.environment | {"HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    path = tmp_path_factory.mktemp("home")
    with serving(
        ModelServer({name: (TINY / name).read_bytes() for name in FILES if (TINY / name).exists()})
    ) as world:
        try:
            yield Home(path, world)
        finally:
            stop_holder(path / "run")


@pytest.fixture(scope="module")
def served(home: Home) -> Iterator[Served]:
    """Started without a network (as all servers of these tests), so what was pulled has to do."""
    home.models("pull", home.world.url)
    home.models("warm", home.world.url)
    home.world.asked.clear()
    places = ("--download-dir", str(home.path / "models"))
    served = kit.serve(home.path, "by-url", *FLAGS, *places, model=home.world.url, env=home.environment)
    try:
        yield served
    finally:
        served.server.stop()


def test_it_is_served_from_the_cache_and_from_memory(home: Home, served: Served) -> None:
    assert served.run(SEEDED).error is None
    assert home.world.asked == []
    status = served.server.wait_status(
        lambda status: bool((status.get("weights") or {}).get("memory")),
        timeout_s=20,
        what="the pool's numbers",
    )
    assert status["weights"]["memory"]["hits_total"] > 0
    (row,) = json.loads(home.models("ls", "--json"))
    assert (row["model"], row["tiers"]) == (home.world.url, ["disk", "memory"])
    assert row["in_use"]


def test_a_lost_rank_loads_from_there_too(served: Served) -> None:
    reference, before = served.reference(SEEDED), served.recoveries()
    served.kill_after(40, 1)
    kit.assert_same(reference, served.run(SEEDED))
    kit.assert_rebuilt(served.recovery(after=before), sealed=True)


def test_it_is_removed_under_a_server_that_goes_on(home: Home, served: Served) -> None:
    home.models("rm", home.world.url, "--yes")
    assert json.loads(home.models("ls", "--json")) == []
    assert served.run(SEEDED).error is None
