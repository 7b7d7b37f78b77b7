"""`ghostserve doctor`: each check on something that is broken on purpose, the report, and its exit status."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from ghostserve.cli import (
    doctor,
    doctor_checks,
    doctor_devices,
    doctor_flags,
    doctor_machine,
    doctor_model,
    doctor_software,
)
from ghostserve.cli import main as cli
from ghostserve.cli.doctor_checks import Finding, Status, Subject, fail, ok, run_checks, warn
from ghostserve.cli.platform_check import PlatformFacts
from ghostserve.clock import monotonic_s
from ghostserve.config import GhostConfig
from ghostserve.errors import UsageError
from ghostserve.native import LIBRARY
from ghostserve.weights.cache import ModelCache, Version, default_root

HERE = PlatformFacts(system="Linux", machine="x86_64", python=(3, 11), vllm="0.32.0+cpu", torch="2.13.0+cpu")
PLAIN = Subject()
TINY = Path(doctor.__file__).parents[1] / "models" / "tiny-llama"


def only(findings: Sequence[Finding]) -> Finding:
    assert len(findings) == 1, findings
    assert (findings[0].remedy is None) == (findings[0].status is Status.OK)
    return findings[0]


def with_config(**values: object) -> Subject:
    return Subject(config=GhostConfig(**values))  # type: ignore[arg-type]


# ---- the runner ------------------------------------------------------------------------------------------------------


def test_a_check_that_raises_or_hangs_is_a_finding_and_the_others_go_on() -> None:
    release = threading.Event()

    def hangs(_subject: Subject) -> list[Finding]:
        release.wait(20)
        return []

    def raises(_subject: Subject) -> list[Finding]:
        raise RuntimeError("broken")

    began_s = monotonic_s()
    findings = run_checks(
        [("hangs", hangs), ("raises", raises), ("fine", lambda _: [ok("fine", "yes")])], PLAIN, within_s=0.2
    )
    release.set()
    assert monotonic_s() - began_s < 5
    assert [(finding.name, finding.status) for finding in findings] == [
        ("hangs", Status.FAIL),
        ("raises", Status.FAIL),
        ("fine", Status.OK),
    ]
    assert "RuntimeError: broken" in findings[1].found
    assert all(finding.remedy for finding in findings[:2])


# ---- what is installed -----------------------------------------------------------------------------------------------


def test_platform() -> None:
    assert [found.status for found in doctor_software.check_platform(PLAIN, facts=HERE)] == [Status.OK] * 2
    old = only(doctor_software.check_platform(PLAIN, facts=replace(HERE, vllm="0.31.0")))
    assert old.status is Status.FAIL
    assert "0.32.0" in old.found
    assert "make install" in str(old.remedy)


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({"torch": "2.12.0"}, "torch is 2.12.0 and ==2.13.0 is asked for"),
        ({}, "torch is missing"),
    ],
)
def test_pins(installed: dict[str, str], said: str) -> None:
    wrong = only(doctor_software.check_pins(PLAIN, requirements=["torch==2.13.0"], installed=installed))
    assert wrong.status is Status.WARN
    assert said in wrong.found
    local = doctor_software.check_pins(
        PLAIN,
        requirements=["torch==2.13.0", "triton==3 ; extra == 'gpu'"],
        installed={"torch": "2.13.0+cpu"},
    )
    assert only(local).status is Status.OK


def test_the_pins_that_are_read_include_vllms() -> None:
    assert any(line.startswith("torch") for line in doctor_software._requirements())


def test_plugin() -> None:
    point = metadata.EntryPoint(
        "ghostserve_cpu", "ghostserve.engine.platform:register", "vllm.platform_plugins"
    )
    assert only(doctor_software.check_plugin(PLAIN, entry_points=[point], environment={})).status is Status.OK
    gone = only(doctor_software.check_plugin(PLAIN, entry_points=[], environment={}))
    left_out = only(
        doctor_software.check_plugin(PLAIN, entry_points=[point], environment={"VLLM_PLUGINS": "other"})
    )
    assert (gone.status, left_out.status) == (Status.FAIL, Status.FAIL)
    assert "VLLM_PLUGINS" in str(left_out.remedy)
    broken = metadata.EntryPoint("ghostserve_cpu", "ghostserve.no_such:register", "vllm.platform_plugins")

    def check(subject: Subject) -> Sequence[Finding]:
        return doctor_software.check_plugin(subject, entry_points=[broken], environment={})

    assert only(run_checks([("plugin", check)], PLAIN)).status is Status.FAIL


def test_native_library(tmp_path: Path) -> None:
    here = only(doctor_software.check_native(PLAIN))
    assert here.status is Status.OK, here
    assert "the codec uses" in here.found
    removed = only(doctor_software.check_native(PLAIN, library=tmp_path / LIBRARY.name))
    assert (removed.status, "missing" in removed.found) == (Status.WARN, True)
    other = tmp_path / "libother.so"
    other.write_bytes(b"no library")
    assert only(doctor_software.check_native(PLAIN, library=other)).status is Status.WARN


def test_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(doctor_software.check_kernel(PLAIN)).status is Status.OK

    def refused(_pid: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "pidfd_open", refused)
    sandboxed = only(doctor_software.check_kernel(PLAIN))
    assert (sandboxed.status, "pidfd_open" in sandboxed.found) == (Status.FAIL, True)


# ---- the machine -----------------------------------------------------------------------------------------------------


def test_memory(tmp_path: Path) -> None:
    cgroup = tmp_path / "memory.max"
    cgroup.write_text("max\n")
    assert only(doctor_machine.check_memory(PLAIN, cgroup=cgroup)).status is Status.OK
    cgroup.write_text(f"{256 << 20}\n")
    too_much = only(doctor_machine.check_memory(with_config(host_memory=1 << 30), cgroup=cgroup))
    assert too_much.status is Status.FAIL
    assert "--host-memory 1073741824" in too_much.found
    tight = only(doctor_machine.check_memory(PLAIN, cgroup=cgroup))
    assert tight.status is Status.WARN  # a budget that fits, and processes that do not


def test_memory_counts_weights_and_kv(tmp_path: Path) -> None:
    cgroup = tmp_path / "memory.max"
    (tmp_path / "model.safetensors").write_bytes(b"\0" * (1 << 20))
    limit = doctor_machine.PROCESSES_BYTES + 2 * doctor_machine.RANK_BYTES + (8 << 20)
    cgroup.write_text(str(limit))
    subject = replace(with_config(host_memory=6 << 20), model=str(tmp_path), ranks=2)
    fits = replace(subject, kv_cache_bytes=1 << 19)
    assert only(doctor_machine.check_memory(fits, cgroup=cgroup)).status is Status.OK
    one_byte_more = replace(subject, kv_cache_bytes=(1 << 19) + 1)
    assert only(doctor_machine.check_memory(one_byte_more, cgroup=cgroup)).status is Status.WARN


def test_standbys() -> None:
    plenty, little = 64 << 30, 1 << 30
    assert only(doctor_machine.check_standby(PLAIN, available_bytes=plenty)).status is Status.OK
    assert only(doctor_machine.check_standby(PLAIN, available_bytes=little)).status is Status.WARN
    asked = only(doctor_machine.check_standby(with_config(standbys=2), available_bytes=little))
    assert (asked.status, "2 are started" in asked.found) == (Status.WARN, True)
    none = doctor_machine.check_standby(with_config(standbys=0), available_bytes=little)
    assert only(none).status is Status.OK


@pytest.mark.parametrize(
    ("free", "status"), [(1 << 30, Status.OK), (64 << 20, Status.WARN), (1 << 20, Status.FAIL)]
)
def test_shared_memory(monkeypatch: pytest.MonkeyPatch, free: int, status: Status) -> None:
    def usage(_path: object) -> object:
        return type("Usage", (), {"free": free})

    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", usage)
    assert only(doctor_machine.check_shared_memory(Subject(ranks=2))).status is status


def test_shared_memory_that_is_not_there(tmp_path: Path) -> None:
    gone = only(doctor_machine.check_shared_memory(PLAIN, directory=tmp_path / "shm"))
    assert gone.status is Status.FAIL


@pytest.mark.parametrize(
    ("hard", "status"), [(resource.RLIM_INFINITY, Status.OK), (65535, Status.OK), (4096, Status.WARN), (256, Status.FAIL)]
)  # fmt: skip
def test_open_files(monkeypatch: pytest.MonkeyPatch, hard: int, status: Status) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (256, hard))
    assert only(doctor_machine.check_open_files(PLAIN)).status is status


def test_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        busy = only(doctor_machine.check_port(Subject(port=port)))
    assert busy.status is Status.FAIL
    assert f"127.0.0.1:{port}" in busy.found
    assert "--port" in str(busy.remedy)
    assert only(doctor_machine.check_port(Subject(port=port))).status is Status.OK
    assert only(doctor_machine.check_port(Subject(port=70000))).status is Status.FAIL
    elsewhere = only(doctor_machine.check_port(Subject(host="192.0.2.1", port=port)))
    assert (elsewhere.status, "--host" in str(elsewhere.remedy)) == (Status.FAIL, True)


def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    asked = Subject(uds=str(path), port=70000)
    assert only(doctor_machine.check_port(asked)).status is Status.OK, "the port does not matter"
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(path))
        taken.listen()
        assert only(doctor_machine.check_port(asked)).status is Status.FAIL
    assert only(doctor_machine.check_port(asked)).status is Status.OK, (
        "a killed server's: the next removes it"
    )
    path.unlink()
    path.write_text("a file")
    assert only(doctor_machine.check_port(asked)).status is Status.FAIL
    for wrong in (tmp_path / "no" / "s", tmp_path / ("x" * 107)):
        assert only(doctor_machine.check_port(Subject(uds=str(wrong)))).status is Status.FAIL


def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment = {"VLLM_CACHE_ROOT": str(tmp_path / "not" / "made" / "yet")}
    assert doctor_machine.check_disk(PLAIN, environment=environment)[0].status is Status.OK
    sizes = {Status.FAIL: 1 << 20, Status.WARN: 1 << 30}
    for status, free in sizes.items():
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda _path, usage=usage: usage)
        assert doctor_machine.check_disk(PLAIN, environment=environment)[0].status is status
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert {found.status for found in doctor_machine.check_disk(PLAIN)} == {Status.FAIL}


# ---- model and devices -----------------------------------------------------------------------------------------------


def model_folder(path: Path, *, heads: int = 4) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": ["X"], "num_attention_heads": heads}))
    (path / "model.safetensors").write_bytes(b"w")
    (path / "tokenizer.json").write_text("{}")
    return path


def look_at(path: Path | str, *, ranks: int = 2) -> Finding:
    return only(doctor_model.check_model(Subject(model=str(path), ranks=ranks)))


def test_model(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    assert look_at(folder).status is Status.OK
    assert look_at(TINY).status is Status.OK
    assert only(doctor_model.check_model(PLAIN)).status is Status.OK
    split = look_at(folder, ranks=3)
    assert split.status is Status.FAIL
    assert "take one of 1, 2, 4" in str(split.remedy)


@pytest.mark.parametrize("lacking", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_that_is_not_whole(tmp_path: Path, lacking: str) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / lacking).unlink()
    assert look_at(folder).status is Status.FAIL


def test_a_model_that_lacks_a_part_of_its_weights(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    parts = {"a": "model.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    found = look_at(folder)
    assert (found.status, "model-2.safetensors" in found.found) == (Status.FAIL, True)


def test_a_model_by_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "s3://bucket/model"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    found = look_at(url)
    assert found.status is Status.WARN
    assert f"ghostserve models pull {url}" in str(found.remedy)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert look_at(url).status is Status.FAIL
    cache = ModelCache(default_root(), url)
    cache.publish(Version(url=url, version="1", files=()))
    assert look_at(url).status is Status.OK


def test_a_model_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look_at("/no/such/folder").status is Status.FAIL
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert look_at("some/model").status is Status.WARN
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert look_at("some/model").status is Status.FAIL
    snapshot = tmp_path / "models--some--model" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert look_at("some/model").status is Status.OK


def test_protection() -> None:
    assert only(doctor_model.check_parity(Subject(ranks=2))).status is Status.OK
    assert (
        only(doctor_model.check_parity(replace(with_config(parity_shards=255), ranks=2))).status
        is Status.FAIL
    )
    assert only(doctor_model.check_parity(with_config(protection="none"))).status is Status.WARN


def gpus(tmp_path: Path, script: str, *, ranks: int = 2) -> list[Finding]:
    device = tmp_path / "nvidiactl"
    device.touch()
    return doctor_devices.check_devices(
        Subject(ranks=ranks), nvidia=device, for_gpu=True, command=(sys.executable, "-c", script)
    )


def test_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch would say of GPUs is played: no machine with one has run this yet."""
    no_gpu = tmp_path / "none"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    cpu = doctor_devices.check_devices(Subject(ranks=2), nvidia=no_gpu, for_gpu=False)
    assert only(cpu).status is Status.OK
    few = doctor_devices.check_devices(Subject(ranks=3), nvidia=no_gpu, for_gpu=False)
    assert only(few).status is Status.WARN
    driver = doctor_devices.check_devices(PLAIN, nvidia=no_gpu, for_gpu=True)
    assert only(driver).status is Status.FAIL
    good = {"names": ["H", "H"], "no_peer": [], "pinned": True}
    assert [found.status for found in gpus(tmp_path, f"print({json.dumps(json.dumps(good))})")] == [
        Status.OK
    ] * 3
    bad = {"names": ["H"], "no_peer": [[0, 1], [1, 0]], "pinned": False, "pinned_error": "out of memory"}
    found = {finding.name: finding for finding in gpus(tmp_path, f"print({json.dumps(json.dumps(bad))})")}
    assert found["devices"].status is Status.FAIL
    assert "0-1" in found["peer access"].found
    assert (found["pinned memory"].status, found["pinned memory"].found) == (Status.WARN, "out of memory")


