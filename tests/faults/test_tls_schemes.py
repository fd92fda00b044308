"""Addresses of Redis with the scheme of TLS and a server without it, and the other way round."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from datetime import timedelta
from pathlib import Path

import pytest

from imagegen.errors import SettingsError
from imagegen.queue.command_check import check_server
from imagegen.redis_client.connection import Connection
from tests.certificates import server_file
from tests.faults.proxy import FaultProxy
from tests.ports import free_port
from tests.support import logged


async def refusal(url: str) -> str:
    """Return the message of a start with this address."""
    connection = Connection(url)
    try:
        with pytest.raises(SettingsError) as caught:
            await check_server(connection, "imagegen")
    finally:
        await connection.close()
    return str(caught.value)


@pytest.mark.parametrize("form", ["redis://:hunter2@127.0.0.1:{}", "redis+sentinel://:hunter2@127.0.0.1:{}/main"])
async def test_an_address_without_tls_of_a_server_with_tls_is_named_with_the_remedy(
    redis_url: str, tls: ssl.SSLContext, form: str
) -> None:
    async with FaultProxy(redis_url.removeprefix("unix://"), tls) as proxy:
        message = await refusal(form.format(proxy.port))
    assert message.startswith(
        f"REDIS_URL: 127.0.0.1:{proxy.port} answers with TLS alone; write rediss in place of redis"
    )
    assert "hunter2" not in message


async def test_a_server_that_needs_a_client_certificate_answers_with_tls_too(
    tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "maximum_version", ssl.TLSVersion.TLSv1_2)
    monkeypatch.setattr(tls, "verify_mode", ssl.CERT_REQUIRED)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        refusing = asyncio.create_task(asyncio.to_thread(refuse_all, listening, tls))
        message = await refusal(f"redis://127.0.0.1:{listening.getsockname()[1]}")
        listening.shutdown(socket.SHUT_RDWR)
        await refusing
    assert "answers with TLS alone" in message


def refuse_all(listening: socket.socket, tls: ssl.SSLContext) -> None:
    """Refuse the handshake of each client with an alert, as Redis does, until the socket is shut."""
    while True:
        try:
            client, _ = listening.accept()
        except OSError:
            return
        with client, contextlib.suppress(OSError):
            tls.wrap_socket(client, server_side=True)


@pytest.mark.usefixtures("service_deadline")
@pytest.mark.parametrize("form", ["rediss://127.0.0.1:{}", "rediss+sentinel://127.0.0.1:{}/main"])
async def test_an_address_with_tls_of_a_server_without_it_is_named_with_the_remedy(redis_url: str, form: str) -> None:
    async with FaultProxy(redis_url.removeprefix("unix://")) as proxy:
        message = await refusal(form.format(proxy.port))
    assert message == f"REDIS_URL: 127.0.0.1:{proxy.port} answers without TLS; write redis in place of rediss"


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
async def test_an_address_that_nothing_answers_is_waited_for(scheme: str) -> None:
    connection = Connection(f"{scheme}://127.0.0.1:{free_port()}")
    await check_server(connection, "imagegen")
    assert connection.health.down_since is not None
    await connection.close()


@pytest.mark.parametrize("begins_in", [timedelta(days=-2), timedelta(hours=1)], ids=["ended", "not yet valid"])
async def test_a_certificate_that_is_not_valid_now_is_waited_for(
    redis_url: str, tmp_path: Path, begins_in: timedelta
) -> None:
    files = [server_file(tmp_path, "now", begins_in), server_file(tmp_path, "renewed")]
    (tmp_path / "authorities.pem").write_bytes(b"".join(file.read_bytes() for file in files))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(files[0])
    async with FaultProxy(redis_url.removeprefix("unix://"), tls) as proxy:
        connection = Connection(f"rediss://127.0.0.1:{proxy.port}?ssl_ca_certs={tmp_path / 'authorities.pem'}")
        with logged("WARNING") as lines:
            await check_server(connection, "imagegen")
        assert connection.health.down_since is not None
        assert "renew the certificate of Redis, or correct the clock of this machine" in lines[-1]
        tls.load_cert_chain(files[1])
        await connection.ping()
        await connection.close()
