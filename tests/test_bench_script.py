"""How every bench ends: results written, named and shown, a picture beside them, errors as one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import results
import script

from ghostserve.errors import StartError


def publish(directory: Path, **more: Any) -> None:
    script.publish("name", about=results.facts(), document={"a": 1}, directory=directory, **more)


def test_results_are_written_named_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(tmp_path, markdown="the table")
    publish(tmp_path, markdown="```text\nanother\n```", shown="another")
    said = capsys.readouterr()
    assert said.out == "the table\nanother\n"
    paths = [Path(line.removeprefix("written: ")) for line in said.err.splitlines()]
    assert [path.suffix for path in paths] == [".json", ".md", ".json", ".md"]
    assert set(paths) == set(tmp_path.iterdir())
    assert paths[2].stem == f"{paths[0].stem}-2"
    assert paths[3].read_text().endswith("```text\nanother\n```\n")


def test_the_tables_name_the_picture_of_their_own_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        publish(
            tmp_path, markdown=f"![seconds]({results.PICTURE})", draw=lambda path: path.write_text("<svg/>")
        )
    pictures = sorted(tmp_path.glob("*.svg"), key=lambda path: path.stem)
    assert len(pictures) == 2
    for picture in pictures:
        assert f"![seconds]({picture.name})" in picture.with_suffix(".md").read_text()
    said = capsys.readouterr()
    assert [line for line in said.out.splitlines() if "svg" in line] == [
        f"![seconds]({picture.name})" for picture in pictures
    ]
    assert all(f"written: {picture}\n" in said.err for picture in pictures)


def test_an_error_is_one_line_and_its_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench/x.py", "--rounds", "1"])

    def fail(argv: Sequence[str]) -> int:
        assert argv == ["--rounds", "1"]
        raise StartError("no server")

    with pytest.raises(SystemExit) as ended:
        script.run(fail)
    assert ended.value.code == StartError.exit_code
    assert capsys.readouterr().err == "bench/x.py: no server\n"
    with pytest.raises(SystemExit) as ended:
        script.run(lambda argv: 1)
    assert ended.value.code == 1
    with pytest.raises(ZeroDivisionError):  # a mistake of ours keeps its traceback
        script.run(lambda argv: 1 // 0)
