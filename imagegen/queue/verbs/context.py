"""Context that the verbs share: connection, keys and lifetimes, and the way of a batch to its script."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from imagegen.queue.claim import checkpoint_ttl_s, owner_life_s
from imagegen.queue.unreadable import Unreadable
from imagegen.queue.verbs.budget_counters import BudgetValues
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.multiplexer import MAX_BYTES, Arg, Item, Multiplexer, Script


@dataclass(frozen=True, slots=True)
class VerbContext:
    """Connection, keys and lifetimes, made once for each instance.

    Args:
        record_ttl_ms: life of an unfinished task's record.
        result_ttl_ms: life of a finished task's record.
        checkpoint_ttl_ms: life of a checkpoint that is not renewed.
        owner_life_s: seconds after a checkpoint's last renewal in which its owner may still work.
        budgets: their values as last seen.
    """

    connection: Connection
    keys: Keys
    record_ttl_ms: int
    result_ttl_ms: int
    checkpoint_ttl_ms: int
    owner_life_s: float
    multiplexer: Multiplexer = field(init=False)
    unreadable: Unreadable = field(init=False)
    budgets: BudgetValues = field(init=False, default_factory=BudgetValues)

    def __post_init__(self) -> None:
        object.__setattr__(self, "multiplexer", self.connection.multiplexer)
        object.__setattr__(self, "unreadable", Unreadable(self.connection.meter))

    @classmethod
    def create(
        cls, connection: Connection, keys: Keys, *, record_life_s: float, result_ttl_s: float, lease_s: float
    ) -> Self:
        """Return the context for lifetimes in seconds; lease_s is that of a claim."""
        return cls(
            connection,
            keys,
            record_ttl_ms=int(record_life_s * 1000),
            result_ttl_ms=max(int(result_ttl_s * 1000), 1),
            checkpoint_ttl_ms=int(checkpoint_ttl_s(lease_s) * 1000),
            owner_life_s=owner_life_s(lease_s),
        )

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        """Run a script and return its reply. Raises QueueUnavailable, RedisError."""
        return await self.multiplexer.evalsha(script, keys, args)

    def count(self, purpose: str, commands: int) -> None:
        """Add to the count of commands that Redis bills, those inside of scripts too."""
        self.connection.meter.commands[purpose] += commands


def pairs_of(flat: list[Any]) -> dict[bytes, Any]:
    """Return the dictionary of a reply that lists names and values in turn."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def batched(items: Iterable[Item], most: int, size: Callable[[Item], int] | None = None) -> Iterator[list[Item]]:
    """Yield the items in order, in batches of at most `most` items and about `MAX_BYTES` bytes."""
    batch: list[Item] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item) if size else 0
        if len(batch) >= most or total >= MAX_BYTES:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
