"""Test that outlives its time limit, as one does in which a callback of the event loop catches the exception."""

from __future__ import annotations

import signal
from contextlib import suppress


def test_it_waits_on() -> None:
    while True:
        with suppress(BaseException):
            signal.pause()
