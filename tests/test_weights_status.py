"""`ghostserve status` says where weights are; `serve URL` serves from the cache."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from ghostserve.cli import status
from ghostserve.cli.serve_model import fetch_model
from ghostserve.config import GhostConfig
from ghostserve.errors import UsageError
from ghostserve.testing.fake_engine import FakeEngine
from ghostserve.web.weights_pool import PoolReading, after
from ghostserve.web.weights_tiers import describe
from ghostserve.weights.pool_types import Counts, ImageKind, PoolStats, Refusal
from model_server import ModelServer, serving, tiny_model

CONFIG = GhostConfig()
STATS = PoolStats(
    budget_bytes=2**30,
    used_bytes=3 * 2**20,
    referenced_bytes=2**20,
    pinned_bytes=0,
    pins=0,
    clients=1,
    bytes={ImageKind.FILE: 2**20, ImageKind.RANK: 2 * 2**20},
    entries={ImageKind.FILE: 1, ImageKind.RANK: 2},
    counts={ImageKind.FILE: Counts(hits=1, misses=1), ImageKind.RANK: Counts(hits=2, misses=2, evictions=1)},
    refusals=dict.fromkeys(Refusal, 0),
)


def test_the_line_of_the_status() -> None:
    engine = FakeEngine(outage_s=0)
    try:
        state = engine.read_state()
    finally:
        engine.close()
    assert state is not None
    assert "weights  " not in status.render(state)  # of a server that does not tell
    state["weights_bytes"] = 5 * 2**20
    text = status.render(state | {"weights": describe(after(PoolReading(), STATS, None))})
    assert (
        "weights   5.0 MiB on disk · in memory, of all models, 3.0 MiB of 1.0 GiB: 1.0 MiB files, 2.0 MiB ranks"
        in text
    )
    assert "3 hits, 3 misses, 1 evictions" in text
    text = status.render(state | {"weights": describe(PoolReading())})
    assert "weights   5.0 MiB on disk · none kept in memory" in text


@pytest.fixture
def world() -> Iterator[ModelServer]:
    with serving(ModelServer(tiny_model(1000))) as made:
        yield made


def arguments(model: str, root: Path, **more: object) -> Namespace:
    given: dict[str, object] = {
        "model": model,
        "model_tag": model,
        "tokenizer": None,
        "served_model_name": None,
        "revision": None,
        "load_format": "auto",
        "download_dir": str(root),
    }
    return Namespace(**given | more)


def test_serve_of_a_url_serves_the_folder_under_the_name_of_the_url(
    tmp_path: Path, world: ModelServer
) -> None:
    given = arguments(world.url, tmp_path)
    fetch_model(given, CONFIG)
    assert (Path(given.model) / "model.safetensors").read_bytes() == world.files["model.safetensors"]
    assert given.model_tag == given.model
    assert given.served_model_name == [world.url]
    named = arguments(world.url, tmp_path, served_model_name=["mine"], tokenizer=world.url)
    fetch_model(named, CONFIG)
    assert (named.served_model_name, named.tokenizer) == (["mine"], named.model)


def test_other_models_are_left_to_vllm(tmp_path: Path, world: ModelServer) -> None:
    for given in (
        arguments("org/name", tmp_path),
        arguments(str(tmp_path), tmp_path),
        arguments(world.url, tmp_path, load_format="runai_streamer"),
    ):
        before = vars(given).copy()
        fetch_model(given, CONFIG)
        assert vars(given) == before
    stock = arguments(world.url, tmp_path)
    fetch_model(stock, GhostConfig(protection="none"))
    assert stock.model == world.url
    with pytest.raises(UsageError, match="--revision"):
        fetch_model(arguments(world.url, tmp_path, revision="main"), CONFIG)
    assert world.asked == []
