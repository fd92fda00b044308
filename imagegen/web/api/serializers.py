"""Serializers of tasks: the JSON and the links that clients and webhooks receive."""

from __future__ import annotations

import math
from collections.abc import Callable

from msgspec import Struct
from yarl import URL

from imagegen.accounts.links import Links
from imagegen.formats import rfc3339
from imagegen.queue.client_queue import CacheResult, SubmitResult
from imagegen.queue.eta import UNKNOWN_POSITION, QueuePosition
from imagegen.tasks.cost import MICRO_USD
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import State, Task
from imagegen.tasks.webhook import Delivery
from imagegen.web.api.schemas import CostView, DeliveryView, ImageView, NotFoundView, SubmittedView, TaskView

TEXTS = {
    "zh": {
        "new": "图像生成任务已创建，请使用任务ID查询结果",
        "hit": "发现相同参数的图像已生成，可直接查询结果",
        "running": "任务{status}中 ({progress}%)",
        "failed": "图像生成失败：{detail}",
        "cancelled": "任务已取消",
        "not_found": "任务不存在或已过期",
        "healthy": "Service is healthy",
    },
    "en": {
        "new": "The image task was created; use its task id to fetch the result",
        "hit": "The same image was generated before; its result can be fetched now",
        "running": "The task is {status} ({progress}%)",
        "failed": "Image generation failed: {detail}",
        "cancelled": "The task was cancelled",
        "not_found": "The task does not exist or has expired",
        "healthy": "Service is healthy",
    },
}

FREE = (CacheResult.HIT, CacheResult.COALESCED)
"""Results of submits that pay nothing."""

ImageUrl = Callable[[Task, StoredImage], str]


class TaskLinks(Struct, frozen=True):
    """Links under one base. signer: signs those of images and events if clients need a key; None for examples."""

    base: str
    signer: Links | None = None

    def task(self, task: Task) -> str:
        """Return the link to the task, which needs a key where clients need one."""
        return f"{self.base}{_path(task)}"

    def location(self, task: Task) -> str:
        """Return the link to the task without scheme and host."""
        return "/".join(["", *self.base.split("/")[3:]]) + _path(task)

    def events(self, task: Task) -> str:
        """Return the link to the events of the task. Raises QueueUnavailable."""
        return self._signed(f"{_path(task)}/events", task, "")

    def image(self, task: Task, image: StoredImage) -> str:
        """Return the link to an image: on this service, or the provider's own if the bytes are not stored.

        Raises QueueUnavailable.
        """
        return image.url or self._signed(f"{_path(task)}/{image.index}", task, f"v={image.sha256[:12]}")

    def short_image(self, task: Task, image: StoredImage) -> str:
        """Return the same without the version of the bytes, so that it may not be cached for long."""
        return image.url or self._signed(f"{_path(task)}/{image.index}", task, "")

    def _signed(self, path: str, task: Task, query: str) -> str:
        if self.signer is None or not self.signer.is_on():
            return f"{self.base}{path}?{query}" if query else f"{self.base}{path}"
        return f"{self.base}{path}?{self.signer.sign(path, task, query)}"


def _path(task: Task) -> str:
    return f"/api/images/{task.id}"


def submitted_view(submitted: SubmitResult, place: QueuePosition, links: TaskLinks, language: str) -> SubmittedView:
    """Return the POST body."""
    task, cached = submitted.task, submitted.cached
    hit = cached is CacheResult.HIT
    url = links.task(task)
    view: SubmittedView = {
        "success": True,
        "taskId": task.id,
        "cached": hit,
        "message": TEXTS[language]["hit" if hit else "new"],
        "status": task.state,
        "sequence": task.sequence,
        "statusUrl": url,
        "eventsUrl": links.events(task),
        "cancelUrl": f"{url}/cancel",
        "queuePosition": place.position,
        "etaSeconds": place.eta_s,
        "cost": cost_view(task, is_free=cached in FREE),
    }
    if cached is CacheResult.COALESCED:
        view["coalesced"] = True
    if task.warnings:
        view["warnings"] = list(task.warnings)
    return view


