"""Documentation of the webhooks that this service sends."""

from __future__ import annotations

from imagegen.tasks.task import State
from imagegen.tasks.webhook import MAX_WEBHOOKS
from imagegen.web.api.schemas import WebhookEvent
from imagegen.web.openapi import samples
from imagegen.web.openapi.document import Body, Operation, Parameter, ResponseDoc

_TEXT = {"type": "string"}

_WEBHOOK_HEADERS = (
    Parameter(
        "webhook-id",
        "header",
        "The same on every try, so that repeats can be ignored.",
        _TEXT,
        required=True,
        example=f"msg_{samples.TASK_ID}",
    ),
    Parameter("webhook-timestamp", "header", "Unix time of this try.", _TEXT, required=True, example="1767225604"),
    Parameter(
        "webhook-signature",
        "header",
        "`v1,` and the base64 HMAC-SHA256 of `id.timestamp.body` by the secret of the webhook, else by "
        "`WEBHOOK_SECRET`. Absent without a secret. Any Standard Webhooks library verifies it.",
        _TEXT,
        example="v1,K5oZfzN95Z9UVu1EsfQmfVNQhnkZ2pj9o9NDN/H/pI4=",
    ),
)
_WEBHOOK_RESPONSES = (
    ResponseDoc(200, "Delivered, as is every 2xx that comes within 10 s."),
    ResponseDoc(410, "Gone: it is not tried again."),
)
_WEBHOOK_TEXT = (
    "Sent when the task ended, to every webhook of its submits; immediately if it was finished already. "
    "Any other response than 2xx and 410 is tried again after 5 s, 30 s, 2 min, 10 min and 1 h, over restarts too; "
    "redirects are not followed. The address must be public and `https`, and not this service's own. Destinations "
    "(scheme, host, port and the path's first segment) do not wait for each other; a slow or failing one is called "
    "less often. A retry calls only the webhooks of its own client. A task has at most "
    f"{MAX_WEBHOOKS} webhooks; `webhook` of the task shows the state of each."
)


def _webhook(state: State) -> Operation:
    return Operation(
        "post",
        f"image.{state}",
        f"onImage{state.title()}",
        "Webhooks",
        f"A task is {state}",
        _WEBHOOK_TEXT,
        _WEBHOOK_RESPONSES,
        _WEBHOOK_HEADERS,
        Body(WebhookEvent, {state.value: samples.hook_event(state)}),
        envelope="none",
        needs="none",
    )


WEBHOOKS = tuple(_webhook(state) for state in State if state.is_final)
