"""Descriptions and examples of properties: learned from the examples of operations, else from the tables here.

A property's own `Field(description=..., examples=[...])` comes first. The tables have what many types share, by the
property's name, and what one type has, by `Type.name`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from imagegen.web.openapi.document import Json

_MAX_EXAMPLE_BYTES = 800
"""Of a property: a whole task in a list of tasks shows no more than the example of the operation."""

_MAX_ENTRIES = 2
"""Of a list in an example of a property."""

DESCRIPTIONS: Mapping[str, str] = {
    "success": "`true`; `false` in an error.",
    "status": "State of the task.",
    "model": "Id of the model.",
    "url": "Address of the image.",
    "index": "Place in the task, from 0.",
    "contentType": "Media type of the bytes.",
    "bytes": "Size in bytes.",
    "width": "Pixels.",
    "height": "Pixels.",
    "sha256": "SHA-256 of the bytes, hexadecimal.",
    "attempts": "Attempts so far, counted from 1.",
    "maxAttempts": "After this number of attempts the task fails.",
    "statusUrl": "GET it to read the task.",
    "eventsUrl": "GET it to follow the task by server-sent events.",
    "status_url": "GET it to read the task.",
    "events_url": "GET it to follow the task by server-sent events.",
    "poll_url": "GET it to read the task.",
    "statusCode": "The HTTP status.",
    "code": "For programs: it never changes.",
    "details": "Every fault of the request, at most 50.",
    "message": "For people.",
    "webhook": "State of the delivery to each webhook of this client.",
    "cached": "The same request was completed before.",
    "currency": "US dollars.",
    "object": "Type of the object, as in OpenAI's API.",
    "type": "Form of the image, or kind of the entry.",
    "timestamp": "When this was written, RFC 3339 in UTC.",
    "limit": "The upper limit.",
    "completed": "Tasks that were completed.",
    "failed": "Tasks that failed.",
    "cancelled": "Tasks that were cancelled.",
    "quality": "The quality, as the model names it.",
    "background": "`transparent` or `opaque`, or as the model names it.",
    "moderation": "Strictness of the provider's own check, as the model names it.",
    "style": "The style, as the model names it.",
    "negativePrompt": "What not to draw.",
    "guidanceScale": "How closely the image follows the prompt.",
    "outputFormat": "File format of the images.",
    "inputFidelity": "How closely an edit keeps to its input images, as the model names it.",
    "disableSafetyChecker": "Request that the provider does not check the images.",
    "promptUpsampling": "Let the provider rewrite the prompt.",
    "imageLoras": "Adapter weights, at most 8.",
    "name": "Name of the API key.",
    "secret": "The key itself, shown this once.",
    "id": "Id of the model.",
    "data": "The entries.",
    "retryAfterSeconds": "Seconds until the next request is useful.",
    "b64_json": "The bytes in base64.",
    "revised_prompt": "The prompt as the provider rewrote it.",
    "size": "`WIDTHxHEIGHT`.",
    "output_format": "File format of the images.",
    "response_format": "`url` for links, `b64_json` or `base64` for the bytes.",
    "owned_by": "Who makes the model.",
    "text_tokens": "Tokens of text.",
    "image_tokens": "Tokens of images.",
    "input_tokens": "Tokens of the prompt and of input images.",
    "output_tokens": "Tokens of the images.",
    "total_tokens": "All tokens.",
    "models": "The models.",
    "keys": "The API keys.",
    "tasks": "The tasks of this page.",
    "by": "What a row is.",
    "rows": "A row for each day, key or model.",
    "results": "The response for each entry, in order.",
    "requests": "The requests.",
    "expires": "Life of the key: `90d`, `24h`, `30m`, or seconds; absent: without an end.",
    "grace": "Life of the earlier secrets: `90d`, `24h`, `30m`, or seconds.",
    "path": "Address of the weights.",
    "scale": "Their strength.",
    "provider": "Provider that has the model.",
    "successor": "Model to use after its end.",
    "promptMax": "Characters.",
    "maxPixels": "Width times height, at most.",
    "maxInputImages": "Input images, at most.",
    "mask": "Whether it takes a mask.",
    "seed": "Whether it takes a seed.",
    "qualities": "Values of `quality`.",
    "default": "Steps if none are given.",
    "images": "The images to start from.",
    "image": "The image to start from, or several.",
    "Image.seed": "The seed that was sent for this image.",
    "Delivery.url": "Scheme and host of the receiver.",
    "Delivery.attempts": "Calls so far.",
    "OpenAIErrorFields.type": "Kind of the error, as in OpenAI's API.",
    "OpenAIEditBody.mask": "Image; its transparent part is to be changed.",
    "WebhookEvent.type": "How the task ended.",
    "Alive.status": "Always `ok`.",
    "Ready.status": "Whether traffic should come.",
    "Ready.causes": "What fails.",
    "Health.message": "Always the same text.",
    "NotFound.status": "Always `not_found`.",
    "BlockedStats.reason": "Why no call is made.",
    "version": "Version of the service.",
    "uptimeSeconds": "Since the start of this process.",
    "budgets": "That of all clients first.",
    "up": "Whether Redis answers.",
    "server": "Name and version of the server program; null if unknown.",
    "progress": "Percent.",
    "spent": "Price of the calls that were sent, in dollars.",
    "saved": "Estimated price of the hits and joins, in dollars.",
    "savedByCache": "Estimated price of the hits, in dollars.",
    "savedByCoalescing": "Estimated price of the joins, in dollars.",
    "submits": "Submits by how they were answered.",
    "oldestAgeSeconds": "Age of the oldest waiting task.",
    "BoardInstance.name": "Host, process id and a random part.",
    "BoardInstance.slots": "Calls at once, at most.",
    "BoardInstance.draining": "It is about to stop.",
    "BoardInstance.storeWritable": "Whether images can be saved.",
    "BoardInstance.providerKeyAccepted": "Whether the provider accepts the key.",
    "BoardTask.errorDetail": "What happened, in words.",
    "BoardTask.images": "Images that are ready.",
    "Today.images": "Images that were generated.",
    "History.stepSeconds": "Seconds of a step.",
    "History.minutes": "The oldest first.",
    "Minute.at": "Unix time of its begin.",
    "Pause.paused": "Whether no task starts.",
    "Span.p50": "The median.",
    "Span.p95": "The 95th percentile.",
    "BudgetStats.left": "The rest.",
    "DeadLetterStats.sinceStart": "Unreadable entries since the start of this process.",
    "DeadLetterStats.kept": "Entries that are kept in Redis.",
    "HttpStats.open": "Requests without a response yet.",
    "HttpStats.byStatus": "Responses since the start, by status.",
    "ImageStats.count": "Images.",
    "ImageStats.bytes": "Bytes of all of them.",
    "InstanceStats.name": "Host, process id and a random part.",
    "InstanceStats.instances": "Processes on the same queue.",
    "InstanceStats.loops": "Background loops by name, with their number.",
    "QueueStats.depth": "Waiting tasks of all instances.",
    "QueueStats.limit": "`MAX_QUEUE`.",
    "QueueStats.inFlight": "Tasks that run here.",
    "QueueStats.retrying": "Tasks that wait here for their next attempt.",
    "QueueStats.loopsFree": "Calls that could start here now.",
    "QueueStats.waiters": "Requests that wait here for the end of a task.",
    "RateStats.windowSeconds": "Seconds that the rates are measured over.",
    "RateStats.submitsPerMinute": "Accepted submits.",
    "RateStats.finishedPerMinute": "Tasks that ended.",
    "RateStats.requestsPerMinute": "HTTP requests.",
    "RateStats.redisCommandsPerMinute": "Commands to Redis.",
    "RedisStats.maxmemoryPolicy": "What Redis does when its memory is full; null if unknown.",
    "RedisStats.warning": "Why this policy loses tasks; null if it does not.",
    "RedisStats.commands": "Commands since the start, by what they were for.",
    "RedisStats.commandsTotal": "Commands since the start.",
    "RedisStats.monthProjected": "Commands a month at the present rate.",
    "TaskStats.pending": "Tasks that wait.",
    "TaskStats.processing": "Tasks that run.",
    "TaskStats.takenOver": "Tasks taken over from instances that died.",
    "UpstreamStats.concurrency": "Calls at once, at most.",
    "UpstreamStats.ratePerMinute": "`UPSTREAM_RATE`; null: no limit.",
    "UpstreamStats.blocked": "Null: the provider may be called.",
    "UpstreamStats.calls": "Calls since the start, by how they ended.",
    "UpstreamStats.ambiguous": "Calls that may have been paid for without an answer.",
}
"""Texts of properties that have none of their own; those of `/v1` count in either spelling."""

EXAMPLES: Mapping[str, Any] = {
    "prompt": "a lighthouse in a storm",
    "model": "black-forest-labs/FLUX.1-schnell",
    "width": 1024,
    "height": 768,
    "n": 2,
    "steps": 4,
    "seed": 7,
    "variant": 1,
    "negativePrompt": "people, text",
    "guidanceScale": 3.5,
    "outputFormat": "png",
    "outputCompression": 80,
    "quality": "high",
    "background": "opaque",
    "moderation": "low",
    "style": "vivid",
    "inputFidelity": "high",
    "disableSafetyChecker": False,
    "promptUpsampling": False,
    "imageLoras": [{"path": "https://example.com/style.safetensors", "scale": 0.8}],
    "imageUrl": "https://example.com/lighthouse.png",
    "referenceImages": ["https://example.com/storm.png"],
    "mask": "https://example.com/mask.png",
    "aspectRatio": "16:9",
    "resolution": "1K",
    "extra": {"watermark": False},
    "secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    "path": "https://example.com/style.safetensors",
    "scale": 0.8,
    "size": "1024x1024",
    "response_format": "url",
    "stream": False,
    "image": "https://example.com/lighthouse.png",
    "events": ["image.completed", "image.failed"],
    "rate": 60,
    "imagesRate": 10,
    "openTasks": 20,
    "maxMegapixels": 4,
    "dailyUsd": 5,
    "retryAfterSeconds": 12,
    "resetsAt": "2026-01-02T00:00:00.000Z",
    "retryAt": "2026-01-01T00:00:12.000Z",
    "reason": "queued",
    "warnings": ["steps was left out: the model refuses it"],
    "cancelledUpstream": True,
    "possiblyBilledTwice": 1,
    "usage": {
        "input_tokens": 16,
        "input_tokens_details": {"text_tokens": 16, "image_tokens": 0},
        "output_tokens": 1040,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": 1040},
        "total_tokens": 1056,
    },
    "stale": True,
    "reused": True,
    "open": True,
    "coalesced": True,
    "b64_json": "iVBORw0KGgo…",
    "revised_prompt": "A lighthouse in a heavy storm at night",
    "text_tokens": 16,
    "image_tokens": 0,
    "input_tokens": 16,
    "output_tokens": 1040,
    "total_tokens": 1056,
    "nextCursor": "1767225600000000-7d793037a0760186574b0282f2f435e7",
    "day": "2026-01-01",
    "file": "(the bytes of an image)",
    "cost": {"currency": "USD", "estimated": 0.0027, "charged": 0.0027, "saved": 0.0},
    "estimated": 0.0027,
    "charged": 0.0027,
    "saved": 0.0,
    "error": {"code": "upstream_timeout", "retryable": True},
    "message": "图像生成失败：the provider did not answer in time",
    "queuePosition": 3,
    "etaSeconds": 4.2,
    "promptMax": 32_000,
    "endsAt": "2026-01-02T00:00:00.000Z",
    "input_tokens_details": {"text_tokens": 16, "image_tokens": 0},
    "output_tokens_details": {"text_tokens": 0, "image_tokens": 1040},
    "AsyncTask.error": {
        "message": "The provider did not answer in time",
        "type": "server_error",
        "param": None,
        "code": "upstream_timeout",
    },
    "Capabilities.sizes": ["1024x1024", "1536x1024"],
    "Capabilities.mask": False,
    "Capabilities.seed": True,
    "Capabilities.qualities": ["low", "medium", "high"],
    "Model.channel": None,
    "Model.endsAt": "2026-12-31",
    "Model.successor": "black-forest-labs/FLUX.2-dev",
    "Delivery.lastStatus": 204,
    "QueueStats.pausedSince": "2026-01-01T00:00:00.000Z",
    "BoardTask.error": "upstream_timeout",
    "BoardTask.errorDetail": "the provider did not answer in time",
    "BoardTask.finishedAt": "2026-01-01T00:10:02.000Z",
    "TaskList.tasks": [],
    "UpstreamStats.blocked": {"reason": "upstream_rate_limited", "until": "2026-01-01T00:00:12.000Z"},
    "BlockedStats.reason": "upstream_rate_limited",
    "BlockedStats.until": "2026-01-01T00:00:12.000Z",
    "RedisStats.warning": None,
    "BudgetStats.key": "shop",
    "MadeKey.secret": "ig_" + "x" * 43,
    "Image.seed": 7,
    "Steps.default": 4,
    "Error.resetsAt": "2026-01-02T00:00:00.000Z",
}
"""Examples of properties that no example of an operation has."""


def complete(components: dict[str, Json], examples: Iterable[tuple[Json, Any]]) -> None:
    """Add a description and an example to every property of the components. examples: schemas with their values."""
    examples_by_property: dict[tuple[str, str], Any] = {}
    for schema, value in examples:
        _collect_examples(components, schema, value, examples_by_property)
    for name, component in components.items():
        for key, schema in component.get("properties", {}).items():
            text = DESCRIPTIONS.get(f"{name}.{key}") or DESCRIPTIONS.get(key) or DESCRIPTIONS.get(_camel(key))
            if text and "description" not in schema and not _has_text(components, schema):
                schema["description"] = text
            if "examples" not in schema:
                for example in _examples(name, key, schema, examples_by_property):
                    schema["examples"] = [example]


def _examples(
    component: str, key: str, schema: Json, examples_by_property: Mapping[tuple[str, str], Any]
) -> Iterable[Any]:
    """Yield the example of a property, if there is one."""
    own = f"{component}.{key}"
    if own in EXAMPLES:
        yield EXAMPLES[own]
    elif (component, key) in examples_by_property:
        yield examples_by_property[component, key]
    elif "const" in schema:
        yield schema["const"]
    elif key in EXAMPLES or _camel(key) in EXAMPLES:
        yield EXAMPLES[key if key in EXAMPLES else _camel(key)]
    elif "enum" in schema:
        yield schema["enum"][0]
    elif "default" in schema:
        yield schema["default"]


def _collect_examples(
    components: Mapping[str, Json], schema: Json, value: Any, examples_by_property: dict[tuple[str, str], Any]
) -> None:
    """Take the first value of each property of each component from an example."""
    if isinstance(value, list):
        for entry in value:
            _collect_examples(components, schema.get("items", {}), entry, examples_by_property)
        return
    if not isinstance(value, dict):
        return
    for choice in schema.get("anyOf", ()):
        _collect_examples(components, choice, value, examples_by_property)
    name = schema.get("$ref", "").rpartition("/")[2]
    component = components.get(name, schema)
    if not _fits(component, value):
        return
    for key, part in component.get("properties", {}).items():
        if value.get(key) is None:
            continue
        short = value[key][:_MAX_ENTRIES] if isinstance(value[key], list) else value[key]
        if name and len(orjson.dumps(short)) <= _MAX_EXAMPLE_BYTES:
            examples_by_property.setdefault((name, key), short)
        _collect_examples(components, part, value[key], examples_by_property)


def _fits(component: Json, value: Mapping[str, Any]) -> bool:
    """Return whether a value may be of this type: one of several types of a choice is."""
    properties = component.get("properties", {})
    return set(component.get("required", ())) <= value.keys() <= properties.keys() and all(
        properties[key].get("const", each) == each for key, each in value.items()
    )


def _has_text(components: Mapping[str, Json], schema: Json) -> bool:
    return "description" in components.get(schema.get("$ref", "").rpartition("/")[2], {})


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)
