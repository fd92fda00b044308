"""Parser of refusals that name fields of a request, in the shapes of many services. No I/O.

A refused value (`Invalid value: 'hd'`, `steps must be between 1 and 4`) is no refused field: without it, another image
than the requested one would be made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache

from imagegen.providers.request_fields import PIXEL_WORDS
from imagegen.tasks.request import GenerationRequest

MAX_ENTRIES = 32
"""Faults of one answer that are read."""

NEEDED_FIELDS = frozenset({"prompt", "model", "n", "image_url", "reference_images", "image", "images", "mask"})
"""Fields that a call can't go without, even if a model refuses them."""

_CODES = frozenset(
    {
        "unknown_parameter",  # OpenAI
        "unsupported_parameter",
        "unrecognized_parameter",
        "unexpected_parameter",
        "unknown_field",
        "unsupported_field",
        "unsupportedparameter",  # Runware
        "extra_forbidden",  # pydantic 2: fal, BFL, vLLM, DeepInfra
        "value_error.extra",  # pydantic 1
        "unexpected_keyword_argument",
        "additionalproperties",  # ajv
    }
)
_WRAPPERS = frozenset({"body", "query", "input", "parameters", "payload", "request"})
"""Places in front of the name of a field in a fault's location."""

_QUOTES = "'\"`“”‘’"
_NAME = rf"[{_QUOTES}]?([A-Za-z_][\w.\-\[\]]{{0,99}})[{_QUOTES}]?"
_ANY_NAME = _NAME.replace("(", "(?:")
_LIST = rf"({_ANY_NAME}(?:(?:, ?(?:and )?| and ){_ANY_NAME}){{0,20}})"
_FIELD = r"(?:parameter|argument|field|property|option|key|input)(?:s|\(s\))?"
_UNKNOWN = r"(?:unknown|unsupported|unrecogni[sz]ed|unexpected)"
_REFUSED = rf"(?:not (?:supported|allowed|permitted|recogni[sz]ed|accepted)|{_UNKNOWN})"
_SUPPORT = r"(?:does not|doesn't|do not|don't) (?:support|accept|allow) (?:the |this )?"

_PATTERNS = (
    rf"{_UNKNOWN} (?:request |input |keyword )?{_FIELD}(?: in object)?(?: supplied| provided| given)?:? {_LIST}",
    rf"unsupported use of {_LIST}",  # Together, Runware
    rf"{_FIELD} not (?:supported|allowed|permitted|recogni[sz]ed):? {_LIST}",  # xAI
    rf"unknown name {_LIST}",  # Google
    rf"additional property {_LIST} is not allowed",  # Replicate
    rf"additional properties are not allowed \({_LIST}",  # JSON schema
    rf"{_SUPPORT}{_FIELD}:? {_LIST}",
    rf"{_SUPPORT}{_LIST} {_FIELD}",
    rf"{_FIELD}:? {_LIST} (?:is|are) {_REFUSED}",
    rf"{_NAME} (?:parameter|argument|field|property) (?:is|are) {_REFUSED}",
    rf"property {_LIST} should not exist",  # NestJS
    rf"(?:不支持的?|未知的?)(?:参数|字段)[:：]? ?{_LIST}",
    rf"(?:参数|字段) ?{_LIST} ?(?:不支持|不被支持|未知|不允许)",
    r"^([\w.\-]{1,100})\n\s+extra (?:inputs are|fields) not permitted",  # pydantic, as one text
    r"([\w.\-]{1,100}): extra (?:inputs are|fields) not permitted",
)
"""Wording that is about fields, with the names of one or several."""


@cache
def _list_patterns() -> tuple[re.Pattern[str], ...]:
    """Compile the patterns at the first refusal: it takes 20 ms, which most starts save."""
    return tuple(re.compile(pattern, re.IGNORECASE | re.MULTILINE) for pattern in _PATTERNS)


_FOR_MODEL = re.compile(
    rf"{_NAME} (?:is|are) (?:not supported|unsupported|not available) (?:for|by|with|in|on) "
    r"(?:the |this |that )?[\w.\-/ ]{0,60}model",
    re.IGNORECASE,
)
"""It may be about a value as well (`1000x1000 is not supported by this model`), so it is not read for sizes."""

