"""Owns what the scripts cost: Redis commands, the inner ones too, since Upstash bills each of them.

Told from the answers, as the common ways through the scripts are; a test compares with what the server counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MEASURED = 2
"""XPENDING and XLEN, where a submit measures the depth."""

BURY = 6

_NEW, _AGAIN, _MET, _MET_WHILE_FULL = 2, 5, 3, 1

_UNFINISHED = (b"pending", b"processing")
"""It is asked whether their entry is still there."""


def submit(answers: Iterable[tuple[str, str, bytes]], room: int) -> int:
    """answers: kind, entry id and known record of each; room: in the queue, before the first of them."""
    commands = 1
    for kind, entry_id, known in answers:
        if kind == "again":
            commands += _AGAIN
        elif entry_id:
            commands += _NEW
        else:
            commands += _MET if room > 0 else _MET_WHILE_FULL
            commands += kind in ("known", "gone") and known.split(b" ", 2)[1] in _UNFINISHED
        room -= bool(entry_id)
    return commands


def start(tasks: int, many: int) -> int:
    """A SET each, in a script where there are many."""
    return tasks + (tasks >= many)


def finish(tasks: int) -> int:
    """XDEL and SET (or GET) a task, one XACK."""
    return 2 + 2 * tasks


def swap(answer: bytes) -> int:
    """GET, and SET where it was written; without the script itself."""
    return 1 if answer else 2


def start_fenced(commands: int) -> int:
    """XPENDING and GET; GET of the run, SET of it, SET of the record, as far as the script came."""
    return 1 + commands


def renew(held: int, runs: int) -> int:
    """XPENDING, PEXPIRE a run, one XCLAIM."""
    return 2 + runs + bool(held)


def retire(consumers: int, removed: int) -> int:
    """XPENDING a consumer, XGROUP DELCONSUMER for each that holds nothing."""
    return 1 + consumers + removed


def release(records: Sequence[bytes], given: int, *, leaving: bool) -> int:
    """XPENDING, and six a task that was ours, but none for a run that was never written."""
    unwritten = sum(not run for run in records) if given else 0
    return 2 + max(given * 6 - unwritten, 0) + 2 * leaving


def cancel(answer: bytes | None) -> int:
    """GET; XDEL, XACK and two SETs where it was cancelled."""
    return 6 if answer == b"" else 2
