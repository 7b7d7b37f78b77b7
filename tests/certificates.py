"""A certificate authority for one test, and what it vouches for: TLS without any file that could run out."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_FROM = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_UNTIL = datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC)
_PLAIN = serialization.NoEncryption()


@dataclass(frozen=True)
class Certificates:
    """Files: the authority, a server on loopback, and a client."""

    cacert: str
    server_cert: str
    server_key: str
    client_cert: str  # its key is in the same file

    @property
    def server_flags(self) -> tuple[str, ...]:
        return ("--ssl-certfile", self.server_cert, "--ssl-keyfile", self.server_key)

    @property
    def mutual_flags(self) -> tuple[str, ...]:
        """The server wants a certificate of its clients, too."""
        return (*self.server_flags, "--ssl-ca-certs", self.cacert, "--ssl-cert-reqs", "2")


def make(folder: Path) -> Certificates:
    """All of them, written to `folder`."""
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _signed("test authority", authority_key, "test authority", authority_key, is_authority=True)
    (folder / "ca.pem").write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    for name in ("server", "client"):
        key = ec.generate_private_key(ec.SECP256R1())
        cert = _signed(name, key, "test authority", authority_key, is_authority=False)
        pem = cert.public_bytes(serialization.Encoding.PEM)
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, _PLAIN)
        (folder / f"{name}.pem").write_bytes(pem if name == "server" else pem + private)
        (folder / f"{name}.key").write_bytes(private)
    names = ("ca.pem", "server.pem", "server.key", "client.pem")
    return Certificates(*(str(folder / name) for name in names))


def _signed(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    is_authority: bool,
) -> x509.Certificate:
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_FROM)
        .not_valid_after(_UNTIL)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
    )
    if not is_authority:
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())
