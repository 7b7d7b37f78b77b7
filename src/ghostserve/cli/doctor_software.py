"""What is installed: platform, versions and pins, the platform plugin, the native library. Imports neither torch nor vLLM."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import ghostserve
from ghostserve import native
from ghostserve.cli.doctor_checks import Finding, Subject, fail, ok, warn
from ghostserve.cli.platform_check import (
    VLLM_DISTRIBUTIONS,
    PlatformFacts,
    installed_version,
    read_platform,
    unsupported,
)

PINNED = ("torch", "transformers", "fastapi", "numpy", "psutil")
"""What of vLLM's and our requirements decides whether it works; vLLM's audio and video packages are left out on purpose."""
PLUGIN_GROUP, PLUGIN = "vllm.platform_plugins", "ghostserve_cpu"
REINSTALL = "run 'make install'"


def check_platform(_subject: Subject, *, facts: PlatformFacts | None = None) -> list[Finding]:
    """What `serve` itself demands."""
    facts = facts or read_platform()
    sentence = unsupported(facts)
    if sentence is not None:
        found, _, remedy = sentence.partition(": ")
        return [fail("platform", found, remedy)]
    return [
        ok("platform", f"{facts.system} on {facts.machine}, Python {facts.python[0]}.{facts.python[1]}"),
        ok("versions", f"ghostserve {ghostserve.__version__}, vllm {facts.vllm}, torch {facts.torch}"),
    ]


def check_pins(
    _subject: Subject,
    *,
    requirements: Sequence[str] | None = None,
    installed: Mapping[str, str] | None = None,
) -> list[Finding]:
    """Whether what vLLM and we were built for is what is there."""
    from packaging.requirements import Requirement

    lines = _requirements() if requirements is None else requirements
    wrong: list[str] = []
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name.lower()
        version = installed_version(name) if installed is None else installed.get(name)
        if version is None:
            wrong.append(f"{name} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{name} is {version} and {requirement.specifier} is asked for")
    if wrong:
        return [
            warn("pins", "; ".join(sorted(set(wrong))), f"{REINSTALL}: only the locked versions are tested")
        ]
    return [ok("pins", f"{', '.join(PINNED)} as asked for")]


def _requirements() -> list[str]:
    """Ours and vLLM's, of what is installed: a checkout that is run as it stands has none."""
    lines: list[str] = []
    for distribution in ("ghostserve", *VLLM_DISTRIBUTIONS):
        with contextlib.suppress(metadata.PackageNotFoundError):
            theirs = metadata.requires(distribution) or []
            lines += [line for line in theirs if _name_of(line) in PINNED]
    return [line for line in lines if "extra ==" not in line]


def _name_of(requirement: str) -> str:
    end = next((at for at, char in enumerate(requirement) if not (char.isalnum() or char in "-_.")), None)
    return requirement[:end].lower()


def check_plugin(
    _subject: Subject,
    *,
    entry_points: Iterable[metadata.EntryPoint] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> list[Finding]:
    """Whether vLLM will find our platform, and is allowed to load it: stock collectives wait for ever for a dead peer."""
    points = metadata.entry_points(group=PLUGIN_GROUP) if entry_points is None else entry_points
    point = next((point for point in points if point.name == PLUGIN), None)
    if point is None:
        return [fail("plugin", f"no entry point {PLUGIN} in {PLUGIN_GROUP}", REINSTALL)]
    point.load()
    allowed = environment.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        return [
            fail(
                "plugin",
                f"VLLM_PLUGINS={allowed} leaves {PLUGIN} out",
                f"name {PLUGIN} in VLLM_PLUGINS too, or unset it",
            )
        ]
    return [ok("plugin", f"{PLUGIN}: {point.value}")]


def check_native(_subject: Subject, *, library: Path = native.LIBRARY) -> list[Finding]:
    """Whether the C library loads, and what of the processor its codec uses."""
    remedy = "python -m ghostserve.native.build; without it numpy computes, slowly"
    if not library.exists():
        return [warn("native library", f"{library} is missing", remedy)]
    try:
        loaded = native.load(library)
    except OSError as error:
        return [warn("native library", str(error), remedy)]
    path = loaded.paths[-1]
    found = f"interface {native.ABI}; the codec uses {path.name.lower()}"
    if path is native.Path256.PORTABLE:
        return [warn("native library", found, "a processor with AVX2 or NEON is many times faster")]
    return [ok("native library", found)]


def check_kernel(_subject: Subject) -> list[Finding]:
    """The system calls that recovery is made of; old kernels and strict sandboxes refuse them."""
    missing: list[str] = []
    try:
        os.close(os.memfd_create("ghostserve-doctor"))
    except OSError as error:
        missing.append(f"memfd_create: {error.strerror}")
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        missing.append(f"pidfd_open: {error.strerror}")
    if ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) < 0:  # PR_GET_DUMPABLE: is prctl there at all
        missing.append("prctl")
    if missing:
        remedy = "use Linux 5.3 or newer, and a seccomp profile that allows them (RuntimeDefault does)"
        return [fail("kernel", "; ".join(missing), remedy)]
    return [ok("kernel", f"{os.uname().release}: memfd, pidfd, prctl")]
