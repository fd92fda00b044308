"""Program that runs calls of real client packages and prints their results; see sdks.py.

Reads lines {"sdk", "version", "mode", "at_once", "calls": [{"base", "method", "options", "fields", "files"}]}, answers
each with a JSON list. files: one base64 text or a list of them for each field.
"""

import asyncio
import base64
import gc
import hashlib
import importlib.metadata
import inspect
import io
import json
import os
import sys
import warnings
from typing import Any


def load(name: str, wanted: str) -> None:
    """Import a package of this version, without collections of garbage, which take a quarter of the time."""
    version = importlib.metadata.version(name)
    if version != wanted:
        sys.exit(f"{name} is {version}, not {wanted}")
    if name not in sys.modules:
        gc.disable()
        importlib.import_module(name)
        gc.freeze()
        gc.enable()


def client_of(sdk: str, mode: str, base: str, options: dict[str, Any]) -> Any:
    kind: Any
    if sdk == "openai":
        import openai

        kind = openai.AsyncOpenAI if mode == "async" else openai.OpenAI
    else:
        import together

        kind = together.AsyncTogether if mode == "async" else together.Together
    return kind(**{"api_key": "any", "base_url": base, **options})


def call(sdk: str, mode: str, spec: dict[str, Any]) -> Any:
    """Return the call's result or its awaitable."""
    if sdk == "litellm":
        import litellm

        name = {"images.generate": "image_generation", "images.edit": "image_edit"}[spec["method"]]
        method = getattr(litellm, f"a{name}" if mode == "async" else name)
        return method(api_base=spec["base"], api_key="any", **spec["options"], **spec["fields"], **files_of(spec))
    method = client_of(sdk, mode, spec["base"], spec["options"])
    for name in spec["method"].split("."):
        method = getattr(method, name)
    return method(**spec["fields"], **files_of(spec))


def files_of(spec: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [file_of(text) for text in value] if isinstance(value, list) else file_of(value)
        for name, value in spec["files"].items()
    }


def file_of(text: str) -> object:
    file = io.BytesIO(base64.b64decode(text))
    file.name = "image.png"
    return file


async def result_of(sdk: str, mode: str, spec: dict[str, Any]) -> dict[str, Any]:
    try:
        result = call(sdk, mode, spec)
        if inspect.isawaitable(result):
            result = await result
        if spec["fields"].get("stream"):
            events = [event async for event in result] if mode == "async" else list(result)
            return {"events": [plain(event.model_dump()) for event in events]}
        if spec["method"] == "models.list" and inspect.isasyncgen(getattr(result, "__aiter__", lambda: None)()):
            result = [model async for model in result]
        return {"answer": plain(dump(result)), "class": type(result).__name__}
    except Exception as error:  # noqa: BLE001 - any error is the result
        return failed(error)


def dump(result: object) -> object:
    if isinstance(result, list):
        return [dump(entry) for entry in result]
    return result.model_dump(mode="json") if hasattr(result, "model_dump") else result


def plain(value: object) -> object:
    """Return the value with each image replaced by its SHA-256."""
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    if isinstance(value, dict):
        return {
            name: hashlib.sha256(base64.b64decode(element)).hexdigest()
            if name == "b64_json" and element
            else plain(element)
            for name, element in value.items()
        }
    return value


def failed(error: Exception) -> dict[str, Any]:
    found: dict[str, Any] = {"error": type(error).__name__, "text": str(error)[:500]}
    for name in ("status_code", "code", "param", "type", "request_id", "body"):
        value = getattr(error, name, None)
        if isinstance(value, str | int | dict):
            found[name] = value
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr  # litellm prints advice
    for line in sys.stdin:
        spec = json.loads(line)
        load(spec["sdk"], spec["version"])
        answers.write(json.dumps(asyncio.run(run(spec))) + "\n")
        answers.flush()
    os._exit(0)  # a package's own threads can delay the end for seconds


async def run(spec: dict[str, Any]) -> list[dict[str, Any]]:
    if spec["at_once"]:
        return list(await asyncio.gather(*(result_of(spec["sdk"], spec["mode"], element) for element in spec["calls"])))
    return [await result_of(spec["sdk"], spec["mode"], element) for element in spec["calls"]]


main()
