"""Triton, beside the environment: where it can be imported vLLM chooses another model runner, so it is never installed into it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TRITON = "triton==3.7.1"
OVERLAY = Path(sys.prefix) / "triton-overlay"
INTERPRETER = Path(__file__).parents[1] / "overlay"  # a Triton backend that takes the CPU for a device


def triton() -> Path:
    """Where Triton is; put there once for each environment."""
    done = OVERLAY / f".{TRITON}"
    if not done.exists():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-deps",
            "--upgrade",
            "--target",
            str(OVERLAY),
            TRITON,
        ]
        subprocess.run(pip, check=True, timeout=250, stdout=subprocess.DEVNULL)
        done.touch()
    return OVERLAY


def v2_environment() -> dict[str, str]:
    """With these a server runs Model Runner V2, as on a GPU, its kernels interpreted."""
    path = [str(triton()), str(INTERPRETER), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(path),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }
