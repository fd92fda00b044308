"""Tests of name resolution: silent DNS servers do not block disk threads or other names."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiodns
import aiohttp
import pytest

from imagegen.resolver import SYSTEM_AT_ONCE, EventLoop, Resolver, SystemResolver
from imagegen.ssrf import AddressBlocked, PublicResolver
from tests.support import eventually


@pytest.fixture
def silent_socket() -> Iterator[socket.socket]:
    """Return the socket of a DNS server that never answers."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.setblocking(False)
        yield server


@pytest.fixture
def silent(silent_socket: socket.socket) -> str:
    """Return the address of a DNS server that never answers."""
    return f"127.0.0.1:{silent_socket.getsockname()[1]}"


def no_thread(_thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


class Answers(asyncio.DatagramProtocol):
    """DNS server with the single name `known.example.com` and one IPv4 address."""

    transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]  # one of this kind
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        end = data.index(b"\0", 12) + 5
        is_ipv4_query, exists = data[end - 4 : end - 2] == b"\0\1", b"\5known\7example" in data
        answer = b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4" + self.address if is_ipv4_query and exists else b""
        head = data[:2] + (b"\x81\x80" if exists else b"\x81\x83") + b"\0\1" + (b"\0\1" if answer else b"\0\0")
        self.transport.sendto(head + b"\0\0\0\0" + data[12:end] + answer, addr)

    address = b"\x7f\0\0\1"


@pytest.fixture
async def answering() -> AsyncIterator[str]:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(Answers, local_addr=("127.0.0.1", 0))
    yield "{}:{}".format(*transport.get_extra_info("sockname"))
    transport.close()


async def test_silent_dns_times_out_and_uses_no_thread(
    silent: str, silent_socket: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_threads: list[str] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_args, **_hints: in_threads.append(host))
    resolver = Resolver([silent], deadline_s=0.3)
    threads = threading.active_count() + 1  # the one of c-ares, for any number of names
    began = time.monotonic()
    lookups = [asyncio.ensure_future(resolver.resolve(f"host{n}.example.com", 443)) for n in range(100)]
    await asyncio.wait_for(asyncio.get_running_loop().sock_recv(silent_socket, 512), 20)
    assert threading.active_count() <= threads  # threads of other tests may end meanwhile
    assert await asyncio.wait_for(asyncio.to_thread(lambda: 7), 7) == 7
    assert (await resolver.resolve("localhost", 80))[0]["host"] in ("127.0.0.1", "::1")
    for error in await asyncio.gather(*lookups, return_exceptions=True):
        assert isinstance(error, OSError)
    assert in_threads == []
    assert time.monotonic() - began < 8
    await resolver.close()


async def test_dns_servers_that_change_while_the_service_runs_are_used(
    silent: str, answering: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere := tmp_path / "run").mkdir()
    servers, link = elsewhere / "resolv.conf", tmp_path / "resolv.conf"
    link.symlink_to(servers)
    open_channel = aiodns.DNSResolver

    def read_and_open(_servers: None, **options: Any) -> aiodns.DNSResolver:
        # in place of c-ares: pycares 5.2.1 frees the path of another file than /etc/resolv.conf before c-ares reads it
        return open_channel([servers.read_text().removeprefix("nameserver ").strip()], **options)

    monkeypatch.setattr(aiodns, "DNSResolver", read_and_open)
    monkeypatch.setattr("imagegen.resolver.RESOLV_CONF", link)
    servers.write_text(f"nameserver {silent}\n")
    resolver = Resolver(deadline_s=0.2)
    with pytest.raises(OSError, match="no answer within"):
        await resolver.resolve("known.example.com", 443)
    servers.write_text(f"nameserver {answering}\n")
    resolved = await asyncio.wait_for(resolver.resolve("known.example.com", 443), 20)
    assert [address["host"] for address in resolved] == ["127.0.0.1"]
    await resolver.close()


async def test_a_connector_gets_a_dns_error_for_a_silent_server(silent: str) -> None:
    resolver = Resolver([silent], deadline_s=0.1)
    connector = aiohttp.TCPConnector(resolver=resolver)
    async with aiohttp.ClientSession(connector=connector) as session:
        with pytest.raises(aiohttp.ClientConnectorDNSError):
            await session.get("http://host.example.com/")
    await resolver.close()


