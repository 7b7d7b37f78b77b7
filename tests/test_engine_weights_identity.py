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


def cached(tmp_path: Path) -> Path:
    """The hub's cache with two commits of one model, alike but for their names; returns what `main` is written in."""
    repository = tmp_path / "models--someone--model"
    for commit in ("a" * 40, "b" * 40):
        files = repository / "snapshots" / commit
        files.mkdir(parents=True)
        (files / "config.json").write_text("{}")
        (files / "model.safetensors").write_bytes(b"weights")
        os.utime(files / "model.safetensors", ns=(0, 0))
        os.utime(files / "config.json", ns=(0, 0))
    main = repository / "refs" / "main"
    main.parent.mkdir()
    main.write_text("a" * 40)
    return main


def test_an_id_whose_branch_moves_on(tmp_path: Path) -> None:
    """A replacement would load the newer commit beside the survivors' older one."""
    main = cached(tmp_path)
    before = identity("someone/model", cache=str(tmp_path))
    assert [name for name, *_ in before] == [f"commit {'a' * 40}", "config.json", "model.safetensors"]
    assert what_changed(before, identity("someone/model", cache=str(tmp_path))) is None
    main.write_text("b" * 40)
    assert "b" * 40 in (what_changed(before, identity("someone/model", cache=str(tmp_path))) or "")
    assert what_changed(before, identity("someone/model", revision="a" * 40, cache=str(tmp_path))) is None


def test_a_single_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    assert [name for name, *_ in identity(str(file))] == ["model.gguf"]


def test_what_cannot_be_told(tmp_path: Path) -> None:
    assert identity("someone/unknown", cache=str(tmp_path)) == ()
    assert identity("s3://bucket/some/model", cache=str(tmp_path)) == ()
