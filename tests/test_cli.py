"""The command line without a server: dispatch, versions, usage errors, exit codes, what people read."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

import ghostserve
from ghostserve.arena.fault_kinds import FaultKind
from ghostserve.cli import arguments, kill, platform_check, status
from ghostserve.cli import main as cli
from ghostserve.cli.platform_check import PlatformFacts, unsupported
from ghostserve.cli.units import bytes_text, count_text, milliseconds_text
from ghostserve.errors import (
    CheckFailed,
    EngineLost,
    GhostserveError,
    StartError,
    UnsupportedError,
    UsageError,
)
from ghostserve.testing.fake_engine import FakeEngine
from ghostserve.web.admin import AdminClient

HERE = PlatformFacts(system="Linux", machine="x86_64", python=(3, 11), vllm="0.32.0+cpu", torch="2.13.0+cpu")


def test_this_kind_of_machine_is_supported() -> None:
    assert unsupported(HERE) is None
    assert unsupported(replace(HERE, machine="aarch64", vllm="0.32.0")) is None


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (replace(HERE, system="Darwin", machine="arm64"), "Linux"),
        (replace(HERE, machine="riscv64"), "aarch64"),
        (replace(HERE, python=(3, 12)), "3.11"),
        (replace(HERE, vllm="0.31.0"), "make install"),
        (replace(HERE, vllm="0.32.1"), "0.32.0"),
        (replace(HERE, vllm=None), "make install"),
    ],
)
def test_what_is_unsupported_is_said_in_one_sentence(facts: PlatformFacts, said: str) -> None:
    sentence = unsupported(facts)
    assert sentence is not None
    assert said in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("verb", ["serve", "demo"])
def test_starting_a_server_elsewhere_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    monkeypatch.setattr(platform_check, "read_platform", lambda: replace(HERE, system="Darwin"))
    assert cli.main([verb, "model"]) == 2
    assert capsys.readouterr().err.startswith("ghostserve: error: this is Darwin")


def test_asking_a_server_works_from_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform_check, "read_platform", lambda: replace(HERE, system="Darwin"))
    monkeypatch.setattr(status, "main", lambda _argv: 0)
    assert cli.main(["status"]) == 0


def test_version_names_ours_and_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    facts = platform_check.read_platform()
    line = capsys.readouterr().out.strip()
    assert line == f"ghostserve {ghostserve.__version__} (vllm {facts.vllm}, torch {facts.torch})"


def test_the_command_line_is_light() -> None:
    """`--version`, `status` and `kill` must not wait for torch or vLLM."""
    code = (
        "import sys; from ghostserve.cli import main, status, kill, demo; main.main(['--version']); "
        "print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "argv", [["--help"], ["-h"], ["status", "--help"], ["kill", "-h"], ["demo", "--help"]]
)
def test_help_is_asked_for_and_given(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert cli.main(argv) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("usage: ghostserve")
    assert captured.err == ""


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "name a verb"),
        (["frobnicate"], "no verb 'frobnicate'"),
        (["kil"], "did you mean 'kill'?"),
        (["kill"], "--rank"),
        (["kill", "--rank", "one"], "invalid int"),
        (["kill", "--rank", "0", "--how", "tickle"], "choose from 'crash', 'segfault'"),
        (["kill", "--how", "client_gone"], "invalid choice"),
        (["kill", "--how", "slow"], "name it with --rank"),
        (["status", "--ulr", "x"], "--ulr"),
        (["status", "--url", "localhost:8000"], "not a URL"),
        (["status", "--url", "http://[::1"], "not a URL"),
        (["status", "--url", "http://localhost:99999"], "not a URL"),
        (["status", "--url", "http://localhost:port"], "not a URL"),
        (["status", "--url", "http://[::zz]"], "not a URL"),
        (["status", "--api-key", "schlüssel"], "API key"),
        (["kill", "--rank", "0", "--api-key", "a\nb"], "API key"),
        (["demo", "--port", "65536"], "outside 1 to 65535"),
        (["demo", "--rank", "2"], "ranks are 0 to 1"),
        (["demo", "--tensor-parallel-size", "3"], "invalid choice"),
        (["demo", "--at-token", "600"], "outside 1 to 599"),
        (["demo", "--max-tokens", "1"], "outside 2"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ghostserve: error: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (GhostserveError("x"), 1),
        (CheckFailed("x"), 1),
        (UsageError("x"), 2),
        (UnsupportedError("x"), 2),
        (StartError("x"), 3),
        (EngineLost("x"), 4),
        (KeyboardInterrupt(), 130),
        (SystemExit(3), 3),
        (SystemExit(None), 0),
        (SystemExit("sentence"), 1),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: BaseException, code: int
) -> None:
    def main(_argv: list[str]) -> int:
        raise raised

    monkeypatch.setattr(importlib, "import_module", lambda _name: SimpleNamespace(main=main))
    assert cli.main(["status"]) == code
    if isinstance(raised, GhostserveError):
        assert capsys.readouterr().err == "ghostserve: error: x\n"


def test_serve_gets_its_arguments_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def main(argv: list[str]) -> int:
        seen.append(argv)
        return 0

    def import_module(name: str) -> SimpleNamespace:
        seen.append(name)
        return SimpleNamespace(main=main)

    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(platform_check, "read_platform", lambda: HERE)
    assert cli.main(["serve", "model", "--tensor-parallel-size", "2", "--json"]) == 0
    assert seen == ["ghostserve.cli.serve", ["model", "--tensor-parallel-size", "2", "--json"]]


@pytest.mark.parametrize("argv", [["status"], ["kill", "--rank", "0"]])
def test_no_server(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert cli.main([*argv, "--url", "http://127.0.0.1:9"]) == 1
    message = capsys.readouterr().err
    assert "no server answers at http://127.0.0.1:9" in message
    assert "ghostserve serve" in message


TALKS = """
import sys, types
from ghostserve.cli import main
def talk(_argv):
    while True:
        print("talk")
