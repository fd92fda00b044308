"""Owns what small bodies that came lately mean, so that clients who ask again cost no parsing."""

from __future__ import annotations

from collections import OrderedDict

from imagegen.queue.client_queue import Submission

COUNT, MAX_BYTES = 1_000, 1_000


class SubmissionCache:
    """Up to `COUNT` submissions by their body; a body over `MAX_BYTES` is not kept."""

    def __init__(self) -> None:
        self._seen: OrderedDict[bytes, Submission] = OrderedDict()
        self.get = self._seen.get

    def put(self, raw: bytes, submission: Submission) -> None:
        if len(raw) <= MAX_BYTES:
            self._seen[raw] = submission
            if len(self._seen) > COUNT:
                self._seen.popitem(last=False)
