"""Decision whether a failed call is repeated at once by another channel or key: only if it was certainly not paid."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from imagegen.errors import UpstreamError
from imagegen.tasks.retry import was_never_sent
from imagegen.worker.key_health import KEY_REFUSALS, LIMITED, NO_MODEL
from imagegen.worker.permits import Choice, Permit

_ACCOUNT_CODES = (LIMITED, *KEY_REFUSALS)
_OPERATOR_CODES = ("upstream_billing", "upstream_auth", NO_MODEL)
"""Task error codes of causes that the operator can repair, the most important first."""

_CONFLICT = 409


def without_tried(choice: Choice, permit: Permit, error: UpstreamError, *, has_job: bool) -> Choice | None:
    """Return the choice that is left after a failed call; None if the call must not go to another channel or key.

    A lost response, an accepted job and a refusal of the request itself are never taken elsewhere, but for a job that
    ended because the account or the channel was refused, such as by the vendor behind a relay.
    """
    if error.ambiguous or error.charged or (has_job and not is_refusal_of_channel(error)):
        return None
    if key := _refused_key(permit, error):
        refused = choice.refused | {key} if error.code in KEY_REFUSALS else choice.refused
        return replace(choice, keys=choice.keys | {key}, refused=refused)
    status = error.status or 0
    failed = error.code == "upstream_error" and (status >= 500 or 200 <= status < 300)  # a 200 may hold an error object
    is_fault = failed or status == _CONFLICT or 300 <= status < 400
    is_refusal = error.of_channel or error.code == "upstream_overloaded"
    if was_never_sent(error) or error.partly_sent or is_fault or is_refusal:
        return replace(choice, channels=choice.channels | {permit.route.channel.name})
    return None


def _refused_key(permit: Permit, error: UpstreamError) -> str | None:
    """Return the key that refused the call, None if its channel did.

    A model is missing at a key in one channel alone: another channel may have the same key, and the model by another
    name.
    """
    if error.code == NO_MODEL:
        return permit.route.place
    return permit.route.account if error.code in _ACCOUNT_CODES else None


def without_refusing(choice: Choice, permit: Permit, error: UpstreamError) -> Choice:
    """Return the choice of all but the keys or the channel that refused, also of others that this call has tried."""
    if key := _refused_key(permit, error):
        return replace(choice, channels=frozenset(), keys=choice.refused | {key})
    return replace(choice, channels=frozenset({permit.route.channel.name}), keys=choice.refused)


def is_refusal_of_channel(error: UpstreamError) -> bool:
    """Return whether a key or a channel refuses such calls for any prompt, until the operator acts."""
    return error.of_channel or error.code in _OPERATOR_CODES


def error_for_client(refusals: Sequence[UpstreamError], last: UpstreamError) -> UpstreamError:
    """Return the error that the client reads when the last channel fails too, after the refusals of others.

    The last error is returned if it is about the request itself, or may pass. Otherwise a cause that the operator can
    repair comes first, then the first refusal.
    """
    if last.retryable or not is_refusal_of_channel(last):
        return last
    rank = {code: index for index, code in enumerate(_OPERATOR_CODES)}
    return min((*refusals, last), key=lambda error: rank.get(error.code, len(rank)))
