"""Owns what is said of webhooks: requests that this service sends."""

from __future__ import annotations

from imagegen.tasks.task import State
from imagegen.tasks.webhook import MAX_WEBHOOKS
from imagegen.web.api.schemas import WebhookEvent
from imagegen.web.openapi import samples
from imagegen.web.openapi.parts import Body, Operation, Parameter, ResponseDoc

_TEXT = {"type": "string"}

_HEADERS = (
    Parameter(
        "webhook-id", "header", "The same on every try: what was seen before may be passed over.", _TEXT, required=True
    ),
    Parameter("webhook-timestamp", "header", "Unix time of this try.", _TEXT, required=True, example="1767225604"),
    Parameter(
        "webhook-signature",
        "header",
        "`v1,` and the base64 HMAC-SHA256 of `id.timestamp.body` by the secret of the webhook, else by "
        "`WEBHOOK_SECRET`. Absent where there is neither. Any Standard Webhooks library verifies it.",
        _TEXT,
    ),
)
_ANSWERS = (
    ResponseDoc(200, "Delivered, as is every 2xx that comes within 10 s."),
    ResponseDoc(410, "Gone: it is not tried again."),
)
_DESCRIPTION = (
    "Sent when the task ended, to every webhook that a submit brought along; at once where it was finished already. "
    "Any other answer than 2xx and 410 is tried again after 5 s, 30 s, 2 min, 10 min and 1 h, over restarts too; "
    "redirects are not followed. The address must be public and `https`, and not this service's own. Destinations "
    "(scheme, host, port and the path's first segment) do not wait for each other; one that is slow or fails is called "
    "less often. A retry calls only the webhooks of the client that asks for it. A task has at most "
    f"{MAX_WEBHOOKS} webhooks; how far each is, is in `webhook` of the task."
)


def _hook(state: State) -> Operation:
    return Operation(
        "post",
        f"image.{state}",
        f"onImage{state.title()}",
        "Webhooks",
        f"A task is {state}",
        _DESCRIPTION,
        _ANSWERS,
        _HEADERS,
        Body(WebhookEvent, {state.value: samples.hook_event(state)}),
        envelope="none",
    )


HOOKS = tuple(_hook(state) for state in State if state.is_final)
