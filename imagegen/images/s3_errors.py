"""Errors of S3 services: which of them show a missing object, which may pass, and what the operator can change."""

from __future__ import annotations

from typing import Any

NO_OBJECT = frozenset({"NoSuchKey"})
"""Codes of a missing object. Any other 404 is that of a bucket, or of something else than the service, as a proxy."""

NO_OBJECT_OF_HEAD = NO_OBJECT | {"404"}
"""The response to a HEAD has no body, so it has no code."""

_PASSING = {408, 425, 429}
_PASSING_CODES = {"OperationAborted", "RequestTimeTooSkewed", "RequestTimeout"}

_ADVICE = {
    "NoSuchBucket": "S3_BUCKET, S3_ENDPOINT: there is no such bucket",
    "InvalidBucketName": "S3_BUCKET: the service accepts no such name",
    "InvalidAccessKeyId": "S3_ACCESS_KEY_ID: the service does not know this key",
    "SignatureDoesNotMatch": "S3_SECRET_ACCESS_KEY: it does not belong to S3_ACCESS_KEY_ID",
    "AccessDenied": "S3_ACCESS_KEY_ID: this key lacks a right; it has to list, read, write and delete",
    "AuthorizationHeaderMalformed": "S3_REGION: it is not the region of the bucket",
    "PermanentRedirect": "S3_REGION, S3_ENDPOINT: the bucket is elsewhere",
    "ExpiredToken": "S3_ACCESS_KEY_ID: this key is a temporary one that has ended",
    "RequestTimeTooSkewed": "the clocks of this machine and of the service differ too much",
}
_UNKNOWN = "S3_ENDPOINT, S3_BUCKET: the service refuses us"


_PATH_ADVICE = "S3_ENDPOINT: it has a path, such as the name of the bucket; name the host alone"
"""Of a listing that is refused with the code of an object: its address is that of an object then."""


class BucketRefusal(Exception):
    """Refusal of a request, with what the operator has to change if that is clear.

    error: a `ClientError` of botocore. with_advice: the text for a start that ends.
    """

    def __init__(self, error: Any) -> None:
        advice = _advice_for(error)
        super().__init__(f"{advice} ({error})" if advice else str(error))
        self.with_advice = f"{advice or _UNKNOWN} ({error})"


def _advice_for(error: Any) -> str | None:
    code = code_of(error)
    if code in NO_OBJECT and error.operation_name.startswith("List"):
        return _PATH_ADVICE
    return _ADVICE.get(code)


def may_pass(error: Any) -> bool:
    """Return whether a refusal may be over soon, as that of a proxy, which names no code."""
    status, code = _status_of(error), code_of(error)
    return status >= 500 or status in _PASSING or code in _PASSING_CODES or code == str(status)


def code_of(error: Any) -> str:
    """Return the code of an error; its status if the response had none."""
    return str(error.response.get("Error", {}).get("Code", ""))


def _status_of(error: Any) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
