"""The operator's webhook secret, and for which receivers it signs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from yarl import URL

from imagegen.errors import FieldError, InvalidRequest
from imagegen.tasks.webhook import Webhook


@dataclass(frozen=True, slots=True)
class OperatorSecret:
    """Secret of webhooks without their own. It vouches for this service, so not every client may choose the receiver.

    secret: None if the operator has none; then nothing is signed but by a webhook's own.
    hosts: that it signs for; none given: all, while no client has a key.
    has_keys: returns whether there are API keys.
    """

    secret: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] = ()
    has_keys: Callable[[], bool] = lambda: False

    def for_url(self, url: URL) -> str | None:
        """Return the secret if it signs for this receiver."""
        if self.hosts:
            host = (url.host_subcomponent or "").rstrip(".").lower()
            return self.secret if host in self.hosts else None
        return None if self.has_keys() else self.secret

    def check(self, webhook: Webhook) -> None:
        """Raise InvalidRequest if nothing would sign this webhook."""
        if self.secret is None or webhook.secret is not None or self.for_url(URL(webhook.url)) is not None:
            return
        rule = "is required: WEBHOOK_SECRET does not sign for this host; the operator names hosts in WEBHOOK_SIGN_HOSTS"
        raise InvalidRequest(details=[FieldError("webhook.secret", rule)])
