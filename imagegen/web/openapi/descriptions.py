"""Introduction and tags of the OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping

INTRODUCTION = """\
POST a prompt, get the id of a task at once, fetch the images when they are ready. An image is paid for once, and \
an accepted task is never lost.

```sh
curl -s $BASE/api/images/generate -H 'Content-Type: application/json' -d '{"prompt": "a lighthouse in a storm"}'
curl -s "$BASE/api/images/$TASK_ID?wait=60"
```

**States.** `pending` → `processing` → `completed`, `failed` or `cancelled`. `pending` is also the wait before another \
attempt; `reason` and `retryAt` show why and until when; `store_unavailable` means that images can't be saved now. \
A finished task is stored for `RESULT_TTL` seconds (a day), its images with it.

**Ids.** A `taskId` is the MD5 of the canonical request (an HMAC where the operator set a secret), so the same request \
is the same task: it is joined while it runs, and its result is returned when it is done. With API keys, each key \
has its own tasks unless `CACHE_SCOPE=shared`. **A client that cancels a task leaves it** while others joined it, and \
the last one's cancel ends it.

**Sequence.** Every response about a task has a `sequence`. It rises with each change, over crashes, restarts and \
resubmissions too, and is not dense. Of two responses, the higher sequence is newer.

**Progress** rises when something happened, never by a timer. `queuePosition` and `etaSeconds` are null \
without an estimate.

**Do not poll blindly.** Wait by `Prefer: wait=N` or `?wait=N`, follow an event stream, or set a webhook. An \
unfinished task has `Retry-After` with the seconds until the next request.

**Limits** are kept for each client in a moving window. Every call under `/api` and `/v1` counts as one against the \
general limit, and one that may start a generation against a second limit too; a wait and an event stream count once, \
however long they take. A generation also spends a unit for each 512 x 512 pixels of its images. Images, health, \
metrics and pages count against none, but a request for an image that does not exist does. `RateLimit` shows the rest \
of each limit, `Retry-After` of a 429 the seconds to wait.

**Errors** under `/api` all look like `Error`: `code` is for programs and never changes, `message` is for people. \
Every answer has an `X-Request-Id`; send your own (letters, digits, `.`, `_`, `-`, at most 64) to find it again. \
Malformed HTTP gets a 400 or 431, an unknown route a 404 `route_not_found`, a wrong method a 405 \
`method_not_allowed` with `Allow`. Every GET route but event streams takes HEAD too.

**Web pages** of the operator's `CORS_ORIGINS` may use every route but the operator's. A page of another site gets a \
403 `cross_site` for each request that changes something.

**Warning of a second bill.** If a call to the provider was sent and no response came, or only a gateway's \
(a time-out, a closed connection), it may have been paid for. It is repeated at most once, and the task counts such \
calls in `possiblyBilledTwice`. A call that is made again because its answer held no usable image counts there too.
"""

TAGS: Mapping[str, str] = {
    "Submit": "Request images, and upload images to start from.",
    "Follow": "Read, wait for or watch a task, and get its images.",
    "Change": "Cancel a task or try it again.",
    "Models": "Limits, prices and ends of models.",
    "OpenAI and Together": "Drop-in routes for the clients of OpenAI and Together, on the same queue.",
    "Agents": "Tools of the Model Context Protocol.",
    "Webhooks": "What this service sends to a request's `webhook`, after the Standard Webhooks specification.",
    "API keys": "Keys of clients, which the admin makes and revokes.",
    "Board": "The page for the operator at `/board`, its data, and the pause of claiming.",
    "Operate": "For the operator.",
    "Pages": "The studio, and this document.",
    "OpenAI and Together, other bases": "The same routes under the other bases that client versions use.",
}
