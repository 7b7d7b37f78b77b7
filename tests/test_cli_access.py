"""The verbs and a server with TLS, an API key and an admin key, as processes: the stand-in server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import certificates
from ghostserve.cli import main as cli
from ghostserve.errors import UsageError
from ghostserve.testing.client import stream_completion
from ghostserve.testing.server import ServerProcess
from ghostserve.web.admin import AdminClient, Tls

pytestmark = pytest.mark.long

FAKE = [sys.executable, "-m", "ghostserve.testing.fake_server", "--token-s", "0.002", "--outage-s", "0.2"]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> certificates.Certificates:
    return certificates.make(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, tls: certificates.Certificates
) -> Iterator[ServerProcess]:
    command = [*FAKE, "--api-key", "secret", "--admin-api-key", "root", *tls.server_flags]
    with ServerProcess(
        command,
        log_dir=tmp_path_factory.mktemp("server"),
        api_key="secret",
        admin_key="root",
        tls=Tls(cacert=tls.cacert),
    ) as server:
        server.start()
        server.wait_ready(timeout_s=60)
        yield server


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, server: ServerProcess) -> None:
    for name in ("SSL_CERT_FILE", "VLLM_API_KEY", "GHOSTSERVE_API_KEY", "GHOSTSERVE_ADMIN_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GHOSTSERVE_URL", server.base_url)


def test_the_client_and_the_harness_speak_tls(server: ServerProcess, tls: certificates.Certificates) -> None:
    assert server.base_url.startswith("https://")
    assert server.status()["state"] == "serving"
    server.set_switch("debug_copy", True)
    server.set_switch("debug_copy", False)
    result = stream_completion(
        server.base_url, prompt="p", max_tokens=5, api_key="secret", tls=Tls(cacert=tls.cacert)
    )
    assert (result.error, result.tokens_total) == (None, 5)


def test_the_verbs_trust_what_they_are_told_to(
    tls: certificates.Certificates, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ("--api-key", "secret")
    assert cli.main(["status", *key]) == 1
    assert "--cacert" in capsys.readouterr().err
    assert cli.main(["status", *key, "--cacert", tls.cacert]) == 0
    assert cli.main(["status", *key, "--cacert", tls.cacert, "--cert", tls.client_cert]) == 0
    monkeypatch.setenv("SSL_CERT_FILE", tls.cacert)
    assert cli.main(["status", *key]) == 0


def test_a_server_that_wants_certificates_of_its_clients(
    tls: certificates.Certificates, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Verbs and harness with one; without it, and with one of somebody else's authority, they say what is missing."""
    strangers = tmp_path / "strangers"
    strangers.mkdir()
    stranger = certificates.make(strangers)
    ours = Tls(cacert=tls.cacert, cert=tls.client_cert)
    with ServerProcess([*FAKE, *tls.mutual_flags], log_dir=tmp_path, tls=ours) as server:
        server.start()
        server.wait_ready(timeout_s=60)
        assert stream_completion(server.base_url, prompt="p", max_tokens=5, tls=ours).error is None
        there = ["--url", server.base_url, "--cacert", tls.cacert]
        for verb in (["status"], ["events"], ["kill", "--disarm"]):
            assert cli.main([*verb, *there, "--cert", tls.client_cert]) == 0, verb
            capsys.readouterr()
            assert cli.main([*verb, *there]) == 1, verb
            assert "client certificate" in (said := capsys.readouterr().err), said
            assert "--cert" in said
        assert cli.main(["status", *there, "--cert", stranger.client_cert]) == 1
        assert "client certificate" not in capsys.readouterr().err, "one was given"


def test_faults_want_the_admin_key(
    tls: certificates.Certificates,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kill = ["kill", "--disarm", "--cacert", tls.cacert]
    assert cli.main([*kill, "--api-key", "secret"]) == 1
    assert "--admin-api-key" in capsys.readouterr().err
    assert cli.main([*kill, "--admin-api-key", "secret"]) == 1
    assert cli.main([*kill, "--admin-api-key", "root"]) == 0
    (tmp_path / "admin").write_text("root\n")
    assert cli.main([*kill, "--admin-api-key-file", str(tmp_path / "admin")]) == 0
    monkeypatch.setenv("GHOSTSERVE_ADMIN_API_KEY", "root")
    assert cli.main(kill) == 0


def test_a_key_from_a_file(tls: certificates.Certificates, tmp_path: Path) -> None:
    status = ["status", "--cacert", tls.cacert]
    for content, code in (("secret\n", 0), ("wrong\n", 1), ("", 2)):
        (tmp_path / "key").write_text(content)
        assert cli.main([*status, "--api-key-file", str(tmp_path / "key")]) == code


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--cacert", "/nowhere"), "--cacert /nowhere"),
        (("--cacert", __file__), "--cacert"),
        (("--cert", "/nowhere"), "--cert /nowhere"),
        (("--key", "/nowhere"), "--cert"),
        (("--api-key", "a", "--api-key-file", "b"), "not allowed with"),
    ],
)
def test_files_that_cannot_be_used(
    flags: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", *flags]) == 2
    assert says in capsys.readouterr().err


def test_a_private_key_with_a_passphrase_asks_nobody(tls: certificates.Certificates, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(Path(tls.server_key).read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"word"),
    )
    (tmp_path / "locked").write_bytes(locked)
    with pytest.raises(UsageError, match="passphrase"):
        AdminClient("https://127.0.0.1:1", tls=Tls(cert=tls.server_cert, key=str(tmp_path / "locked")))
