"""Where keys come from, and that they are shown nowhere."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path

import pytest

from ghostserve.cli.serve import prepare
from ghostserve.config import GhostConfig
from ghostserve.errors import UsageError
from ghostserve.web.access import MIDDLEWARES, Access
from ghostserve.web.keys import FILE_BYTES_MAX, admin_key, api_keys, read_keys
from ghostserve.web.security import AccessPolicy


def written(folder: Path, content: bytes) -> str:
    (folder / "keys").write_bytes(content)
    return str(folder / "keys")


def test_flags_and_file_win_over_the_environment(tmp_path: Path) -> None:
    file = written(tmp_path, b"two\r\n\n  three  \n")
    environment = {"VLLM_API_KEY": "env"}
    assert api_keys(["one", ""], file, environment) == ["one", "two", "three"]
    assert api_keys(None, file, environment) == ["two", "three"]
    assert api_keys(None, None, environment) == ["env"]
    assert api_keys([""], None, environment) == [], "an empty key is vLLM's way to say none"
    assert api_keys(None, None, {}) == []


def test_the_admin_key(tmp_path: Path) -> None:
    environment = {"GHOSTSERVE_ADMIN_API_KEY": "env"}
    file = written(tmp_path, b"filed\n")
    assert admin_key("flag", None, environment) == "flag"
    assert admin_key(None, file, environment) == "filed"
    assert admin_key(None, None, environment) == "env"
    assert admin_key(None, None, {"GHOSTSERVE_ADMIN_API_KEY": ""}) is None
    with pytest.raises(UsageError, match="one of the two"):
        admin_key("flag", file, {})
    with pytest.raises(UsageError, match="2 keys"):
        admin_key(None, written(tmp_path, b"a\nb\n"), {})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no key"),
        (b"\n \n", "no key"),
        (b"hidden\xff\n", "ASCII"),
        (b"hidden\x01\n", "ASCII"),
        (b"hidden " * (FILE_BYTES_MAX // 7 + 1), "longer than"),
    ],
)
def test_a_file_that_holds_no_usable_key(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(UsageError, match=says) as raised:
        read_keys(written(tmp_path, content))
    assert "hidden" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere: No such file"):
        read_keys(str(tmp_path / "nowhere"))


def parsed(*words: str) -> tuple[Namespace, GhostConfig]:
    parser = argparse.ArgumentParser()
    GhostConfig.add_arguments(parser)
    arguments = parser.parse_args(words)
    arguments.api_key, arguments.middleware = None, ["their.Middleware"]
    arguments.model = "model"
    return arguments, GhostConfig.from_arguments(arguments)


def test_no_other_process_and_no_text_has_the_admin_key() -> None:
    """The configuration goes to every worker in its environment; vLLM keeps the parsed arguments and may show them."""
    arguments, config = parsed("--admin-api-key", "hidden")
    assert config.admin_api_key == "hidden"
    assert "hidden" not in config.to_json()
    assert "hidden" not in repr(config)
    assert GhostConfig.from_environment({"GHOSTSERVE_CONFIG": config.to_json()}).admin_api_key is None
    prepare(arguments, config)
    assert "hidden" not in repr(arguments)
    for holder in (AccessPolicy(api_keys=("hidden",)), Access(api_keys=("hidden",), salt_secret=b"hidden")):
        assert "hidden" not in repr(holder)


def test_what_vllm_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    file = written(tmp_path, b"one\ntwo\n")
    arguments, config = parsed("--api-key-file", file, "--no-prefix-cache-salt-per-key")
    assert not config.prefix_cache_salt_per_key
    prepare(arguments, config)
    assert arguments.api_key == ["one", "two"]
    assert arguments.middleware == [*MIDDLEWARES, "their.Middleware"], "theirs see a request first"


def test_without_protection_only_the_keys_are_ours(tmp_path: Path) -> None:
    arguments, config = parsed("--protection", "none", "--api-key-file", written(tmp_path, b"one\n"))
    prepare(arguments, config)
    assert (arguments.api_key, arguments.middleware) == (["one"], ["their.Middleware"])


def test_fault_injection_for_every_tenant_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "one")
    prepare(*parsed())
    prepare(*parsed("--enable-fault-injection", "--admin-api-key", "root"))
    assert not caplog.text
    prepare(*parsed("--enable-fault-injection"))
    assert "--admin-api-key" in caplog.text


def test_an_unusable_key_is_refused_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "schlüssel")
    with pytest.raises(UsageError, match="ASCII"):
        prepare(*parsed())
    monkeypatch.setenv("VLLM_API_KEY", "")
    with pytest.raises(UsageError, match="nowhere"):
        prepare(*parsed("--admin-api-key-file", "/nowhere"))
