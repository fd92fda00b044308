"""Bundle of one certificate, instead of the 150 that each new TLS context and each new client parses in 20 ms.

Tests call nothing on the internet; those with TLS give their clients the certificate of their own server.
"""

from __future__ import annotations

import os
import ssl
import tempfile
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import certifi
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

FILE_SETTINGS = ("SSL_CERT_FILE", "AWS_CA_BUNDLE")
"""Environment variables with the path of a bundle: of OpenSSL and httpx, and of botocore."""

_CACHE = Path(__file__).resolve().parents[1] / ".sdks"
_GIVEN = {name: os.environ[name] for name in FILE_SETTINGS if name in os.environ}
_END = "-----END CERTIFICATE-----\n"


def shorten_bundle() -> None:
    """Let this process and those that it starts read one certificate."""
    _CACHE.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=_CACHE, delete=False) as file:
        file.write(Path(certifi.where()).read_text().partition(_END)[0] + _END)
    path = Path(file.name).rename(_CACHE / "certificate.pem")
    os.environ.update(dict.fromkeys(FILE_SETTINGS, str(path)))


def with_whole_bundle() -> dict[str, str]:
    """Return the environment for a program that downloads."""
    return {name: value for name, value in os.environ.items() if name not in FILE_SETTINGS} | _GIVEN


def server_file(folder: Path, name: str = "server", begins_in: timedelta = timedelta(0)) -> Path:
    """Return a file with a new self-signed certificate of 127.0.0.1, valid for a day, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    begin = datetime.now(UTC) + begins_in
    made = x509.CertificateBuilder(subject, subject, key.public_key(), 1, begin, begin + timedelta(days=1))
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    signed = made.add_extension(address, critical=True).sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    file = folder / f"{name}.pem"
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + signed)
    return file


def server_tls(folder: Path) -> ssl.SSLContext:
    """Return the server side of TLS with a new self-signed certificate."""
    file = server_file(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context
