"""Provider jobs: asynchronous jobs of an upstream that a paid call has begun, and that can be polled by their id."""

from __future__ import annotations

import hashlib

from msgspec import Struct

from imagegen.tasks.image import GivenImage, ImageLink


class FailedPolls(Struct, frozen=True, gc=False, omit_defaults=True):
    """The last polls of a job in sequence if they failed. Times are Unix times.

    count, since: of all of them. useless, useless_since: of the last ones, which had an answer that no repeat changes,
    such as an HTML page or a refusal of the key.
    """

    count: int = 0
    since: float = 0.0
    useless: int = 0
    useless_since: float = 0.0


NO_FAILED_POLLS = FailedPolls()


class JobHandle(Struct, frozen=True, gc=False, omit_defaults=True):
    """Data with which each process can collect the result of a provider job.

    provider: name of the provider. channel: name of the channel that made the job, empty if it has none.
    account: fingerprint of the key that the job belongs to.
    poll_url, result_url, cancel_url: by the upstream; empty if it gave none that may be used.
    accepted_at, expires_at: Unix time; after the second one the upstream may have forgotten the job.
    cost_micro_usd: the price that the upstream named when it accepted the job, in millionths of a US dollar.
    warnings: about fields of the request that were not sent as given.
    failed_polls: where the polls were left, so that another attempt or process goes on from there.
    """

    provider: str
    id: str
    account: str = ""
    poll_url: str = ""
    accepted_at: float = 0.0
    expires_at: float | None = None
    channel: str = ""
    result_url: str = ""
    cancel_url: str = ""
    cost_micro_usd: int | None = None
    warnings: tuple[str, ...] = ()
    failed_polls: FailedPolls = NO_FAILED_POLLS


class AcceptedJob(Struct, frozen=True, gc=False, omit_defaults=True):
    """A provider job that is not collected yet, as a checkpoint carries it.

    indexes: places of its images in the task. seed: that was sent. model: that was called.
    renewals: how often it was polled again for fresh links after its end. dead_links: those that it had before.
    """

    handle: JobHandle
    indexes: tuple[int, ...]
    seed: int | None = None
    model: str = ""
    renewals: int = 0
    dead_links: tuple[str, ...] = ()

    def had_link(self, image: GivenImage) -> bool:
        """Return whether an image of a later poll has a link that died before."""
        return isinstance(image, ImageLink) and image.url in self.dead_links


class SentCall(Struct, frozen=True, gc=False, omit_defaults=True):
    """A call without a result yet, as a checkpoint carries it from before the call on.

    indexes: places of its images in the task. seed, model: that were sent. sent_at: Unix time just before it.
    price: what the cost of the task has in `calling` meanwhile.
    """

    indexes: tuple[int, ...]
    seed: int | None = None
    model: str = ""
    sent_at: float = 0.0
    price: int = 0


def key_fingerprint(address: str, secret: str) -> str:
    """Return a short hash of an upstream's address and a key for it; it names the key and does not disclose it."""
    return hashlib.sha256(f"{address} {secret}".encode()).hexdigest()[:16]