_STRICTLY_A_FIELD = r"(?:parameter|argument|field|property)"
_ABOUT_A_FIELD = re.compile(
    rf"{_STRICTLY_A_FIELD}[^.]{{0,40}}{_REFUSED}|{_REFUSED}[^.]{{0,40}}{_STRICTLY_A_FIELD}", re.IGNORECASE
)
_ABOUT_A_VALUE = re.compile(r"\bvalues?\b|must be (?:one of|between|a )", re.IGNORECASE)
_ONE_NAME = re.compile(_NAME)

_OUR_NAMES = {
    "num_inference_steps": "steps",
    "step": "steps",
    "guidance": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "response_extension": "output_format",
    "enable_safety_checker": "disable_safety_checker",
    "enhance_prompt": "prompt_upsampling",
    "loras": "image_loras",
    "output_quality": "output_compression",
    "prompt_extend": "prompt_upsampling",
}


def refused_fields(error: Mapping[str, object], message: str, code: str, parameter: str) -> tuple[str, ...]:
    """Return the fields that a refusal names, as the upstream spells them: `style`, `options.fast`.

    Unquoted names may be words of the text; `sent_fields` drops those that are no fields.

    error: the error object with its lists of faults. message, code, parameter: of the error.
    """
    names = [*_in_faults(error), *_in_text(message)]
    if parameter and (code in _CODES or (_ABOUT_A_FIELD.search(message) and not _ABOUT_A_VALUE.search(message))):
        names.append(parameter)
    return tuple(dict.fromkeys(names))[:MAX_ENTRIES]


def _in_faults(error: Mapping[str, object]) -> Iterator[str]:
    """Read lists of faults: FastAPI's `detail`, ajv's and zod's `errors`, Runware's `errors`."""
    for place in ("detail", "details", "errors", "issues", "message"):
        faults = error.get(place)
        for fault in faults[:MAX_ENTRIES] if isinstance(faults, list) else ():
            if isinstance(fault, dict):
                yield from _in_fault(fault)
            elif isinstance(fault, str):
                yield from _in_text(fault)


def _in_fault(fault: Mapping[str, object]) -> Iterator[str]:
    kinds = {str(fault.get(name)).lower() for name in ("type", "code", "keyword")}
    text = next((text for name in ("msg", "message") if isinstance(text := fault.get(name), str)), "")
    if kinds & _CODES or re.match(r"extra (?:inputs are|fields) not permitted", text, re.IGNORECASE):
        location = fault.get("loc") or fault.get("path") or fault.get("parameter") or fault.get("param")
        if isinstance(location, list):
            yield ".".join(str(part) for part in location if part not in _WRAPPERS)
        elif isinstance(location, str):
            yield location
        details = fault.get("params")
        if isinstance(details, dict) and isinstance(name := details.get("additionalProperty"), str):
            yield name
    if "unrecognized_keys" in kinds and isinstance(keys := fault.get("keys"), list):
        yield from (key for key in keys if isinstance(key, str))
    yield from _in_text(text)


def _in_text(text: str) -> Iterator[str]:
    for pattern in _list_patterns():
        for match in pattern.finditer(text):
            yield from (name.rstrip(".-") for name in _ONE_NAME.findall(match[1]))
    yield from (name for name in _FOR_MODEL.findall(text) if name.lower() not in PIXEL_WORDS)


def sent_fields(refused: Iterable[str], request: GenerationRequest) -> list[str]:
    """Return our names of refused fields that a call for the request sends, or the names that they have in `extra`.

    Fields that a call can't go without are left out, and so is a part of a field.
    """
    names = (_sent_field(path, request) for path in refused)
    return list(dict.fromkeys(name for name in names if name is not None and name not in NEEDED_FIELDS))


def _sent_field(path: str, request: GenerationRequest) -> str | None:
    extra = request.extra or {}
    if path in extra:
        return path
    parts = [part for part in re.split(r"[.\[\]]+", path) if part]
    for place, part in enumerate(parts, 1):
        if (name := _own_name(part, request, extra)) is not None:
            return name if place == len(parts) else None
    return None


def _own_name(part: str, request: GenerationRequest, extra: Mapping[str, object]) -> str | None:
    if part in extra:
        return part
    name = part.lower()
    name = _OUR_NAMES.get(name, name)
    if name in PIXEL_WORDS or name == "response_format":
        return name
    is_sent = name in request.__struct_fields__ and name not in ("extra", "variant")
    return name if is_sent and getattr(request, name) is not None else None