def task_view(
    task: Task, image_url: ImageUrl, *, language: str, max_attempts: int, place: QueuePosition = UNKNOWN_POSITION
) -> TaskView:
    """Return the GET body of a task."""
    texts = TEXTS[language]
    view: TaskView = {
        "success": True,
        "status": task.state,
        "taskId": task.id,
        "sequence": task.sequence,
        "progress": task.progress,
        "attempts": task.attempts,
        "maxAttempts": max_attempts,
        "model": task.model,
        "createdAt": rfc3339(task.created_at),
        "startedAt": rfc3339(task.started_at) if task.started_at else None,
        "finishedAt": rfc3339(task.finished_at) if task.finished_at else None,
        "cost": cost_view(task),
    }
    match task.state:
        case State.COMPLETED:
            view["progress"] = 100
        case State.FAILED if task.error is not None:
            view["message"] = texts["failed"].format(detail=task.error.detail)
            view["error"] = {"code": task.error.code, "retryable": task.error.retryable}
        case State.CANCELLED:
            view["message"] = texts["cancelled"]
            view["cancelledUpstream"] = task.cancelled_upstream
        case State.PENDING | State.PROCESSING:
            view["message"] = texts["running"].format(status=task.state, progress=task.progress)
            view["reason"] = task.reason
            view["retryAt"] = rfc3339(task.retry_at) if task.retry_at else None
            view["queuePosition"] = place.position
            view["etaSeconds"] = place.eta_s
    if task.images or task.state is State.COMPLETED:
        view["data"] = [image_view(task, image, image_url) for image in task.images]
    _add_extras(view, task)
    return view


def _add_extras(view: TaskView, task: Task) -> None:
    """Add what only some tasks have."""
    if task.channel:
        view["channel"] = task.channel
    if task.warnings:
        view["warnings"] = list(task.warnings)
    if task.details and task.details.usage:
        view["usage"] = task.details.usage
    if task.possibly_billed_twice:
        view["possiblyBilledTwice"] = task.possibly_billed_twice
    if task.deliveries and (deliveries := _shown_deliveries(task)):
        view["webhook"] = [_delivery_view(delivery) for delivery in deliveries]


def cost_view(task: Task, *, is_free: bool = False) -> CostView | None:
    """Return the money of a task, None if its price is unknown. is_free: a submit met it that pays nothing."""
    cost = task.cost
    if cost is None:
        return None
    charged = cost.charged if task.state.is_final and not cost.unpriced else None
    if cost.estimated is None and not charged:
        return None
    return {
        "currency": "USD",
        "estimated": None if cost.estimated is None else cost.estimated / MICRO_USD,
        "charged": None if charged is None else charged / MICRO_USD,
        "saved": (cost.total or 0 if is_free else cost.saved) / MICRO_USD,
    }


def _shown_deliveries(task: Task) -> list[Delivery]:
    """Return all deliveries of an unfinished task, and those that the end of a finished one concerns."""
    return [
        delivery
        for delivery in task.deliveries
        if not task.state.is_final or delivery.webhook.subscribes_to(task.state)
    ]


def _delivery_view(delivery: Delivery) -> DeliveryView:
    """Show scheme and host of the URL: its path and query often hold a secret, and a task may be shared."""
    return {
        "url": str(URL(delivery.webhook.url).origin()),
        "status": delivery.status,
        "attempts": delivery.attempts,
        "lastStatus": delivery.last_status,
    }


def image_view(task: Task, image: StoredImage, image_url: ImageUrl) -> ImageView:
    """Return an image as the body of its task shows it."""
    view: ImageView = {"url": image_url(task, image), "index": image.index, "seed": image.seed}
    if image.sha256:
        view |= {
            "contentType": image.content_type,
            "bytes": image.size_bytes,
            "width": image.width,
            "height": image.height,
            "sha256": image.sha256,
            "expiresAt": rfc3339(task.expires_at) if task.expires_at else None,
        }
    if task.stale_images:
        view["stale"] = True
    if image.reused:
        view["reused"] = True
    return view


def not_found_view(language: str) -> NotFoundView:
    """Return the GET body of an unknown task."""
    return {"success": False, "status": "not_found", "message": TEXTS[language]["not_found"]}


def submit_headers(submitted: SubmitResult, links: TaskLinks) -> dict[str, str]:
    """Return the headers of every response to a submit."""
    return {"Location": links.location(submitted.task), "X-Cache": submitted.cached}


def retry_after_s(place: QueuePosition) -> int:
    """Return the seconds until the next poll: half of the time left, within 1 to 30; 2 without an estimate."""
    return 2 if place.eta_s is None else min(max(math.ceil(place.eta_s / 2), 1), 30)
