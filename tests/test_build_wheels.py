"""Platform wheels: how one is made of the pure wheel, and (slowly) all of them with the real compiler."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from build_wheels import LIBRARY, pack
from fake_index import make_wheel
from ghostserve.native.build import TARGETS
from install import COMPILER

ROOT = Path(__file__).parents[1]
MAGIC = {"linux": b"\x7fELF", "macos": b"\xcf\xfa\xed\xfe"}
ELF_MACHINE = {"x86_64": 62, "aarch64": 183}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    make_wheel(
        tmp_path, "ghostserve", "0.1.0", {"ghostserve/__init__.py": "", LIBRARY: "of the builder's machine"}
    )
    out = tmp_path / "out"
    out.mkdir()
    (pure,) = tmp_path.glob("*.whl")
    return pack(pure, b"a library", "manylinux_2_17_x86_64", out)


def test_the_wheel_of_a_platform(packed: Path) -> None:
    assert packed.name == "ghostserve-0.1.0-py3-none-manylinux_2_17_x86_64.whl"
    with zipfile.ZipFile(packed) as wheel:
        assert wheel.read(LIBRARY) == b"a library"
        about = wheel.read("ghostserve-0.1.0.dist-info/WHEEL").decode()
        record = wheel.read("ghostserve-0.1.0.dist-info/RECORD").decode().splitlines()
        assert "Tag: py3-none-manylinux_2_17_x86_64" in about
        assert "Tag: py3-none-any" not in about
        assert "Root-Is-Purelib: false" in about
        lines = {line.split(",")[0]: line.split(",")[1:] for line in record}
        assert lines.keys() == set(wheel.namelist())
        for name, (digest, size) in lines.items():
            if name.endswith("RECORD"):
                assert (digest, size) == ("", "")
                continue
            content = wheel.read(name)
            expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            assert (digest, size) == (f"sha256={expected}", str(len(content)))


def test_the_same_input_gives_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    (pure,) = tmp_path.glob("*.whl")
    again = tmp_path / "again"
    again.mkdir()
    assert pack(pure, b"a library", "manylinux_2_17_x86_64", again).read_bytes() == packed.read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_wheels_from_this_machine(tmp_path: Path) -> None:
    """Every target compiles; this machine's wheel installs, and its library works."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*pip, str(tmp_path / "zig"), COMPILER], check=True, timeout=300)
    env = os.environ | {"PYTHONPATH": str(tmp_path / "zig")}
    script = [sys.executable, str(ROOT / "scripts" / "build_wheels.py"), "--out", str(tmp_path / "dist")]
    subprocess.run(script, env=env, check=True, timeout=600)
    for target, tag in TARGETS.items():
        (wheel,) = (tmp_path / "dist").glob(f"*-{tag}.whl")
        with zipfile.ZipFile(wheel) as file:
            library = file.read(LIBRARY)
        machine, system = target.split("-")[:2]
        assert library.startswith(MAGIC[system.partition(".")[0]])
        if system == "linux":
            assert int.from_bytes(library[18:20], "little") == ELF_MACHINE[machine]
    (mine,) = (tmp_path / "dist").glob(f"*-manylinux_2_17_{os.uname().machine}.whl")
    subprocess.run([*pip, str(tmp_path / "site"), str(mine)], check=True, timeout=300)
    code = "import ghostserve.codec.choose as c; print(c.__file__, c.host_codec(4, 3).backend.name)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert str(tmp_path / "site") in done.stdout, done.stderr
    assert "native (" in done.stdout
