"""The load format `ghostserve` beside vLLM's own: the same parameters, bit for bit, however they came. TP=2, no server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ghostserve.engine import load_format
from ghostserve.engine.weights_identity import source_of
from ghostserve.testing.server import server_environment
from ghostserve.weights import pool_start, runtime_dir
from real import families, kit

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

RANKS = 2
WAYS = ("stock", "cold", "hit", "replacement", "without the pool")
FAMILIES = ("moe", "hybrid-kv", "qwen3")
MODELS = ("tiny", "awq", *FAMILIES)
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(model, way) to what each rank says."""
    directory = tmp_path_factory.mktemp("loads")
    # The first decides which groups vLLM forms; those of a mixture of experts are enough for all.
    models = {**{name: families.build(name, directory / name) for name in FAMILIES}, "tiny": kit.TINY}
    models["awq"] = families.build_awq(directory / "awq")
    asked = {
        (name, way): {
            "model": str(path),
            "format": "auto" if way == "stock" else "ghostserve",
            "dtype": "bfloat16" if name == "awq" else "float32",
            **({"source": source_of(str(path))} if way == "replacement" else {}),
        }
        for name, path in models.items()
        for way in WAYS[:-1]
    }
    pooled = run(directory, "pooled", list(asked.values()))
    asked_alone = [{"model": str(kit.TINY), "format": "ghostserve"}]
    alone = run(directory, "alone", asked_alone, {"GHOSTSERVE_CONFIG": '{"weights_memory": 0}'})
    return {
        **{key: [rank[place] for rank in pooled] for place, key in enumerate(asked)},
        ("tiny", WAYS[-1]): [rank[0] for rank in alone],
    }


def run(
    directory: Path, name: str, loads: list[dict[str, Any]], env: dict[str, str] | None = None
) -> list[list[dict[str, Any]]]:
    """All ranks side by side, with a pool that holds nothing yet."""
    pool = directory / f"{name}-pool"
    pool.mkdir(mode=0o700)
    own = {
        runtime_dir.RUNTIME_DIR_ENV: str(pool),
        load_format.LOADER_ENV: "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        **(env or {}),
    }
    asked = {"ranks": RANKS, "store": str(directory / f"{name}-store"), "loads": loads}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "one_rank.py"), json.dumps({**asked, "rank": rank})],
            env=server_environment(os.environ, own),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        printed = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
        pool_start.stop_holder(pool)
    for rank, text in zip(ranks, printed, strict=True):
        assert rank.returncode == 0, text[-4000:]
    return [json.loads(next(line for line in text.splitlines() if line.startswith("[{"))) for text in printed]


@pytest.mark.parametrize("way", WAYS[1:-1])
@pytest.mark.parametrize("model", MODELS)
def test_the_same_bits(loads: Any, model: str, way: str) -> None:
    for stock, ours in zip(loads[model, "stock"], loads[model, way], strict=True):
        assert ours["parameters"] == stock["parameters"]


def test_the_ranks_differ(loads: Any) -> None:
    """Or the comparison above would prove little."""
    first, second = loads["tiny", "stock"]
    assert first["parameters"] != second["parameters"]


def test_without_the_pool(loads: Any) -> None:
    for stock, ours in zip(loads["tiny", "stock"], loads["tiny", WAYS[-1]], strict=True):
        assert ours["parameters"] == stock["parameters"]
        assert any("for this process alone: there is no pool" in line for line in ours["said"]), ours["said"]


@pytest.mark.parametrize("model", MODELS)
def test_by_which_way(loads: Any, model: str) -> None:
    """Loaded once and left in the pool, then out of it; a replacement that knows its server's files, too."""
    for way, sentence in (
        ("cold", "loaded, and left in the pool"),
        ("hit", "out of the pool"),
        ("replacement", "out of the pool"),
    ):
        for rank in loads[model, way]:
            assert any(sentence in line for line in rank["said"]), (way, rank["said"])


def test_what_is_repacked_is_given_back(loads: Any) -> None:
    """vLLM's CPU kernels keep packed copies of linear layers: of the tiny model its embedding stays, and little else."""
    for rank in loads["tiny", "hit"]:
        shapes = {name: shape for name, (_, shape, _) in rank["parameters"].items()}
        rows, columns = shapes["model.embed_tokens.weight"]
        assert rows * columns * 4 <= rank["memory"]["Size"] <= rows * columns * 4 + (64 << 10)
