"""Addresses of the Redis server that holds our keys: a fixed one, the master Sentinel names, or a cluster's node."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from redis.asyncio import ConnectionPool
from redis.asyncio.connection import SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.driver_info import DriverInfo
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from imagegen.errors import SettingsError
from imagegen.port_protocols import answers_with_tls, first_bytes
from imagegen.redis_client.url import SentinelUrl, sentinel_url

if TYPE_CHECKING:
    from imagegen.redis_client.multiplexer import ReplyProtocol

DEADLINE_S = 2.0
"""For connecting, repeats and reply together, so that no HTTP response hangs on Redis."""

NODE_TIMEOUT_S = 0.7
"""For a connect to one of several cluster nodes or sentinels, so that all are tried within DEADLINE_S."""

SENTINEL_LOOK_S = 2.0
"""Interval at which a sentinel is queried for the master, which a billing Redis does not count."""

MAX_NODES = 12
"""Cluster nodes that are remembered."""

DRIVER = DriverInfo()
"""What redis-py reports of itself. Without it, each new connection reads and parses the metadata of the package."""

Address = tuple[str, int]

_NO_CLUSTER: Address = ("", 0)
"""In place of the owner of our slot."""


class Servers:
    """Connections to the server that holds our keys.

    All keys carry one hash tag, so one node of a cluster holds them all. It is learned from its redirects, and from
    CLUSTER SLOTS if a node fails. on_change: called when another node holds the keys. deadline_s: of each call.
    """

    deadline_s = DEADLINE_S

    def __init__(self, url: str, prefix: str) -> None:
        """Raise SettingsError for an invalid URL. `prefix`: the hash tag of our keys."""
        self._slot = key_slot(f"{{{prefix}}}".encode())
        self._nodes: list[Address] = []
        self._doubted = False
        self.on_change: list[Callable[[], None]] = []
        self.sentinel_service: str | None = None
        self._sentinel: Sentinel | None = None
        self._sentinel_places: Sequence[Address] = ()
        self._watching: asyncio.Task[None] | None = None
        try:
            parsed = sentinel_url(url)
            if parsed is not None:
                self.sentinel_service, url = parsed.service, parsed.master_url
            self._pool = _pool(url, self.deadline_s)
            if parsed is not None:
                self._sentinel = _sentinel(parsed, self._pool.connection_kwargs)
                self._sentinel_places = parsed.hosts
            _check_options(self._pool)
        except (ValueError, TypeError, OSError, RedisError) as error:
            raise SettingsError(f"REDIS_URL: it can't be used: {_fault(error)}") from error
        options = self._pool.connection_kwargs
        self.user: str = options.get("username") or "default"
        self._unix = issubclass(self._pool.connection_class, UnixDomainSocketConnection)
        self._named: Address = (options.get("host", "localhost"), int(options.get("port", 6379)))
        self.address = self._named

    @property
    def clustered(self) -> bool:
        """Whether the server has turned out to be a node of a cluster."""
        return bool(self._nodes)

    async def connect(self) -> Any:
        """Return an open connection of redis-py. Raises RedisError, OSError, TimeoutError."""
        if self._sentinel is not None:
            self._set(await self._master(self._sentinel))
            if self._watching is None:
                self._watching = asyncio.create_task(self._watch_master(self._sentinel), name="sentinel")
            return await self.connect_to(self.address)
        if not self._nodes:
            return await self.connect_to(self.address)
        try:
            if self._doubted:
                await self._find_holder()
            self._doubted = False
            return await self.connect_to(self.address, NODE_TIMEOUT_S)
        except (RedisError, OSError, TimeoutError):
            if not await self._find_holder():
                raise
            return await self.connect_to(self.address, NODE_TIMEOUT_S)

    def moved(self, host: str, port: int) -> None:
        """Use the node of a redirect as the holder of our keys."""
        self._remember([self.address])
        self._set((host or self.address[0], port))

    def doubt(self) -> None:
        """Query the other nodes of a cluster before the next connect: this one can't be used."""
        self._doubted = True

    async def learn_nodes(self, connection: Any) -> frozenset[str]:
        """Remember the other nodes of a cluster, which replace its node when it is gone.

        Return the ids of those that have our slot, the owner and its replicas, as the connection's node reports them.
        """
        try:
            return frozenset(name for _, name in await self._holders(connection))
        except ResponseError:
            return frozenset()

    async def unknown_service(self) -> str | None:
        """Return a text if a sentinel answers and watches no service of our name; else None."""
        for client in self._sentinel.sentinels if self._sentinel is not None else ():
            try:
                services: Any = await client.sentinel_masters()
            except (RedisError, OSError, TimeoutError):
                continue
            if self.sentinel_service in services:
                return None
            return f"the sentinel watches no service {self.sentinel_service}, but {', '.join(services) or 'none'}"
        return None

    async def wrong_scheme(self) -> str | None:
        """Return what to change if a server speaks TLS and the URL does not, or the other way round; else None."""
        if self._unix:
            return None
        tls = issubclass(self._pool.connection_class, SSLConnection)
        has_other = _answers_without_tls if tls else answers_with_tls
        for host, port in self._sentinel_places or [self.address]:
            try:
                async with asyncio.timeout(NODE_TIMEOUT_S):
                    if not await has_other(host, port):
                        continue
            except (OSError, TimeoutError, ValueError):
                continue
            if tls:
                return f"{host}:{port} answers without TLS; write redis in place of rediss"
            authority = "add ?ssl_ca_certs=FILE if no public authority signed its certificate"
            return f"{host}:{port} answers with TLS alone; write rediss in place of redis, and {authority}"
        return None

    async def close(self) -> None:
        """Close the connections to sentinels."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        for client in self._sentinel.sentinels if self._sentinel is not None else ():
            await client.aclose()

    async def _master(self, sentinel: Sentinel) -> Address:
        """Return the master that the first reachable sentinel reports.

        redis-py's `discover_master` returns the old master until the failover is over.
        """
        faults = []
        for client in sentinel.sentinels:
            try:
                address: Any = await client.sentinel_get_master_addr_by_name(self.sentinel_service or "")
            except (RedisError, OSError, TimeoutError) as error:
                faults.append(str(error))
                continue
            if address:
                return _text(address[0]), int(address[1])
            faults.append("unknown service")
        raise MasterNotFoundError(f"No sentinel names a master: {'; '.join(faults)}")

    async def _watch_master(self, sentinel: Sentinel) -> None:
        """Leave a replaced master that is alive; its sentinels may take ten seconds to demote it."""
        while True:
            await asyncio.sleep(SENTINEL_LOOK_S)
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                self._set(await self._master(sentinel))

    def _set(self, address: Address) -> None:
        if self._sentinel is None:
            self._remember([address])
        if address != self.address:
            self.address = address
            for callback in self.on_change:
                callback()

    def _remember(self, addresses: Iterable[Address]) -> None:
        for address in addresses:
            if address not in self._nodes and len(self._nodes) < MAX_NODES:
                self._nodes.append(address)

    async def connect_to(self, address: Address, within_s: float | None = None) -> Any:
        """Return an open connection of redis-py to one node. Raises RedisError, OSError, TimeoutError."""
        options = dict(self._pool.connection_kwargs)
        if not self._unix:
            options["host"], options["port"] = address
        connection: Any = self._pool.connection_class(**options)
        try:
            async with asyncio.timeout(self.deadline_s if within_s is None else within_s):
                await connection.connect()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return connection

    async def _find_holder(self) -> bool:
        """Use the owner of our slot that a reachable node reports, if possible another than the present one.

        If there is none, and the server of the URL is no node of a cluster, such as the successor of one, use that.
        Return False if no holder is known.
        """
        nodes = [node for node in dict.fromkeys([*self._nodes, self._named]) if node != self.address]
        reported = dict(zip(nodes, await asyncio.gather(*map(self._query_node, nodes)), strict=True))
        owners = [owner for owner in reported.values() if owner not in {None, _NO_CLUSTER}]
        if owners:
            self._set(next((owner for owner in owners if owner != self.address), owners[0]))
            return True
        if reported.get(self._named) != _NO_CLUSTER:
            return False
        self._set(self._named)
        self._nodes.clear()
        return True

    async def _query_node(self, node: Address) -> Address | None:
        """Return the owner of our slot that a node reports, `_NO_CLUSTER` from a server that is no node."""
        try:
            async with asyncio.timeout(NODE_TIMEOUT_S):
                connection = await self.connect_to(node)
                try:
                    holders = await self._holders(connection, node)
                    return holders[0][0] if holders else None
                finally:
                    await connection.disconnect(nowait=True)
        except ResponseError as error:
            return _NO_CLUSTER if "disabled" in str(error) else None
        except (RedisError, OSError, TimeoutError):
            return None

    async def _holders(self, connection: Any, node: Address | None = None) -> list[tuple[Address, str]]:
        """Return the owner of our slot and its replicas, with their ids, as the connection's node reports them.

        Its own address has no host. Raises ResponseError.
        """
        await connection.send_command("CLUSTER", "SLOTS")
        ranges = await connection.read_response()
        holders: list[tuple[Address, str]] = []
        for first, last, *nodes in ranges:
            named = [
                ((_text(host) or (node or self.address)[0], int(port)), _text(name)) for host, port, name, *_ in nodes
            ]
            self._remember(address for address, _ in named)
            if first <= self._slot <= last:
                holders = named
        return holders


def _pool(url: str, deadline_s: float) -> ConnectionPool:
    """Return a pool that never opens a connection: it holds redis-py's options of the URL."""
    return ConnectionPool.from_url(
        url,
        protocol=2,
        driver_info=DRIVER,
        socket_connect_timeout=deadline_s,
        socket_timeout=None,
        retry=Retry(NoBackoff(), 0),
    )