sys.modules["ghostserve.cli." + sys.argv[1]] = types.SimpleNamespace(main=talk)
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("words", "code"), [("status", 0), ("kill --help", 0), ("kill --rank 0", 1), ("demo --no-restore", 1)]
)
def test_what_nobody_read_to_the_end_is_no_success(words: str, code: int) -> None:
    command = (
        f"{sys.executable} -c '{TALKS.replace(chr(39), chr(34))}' {words} | head -3; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.parametrize(
    ("argv", "code"),
    [(["--help"], 0), (["--version"], 0), (["status"], 0), (["serve", "-h"], 0), (["serve", "m"], 1), ([], 1),
     (["nonsense"], 1), (["demo"], 1)],
)  # fmt: skip
def test_exit_codes_of_the_unheard(argv: list[str], code: int) -> None:
    assert cli.code_unheard(argv) == code


def test_a_missing_package_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_httpx(_name: str) -> None:
        raise ModuleNotFoundError("No module named 'httpx'", name="httpx")

    monkeypatch.setattr(importlib, "import_module", no_httpx)
    for argv in (["status"], ["demo", "--help"]):
        assert cli.main(argv) == 2
        message = capsys.readouterr().err
        assert "No module named 'httpx'" in message
        assert "make install" in message
        assert message.count("\n") == 1


def test_a_missing_module_of_ours_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(_name: str) -> None:
        raise ModuleNotFoundError("No module named 'ghostserve.lost'", name="ghostserve.lost")

    monkeypatch.setattr(importlib, "import_module", ours)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["status"])


def test_a_reader_that_leaves_is_no_error() -> None:
    code = "import sys; from ghostserve.cli.main import main; sys.exit(main(['--help']))"
    command = f'{sys.executable} -c "{code}" | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_flags_win_over_the_environment() -> None:
    parser = arguments.new_parser("status", "")
    arguments.add_server_options(parser)
    environment = {"GHOSTSERVE_URL": "http://a:1", "VLLM_API_KEY": "theirs"}
    assert arguments.admin_of(parser.parse_args([]), {}).url == "http://127.0.0.1:8000"
    assert arguments.admin_of(parser.parse_args([]), environment).url == "http://a:1"
    assert arguments.admin_of(parser.parse_args(["--url", "http://b:2/"]), environment).url == "http://b:2"


