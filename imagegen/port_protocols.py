"""Probes of what a port speaks: TLS, or its protocol without it. Nothing is sent that a wrong server must not see."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from contextlib import suppress

MAX_FIRST_BYTES = 4_096


async def answers_with_tls(host: str, port: int) -> bool:
    """Return whether a port speaks TLS, with any certificate. Raises OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        _, writer = await asyncio.open_connection(host, port, ssl=context)
    except ssl.SSLError as error:
        return "ALERT" in str(error)  # the server speaks TLS, and refuses a client without a certificate for example
    writer.transport.abort()
    return True


async def first_bytes(host: str, port: int, request: bytes, is_enough: Callable[[bytes], object] = bool) -> bytes:
    """Return the first bytes that a port sends without TLS in response to a request, empty if it hangs up.

    is_enough: returns whether no more than these bytes is read. Raises OSError if there is no connection.
    """
    reader, writer = await asyncio.open_connection(host, port)
    received = b""
    try:
        writer.write(request)
        with suppress(ConnectionError):
            while len(received) < MAX_FIRST_BYTES and not is_enough(received):
                if not (part := await reader.read(MAX_FIRST_BYTES)):
                    break
                received += part
    finally:
        writer.transport.abort()
    return received
