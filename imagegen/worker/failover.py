"""Decision whether a failed call is repeated at once by another channel or key: only if it was certainly not paid."""

from __future__ import annotations

from msgspec.structs import replace

from imagegen.errors import UpstreamError
from imagegen.tasks.retry import was_never_sent
from imagegen.worker.key_health import KEY_REFUSALS, LIMITED, NO_MODEL
from imagegen.worker.permits import Choice, Permit

_CHANNEL_CODES = ("upstream_overloaded", NO_MODEL)
_CONFLICT = 409


def without_tried(choice: Choice, permit: Permit, error: UpstreamError, *, has_job: bool) -> Choice | None:
    """Return the choice that is left after a failed call; None if the call must not go to another channel or key.

    A lost response, an accepted job and a refusal of the request itself are never taken elsewhere.
    """
    if has_job or error.ambiguous or error.charged:
        return None
    if error.code == LIMITED or error.code in KEY_REFUSALS:
        return replace(choice, keys=choice.keys | {permit.route.account})
    status = error.status or 0
    failed = error.code == "upstream_error" and (status >= 500 or 200 <= status < 300)  # a 200 may hold an error object
    is_fault = failed or status == _CONFLICT or 300 <= status < 400
    if was_never_sent(error) or error.partly_sent or is_fault or error.code in _CHANNEL_CODES:
        return replace(choice, channels=choice.channels | {permit.route.channel.name})
    return None
