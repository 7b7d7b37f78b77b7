"""A model folder that is exchanged under a running server is noticed; one that is not is left in peace."""

from __future__ import annotations

import os
from pathlib import Path

from ghostserve.engine.weights_identity import identity, what_changed


def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("text")
    return tmp_path


def test_same_files(tmp_path: Path) -> None:
    model = folder(tmp_path)
    before = identity(str(model))
    (model / "README.md").write_text("other text")
    assert what_changed(before, identity(str(model))) is None


def test_exchanged_weights_are_named(tmp_path: Path) -> None:
    model = folder(tmp_path)
    before = identity(str(model))
    file = model / "model.safetensors"
    stat = file.stat()
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert "model.safetensors" in (what_changed(before, identity(str(model))) or "")


def test_removed_weights_are_named(tmp_path: Path) -> None:
    model = folder(tmp_path)
    before = identity(str(model))
    (model / "model.safetensors").unlink()
    assert "model.safetensors" in (what_changed(before, identity(str(model))) or "")


def test_an_id_instead_of_a_folder() -> None:
    assert identity("someone/model") == ()
