"""Refused TLS certificates of providers and image hosts: nothing is sent, and the error says why."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from yarl import URL

from imagegen.byte_budget import ByteBudget
from imagegen.errors import DownloadFailed, UpstreamError
from imagegen.images.disk import DiskStore
from imagegen.images.fetch import ImageFetcher
from imagegen.images.image_links import Origin
from imagegen.images.spool import Spool
from imagegen.providers.http_client import ProviderClient
from imagegen.tasks.image import ImageLink
from tests.emulated_jobs import Recorder

CASES = {
    "expired": ("/CN=127.0.0.1", "IP:127.0.0.1", ["-days", "-1"], True, "certificate has expired"),
    "wrong host": ("/CN=a.example", "DNS:a.example", ["-days", "2"], True, "IP address mismatch"),
    "self-signed": ("/CN=127.0.0.1", "IP:127.0.0.1", ["-days", "2"], False, "self-signed certificate"),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext, str]:
    """Return the contexts of a server and of a client, and the fault."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the command openssl")
    subject, name, life, is_trusted, fault = CASES[request.param]
    key, signed, file = tmp_path / "key.pem", tmp_path / "request.pem", tmp_path / "certificate.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    (names := tmp_path / "names").write_text(f"subjectAltName={name}")
    begin = ["openssl", "req", *curve, "-nodes", "-subj", subject, "-keyout", str(key), "-out", str(signed)]
    end = ["openssl", "x509", "-req", "-in", str(signed), "-signkey", str(key), *life, "-extfile", str(names)]
    for command in (begin, [*end, "-out", str(file)]):
        subprocess.run(command, check=True, capture_output=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(file, key)
    return server, ssl.create_default_context(cafile=str(file) if is_trusted else None), fault


@asynccontextmanager
async def serving(server: ssl.SSLContext, client: ssl.SSLContext) -> AsyncIterator[tuple[URL, aiohttp.ClientSession]]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert not await reader.read(1), "a byte of a request came"
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server)
    async with listening, aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=client)) as session:
        yield URL(f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}/"), session


async def test_a_provider_with_a_refused_certificate_gets_no_call_and_the_error_says_why(
    case: tuple[ssl.SSLContext, ssl.SSLContext, str],
) -> None:
    server, client, fault = case
    async with serving(server, client) as (url, session):
        with pytest.raises(UpstreamError) as caught:
            await ProviderClient(session, url, "paid", 5).generate({}, Recorder())
    error = caught.value
    assert error.detail == f"The provider can't be reached: its TLS certificate is refused ({fault})"
    assert (error.retryable, error.ambiguous, error.charged) == (True, False, False)


async def test_an_image_of_a_host_with_a_refused_certificate_is_tried_again_later(
    case: tuple[ssl.SSLContext, ssl.SSLContext, str], tmp_path: Path
) -> None:
    server, client, fault = case
    store = DiskStore(tmp_path / "images", max_bytes=2**20)
    async with serving(server, client) as (url, session):
        origin = Origin(frozenset({f"127.0.0.1:{url.port}"}), None)
        fetcher = ImageFetcher(session, Spool(store, ByteBudget()), origin, timeout_s=5)
        with pytest.raises(DownloadFailed) as caught:
            await fetcher.fetch(ImageLink(str(url)))
    assert caught.value.detail == f"127.0.0.1: its TLS certificate is refused ({fault})"
