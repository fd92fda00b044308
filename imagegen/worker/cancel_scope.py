"""Cancel scope of a claim: work for it ends at once when the claim is lost."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from imagegen.queue.claim import Claim


class ClaimWasLost(Exception):
    """The claim was lost; nothing that was done for it matters."""


class ClaimScope:
    """Block that ends with `ClaimWasLost` as soon as its claim is lost, without a cancellation of its loop.

    If the block itself notices the loss, it is not cancelled: a cancellation of the running task would only take
    effect after the block.
    """

    def __init__(self, claim: Claim) -> None:
        self._claim = claim
        self._task: asyncio.Task[object] | None = None
        self._cancel_requested = False

    def __enter__(self) -> Self:
        if self._claim.lost:
            raise ClaimWasLost
        self._task = asyncio.current_task()
        self._claim.on_lost = self._abandon
        return self

    def _abandon(self) -> None:
        if self._task is not None and self._task is not asyncio.current_task() and not self._cancel_requested:
            self._cancel_requested = self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._claim.on_lost = None
        if self._cancel_requested and self._task is not None and self._task.uncancel() == 0:
            raise ClaimWasLost from None