async def test_public_names_use_dns_and_local_names_do_not(answering: str) -> None:
    resolver = Resolver([answering])
    (result,) = await resolver.resolve("known.example.com", 443, socket.AF_UNSPEC)
    assert (result["host"], result["port"], result["hostname"]) == ("127.0.0.1", 443, "known.example.com")
    for name in ("localhost", socket.gethostname()):
        expected = {info[4][0] for info in socket.getaddrinfo(name, 1)}
        assert {result["host"] for result in await resolver.resolve(name, 1, socket.AF_UNSPEC)} & expected
    await resolver.close()


async def test_the_guard_checks_the_answer_of_the_dns_server(answering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = Resolver([answering])
    guard = PublicResolver(inner=resolver)
    with pytest.raises(AddressBlocked):
        await guard.resolve("known.example.com", 443)
    monkeypatch.setattr(Answers, "address", bytes([93, 184, 215, 14]))
    other = Resolver([answering])
    assert [result["host"] for result in await PublicResolver(inner=other).resolve("known.example.com", 443)] == [
        "93.184.215.14"
    ]
    await resolver.close()
    await other.close()


async def test_names_unknown_to_dns_are_resolved_by_the_system(answering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def system(host: str, port: int, **hints: int) -> list[object]:
        if host != "gpu.local":
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.168.1.9", port))]

    monkeypatch.setattr(socket, "getaddrinfo", system)
    resolver = Resolver([answering])
    assert [result["host"] for result in await resolver.resolve("gpu.local", 7860)] == ["192.168.1.9"]
    with pytest.raises(socket.gaierror):
        await resolver.resolve("no.such.name", 7860)
    await resolver.close()


async def test_a_refused_thread_is_a_dns_error_and_frees_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolver = SystemResolver()

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        for _ in range(SYSTEM_AT_ONCE):
            with pytest.raises(socket.gaierror):
                await resolver.getaddrinfo("localhost", 80)
    assert await asyncio.wait_for(resolver.getaddrinfo("127.0.0.1", 80), 20)


def test_the_loop_resolves_names_outside_the_disk_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocked, running = threading.Event(), []

    def lookup(host: str, *_args: object, **_hints: object) -> None:
        running.append(host)
        blocked.wait(20)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        lookups = [asyncio.ensure_future(loop.getaddrinfo("redis.example.com", 6379)) for _ in range(50)]
        await eventually(lambda: len(running) >= SYSTEM_AT_ONCE)
        assert sum(thread.name == "resolver" for thread in threading.enumerate()) == SYSTEM_AT_ONCE
        assert await asyncio.wait_for(asyncio.to_thread(lambda: 7), 15) == 7
        for lookup in lookups:
            lookup.cancel()

    began = time.monotonic()
    with asyncio.Runner(loop_factory=EventLoop) as runner:
        runner.run(main())
    assert time.monotonic() - began < 19
    blocked.set()


def test_the_loop_resolves_names_as_the_system_does() -> None:
    async def main() -> object:
        return await asyncio.get_running_loop().getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)

    with asyncio.Runner(loop_factory=EventLoop) as runner:
        assert runner.run(main()) == socket.getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)


def test_work_in_threads_is_done_once_also_while_the_system_has_no_thread_left(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        calls = iter(range(10))
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            assert await asyncio.to_thread(next, calls) == 0
            with pytest.raises(ZeroDivisionError):
                await asyncio.to_thread(divmod, 1, 0)
        assert [await asyncio.to_thread(next, calls) for _ in range(2)] == [1, 2]
        monkeypatch.setattr(threading.Thread, "start", no_thread)

    with asyncio.Runner(loop_factory=EventLoop) as runner:
        runner.run(work())


def test_work_waits_for_a_busy_thread_while_the_system_has_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()

    async def work() -> None:
        first = asyncio.ensure_future(asyncio.to_thread(free.wait, 20))
        await asyncio.sleep(0)
        monkeypatch.setattr(threading.Thread, "start", no_thread)
        second = asyncio.ensure_future(asyncio.to_thread(threading.current_thread))
        await asyncio.sleep(0)
        assert not second.done()
        free.set()
        assert await first
        assert await second is not threading.main_thread()

    with asyncio.Runner(loop_factory=EventLoop) as runner:
        runner.run(work())


def test_work_that_the_loop_did_keeps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Body(bytearray):
        """Bytes that can be referenced weakly."""

    async def work() -> None:
        body = Body(1000)
        kept = [weakref.ref(body), weakref.ref(result := await asyncio.to_thread(Body, body))]
        del body, result
        await asyncio.sleep(0)  # this step of the loop holds the result
        gc.collect()
        assert [each() for each in kept] == [None, None]

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with asyncio.Runner(loop_factory=EventLoop) as runner:
        runner.run(work())
