"""Statuses of gateways between this service and a provider, by whether the provider may have run the call. No I/O."""

from __future__ import annotations

import re

NEVER_REACHED = frozenset({521, 523, 525, 526, 530})
"""Cloudflare found no origin: connection refused, no route, TLS handshake, certificate, no DNS record or tunnel. The
request was never passed on, so nothing was paid.
https://developers.cloudflare.com/support/troubleshooting/http-status-codes/cloudflare-5xx-errors/"""

GAVE_UP_WAITING = frozenset({408, 460, 499, 504, 520, 522, 524, 527, 598, 599})
"""A gateway passed the request on, or may have, and then stopped waiting or got no usable answer; the origin may have
made the image and charged for it. None of them comes from the origin's own application.

408, 504, 598, 599: a gateway's time-outs (https://www.rfc-editor.org/rfc/rfc9110#name-504-gateway-timeout; the last two
of Microsoft's and other proxies). 499, 460: nginx and AWS' load balancer closed "for the client", a gateway between us
and the origin. 520, 524, 527: Cloudflare passed it on and got an empty answer, none in time, or lost the tunnel. 522:
no connection *or* no acknowledgement within 90 s of a request that was sent (the page above). 500, 503 and 529 are not
among them: an application answered, and refused or failed."""

_UNSURE_GATEWAY = 502
"""A gateway got an invalid answer, nginx' also if the origin's process died in the middle of its work. A service's own
application sends it too, with its error object: that one is an answer."""

_ENVOY_RESET = re.compile(r"disconnect/reset before headers", re.IGNORECASE)
_ENVOY_NOT_SENT = re.compile(r"reset reason: (?:remote )?(?:connection failure|overflow)", re.IGNORECASE)
"""Envoy's 503 for a connection that was lost after the request was sent, unless its reason is that it never was:
https://www.envoyproxy.io/docs/envoy/latest/faq/debugging/why_is_envoy_sending_internal_responses"""


def may_have_run(status: int, body: bytes | bytearray, *, is_own_error: bool) -> bool:
    """Return whether a call that got this answer may have been paid for all the same.

    is_own_error: the answer is the service's own error object, not a page or a text of a gateway.
    """
    if status in GAVE_UP_WAITING:
        return True
    if status == _UNSURE_GATEWAY:
        return not is_own_error
    text = body[:2_000].decode(errors="replace") if status == 503 and not is_own_error else ""
    return bool(_ENVOY_RESET.search(text)) and not _ENVOY_NOT_SENT.search(text)
