"""scripts/install: what it decides, and whole installs against a folder of tiny wheels, offline."""

from __future__ import annotations

import dataclasses
import os
import platform
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import install
from fake_index import make_compiler, make_project, make_rest, make_torch, run_install

ROOT = Path(__file__).parents[1]

GOOD = install.Machine(
    system="Linux",
    machine="x86_64",
    libc="glibc",
    python=(3, 11),
    implementation="CPython",
    cpu_flags=frozenset({"avx2", "fma"}),
    free_gb=100.0,
    has_nvidia=False,
)

# ---- decisions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{}, {"machine": "aarch64", "cpu_flags": frozenset({"asimd"})}, {"cpu_flags": frozenset()}]
)
def test_a_supported_machine_is_not_refused(change: dict[str, object]) -> None:
    assert install.unsupported(dataclasses.replace(GOOD, **change)) is None


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"system": "Darwin"}, "use a Linux machine"),
        ({"machine": "ppc64le"}, "x86-64 or aarch64"),
        ({"libc": ""}, "instead of a musl system"),
        ({"python": (3, 12)}, "CPython 3.12: name the right one with PYTHON="),
        ({"implementation": "PyPy"}, "name the right one with PYTHON="),
        ({"cpu_flags": frozenset({"avx"})}, "use a newer machine"),
    ],
)
def test_another_machine_is_refused_in_one_sentence(change: dict[str, object], remedy: str) -> None:
    sentence = install.unsupported(dataclasses.replace(GOOD, **change))
    assert sentence is not None
    assert remedy in sentence
    assert sentence.endswith((".", "..."))
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("asked", "before", "has_nvidia", "device"),
    [
        ("auto", None, False, "cpu"),
        ("auto", None, True, "gpu"),
        ("auto", "cpu", True, "cpu"),
        ("cpu", None, True, "cpu"),
        ("gpu", "cpu", False, "gpu"),
    ],
)
def test_the_device(asked: str, before: str | None, has_nvidia: bool, device: str) -> None:
    assert install.choose_device(asked=asked, before=before, has_nvidia=has_nvidia)[0] == device


def test_a_cuda_build_of_torch_is_said_only_where_a_cpu_build_was_wanted() -> None:
    assert "CUDA 13.0 build" in str(install.torch_note(device="cpu", version="2.13.0", cuda="13.0"))
    assert install.torch_note(device="cpu", version="2.13.0+cpu", cuda="") is None
    assert install.torch_note(device="gpu", version="2.13.0", cuda="13.0") is None


def test_a_failed_import_check_says_why() -> None:
    assert "illegal instruction" in install.check_failure(-signal.SIGILL, "")
    assert "SIGKILL" in install.check_failure(-signal.SIGKILL, "")
    assert "no module named x" in install.check_failure(1, "no module named x")


@pytest.mark.parametrize("spoil", [[], ["pyvenv.cfg"], ["bin/python"]])
def test_what_looks_like_an_environment_is_removed(tmp_path: Path, spoil: list[str]) -> None:
    venv = tmp_path / ".venv"
    for name in ["bin/pip", "lib/x", *spoil]:
        (venv / name).parent.mkdir(parents=True, exist_ok=True)
        (venv / name).touch()
    install.remove(venv)
    assert not venv.exists()


