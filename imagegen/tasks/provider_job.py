"""Provider jobs: asynchronous jobs of an upstream that a paid call has begun, and that can be polled by their id."""

from __future__ import annotations

from msgspec import Struct


class JobHandle(Struct, frozen=True, gc=False, omit_defaults=True):
    """Data with which each process can collect the result of a provider job.

    provider: name of the provider. account: hash of the address and the key that the job belongs to.
    poll_url: the address to poll, empty if the upstream gave none that may be used.
    accepted_at, expires_at: Unix time; after the second one the upstream may have forgotten the job.
    """

    provider: str
    id: str
    account: str = ""
    poll_url: str = ""
    accepted_at: float = 0.0
    expires_at: float | None = None


class AcceptedJob(Struct, frozen=True, gc=False, omit_defaults=True):
    """A provider job that is not collected yet, as a checkpoint carries it.

    indexes: places of its images in the task. seed: that was sent. model: that was called.
    """

    handle: JobHandle
    indexes: tuple[int, ...]
    seed: int | None = None
    model: str = ""
