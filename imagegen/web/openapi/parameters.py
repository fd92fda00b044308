"""Parameters, headers, parts of bodies and errors that routes share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from imagegen.accounts.api_keys import NAME
from imagegen.errors import (
    BudgetExceeded,
    Draining,
    ImageTooLarge,
    MaxCostExceeded,
    NotAllowed,
    PriceUnknown,
    QueueFull,
    QueueUnavailable,
    StoreUnavailable,
    TooManyOpenTasks,
    UnsupportedImage,
    UploadNotFound,
)
from imagegen.images.thumbnails import SIZES
from imagegen.tasks.validation import ModelId
from imagegen.web.api.events import MAX_TASKS
from imagegen.web.api.tasks import MAX_WAIT_S
from imagegen.web.max_cost import MaxCost
from imagegen.web.openapi import samples
from imagegen.web.openapi.document import Parameter

_TEXT = {"type": "string"}
_NUMBER = {"type": "string", "pattern": "^[0-9]+$"}

SUBMIT_ERRORS = (NotAllowed, PriceUnknown, TooManyOpenTasks, QueueUnavailable, QueueFull, Draining, StoreUnavailable)
MONEY_ERRORS = (BudgetExceeded, MaxCostExceeded)
INPUT_ERRORS = (UploadNotFound, ImageTooLarge, UnsupportedImage)
FILE_BYTES = {"type": "string", "format": "binary", "description": "The bytes of the file."}
"""`format: binary` is of OpenAPI 3.0, and what generators of clients understand."""

ModelField = Annotated[ModelId, Field(description="Any model id of the provider; `DEFAULT_MODEL` if absent.")]
MaxCostField = Annotated[MaxCost, Field(examples=[0.05])]

TASK = Parameter(
    "taskId",
    "path",
    "The `taskId` of a POST. An unknown or malformed id is a 404.",
    {"type": "string", "pattern": "^[0-9a-f]{32}$"},
    required=True,
    example=samples.TASK_ID,
)
INDEX = Parameter(
    "index", "path", "The image's place in the task.", {"type": "integer", "minimum": 0}, required=True, example=0
)
MODEL = Parameter(
    "modelId",
    "path",
    "The model's id; its slashes may stay as they are.",
    _TEXT | {"minLength": 1},
    required=True,
    example="black-forest-labs/FLUX.1-schnell",
)
FILE = Parameter("file", "path", "Name of a file of the page.", _TEXT, required=True, example="docs.css")
ASSETS_VERSION = Parameter(
    "version", "path", "Version of all files, as the page names it.", _TEXT, required=True, example="0123456789ab"
)
KEY_NAME = Parameter(
    "name",
    "path",
    "Name of an API key.",
    {"type": "string", "pattern": f"^{NAME.pattern}$"},
    required=True,
    example="web",
)
TASKS = Parameter(
    "tasks",
    "query",
    f"1 to {MAX_TASKS} task ids with commas between.",
    _TEXT | {"minLength": 1},
    required=True,
    example=samples.TASK_ID,
)
WAIT = Parameter(
    "wait",
    "query",
    f"Respond when the task is finished, or after this number of seconds: 1 to {MAX_WAIT_S}. Earlier, with the present "
    "state, if the service stops or all its connections are taken.",
    {"type": "integer", "minimum": 1, "maximum": MAX_WAIT_S},
    example=30,
)
VERSION = Parameter(
    "v",
    "query",
    "The first 12 digits of the bytes' SHA-256: with it the answer may be cached.",
    _TEXT,
    example="3c1e0a7d5b2f",
)
EXPIRY = Parameter(
    "exp",
    "query",
    "When the signed link expires, in Unix seconds. With `sig` no key is needed. Of several tasks: of each one, with "
    "commas between.",
    _TEXT,
    example="1767312000",
)
SIGNATURE = Parameter(
    "sig",
    "query",
    "The signature of the link, as `url` and `eventsUrl` have it.",
    _TEXT,
    example="q2wY8d5vJ0u3bXc1kQ7mZg",
)
SIZE = Parameter(
    "size",
    "query",
    "A thumbnail in place of the image: a WebP with at most this number of pixels on its longer side, never enlarged.",
    {"type": "integer", "enum": list(SIZES)},
    example=256,
)
FORCE = Parameter(
    "force",
    "query",
    "With the admin token: cancels for all clients that joined.",
    {"type": "boolean", "default": False},
    example=True,
)
PREFER = Parameter(
    "Prefer",
    "header",
    f"`wait=N` is the same as `?wait=N` (RFC 7240); more than {MAX_WAIT_S} is cut. A malformed preference is ignored.",
    _TEXT,
    example="wait=30",
)
PREFER_ASYNC = Parameter(
    "Prefer",
    "header",
    "`respond-async` requests 202 and a link in place of the images; `wait=N` waits N seconds first.",
    _TEXT,
    example="respond-async",
)
READ_TIMEOUT = Parameter(
    "x-stainless-read-timeout",
    "header",
    "Read timeout that the SDKs of OpenAI and Together send; the response comes a tenth earlier, within 90 s.",
    _TEXT,
    example="60",
)
RETRY_COUNT = Parameter(
    "x-stainless-retry-count",
    "header",
    "Number of the repeat that the SDKs of OpenAI and Together send; above 0, the call joins the call that it repeats.",
    _TEXT,
    example="0",
)
IDEMPOTENCY_KEY = Parameter(
    "Idempotency-Key",
    "header",
    "1 to 255 visible ASCII characters, kept 24 hours for each client. A repeat with the same body gets the first "
    "answer's task and pays nothing, also with `no-cache`; with another body it is a 422. A refused body leaves the "
    "key unused.",
    {"type": "string", "pattern": "^[!-~]{1,255}$"},
    example="order-4711",
)
CACHE_CONTROL = Parameter(
    "Cache-Control",
    "header",
    "`no-cache` requests fresh images under the same id; further requests join the running task. The old "
    "images stay in `data` with `stale:true` until the new ones are stored, and remain if the fresh run fails. Where "
    "keys share their tasks, the fresh images have an id of their own, and only this client sees them.",
    _TEXT,
    example="no-cache",
)
IF_NONE_MATCH = Parameter(
    "If-None-Match",
    "header",
    "An `ETag` that the client has: 304 if nothing changed.",
    _TEXT,
    example='"1767225600000000"',
)
LAST_EVENT_ID = Parameter(
    "Last-Event-ID",
    "header",
    "The id of the last event that was received. Nothing that changed since is missed, after a restart or on another "
    "instance too.",
    _TEXT,
    example="1767225600000000",
)
RANGE = Parameter("Range", "header", "One range of bytes.", _TEXT, example="bytes=0-1023")
IF_MATCH = Parameter(
    "If-Match", "header", "An `ETag`: with another one the answer is 412.", _TEXT, example='"3c1e0a7d5b2f"'
)
IF_RANGE = Parameter(
    "If-Range", "header", "An `ETag`: with another one the whole image comes.", _TEXT, example='"3c1e0a7d5b2f"'
)
LANGUAGE = Parameter(
    "Accept-Language",
    "header",
    "Language of texts for people: Chinese, or English if it is preferred.",
    _TEXT,
    example="en",
)

HEADERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "X-Request-Id": ("Id of the request: the client's own if it is harmless, else a new one.", _TEXT),
    "Location": ("Address of the task or page.", _TEXT),
    "Retry-After": ("Seconds until the next request is useful.", _NUMBER),
    "ETag": ("The version of the content; that of a task is its sequence.", _TEXT),
    "Cache-Control": ("How long this may be cached.", _TEXT),
    "Preference-Applied": ("The preference that was applied.", _TEXT),
    "X-Cache": (
        "`MISS`: a new task. `COALESCED`: joined. `HIT`: completed before. `REFRESH`: made again.",
        {"type": "string", "enum": ["MISS", "COALESCED", "HIT", "REFRESH"]},
    ),
    "RateLimit-Policy": ("The limits that count here, by name.", _TEXT),
    "RateLimit": ("The rest of each limit, and the seconds until some of it is free again.", _TEXT),
    "X-RateLimit-Limit": ("Of the tightest limit.", _NUMBER),
    "X-RateLimit-Remaining": ("The rest of it.", _NUMBER),
    "X-RateLimit-Reset": ("Seconds until some of it is free again.", _NUMBER),
    "WWW-Authenticate": ("`Bearer`.", _TEXT),
    "Accept-Ranges": ("`bytes`.", _TEXT),
    "Content-Range": ("Which bytes these are, and of how many.", _TEXT),
    "Content-Disposition": ("A file name.", _TEXT),
    "x-should-retry": ("`false` if a repeat can't help.", {"type": "string", "enum": ["false"]}),
}
