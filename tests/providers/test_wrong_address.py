"""Tests of a provider's address with `http` at a port with TLS, and with `https` at a port without it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
import pytest

from imagegen.metrics import Meter
from imagegen.providers.metered import MeteredProvider
from imagegen.providers.together import TogetherProvider
from imagegen.providers.wrong_address import WrongAddress
from tests.certificates import server_tls
from tests.emulated_jobs import Recorder, failed
from tests.played_upstream import elsewhere, paid
from tests.providers.conftest import MakeCall
from tests.support import logged

NGINX = (
    b"<html>\r\n<head><title>400 The plain HTTP request was sent to HTTPS port</title></head>\r\n<body>\r\n"
    b"<center><h1>400 Bad Request</h1></center>\r\n"
    b"<center>The plain HTTP request was sent to HTTPS port</center>\r\n</body>\r\n</html>\r\n"
)
GO = b"Client sent an HTTP request to an HTTPS server.\n"
APACHE = b"<html><body><p>You're speaking plain HTTP to an SSL-enabled server port.<br />\n</p></body></html>"
TOMCAT = b"Bad Request\r\nThis combination of host and port requires TLS.\r\n"
ALERT = b"\x15\x03\x01\x00\x02\x02\x46"
H2_SETTINGS = bytes.fromhex("000000040000000000") + bytes.fromhex("00000408000000000000000001")


@dataclass
class TlsPort:
    """A port with TLS. plain: what it sends to a client without TLS before it hangs up. tls: None for no TLS at all."""

    tls: ssl.SSLContext | None
    plain: bytes = b""
    port: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.read(1)
        if first == b"\x16" and self.tls is not None:
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            handshake = self.tls.wrap_bio(incoming, outgoing, server_side=True)
            incoming.write(first)
            while True:
                try:
                    handshake.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    writer.write(outgoing.read())
                    if not (part := await reader.read(2**16)):
                        break
                    incoming.write(part)
            writer.write(outgoing.read())
        else:
            writer.write(self.plain)
        writer.close()


@asynccontextmanager
async def serving(port: TlsPort) -> AsyncIterator[TlsPort]:
    server = await asyncio.start_server(port.serve, "127.0.0.1", 0)
    async with server:
        port.port = server.sockets[0].getsockname()[1]
        yield port


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    return server_tls(tmp_path_factory.mktemp("tls"))


def provider(session: aiohttp.ClientSession, address: str) -> TogetherProvider:
    return TogetherProvider(session, api_key="not-a-key", base_url=address, timeout_s=20.0)


def refusal(body: bytes) -> bytes:
    return b"HTTP/1.0 400 Bad Request\r\nConnection: close\r\n\r\n" + body


@pytest.mark.parametrize(
    "plain",
    [b"", ALERT, refusal(NGINX), refusal(GO), refusal(APACHE), refusal(TOMCAT)],
    ids=["hangs up", "alert", "nginx", "Go", "Apache", "Tomcat"],
)
async def test_a_call_without_tls_to_a_port_with_tls_costs_nothing_and_the_address_is_named(
    session: aiohttp.ClientSession, tls: ssl.SSLContext, make_call: MakeCall, plain: bytes
) -> None:
    async with serving(TlsPort(tls, plain)) as port:
        _, error = await failed(provider(session, f"http://127.0.0.1:{port.port}"), make_call())
    assert (error.code, error.retryable, paid(error)) == ("upstream_error", False, "no")
    assert elsewhere(error, has_job=False)
    assert error.detail == (
        "The provider can't be reached: its address has http in place of https; the operator of this service must act"
    )
    where = f"127.0.0.1:{port.port}"
    assert error.upstream_detail == (f"{where} answers with TLS alone; write https in place of http in http://{where}")


async def test_a_large_body_that_a_port_with_tls_does_not_read_names_the_address_too(
    session: aiohttp.ClientSession, tls: ssl.SSLContext, make_call: MakeCall
) -> None:
    async with serving(TlsPort(tls)) as port:
        call = make_call(prompt="x" * 30_000)
        _, error = await failed(provider(session, f"http://127.0.0.1:{port.port}"), call)
    assert isinstance(error, WrongAddress)


@pytest.mark.parametrize(
    "plain", [refusal(b"{}"), b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"], ids=["refuses", "answers"]
)
async def test_a_call_with_tls_to_a_port_without_it_names_the_address(
    session: aiohttp.ClientSession, make_call: MakeCall, plain: bytes
) -> None:
    async with serving(TlsPort(None, plain)) as port:
        _, error = await failed(provider(session, f"https://127.0.0.1:{port.port}"), make_call())
    assert (error.code, error.retryable, paid(error)) == ("upstream_error", False, "no")
    where = f"127.0.0.1:{port.port}"
    assert error.upstream_detail == (
        f"{where} answers with HTTP without TLS; write http in place of https in https://{where}"
    )


@pytest.mark.parametrize(
    "banner",
    [b"SSH-2.0-OpenSSH_9.6\r\n", b"220 mail ESMTP\r\n", b"-ERR unknown command 'POST'\r\n", H2_SETTINGS],
    ids=["SSH", "mail", "Redis", "HTTP/2"],
)
async def test_a_call_to_a_server_without_http_costs_nothing(
    session: aiohttp.ClientSession, make_call: MakeCall, banner: bytes
) -> None:
    async with serving(TlsPort(None, banner)) as port:
        _, error = await failed(provider(session, f"http://127.0.0.1:{port.port}"), make_call())
    assert (error.code, error.retryable, paid(error)) == ("upstream_error", False, "no")
    assert error.upstream_detail == f"127.0.0.1:{port.port} does not answer with HTTP"


async def test_an_answer_that_is_lost_by_a_server_without_tls_stays_unsure(
    session: aiohttp.ClientSession, make_call: MakeCall
) -> None:
    async with serving(TlsPort(None)) as port:
        _, error = await failed(provider(session, f"http://127.0.0.1:{port.port}"), make_call())
    assert paid(error) == "unsure"


async def test_an_answer_that_is_lost_over_tls_stays_unsure_though_the_port_answers_without_tls_too(
    tls: ssl.SSLContext, make_call: MakeCall
) -> None:
    async def read_and_hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()

    async def pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while part := await source.read(2**16):
            target.write(part)
        target.close()

    async def both(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.read(1)
        if first != b"\x16":
            writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            writer.close()
            return
        behind, ahead = await asyncio.open_connection("127.0.0.1", inner_port)
        ahead.write(first)
        await asyncio.gather(pass_on(reader, ahead), pass_on(behind, writer), return_exceptions=True)

    inner = await asyncio.start_server(read_and_hang_up, "127.0.0.1", 0, ssl=tls)
    outer = await asyncio.start_server(both, "127.0.0.1", 0)
    inner_port, port = (each.sockets[0].getsockname()[1] for each in (inner, outer))
    async with inner, outer, aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=False)) as session:
        _, error = await failed(provider(session, f"https://127.0.0.1:{port}"), make_call())
    assert not isinstance(error, WrongAddress)
    assert paid(error) == "unsure"


async def test_a_port_with_tls_that_fails_for_another_reason_is_waited_for(
    session: aiohttp.ClientSession, tls: ssl.SSLContext, make_call: MakeCall
) -> None:
    async with serving(TlsPort(tls, refusal(NGINX))) as port:  # its certificate is refused
        _, error = await failed(provider(session, f"https://127.0.0.1:{port.port}"), make_call())
    assert not isinstance(error, WrongAddress)
    assert (error.retryable, paid(error)) == (True, "no")


async def test_a_redirect_to_tls_on_the_same_host_names_the_address(
    session: aiohttp.ClientSession, make_call: MakeCall
) -> None:
    head = b"HTTP/1.1 301 Moved Permanently\r\nLocation: https://127.0.0.1/v1\r\nContent-Length: 0\r\n\r\n"
    async with serving(TlsPort(None, head)) as port:
        _, error = await failed(provider(session, f"http://127.0.0.1:{port.port}"), make_call())
    assert (error.code, error.retryable, paid(error)) == ("upstream_error", False, "no")
    assert "write https in place of http" in error.upstream_detail


async def test_a_check_of_a_key_names_the_address(session: aiohttp.ClientSession, tls: ssl.SSLContext) -> None:
    async with serving(TlsPort(tls)) as port:
        with pytest.raises(WrongAddress):
            await provider(session, f"http://127.0.0.1:{port.port}").check_key()
        port.plain = refusal(NGINX)
        with pytest.raises(WrongAddress):
            await provider(session, f"http://127.0.0.1:{port.port}").check_key()


async def test_the_operator_is_warned_of_the_address_once_a_minute(
    session: aiohttp.ClientSession, tls: ssl.SSLContext, make_call: MakeCall
) -> None:
    async with serving(TlsPort(tls, refusal(GO))) as port:
        metered = MeteredProvider(provider(session, f"http://127.0.0.1:{port.port}"), Meter())
        with logged("WARNING") as lines:
            for _ in range(3):
                with pytest.raises(WrongAddress):
                    await metered.generate(make_call(), Recorder())
    (line,) = lines
    assert f"write https in place of http in http://127.0.0.1:{port.port}" in line