def test_devices_that_do_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = only(gpus(tmp_path, "raise RuntimeError('driver too old')"))
    assert (broken.status, "driver too old" in broken.found) == (Status.FAIL, True)
    monkeypatch.setattr(doctor_devices, "PROBE_S", 0.1)
    assert only(gpus(tmp_path, "import time; time.sleep(20)")).status is Status.WARN


# ---- the command -----------------------------------------------------------------------------------------------------


def test_flags() -> None:
    subject, others, as_json = doctor.parse(
        [
            "m",
            "-tp",
            "2",
            "--host-memory",
            "2Gi",
            "--max-model-len",
            "4096",
            "--json",
            "--kv-cache-memory-bytes",
            "1Gi",
        ]
    )
    assert (subject.model, subject.ranks, subject.config.host_memory) == ("m", 2, 2 << 30)
    assert (subject.kv_cache_bytes, others, as_json) == (1 << 30, ["--max-model-len"], True)
    assert doctor.parse(["--max-model-len", "4096"])[0].model is None
    assert doctor.parse(["--model", "m"])[0].model == "m"


def test_flags_are_spelt_as_vllm_takes_them() -> None:
    argv = ["m", "--tensor_parallel_size", "2", "--kv_cache_memory_bytes=1Gi", "--uds=/run/a_b"]
    subject, others, _ = doctor.parse(argv)
    assert (subject.ranks, subject.kv_cache_bytes, subject.uds, others) == (2, 1 << 30, "/run/a_b", [])


