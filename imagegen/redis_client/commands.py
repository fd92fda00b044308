"""redis-py's client for rare commands, sent over multiplexed connections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.client import EMPTY_RESPONSE, NEVER_DECODE
from redis.exceptions import RedisError, ResponseError

from imagegen.redis_client.multiplexer import Arg, Command, CommandBatch, Multiplexer, Script
from imagegen.redis_client.replies import decoding
from imagegen.redis_client.topology import DRIVER


class Commands(Redis):
    """redis-py's methods and types over multiplexers, which follow redirects and reconnect.

    multiplexers: connected on first use. A command goes to the one with the fewest commands in flight, so that a large
    value delays no other.
    """

    def __init__(self, multiplexers: Sequence[Multiplexer]) -> None:
        super().__init__(protocol=2, driver_info=DRIVER)
        self._multiplexers = multiplexers

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Send one command and return its parsed reply. Raises RedisError, OSError, TimeoutError."""
        (reply,) = await self._least_busy().execute_batch(CommandBatch([_packable(args)]))
        return await self._parsed(args[0], reply, options)

    def pipeline(self, transaction: bool = False, shard_hint: str | None = None) -> CommandPipeline:  # noqa: FBT001, FBT002
        """Return a pipeline without a transaction."""
        if transaction or shard_hint:
            raise RedisError("Transactions are not supported here; write a script")
        return CommandPipeline(self)

    async def run(self, stack: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]) -> list[Any]:
        """Send commands together and return their parsed replies. Raises the first error."""
        replies = await self._least_busy().execute_batch(CommandBatch([_packable(args) for args, _ in stack]))
        return [await self._parsed(args[0], reply, opts) for (args, opts), reply in zip(stack, replies, strict=True)]

    async def run_script(self, script: Script, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        """Run a script without SCRIPT LOAD, which not every server offers. Raises RedisError, OSError, TimeoutError."""
        return await self._least_busy().evalsha(script, keys, args)

    def _least_busy(self) -> Multiplexer:
        return min(self._multiplexers, key=lambda multiplexer: multiplexer.under_way)

    async def _parsed(self, name: str, reply: Any, options: Mapping[str, Any]) -> Any:
        callback = self.response_callbacks.get(name)
        if callback is None:
            return reply
        parser_options = {
            key: value for key, value in options.items() if key not in {"keys", EMPTY_RESPONSE, NEVER_DECODE}
        }
        with decoding():
            return callback(reply, **parser_options)


class CommandPipeline(Pipeline):
    """Commands that are sent together over the client's connections."""

    def __init__(self, commands: Commands) -> None:
        super().__init__(commands.connection_pool, commands.response_callbacks, transaction=False, shard_hint=None)
        self._commands = commands

    async def execute(self, raise_on_error: bool = True) -> list[Any]:  # noqa: FBT001, FBT002
        """Send the collected commands and return the replies. Raises the first error."""
        if not raise_on_error:
            raise ResponseError("Errors of single commands are not kept apart here")
        stack, self.command_stack = self.command_stack, []
        return await self._commands.run(stack) if stack else []


def _packable(args: Sequence[Any]) -> Command:
    """Split names of two words, such as XGROUP CREATE, as redis-py's own encoder does."""
    name, *rest = args
    return (*str(name).split(), *rest)