def _sentinel(parsed: SentinelUrl, options: dict[str, Any]) -> Sentinel:
    same = {name: value for name, value in options.items() if name.startswith("ssl")}
    login = {"username": parsed.username, "password": parsed.password}
    return Sentinel(
        parsed.hosts,
        sentinel_kwargs={
            **same,
            **{name: value for name, value in login.items() if value},
            "ssl": parsed.tls,
            "protocol": 2,
            "driver_info": DRIVER,
            "socket_timeout": NODE_TIMEOUT_S,
            "socket_connect_timeout": NODE_TIMEOUT_S,
            "retry": Retry(NoBackoff(), 0),
        },
    )


async def _answers_without_tls(host: str, port: int) -> bool:
    return (await first_bytes(host, port, b"PING\r\n"))[:1] in {b"+", b"-"}


def _check_options(pool: ConnectionPool) -> None:
    """Make a connection and its TLS context without opening it: both raise for invalid options."""
    connection: Any = pool.connection_class(**pool.connection_kwargs)
    context = getattr(connection, "ssl_context", None)
    if context is not None:
        context.get()


def _fault(error: Exception) -> str:
    if isinstance(error, ssl.SSLError | FileNotFoundError | PermissionError | IsADirectoryError):
        return f"the files that its ssl_ options name can't be read ({error})"
    return str(error)


def _text(value: bytes | str | None) -> str:
    return value.decode() if isinstance(value, bytes) else value or ""


def take_over(connection: Any, protocol: ReplyProtocol) -> asyncio.Transport:
    """Move the transport of redis-py's connection to the protocol; redis-py has nothing to close then."""
    at_end = connection._reader.at_eof()  # noqa: SLF001
    writer, connection._reader, connection._writer = connection._writer, None, None  # noqa: SLF001
    protocol.writer = writer
    transport = cast(asyncio.Transport, writer.transport)
    transport.set_protocol(protocol)
    if at_end or transport.is_closing():  # it was lost before the protocol was set
        transport.abort()
        asyncio.get_running_loop().call_soon(protocol.end, RedisConnectionError("Connection closed by server"))
    return transport
