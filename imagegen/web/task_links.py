"""Absolute links of tasks, as clients and webhooks receive them."""

from __future__ import annotations

from msgspec import Struct

from imagegen.accounts.links import Links
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import Task


class TaskLinks(Struct, frozen=True):
    """Links under one base. signer: signs those of images and events if clients need a key; None for examples."""

    base: str
    signer: Links | None = None

    def task(self, task: Task) -> str:
        """Return the link to the task, which needs a key where clients need one."""
        return f"{self.base}{_path(task)}"

    def events(self, task: Task) -> str:
        """Return the link to the events of the task. Raises QueueUnavailable."""
        return self._signed(f"{_path(task)}/events", task, "")

    def image(self, task: Task, image: StoredImage) -> str:
        """Return the link to an image: on this service, or the provider's own if the bytes are not stored.

        Raises QueueUnavailable.
        """
        return image.url or self._signed(f"{_path(task)}/{image.index}", task, f"v={image.sha256[:12]}")

    def _signed(self, path: str, task: Task, query: str) -> str:
        if self.signer is None or not self.signer.is_on():
            return f"{self.base}{path}?{query}" if query else f"{self.base}{path}"
        return f"{self.base}{path}?{self.signer.sign(path, task, query)}"


def _path(task: Task) -> str:
    return f"/api/images/{task.id}"
