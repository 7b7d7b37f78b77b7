"""Processors or GPUs for so many ranks; on GPUs peer access and pinned memory, asked of torch in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ghostserve.cli.doctor_checks import Finding, Subject, fail, ok, warn
from ghostserve.cli.platform_check import installed_version

NVIDIA = Path("/dev/nvidiactl")
PROBE_S = 7.0
PROBE = """
import json, torch
count = torch.cuda.device_count()
pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
found = {
    "names": [torch.cuda.get_device_name(device) for device in range(count)],
    "no_peer": [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)],
}
try:
    found["pinned"] = bool(count) and torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True).is_pinned()
except RuntimeError as error:
    found["pinned"], found["pinned_error"] = False, str(error).splitlines()[0]
print(json.dumps(found))
"""


def check_devices(
    subject: Subject,
    *,
    nvidia: Path = NVIDIA,
    for_gpu: bool | None = None,
    command: Sequence[str] = (sys.executable, "-c", PROBE),
) -> list[Finding]:
    """`for_gpu`: whether vLLM's build is the one for GPUs."""
    gpu_build = installed_version("vllm") is not None if for_gpu is None else for_gpu
    if not gpu_build:
        return _cpus(subject, has_gpu=nvidia.exists())
    if not nvidia.exists():
        remedy = "install the NVIDIA driver (containers: its runtime), or 'scripts/install --device cpu'"
        return [fail("devices", f"vLLM is built for GPUs, and there is no {nvidia}", remedy)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=False)
    except subprocess.TimeoutExpired:
        found = f"torch did not tell its devices within {PROBE_S:g} s"
        return [
            warn("devices", found, "look at nvidia-smi; the first import after a boot may be slow: ask again")
        ]
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return [
            fail(
                "devices", f"torch cannot use the GPUs: {last}", "look at nvidia-smi and the driver's version"
            )
        ]
    return _gpus(subject, json.loads(done.stdout))


def _cpus(subject: Subject, *, has_gpu: bool) -> list[Finding]:
    cpus = len(os.sched_getaffinity(0))
    found = f"CPU: {cpus} for {subject.ranks} ranks; peer access and pinned memory do not matter"
    if has_gpu:
        return [
            warn("devices", f"{found}; a GPU is there and not used", "'scripts/install --device gpu' uses it")
        ]
    if cpus < subject.ranks:
        return [warn("devices", found, "give each rank a CPU of its own, or lower --tensor-parallel-size")]
    return [ok("devices", found)]


def _gpus(subject: Subject, found: dict[str, Any]) -> list[Finding]:
    names, no_peer = found["names"], found["no_peer"]
    listed = f"{len(names)} GPUs ({', '.join(sorted(set(names))) or 'none'}) for {subject.ranks} ranks"
    findings = [ok("devices", listed)]
    if len(names) < subject.ranks:
        remedy = "lower --tensor-parallel-size, or look at CUDA_VISIBLE_DEVICES"
        findings = [fail("devices", listed, remedy)]
    if subject.ranks > 1:
        pairs = ", ".join(f"{a}-{b}" for a, b in no_peer if a < b)
        if pairs:
            remedy = (
                "slower, not wrong: see 'nvidia-smi topo -p2p r'; virtual machines and IOMMU switch it off"
            )
            findings.append(warn("peer access", f"none between GPUs {pairs}", remedy))
        else:
            findings.append(ok("peer access", "between all GPUs"))
    if found["pinned"]:
        findings.append(ok("pinned memory", "64 MiB could be pinned"))
    else:
        reason = found.get("pinned_error") or "not to be had"
        findings.append(
            warn("pinned memory", reason, "raise the memory limit: copies to host memory are slower")
        )
    return findings
