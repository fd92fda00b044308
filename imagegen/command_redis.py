"""Redis for the commands that read and change what the service keeps, and the ends of these commands.

Without REDIS_URL it is the embedded server: that of the running service, else a server that runs for the command.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager

from imagegen import log
from imagegen.errors import ApiError, FieldError, QueueUnavailable, SettingsError
from imagegen.queue.command_check import check_server
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.embedded import EmbeddedRedis
from imagegen.redis_client.redis_errors import ResponseError, shown
from imagegen.settings import Settings

FAILED, USAGE = 1, 2
"""Exit codes."""


def run_command(command: Callable[[Settings], Coroutine[None, None, int]]) -> int:
    """Run a command with the settings; return its exit code. Errors are printed with their remedy."""
    log.configure("ERROR", "text")
    try:
        return asyncio.run(command(Settings.load()))
    except SettingsError as error:
        return fail(str(error), USAGE)
    except QueueUnavailable as error:
        return fail(_unavailable_text(error.__cause__), FAILED)
    except ApiError as error:
        wrong = [f"{_option(detail)}: {detail.message}" for detail in error.details]
        return fail("\n".join(wrong) or error.message("en"), USAGE if wrong else FAILED)
    except OSError as error:
        if error.filename != "stdout":
            raise
        return fail(f"stdout can't be written ({error.strerror})", FAILED)


@asynccontextmanager
async def connected_redis(settings: Settings) -> AsyncIterator[Connection]:
    """Yield a connection to the Redis of the settings. Raises SettingsError."""
    url, embedded = settings.redis_url, None
    if url is None:
        embedded = EmbeddedRedis(settings.data_dir, settings.redis_server)
        await embedded.start()
        url = embedded.url
    try:
        connection = Connection(url, prefix=settings.redis_prefix)
        try:
            await check_server(connection, settings.redis_prefix)
            yield connection
        finally:
            await connection.close()
    finally:
        if embedded:
            await embedded.stop()


def note(text: str) -> None:
    """Print a line for the operator that is no result."""
    print(text, file=sys.stderr)


def fail(text: str, code: int) -> int:
    """Print why a command failed; return its exit code."""
    note(text)
    return code


def _unavailable_text(cause: BaseException | None) -> str:
    if isinstance(cause, ResponseError):  # for example OOM, MISCONF, LOADING
        return f"Redis refuses the command now ({shown(cause)})"
    return f"Redis does not answer{f' ({shown(cause)})' if cause else ''}: start it, or check REDIS_URL and the network"


def _option(error: FieldError) -> str:
    """Return the option of a field, as `--images-rate` of `imagesRate`."""
    if error.field == "name":
        return "NAME"
    return "--" + "".join(f"-{char.lower()}" if char.isupper() else char for char in error.field)
