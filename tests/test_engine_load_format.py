"""Which load format a server gets, and what a replacement is told."""

from __future__ import annotations

import importlib
import sys
import tomllib
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ghostserve.config import GhostConfig
from ghostserve.engine.load_format import LOAD_FORMAT, LOADER_ENV, STOCK, choose, flaw, for_newcomer
from ghostserve.errors import UnsafeWeightsError
from weights_kit import write_weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").touch()
    return tmp_path


def chosen(model: object, *, protection: str = "parity", **given: Any) -> str:
    arguments = Namespace(
        model=str(model),
        **{"load_format": None, "model_loader_extra_config": {}, "safetensors_load_strategy": None, **given},
    )
    return choose(arguments, GhostConfig(protection=protection))


def test_ours_by_default(folder: Path) -> None:
    assert chosen(folder) == LOAD_FORMAT
    assert chosen("someone/something") == LOAD_FORMAT


def test_vllms_own_without_protection(folder: Path) -> None:
    assert chosen(folder, protection="none") == STOCK
    assert chosen(folder, protection="none", load_format="ghostserve") == LOAD_FORMAT


@pytest.mark.parametrize("given", ["auto", "dummy", "safetensors", "runai_streamer", "sharded_state"])
def test_what_the_user_names(folder: Path, given: str) -> None:
    assert chosen(folder, load_format=given) == given


@pytest.mark.parametrize(
    ("model", "given"),
    [
        ("s3://bucket/model", {}),
        (None, {"model_loader_extra_config": {"num_threads": 4}}),
        (None, {"safetensors_load_strategy": "eager"}),
    ],
)
def test_what_only_vllms_loader_knows(folder: Path, model: str | None, given: dict[str, Any]) -> None:
    assert chosen(model or folder, **given) == STOCK


def test_a_single_file_is_no_folder_of_safetensors(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert chosen(tmp_path / "model.gguf") == STOCK


def test_pickles_are_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UnsafeWeightsError, match=r"pytorch_model\.bin.*safetensors.*--load-format auto"):
        chosen(tmp_path)
    assert chosen(tmp_path, load_format="auto") == "auto"


def test_vllms_own_workers_come_to_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the plugin that the package names; it imports nothing where nobody asked for it."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    module, _, name = project["project"]["entry-points"]["vllm.general_plugins"][
        "ghostserve_load_format"
    ].partition(":")
    register = getattr(importlib.import_module(module), name)
    monkeypatch.delenv(LOADER_ENV, raising=False)
    before = set(sys.modules)
    register()
    assert set(sys.modules) == before


def test_other_formats_are_left_as_they_are() -> None:
    config = SimpleNamespace(load_format="auto")
    assert for_newcomer(config, "source") is config


def test_what_a_start_that_failed_may_have_failed_of(tmp_path: Path) -> None:
    """Files that are cut, of the format that would have read them; and nothing that is only suspected."""
    whole = write_weights(tmp_path / "model.safetensors", {"a": ("U8", [4096])})

    def flaw_of(load_format: str, model: object = tmp_path) -> str | None:
        return flaw(Namespace(model=str(model), load_format=load_format))

    assert flaw_of(LOAD_FORMAT) is None
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    found = flaw_of(LOAD_FORMAT)
    assert found is not None
    assert "model.safetensors" in found
    assert flaw_of(STOCK) is None
    assert flaw_of(LOAD_FORMAT, "someone/something") is None
