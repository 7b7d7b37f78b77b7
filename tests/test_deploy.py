"""The files in deploy/: valid by the schemas of their kind, and in step with what the server does."""

from __future__ import annotations

import copy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from ghostserve.cli import doctor
from ghostserve.testing.fake_engine import FakeEngine
from ghostserve.testing.fake_server import build_app

DEPLOY = Path(__file__).parents[1] / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
UNIT = DEPLOY / "systemd" / "ghostserve.service"
KUBERNETES = ("1.31", "1.37")  # some that are in use; before 1.30 `sleep` in preStop needs a feature gate
END_S = 20.0  # for errors to what is left, and for HTTP server, engine core and keeper to end; docs/operations.md says so


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def of_kind(path: Path, kind: str) -> dict[str, Any]:
    (found,) = [document for document in documents(path) if document["kind"] == kind]
    return found


def container(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod's spec and its one container."""
    pod: dict[str, Any] = of_kind(path, "Deployment")["spec"]["template"]["spec"]
    (only,) = pod["containers"]
    return pod, only


def flags(only: dict[str, Any]) -> dict[str, str]:
    words = [word.removeprefix("--") for word in only["args"] if word.startswith("--")]
    return dict(word.split("=", 1) for word in words)


@pytest.fixture(scope="module")
def routes() -> Iterator[set[str]]:
    engine = FakeEngine()
    try:
        yield {getattr(route, "path", "") for route in build_app(engine).router.routes}
    finally:
        engine.close()


def bytes_of(quantity: str) -> int:
    return int(quantity.removesuffix("Gi")) << 30


# ---- Kubernetes ------------------------------------------------------------------------------------------------------


def test_there_is_one_for_cpus_and_one_for_gpus() -> None:
    assert [path.stem for path in MANIFESTS] == ["ghostserve-cpu", "ghostserve-gpu"]
    for path in MANIFESTS:
        assert [document["kind"] for document in documents(path)] == [
            "Deployment",
            "Service",
            "PodDisruptionBudget",
        ]


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_kubernetes_would_take_it(path: Path, version: str) -> None:
    for document in documents(path):
        kubernetes_validate.validate(document, version, strict=True)


def test_a_mistake_would_be_found() -> None:
    wrong = copy.deepcopy(of_kind(MANIFESTS[0], "Deployment"))
    probe = wrong["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]
    probe["periodSecond"] = probe.pop("periodSeconds")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES[-1], strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_probes(path: Path, routes: set[str]) -> None:
    """Each asks a route that exists, at the port that is served; only the one that means it restarts the pod."""
    _, only = container(path)
    asked = {name: only[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {name: get["path"] for name, get in asked.items()} == {
        "startup": "/readyz",
        "liveness": "/health",
        "readiness": "/readyz",
    }
    assert {get["path"] for get in asked.values()} <= routes
    (port,) = only["ports"]
    assert {get["port"] for get in asked.values()} == {port["name"]}
    assert flags(only)["port"] == str(port["containerPort"])
    service = of_kind(path, "Service")["spec"]
    assert service["ports"][0]["targetPort"] == port["name"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_the_grace_period_covers_the_drain(path: Path) -> None:
    pod, only = container(path)
    slept_s = only["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed_s = slept_s + int(flags(only)["shutdown-timeout"]) + END_S
    assert pod["terminationGracePeriodSeconds"] >= needed_s


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_memory_adds_up(path: Path) -> None:
    """The limit holds what is asked for by flags, and what lies in memory-backed volumes."""
    pod, only = container(path)
    limit, given = bytes_of(only["resources"]["limits"]["memory"]), flags(only)
    assert only["resources"]["requests"]["memory"] == only["resources"]["limits"]["memory"]
    volumes = {volume["name"]: volume.get("emptyDir", {}) for volume in pod["volumes"]}
    in_memory = sum(
        bytes_of(room["sizeLimit"]) for room in volumes.values() if room.get("medium") == "Memory"
    )
    kv = int(given["tensor-parallel-size"]) * int(given.get("kv-cache-memory-bytes", 0))
    assert bytes_of(given["host-memory"]) + in_memory + kv + (8 << 30) < limit
    mounted = {mount["mountPath"]: mount["name"] for mount in only["volumeMounts"]}
    assert volumes[mounted["/dev/shm"]]["medium"] == "Memory"


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_it_runs_without_privileges(path: Path) -> None:
    pod, only = container(path)
    assert pod["securityContext"]["runAsNonRoot"] is True
    context = only["securityContext"]
    assert (context["allowPrivilegeEscalation"], context["readOnlyRootFilesystem"]) == (False, True)
    assert context["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_labels_and_flags_fit(path: Path) -> None:
    labels = of_kind(path, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert of_kind(path, "Deployment")["spec"]["selector"]["matchLabels"] == labels
    assert of_kind(path, "Service")["spec"]["selector"] == labels
    assert of_kind(path, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    _, only = container(path)
    subject, _, _ = doctor.parse(only["args"])
    gpus = only["resources"]["limits"].get("nvidia.com/gpu")
    assert subject.ranks == 2
    assert gpus in (None, subject.ranks)


# ---- systemd ---------------------------------------------------------------------------------------------------------


def unit_lines() -> dict[str, str]:
    pairs = [line.partition("=") for line in UNIT.read_text(encoding="utf-8").splitlines() if "=" in line]
    return {name: value for name, _, value in pairs if not name.startswith("#")}


def test_the_unit_lets_a_drain_end() -> None:
    unit = unit_lines()
    assert (unit["Type"], unit["KillMode"]) == ("exec", "mixed")
    timeout_s = int(UNIT.read_text(encoding="utf-8").partition("--shutdown-timeout ")[2].split('"')[0])
    assert int(unit["TimeoutStopSec"]) >= timeout_s + END_S


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="not run: there is no systemd-analyze here"
)
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """With a program that exists here. Negative control: a misspelt setting is complained about."""

    def verify(text: str) -> str:
        file = tmp_path / UNIT.name
        file.write_text(text.replace("/opt/ghostserve/.venv/bin/ghostserve", "/bin/true"))
        done = subprocess.run(
            ["systemd-analyze", "verify", str(file)], capture_output=True, text=True, timeout=60, check=False
        )
        return done.stderr + (f"status {done.returncode}" if done.returncode else "")

    text = UNIT.read_text(encoding="utf-8")
    assert verify(text) == ""
    assert "KilMode" in verify(text.replace("KillMode", "KilMode"))
