"""Bundle of one certificate, instead of the 150 that each new TLS context and each new client parses in 20 ms.

Tests call nothing on the internet; those with TLS give their clients the certificate of their own server.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import certifi

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
