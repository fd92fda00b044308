"""Progress of `imagegen generate` on stderr: lines, or a bar of rich on a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from imagegen.client import ImageTask, SubmitReceipt, TaskCost
    from imagegen.client.exchange import Pause

NOTED_PAUSE_S = 1.0
"""Shortest pause that is shown."""


class Progress(Protocol):
    """Display of one task's progress."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def note(self, text: str) -> None:
        """Show a line that stays."""
        ...

    def update(self, task: ImageTask) -> None:
        """Show the state of the task."""
        ...


class PlainProgress:
    """A line for each change."""

    def __init__(self) -> None:
        self._shown = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Hold nothing."""

    def note(self, text: str) -> None:
        print(printable(text), file=sys.stderr, flush=True)

    def update(self, task: ImageTask) -> None:
        text = f"{describe(task)} {task.progress} %" if task.status == "processing" else describe(task)
        if text != self._shown and not task.is_final:  # the end has a separate line
            self._shown = text
            self.note(text)


class BarProgress:
    """A bar that is gone at the end. bar: a `rich.progress.Progress`."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._row = bar.add_task("starting", total=100)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        self._bar.console.print(printable(text), markup=False, highlight=False)

    def update(self, task: ImageTask) -> None:
        self._bar.update(self._row, completed=task.progress, description=printable(describe(task)))


def create_progress() -> Progress:
    """Return a bar if stderr is a terminal and rich is installed, else lines."""
    if not sys.stderr.isatty():
        return PlainProgress()
    try:
        from rich.console import Console  # noqa: PLC0415 - an extra
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415
        from rich.progress import Progress as Bar  # noqa: PLC0415
    except ImportError:
        return PlainProgress()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)  # stdout is for the paths, which rich would otherwise write to its console
    return BarProgress(Bar(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False))


def describe(task: ImageTask) -> str:
    """Return the state of a task in words, with its place and why it waits."""
    parts = [task.status]
    if task.status == "pending" and task.queue_position:
        parts.append(f"place {task.queue_position}")
    if task.reason and task.reason != "queued":
        parts.append(task.reason.replace("_", " "))
    if task.retry_at is not None and (left_s := task.retry_at.timestamp() - time.time()) > 0:
        parts.append(f"next attempt in {left_s:.0f} s")
    elif task.eta_seconds is not None and not task.is_final:
        parts.append(f"about {task.eta_seconds:.0f} s left")
    return ", ".join(parts)


def describe_pause(pause: Pause) -> str:
    """Return the cause of a wait; nothing for a short one."""
    if pause.seconds < NOTED_PAUSE_S:
        return ""
    return f"waiting {pause.seconds:.0f} s: {pause.why.replace('_', ' ') or 'no response of the service'}"


def describe_submit(receipt: SubmitReceipt) -> str:
    """Return what a submit did, with its price."""
    if receipt.cached:
        return f"{receipt.task_id}: generated before, costs nothing{_saved(receipt.cost)}"
    if is_joined(receipt):
        return f"{receipt.task_id}: joined the same unfinished task, costs nothing more{_saved(receipt.cost)}"
    estimated = receipt.cost.estimated if receipt.cost else None
    return f"{receipt.task_id}: submitted, {'price unknown' if estimated is None else f'about {dollars(estimated)}'}"


def is_joined(receipt: SubmitReceipt) -> bool:
    """Return whether the task is certainly that of another submit."""
    return receipt.coalesced and not receipt.repeated


def describe_end(task: ImageTask, receipt: SubmitReceipt) -> str:
    """Return how a task ended, with what this command paid."""
    if receipt.cached or is_joined(receipt):
        return f"{task.status}, cost {dollars(0)}"
    charged = task.cost.charged if task.cost else None
    return f"{task.status}, cost {'unknown' if charged is None else dollars(charged)}"


def dollars(value: float) -> str:
    """Return an amount with at least cents and at most micro-dollars."""
    whole, _, digits = f"{value:.6f}".partition(".")
    return f"${whole}.{digits.rstrip('0').ljust(2, '0')}"


def printable(text: str) -> str:
    """Return a text without control characters, which a terminal would obey."""
    return "".join(char if char.isprintable() else " " for char in text)


def _saved(cost: TaskCost | None) -> str:
    return f" (saves {dollars(cost.saved)})" if cost and cost.saved else ""