def test_what_does_not_look_like_one_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(install.Refused, match=r"thesis\.txt.*move it away"):
        install.remove(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_a_second_install_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "WAIT_FOR_OTHER_MAX_S", -1.0)
    with (
        install.alone(tmp_path),
        pytest.raises(install.Failed, match="another install"),
        install.alone(tmp_path),
    ):
        pass
    with install.alone(tmp_path):
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("version", ["3.12.1", "none"])
def test_without_python_3_11_one_sentence_and_status_2(tmp_path: Path, version: str) -> None:
    for name in ("bash", "dirname"):
        os.symlink(f"/bin/{name}" if Path(f"/bin/{name}").exists() else f"/usr/bin/{name}", tmp_path / name)
    if version != "none":
        other = tmp_path / "python3"
        other.write_text(f'#!/bin/bash\n[ "$1" = --version ] && echo Python {version} || exit 1\n')
        other.chmod(other.stat().st_mode | stat.S_IXUSR)
    script = tmp_path / "root" / "scripts" / "install"
    script.parent.mkdir(parents=True)
    script.write_bytes((ROOT / "scripts" / "install").read_bytes())
    done = subprocess.run(
        [tmp_path / "bash", script], env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert ("found Python 3.12.1" if version != "none" else "found no python3") in done.stderr


# ---- whole installs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index with both builds of torch, as where somebody configured the CPU one beside the default."""
    folder = tmp_path_factory.mktemp("wheels")
    make_rest(folder)
    make_torch(folder, cuda=True)
    make_torch(folder, cuda=False)
    make_compiler(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a project")  # with a space in its name
    make_project(folder)
    return folder


@pytest.mark.real
def test_install_rerun_and_repair(root: Path, wheels: Path) -> None:
    done = run_install(root, wheels)
    assert done.returncode == 0, done.stdout
    assert "torch 2.13.0+cpu" in done.stdout
    assert "CUDA" not in done.stdout

    start = time.monotonic()
    again = run_install(root, root / "no such folder")  # ready: needs no index, says nothing
    assert (again.returncode, again.stdout) == (0, "")
    assert time.monotonic() - start < 2

    library = root / "src/ghostserve/native/libghostserve.so"
    assert "cc -target x86_64-linux-gnu" in library.read_text() or platform.machine() != "x86_64"
    assert not (root / ".venv/.compiler").exists()
    library.unlink()
    rebuilt = run_install(root, wheels)
    assert "the native library is missing" in rebuilt.stdout
    assert library.exists()

    for damaged in ("platforms.py", "__init__.py"):  # where pip does not see it
        (root / ".venv/lib/python3.11/site-packages/vllm" / damaged).unlink()
    repaired = run_install(root, wheels, ensurepip=False)
    assert repaired.returncode == 0, repaired.stdout
    assert "vllm/__init__.py is missing" in repaired.stdout
    assert "Making .venv anew: vLLM was installed but does not work here" in repaired.stdout


@pytest.mark.real
def test_an_interrupted_install_is_made_anew_where_pip_offers_only_a_cuda_torch_and_python_no_ensurepip(
    root: Path, tmp_path: Path
) -> None:
    make_rest(tmp_path / "wheels")
    make_torch(tmp_path / "wheels", cuda=True)
    venv = tmp_path / "env"
    (venv / "bin").mkdir(parents=True)
    (venv / install.BUSY).touch()
    done = run_install(root, tmp_path / "wheels", "--venv", str(venv), ensurepip=False, CC="false")
    assert done.returncode == 0, done.stdout
    assert (
        "parity is computed with numpy, which is slow" in done.stdout
    )  # no compiler: said, and not in the way
    assert run_install(root, tmp_path / "wheels", "--venv", str(venv), CC="false").stdout == ""
    assert "Making env anew: an earlier install was interrupted" in done.stdout
    assert "--without-pip" in (venv / install.LOG).read_text()
    assert "only as a CUDA 13.0 build here: using that" in done.stdout
    assert not (venv / install.BUSY).exists()


def test_the_lock_for_a_gpu_is_the_lock_but_for_what_vllm_pins() -> None:
    with install.gpu_lock() as lock:
        left_out = set(install.LOCK.read_text().splitlines()) - set(lock.read_text().splitlines())
    assert {line.partition("==")[0] for line in left_out} == set(install.PINNED_BY_VLLM)
    assert not lock.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "whole", [False, True], ids=["less what vLLM pins", "negative control: the whole lock"]
)
def test_what_a_gpu_machine_installs_fits_together(whole: bool) -> None:
    """pip resolves it against the real packages, and installs nothing."""
    with install.gpu_lock() as lock:
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
        command += ["-r", str(install.GPU), "-c", str(install.LOCK if whole else lock)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert (done.returncode == 0) is not whole, done.stderr[-2000:]
    assert ("ResolutionImpossible" in done.stderr) is whole


@pytest.mark.slow
def test_for_a_gpu_and_then_not_for_one(root: Path, wheels: Path, tmp_path: Path) -> None:
    venv = tmp_path / "env"
    done = run_install(root, wheels, "--venv", str(venv), "--device", "gpu", ensurepip=False)
    assert done.returncode == 0, done.stdout
    assert list((venv / "lib/python3.11/site-packages").glob("vllm-0.32.0.dist-info"))
    assert run_install(root, wheels, "--venv", str(venv)).stdout == ""  # by itself it stays what it is

    other = run_install(root, tmp_path / "empty", "--venv", str(venv), "--device", "cpu", ensurepip=False)
    assert other.returncode == 1
    assert "Making env anew: it was made for the gpu" in other.stdout


@pytest.mark.slow
def test_an_import_check_that_dies_and_a_pip_that_finds_nothing_are_said(
    root: Path, wheels: Path, tmp_path: Path
) -> None:
    venv = tmp_path / "env"
    sigill = {"FAKE_SIGNAL": str(int(signal.SIGILL))}
    died = run_install(root, wheels, "--venv", str(venv), ensurepip=False, **sigill)
    assert died.returncode == 1
    assert died.stdout.strip().endswith("(AVX2 at least is needed).")
    assert not (venv / install.STAMP).exists()

    (root / "requirements/constraints-cpu.txt").write_text(
        "torch==2.13.0\ntransformers==9\nvllm-cpu==0.32.0\n"
    )
    failed = run_install(root, wheels, "--venv", str(venv))
    make_project(root)
    assert failed.returncode == 1
    assert "No matching distribution found for transformers==9" in failed.stdout
    assert "installing vLLM failed (whole log: " in failed.stdout
    assert not (venv / install.BUSY).exists()  # pip ended by itself: nothing to make anew


def test_python_without_pip_and_ensurepip_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "has_pip", lambda python: False)
    with pytest.raises(install.Refused, match="neither ensurepip nor pip"):
        install.make_venv(tmp_path / "env", has_ensurepip=False)
    assert not (tmp_path / "env").exists()
