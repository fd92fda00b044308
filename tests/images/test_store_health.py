"""Tests of store health: one log line when writes fail, one when they work again."""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from imagegen.images.store_health import StoreHealth, describe
from tests.support import logged


@pytest.fixture
def lines() -> Iterator[list[str]]:
    with logged() as lines:
        yield lines


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", "/data/images/ab/task/0.png")


async def test_an_outage_is_logged_at_its_start_with_errno_and_at_its_end(lines: list[str]) -> None:
    health = StoreHealth("disk")
    changes: list[bool] = []
    health.on_change(changes.append)
    health.mark_ok()
    for _ in range(3):
        health.mark_failed(full())
    assert (health.writable, "ENOSPC" in health.cause, changes) == (False, True, [False])
    health.mark_ok()
    health.mark_ok()
    assert (health.writable, health.cause, changes) == (True, "", [False, True])
    assert [line.split()[0] for line in lines] == ["WARNING", "INFO"]
    assert all("ENOSPC" in line for line in lines)


async def test_waiting_ends_when_images_can_be_saved_again() -> None:
    health = StoreHealth("disk")
    await asyncio.wait_for(health.wait_writable(), 20)
    health.mark_failed("full")
    waiting = asyncio.create_task(health.wait_writable())
    await asyncio.sleep(0)
    assert not waiting.done()
    health.mark_ok()
    await asyncio.wait_for(waiting, 20)


def test_a_cause_names_the_errno_and_no_path() -> None:
    assert describe(full()) == "ENOSPC No space left on device"
    assert describe(ValueError("odd\nand long")) == "ValueError: odd"


def test_a_cause_says_why_a_tls_certificate_was_refused() -> None:
    """The error of an S3 client has the reason behind its address, at a place that is cut off."""
    refused = ssl.SSLCertVerificationError(1, "certificate verify failed")
    refused.verify_message = "Hostname mismatch, certificate is not valid for 's3.example'."
    unknown_key: Any = None
    error = ValueError("SSL validation failed for https://s3.example/bucket")
    error.__context__ = aiohttp.ClientConnectorCertificateError(unknown_key, refused)
    assert describe(error) == "TLS certificate refused (Hostname mismatch)"
