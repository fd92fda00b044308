"""Bucket of the settings, and the client of botocore for it."""

from __future__ import annotations

from typing import Any

from msgspec import Struct


class Bucket(Struct, frozen=True):
    """Address and credentials of a bucket. endpoint: None at AWS itself; prefix: of every object, without a slash."""

    name: str
    access_key_id: str
    secret_access_key: str
    endpoint: str | None = None
    region: str | None = None
    prefix: str = "imagegen"

    def __repr__(self) -> str:
        return f"Bucket({self.name!r})"


def follow_no_redirect(context: dict[str, Any], **_: object) -> None:
    """Keep botocore from following a redirect of the call by which it looks up the region of a redirected bucket.

    A service that redirects this call too would get the same call again and again.
    """
    context.setdefault("s3_redirect", {})["redirected"] = True


def client_options(bucket: Bucket) -> dict[str, Any]:
    """Return path-style addresses and no checksums of AWS's own, since other services may lack the rest.

    Bodies are not part of the signature, which would hash them in the loop's thread; a Content-MD5 protects them.
    """
    from aiobotocore.config import AioConfig  # noqa: PLC0415

    return {
        "endpoint_url": bucket.endpoint,
        "region_name": bucket.region or "us-east-1",
        "aws_access_key_id": bucket.access_key_id,
        "aws_secret_access_key": bucket.secret_access_key,
        "config": AioConfig(
            connect_timeout=3,
            read_timeout=10,
            max_pool_connections=20,
            retries={"mode": "standard", "total_max_attempts": 3},
            s3={"addressing_style": "path" if bucket.endpoint else "auto", "payload_signing_enabled": False},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            ignore_configured_endpoint_urls=True,
        ),
    }
