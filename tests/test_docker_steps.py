"""The Dockerfiles: what can be said of them by reading, and their RUN steps run in an empty folder (slow)."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

import docker_steps
from ghostserve.testing.fake_engine import FakeEngine
from ghostserve.testing.fake_server import build_app

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "deploy" / "docker"
VARIANTS = ("cpu", "gpu")


def instructions(variant: str) -> list[docker_steps.Instruction]:
    return docker_steps.read(DOCKER / f"Dockerfile.{variant}")


def of(variant: str, word: str) -> list[str]:
    return [found.rest for found in instructions(variant) if found.word == word]


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_reads_as_a_dockerfile(variant: str) -> None:
    known = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK"}
    words = [found.word for found in instructions(variant)]
    assert set(words) <= known | {"ENTRYPOINT", "CMD"}
    assert words[0] == "FROM"
    assert words.index("USER") > max(index for index, word in enumerate(words) if word == "RUN")
    (base,) = of(variant, "FROM")
    assert base.startswith("python:3.11")
    (entry,), (command,) = of(variant, "ENTRYPOINT"), of(variant, "CMD")
    assert json.loads(entry)[-2:] == ["ghostserve", "serve"]
    model = json.loads(command)[0].removeprefix("/opt/ghostserve/")
    assert (ROOT / model / "config.json").exists()
    assert json.loads(command)[1:3] == ["--host", "0.0.0.0"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_health_check_asks_a_route_that_exists(variant: str) -> None:
    (check,) = of(variant, "HEALTHCHECK")
    path = re.search(r"http://127\.0\.0\.1:8000(/\w+)", check)
    assert path is not None
    engine = FakeEngine()
    try:
        assert path[1] in {getattr(route, "path", "") for route in build_app(engine).router.routes}
    finally:
        engine.close()


def test_pins_are_those_of_the_lock_and_of_the_install() -> None:
    pins = set(re.findall(r"[\w-]+==[\w.]+", " ".join(of("gpu", "RUN"))))
    known = "\n".join(
        (ROOT / name).read_text()
        for name in ("requirements/constraints-cpu.txt", "pyproject.toml", "scripts/install.py")
    )
    assert pins
    assert not [pin for pin in pins if pin not in known]


def test_the_steps_of_a_file_are_run_and_a_failing_one_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text(
        "FROM x\nWORKDIR /a/b\nENV WHO=me\nRUN echo $WHO \\\n  > said\nRUN apt-get no\nUSER 1\nRUN false\n"
    )

    def change(command: str) -> str | None:
        return None if command.startswith("apt-get") else command

    ran = docker_steps.run(docker_steps.read(file), root=tmp_path / "root", context=tmp_path, change=change)
    assert len(ran) == 1
    assert (tmp_path / "root/a/b/said").read_text() == "me\n"
    file.write_text("FROM x\nWORKDIR /a\nRUN exit 3\n")
    with pytest.raises(AssertionError, match="exit 3"):
        docker_steps.run(docker_steps.read(file), root=tmp_path / "root", context=tmp_path, change=change)


def only_here(command: str) -> str | None:
    """All but apt-get; of 9 GB only what pip would install."""
    if command.startswith("apt-get"):
        return None
    return command.replace("pip install -r", "pip install --dry-run -r")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_steps_as_they_stand(variant: str, tmp_path: Path) -> None:
    """In an empty folder, from the files that git knows; then what they made is asked whether a server could run."""
    ran = docker_steps.run(instructions(variant), root=tmp_path, context=ROOT, change=only_here)
    assert len(ran) == len(of(variant, "RUN")) - 1
    home = tmp_path / "opt" / "ghostserve"
    assert list((home / "src" / "ghostserve" / "native").glob("*.so"))
    if variant == "cpu":
        done = subprocess.run(
            [home / ".venv/bin/ghostserve", "doctor", home / "src/ghostserve/models/tiny-llama", "--port", "0", "--json"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        found = {finding["name"]: finding["status"] for finding in json.loads(done.stdout)["findings"]}
        assert {found[name] for name in ("versions", "pins", "plugin", "native library", "model")} == {"ok"}
