"""Python client of the service, asynchronous and synchronous.

    with ImageClient("http://127.0.0.1:3000", api_key="ig_...") as client:
        task = client.generate("a red fox in the snow", n=2)
        for image in task.images:
            client.save(image, f"fox-{image.index}.png")

`AsyncImageClient` has the same methods as coroutines. Each submit has an Idempotency-Key, so a repeat after a lost
answer never pays twice. It needs httpx, as the extra `client` of this package has it.
"""

try:
    from imagegen.client.async_client import AsyncImageClient
    from imagegen.client.sync_client import ImageClient
except ModuleNotFoundError as error:
    if error.name != "httpx":
        raise
    raise ModuleNotFoundError("imagegen.client needs httpx: pip install httpx", name="httpx") from error
from imagegen.client.exceptions import (
    AuthenticationFailed,
    BudgetUsedUp,
    ClientError,
    ConnectionFailed,
    DownloadBroken,
    RequestConflict,
    RequestRefused,
    ResourceNotFound,
    ResponseError,
    ServiceUnavailable,
    TaskUnsuccessful,
    TooManyRequests,
    WaitTimeout,
    WebhookRejected,
)
from imagegen.client.exchange import RepeatPolicy
from imagegen.client.results import (
    FieldFault,
    ImageTask,
    SubmitReceipt,
    TaskCost,
    TaskEvent,
    TaskFault,
    TaskImage,
    UploadReceipt,
)
from imagegen.client.submit_fields import SubmitFields, WebhookField
from imagegen.client.webhook_verifier import WebhookEvent, WebhookVerifier

__all__ = [
    "AsyncImageClient",
    "AuthenticationFailed",
    "BudgetUsedUp",
    "ClientError",
    "ConnectionFailed",
    "DownloadBroken",
    "FieldFault",
    "ImageClient",
    "ImageTask",
    "RepeatPolicy",
    "RequestConflict",
    "RequestRefused",
    "ResourceNotFound",
    "ResponseError",
    "ServiceUnavailable",
    "SubmitFields",
    "SubmitReceipt",
    "TaskCost",
    "TaskEvent",
    "TaskFault",
    "TaskImage",
    "TaskUnsuccessful",
    "TooManyRequests",
    "UploadReceipt",
    "WaitTimeout",
    "WebhookEvent",
    "WebhookField",
    "WebhookRejected",
    "WebhookVerifier",
]