CONFIG_FILE = """
model: m
tensor_parallel_size: 4
host-memory: 2Gi
ui: true
enforce-eager: false
allowed-origins: [a, b]
middleware: []
compilation-config: {level: 0}
"""


def test_a_configuration_file_is_read_as_serve_does(tmp_path: Path) -> None:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    file = tmp_path / "config.yaml"
    file.write_text(CONFIG_FILE)
    for config in (["--config", str(file)], [f"--config={file}"]):
        subject, others, _ = doctor.parse(["--port", "1", *config])
        assert (subject.model, subject.ranks, subject.port) == ("m", 4, 1)
        assert (subject.config.host_memory, subject.config.ui) == (2 << 30, True)
        assert "--allowed-origins" in others
        assert doctor.parse(["mine", "-tp", "2", *config])[0].ranks == 2, "the command line wins"
        assert doctor.parse(["mine", *config])[0].model == "mine"
    theirs = FlexibleArgumentParser()
    theirs.add_argument("--no-enforce-eager")
    expected = [
        word.replace("_", "-") if word.startswith("--") else word
        for word in theirs.load_config_file(str(file))
    ]
    assert doctor_flags.spread(["--config", str(file)]) == (None, expected)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.yaml", None, "x.yaml: No such file"),
        ("x.yaml", "a: [", "x.yaml: no YAML"),
        ("x.yaml", "- a", "one 'flag: value' a line"),
        ("x.json", "{}", "ends in .yaml"),
    ],
)
def test_a_configuration_file_that_cannot_be_read(
    tmp_path: Path, name: str, text: str | None, said: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=said):
        doctor.parse(["--config", str(tmp_path / name)])
    with pytest.raises(UsageError, match="name one file"):
        doctor.parse(["--config", "a.yaml", "--config=b.yaml"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--port", "web"], "--port"),
        (["-tp", "0"], "--tensor-parallel-size 0"),
        (["--host-memory", "lots"], "not an amount"),
        (["--parity-shards", "0"], "--parity-shards 0"),
    ],
)
def test_usage(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError):
        doctor.parse(argv)
    assert cli.main(["doctor", *argv]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("findings", "code", "said"),
    [
        ([ok("a", "x")], 0, "All is well."),
        ([ok("a", "x"), warn("b", "y", "do z")], 0, "Nothing fails, 1 of 2 warn."),
        ([fail("a", "x", "do z"), warn("b", "y", "do z")], 1, "1 of 2 fail, 1 warn"),
    ],
)
def test_exit_status_and_report(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    findings: list[Finding],
    code: int,
    said: str,
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", [("one", lambda _subject: findings)])
    assert cli.main(["doctor"]) == code
    text = capsys.readouterr().out
    assert said in text
    assert all(finding.remedy in text for finding in findings if finding.remedy)
    assert cli.main(["doctor", "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] == (code == 0)
    assert [found["status"] for found in document["findings"]] == [found.status.value for found in findings]


def test_as_a_process_with_a_low_limit_and_a_port_that_is_taken() -> None:
    """All checks for real: quick, nothing heavy imported, and what is broken is found."""
    assert doctor_checks.ALL_CHECKS_S < 10

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))

    code = (
        "import sys; from ghostserve.cli.main import main; status = main(sys.argv[1:]); "
        "assert not {'torch', 'vllm'} & set(sys.modules); sys.exit(status)"
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        flags = ["--json", "--port", str(taken.getsockname()[1]), "-tp", "2"]
        done = subprocess.run(
            [sys.executable, "-c", code, "doctor", str(TINY), *flags],
            capture_output=True, text=True, timeout=30, check=False, preexec_fn=lower,
        )  # fmt: skip
    assert done.returncode == 1, done.stderr
    found = {finding["name"]: finding["status"] for finding in json.loads(done.stdout)["findings"]}
    assert (found["open files"], found["port"], found["model"]) == ("fail", "fail", "ok")
