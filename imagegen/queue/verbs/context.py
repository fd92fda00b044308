"""What the verbs share: connection, keys and lifetimes, and the arguments for budgets and lines of clients.

See budget.lua for the texts of budgets, and line_args.lua for the arguments of lines.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from imagegen.queue.claim import checkpoint_ttl_s, owner_life_s
from imagegen.queue.unreadable import Unreadable
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.multiplexer import MAX_BYTES, Arg, Item, Multiplexer, Script
from imagegen.tasks.cost import Cost

BUDGETS_TTL_S = 8 * 86_400
"""Life of the budgets of a day: longer than a task."""

KEPT_DAYS = 3
"""Days of which an instance remembers the values."""

REFUSED = -(2**53)
"""Limit under which nothing fits: of a task with an unknown price."""

Limits = tuple[tuple[int, int], ...]
"""Slots of the budgets that a task counts against, each with its limit in micro-dollars."""

LimitsOf = Callable[[str], Limits]
"""Returns the budgets of a client by the name of its key, empty if none limits it."""


class BudgetValues:
    """Values of the budgets as this instance last saw them, in micro-dollars.

    Scripts return them at no cost. Redis counts the changes of a day, so a lower count shows that it has lost some.
    on_change: called after values were seen. on_refused: called with the client of a refused request.
    """

    def __init__(self) -> None:
        self._days: dict[int, tuple[int, dict[int, int]]] = {}
        self.on_change: Callable[[], None] = lambda: None
        self.on_refused: Callable[[str], None] = lambda _client: None

    @property
    def days(self) -> tuple[int, ...]:
        """Days of which values were seen."""
        return tuple(self._days)

    def used(self, day: int, slot: int) -> int:
        """Return what a budget held when it was last seen, reserved and charged; 0 if it was never seen."""
        return self.seen(day)[1].get(slot, 0)

    def seen(self, day: int) -> tuple[int, dict[int, int]]:
        """Return the highest count of changes that was seen, and the values by slot."""
        return self._days.get(day, (0, {}))

    def learn_all(self, day: int, stored: bytes) -> None:
        """Record the stored values of a day."""
        count, *values = struct.unpack(f">{len(stored) // 8}q", stored[: len(stored) // 8 * 8]) or (0,)
        if count >= self.seen(day)[0]:
            self._days[day] = (count, dict(enumerate(values)))
            self.on_change()

    def learn(self, reply: Sequence[Any]) -> int:
        """Record the values that a script returned. Return the number of its commands for budgets."""
        for at in range(1, len(reply), 4):
            day, count, slot, value = map(int, reply[at : at + 4])
            last, values = self.seen(day)
            if count >= last:
                values[slot] = value
                self._days[day] = (count, values)
        if len(self._days) > KEPT_DAYS:
            del self._days[min(self._days)]
        if len(reply) > 1:
            self.on_change()
        return int(reply[0])


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


def reservation(cost: Cost | None, limits: Limits) -> str:
    """Return the text of what a submit reserves; empty for nothing."""
    if cost is None or not cost.slots:
        return ""
    if cost.estimated is None:
        return _text(cost.day, 0, [f"{slot}={REFUSED}" for slot in cost.slots])
    if not cost.reserved:
        return ""
    return _text(cost.day, cost.reserved, [f"{slot}={limit}" for slot, limit in limits])


def extension(day: int, amount: int, limits: Limits) -> str:
    """Return the text of what a call beyond the planned ones reserves."""
    return _text(day, amount, [f"{slot}={limit}" for slot, limit in limits])


def settlement(cost: Cost | None) -> str:
    """Return the text of what budgets get at the end of a task; empty if none holds it."""
    if cost is None or not cost.slots:
        return ""
    return _text(cost.day, cost.ended().charged - cost.reserved, cost.slots)


def refund(cost: Cost | None, amount: int) -> str:
    """Return the text of what budgets get back of a task that is settled; empty for nothing."""
    return _text(cost.day, -amount, cost.slots) if cost and cost.slots and amount > 0 else ""


def release(cost: Cost | None) -> str:
    """Return the text that takes back everything that is reserved for a task; empty if nothing is."""
    if cost is None or not cost.slots or not cost.reserved:
        return ""
    return _text(cost.day, -cost.reserved, cost.slots)


def _text(day: int, amount: int, slots: Iterable[object]) -> str:
    return f"{day} {amount} {' '.join(map(str, slots))}"


def budget_keys(keys: Keys, texts: Iterable[str]) -> list[str]:
    """Return the keys of the days that texts concern."""
    days = {text.partition(" ")[0] for text in texts if text}
    return [keys.budgets(day) for day in sorted(days)]


def clients_with_lines(clients: Sequence[str]) -> list[str]:
    """Return the clients of a batch that have a line, each once; '' is none."""
    return list(dict.fromkeys(filter(None, clients)))


def add_line_args(context: VerbContext, keys: list[str], args: list[Any], clients: Sequence[str]) -> None:
    """Append the lines of a batch to the arguments of its script.

    clients: for each task the client with the line that it concerns, '' for none.
    """
    args.append(context.record_ttl_ms)
    if not any(clients):
        args += ("", "")
        return
    lines = clients_with_lines(clients)
    keys.append(context.keys.lines)
    keys += map(context.keys.line, lines)
    numbers = {client: number for number, client in enumerate(lines, 1)}
    args += (" ".join([str(numbers.get(client, 0)) for client in clients]), "\n".join(lines))


def batched(items: Sequence[Item], most: int, size: Callable[[Item], int] | None = None) -> Iterator[list[Item]]:
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
