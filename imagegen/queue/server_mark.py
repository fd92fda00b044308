"""Mark of the Redis server, in Redis: it shows an instance that starts a failover that others may not have noticed."""

from __future__ import annotations

from imagegen.queue.queue_verbs import QueueVerbs
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys


class ServerMark:
    """The replication id of the server to which all instances have written back what they had in memory.

    A replica that was promoted has another one, and that of its master before. In a cluster the server is the owner of
    our slot: after the slot has moved to another node, the mark shows no failover until it is written again.
    """

    def __init__(self, connection: Connection, keys: Keys, verbs: QueueVerbs, instance: str) -> None:
        self._connection = connection
        self._key = keys.server
        self._verbs = verbs
        self._instance = instance

    async def awaited_instances(self) -> frozenset[str]:
        """Return the instances that may have to write back to this server, since it was promoted; mostly none.

        The shared connection is used, which identifies the server. Costs one command, and one or two more if the
        server is another one. Raises QueueUnavailable.
        """
        async with self._connection.deadline():
            stored = await self._connection.multiplexer.execute("GET", self._key)
        self._connection.meter.redis_commands_sent("control", 1)
        server = self._connection.server
        if server is None or stored == server.replication_id.encode():
            return frozenset()
        if stored and stored == server.promoted_from.encode():
            others = frozenset(consumer.name for consumer in await self._verbs.consumers()) - {self._instance}
            if others:
                return others
        await self.write()
        return frozenset()

    async def write(self) -> None:
        """Name the present server. Raises QueueUnavailable."""
        server = self._connection.server
        if server is not None and server.replication_id:
            async with self._connection.deadline():
                await self._connection.multiplexer.execute("SET", self._key, server.replication_id)
            self._connection.meter.redis_commands_sent("control", 1)