def test_status_is_readable() -> None:
    engine = FakeEngine(outage_s=0)
    try:
        engine.tokens = 64
        before = engine.read_state()
        engine.workers[1].kill()
        engine.workers[1].wait()
        lost = engine.read_state()
        engine.step()
        after = engine.read_state()
    finally:
        engine.close()
    assert before is not None
    assert lost is not None
    assert after is not None
    assert "recovered never" in status.render(before)
    assert "lost      VLLM::Worker_TP1" in status.render(lost)
    text = status.render(after)
    assert "recovered 1 time; last: rank 1 by rebuild" in text
    assert "2 blocks from parity, 1 from mirrors (128.0 KiB) · nothing recomputed" in text
    assert "bound 256.0 KiB <= 512.0 KiB: holds" in text
    assert "live KV 1 times and 2/2 blocks" in text
    assert "wrong: 0 KV, 0 mirrors, 0 parity · 0 repaired, 0 given up, 0 waiting" in text
    assert "NaN" not in text
    assert "standby" not in text
    slow = {"health": "slow", "health_reason": "9.0 ms of work per step, 2.0 ms on the others"}
    troubled = after | {
        "ranks": [after["ranks"][0], after["ranks"][1] | slow],
        "standbys": [{"pid": 77, "state": "ready", "memory_bytes": 100 << 20}],
        "keeper": {"pid": None, "restarts": 6},
        "failure": "rank 1 was lost 21 times within 600 s",
    }
    shown = status.render(troubled)
    assert "slow      VLLM::Worker_TP1 · 9.0 ms of work per step" in shown
    assert "77  standby   ready · 100.0 MiB" in shown
    assert "keeper    gone" in shown
    assert "rank 1 was lost 21 times" in shown
    broken = after | {"scrub": after["scrub"] | {"kv_nan_total": 3, "kv_mismatches_total": 1}}
    assert "KV holds 3 NaN and 0 infinities" in status.render(broken)
    assert "wrong: 1 KV" in status.render(broken)
    assert "scrub     off" in status.render(after | {"scrub": after["scrub"] | {"rate_bytes_s": 0}})
    assert "draining" not in text
    assert "serving · draining: no new requests" in status.render(after | {"draining": True})
    unbound = before | {"shadow": before["shadow"] | {"bound_holds": False}}
    assert "DOES NOT HOLD" in status.render(unbound)


@pytest.mark.parametrize(
    ("how", "answer", "said"),
    [
        ("crash", {"rank": 1, "pid": 7}, "rank 1 was killed: SIGKILL to process 7"),
        ("hang", {"rank": 1, "pid": 7, "strikes": "now"}, "rank 1 (process 7) is stopped by SIGSTOP: now"),
        (
            "keeper_crash",
            {"rank": None, "pid": 7, "strikes": "now"},
            "the keeper (process 7) ends by SIGKILL: now",
        ),
        (
            "memory_exhausted",
            {"rank": None, "pid": None, "strikes": "in the next step"},
            "the engine finds no free frame in the arena: in the next step",
        ),
    ],
)
def test_what_kill_says(how: str, answer: dict[str, object], said: str) -> None:
    assert kill.sentence({"how": how, **answer}) == said


def test_what_is_armed_can_be_disarmed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(AdminClient, "_ask", lambda _self, *request: asked.append(request) or {})
    assert cli.main(["kill", "--disarm"]) == 0
    assert asked == [("DELETE", "/ghostserve/faults")]
    assert capsys.readouterr().out == "no fault is armed any more\n"


def test_kill_help_tells_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["kill", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for kind in FaultKind:
        assert (f"{kind.value}: " in text) is (kind is not FaultKind.CLIENT_GONE), kind


def test_numbers_for_people() -> None:
    assert [bytes_text(n) for n in (0, 1023, 1536, 5 << 20, 3 << 40)] == [
        "0 B", "1023 B", "1.5 KiB", "5.0 MiB", "3.0 TiB",
    ]  # fmt: skip
    assert count_text(1, "block") == "1 block"
    assert milliseconds_text(3.14159) == "3.1 ms"
    assert milliseconds_text(1234.5) == "1234 ms"
