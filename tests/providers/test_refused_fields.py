"""Tests of refusals that name fields: the shapes of many services, and what may be left out because of them."""

from __future__ import annotations

import json
import time

from multidict import CIMultiDict

from imagegen.providers.refused_fields import sent_fields
from imagegen.providers.response_parser import error_from_response
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.validation import parse
from tests.support import over_rows


def requested(**fields: object) -> GenerationRequest:
    return parse({"prompt": "a cat"} | fields, default_model="m", aliases={})


ALL = requested(
    steps=4,
    seed=7,
    negative_prompt="fog",
    guidance_scale=3,
    output_format="png",
    output_compression=50,
    quality="high",
    background="opaque",
    style="vivid",
    image_loras=[{"path": "a", "scale": 1}],
    image_url="https://host/a.png",
    extra={"x_style": 1, "options": {"fast": True}, "x-raw": 2},
)


def refused(status: int, body: object) -> list[str]:
    found = error_from_response(status, CIMultiDict(), json.dumps(body).encode())
    assert found.code == "upstream_invalid_request"
    assert not found.retryable
    return sent_fields(found.refused, ALL)


def openai(message: str, param: str | None = None, code: str | None = None) -> dict[str, object]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


def fastapi(*faults: dict[str, object]) -> dict[str, object]:
    return {"detail": list(faults)}


def extra_forbidden(*place: str) -> dict[str, object]:
    return {"type": "extra_forbidden", "loc": ["body", *place], "msg": "Extra inputs are not permitted", "input": 1}


def google(message: str) -> list[dict[str, object]]:
    return [{"error": {"code": 400, "message": message, "status": "INVALID_ARGUMENT"}}]


@over_rows(
    ("status", "body", "names"),
    [
        (
            400,
            openai("Unsupported use of 'steps' parameter. This parameter is not supported for the selected model."),
            ["steps"],
        ),
        (400, openai("Unknown parameter: 'x_style'.", "x_style", "unknown_parameter"), ["x_style"]),
        (400, openai("Unknown parameter: 'options.fast'.", "options.fast", "unknown_parameter"), []),
        (
            400,
            openai(
                "Unsupported parameter: 'quality' is not supported with this model.", "quality", "unsupported_parameter"
            ),
            ["quality"],
        ),
        (400, openai("The model does not support this.", "background", "unsupported_parameter"), ["background"]),
        (400, openai("Unrecognized request argument supplied: x_style"), ["x_style"]),
        (400, openai("Unrecognized request arguments supplied: x_style, style"), ["x_style", "style"]),
        (400, openai("This parameter is not supported by the model.", "style"), ["style"]),
        (400, openai("The model `m` does not support the 'output_compression' parameter."), ["output_compression"]),
        (400, openai("quality is not supported for this model"), ["quality"]),
        (400, openai("The parameter `seed` specified in the request is not valid", "seed", "InvalidParameter"), []),
        (400, {"error": "Argument not supported: size"}, ["size"]),
        (400, {"code": "invalid-argument", "error": "Arguments not supported: size, style"}, ["size", "style"]),
        (422, fastapi(extra_forbidden("x_style")), ["x_style"]),
        (422, fastapi(extra_forbidden("x_style"), extra_forbidden("num_inference_steps")), ["x_style", "steps"]),
        (422, fastapi(extra_forbidden("input", "x_style")), ["x_style"]),
        (422, fastapi(extra_forbidden("image_loras", "0", "weight")), []),
        (
            422,
            fastapi({"loc": ["body", "style"], "msg": "extra fields not permitted", "type": "value_error.extra"}),
            ["style"],
        ),
        (422, fastapi({"loc": ["body", "steps"], "msg": "Input should be less than 5", "type": "less_than"}), []),
        (422, {"detail": "x_style: Extra inputs are not permitted"}, ["x_style"]),
        (
            400,
            openai(
                "1 validation error for ImageRequest\nx_style\n  Extra inputs are not permitted [type=extra_forbidden]"
            ),
            ["x_style"],
        ),
        (400, {"message": "Unexpected keyword argument 'cfg_scale'", "code": 20015}, ["guidance_scale"]),
        (
            400,
            {
                "code": "InvalidParameter",
                "message": "The parameter negative_prompt is not supported",
                "request_id": "r",
            },
            ["negative_prompt"],
        ),
        (400, {"code": "InvalidParameter", "message": "Unexpected parameter: x_style"}, ["x_style"]),
        (400, {"code": 20012, "message": "参数 quality 不支持", "data": None}, ["quality"]),
        (
            400,
            google(
                "\n".join(
                    f'Invalid JSON payload received. Unknown name "{name}": Cannot find field.'
                    for name in ("x_style", "seed")
                )
            ),
            ["x_style", "seed"],
        ),
        (
            422,
            {
                "detail": "- input: Additional property x_style is not allowed",
                "status": 422,
                "title": "Input validation failed",
            },
            ["x_style"],
        ),
        (
            400,
            {"error": "Additional properties are not allowed ('x_style', 'style' were unexpected)"},
            ["x_style", "style"],
        ),
        (
            400,
            {"errors": [{"code": "unsupportedParameter", "message": "Unsupported use of it", "parameter": "style"}]},
            ["style"],
        ),
        (
            400,
            {
                "errors": [
                    {
                        "keyword": "additionalProperties",
                        "params": {"additionalProperty": "x_style"},
                        "message": "must NOT have additional properties",
                    }
                ]
            },
            ["x_style"],
        ),
        (
            400,
            {
                "error": {
                    "message": "Invalid request",
                    "issues": [{"code": "unrecognized_keys", "keys": ["x_style"], "path": []}],
                }
            },
            ["x_style"],
        ),
        (
            400,
            {"message": ["property x_style should not exist"], "error": "Bad Request", "statusCode": 400},
            ["x_style"],
        ),
        (400, {"error": 'json: unknown field "x_style"'}, ["x_style"]),
        (422, {"error": "unknown field `x-raw`, expected one of `prompt`, `steps`"}, ["x-raw"]),
        (400, openai("Unknown parameter: 'response_format'."), ["response_format"]),
    ],
)
def test_a_refused_field_is_found_in_the_shape_of_each_service(status: int, body: object, names: list[str]) -> None:
    assert refused(status, body) == names


@over_rows(
    "body",
    [
        openai("Unsupported use of 'prompt' parameter."),
        openai("Unknown parameter: 'model'.", "model", "unknown_parameter"),
        openai("Unsupported use of 'image_url' parameter. This parameter is not supported for the selected model."),
        openai("Unknown parameter: 'made_up'.", "made_up", "unknown_parameter"),
        openai("Unknown parameter: 'moderation'."),
        openai(
            "Invalid value: 'hd'. Supported values are: 'low', 'medium', 'high', and 'auto'.",
            "quality",
            "invalid_value",
        ),
        openai("Unsupported value: 'quality' does not support 'hd' with this model.", "quality", "unsupported_value"),
        openai("steps must be between 1 and 4"),
        openai("Size 1000x1000 is not supported by this model"),
        openai("size is not supported for this model: 1000x1000"),
        openai("Transparent background is not supported for this image", "background"),
        openai("The transparent background option is not supported for this model"),
        openai("The transparent background option is not supported for this model", "background"),
        openai("This value of the parameter is not supported.", "quality"),
        openai("Transparent background is not supported for gpt-image-2", "background", "invalid_value"),
    ],
)
def test_a_refused_value_or_a_field_that_was_not_sent_is_never_left_out(body: object) -> None:
    assert refused(400, body) == []


@over_rows(
    ("status", "body"),
    [
        (500, openai("Unsupported use of 'steps' parameter.")),
        (429, openai("Unsupported use of 'steps' parameter.")),
        (401, openai("Unsupported use of 'steps' parameter.")),
        (200, {"error": "Unsupported use of 'steps' parameter."}),
        (400, openai("Unknown parameter: 'steps'.", code="insufficient_quota")),
        (400, openai("Unknown parameter: 'steps' (blocked by our safety system)")),
        (400, openai("Unknown parameter: 'steps'.", code="model_not_found")),
    ],
)
def test_only_a_definite_refusal_for_a_field_permits_another_call(status: int, body: object) -> None:
    assert error_from_response(status, CIMultiDict(), json.dumps(body).encode()).refused == ()


@over_rows("text", ["a" * 4_000, "'a', " * 1_000, "unknown parameter " * 300, "a and " * 800, "a.b[0] " * 600])
def test_a_long_text_is_read_quickly(text: str) -> None:
    started = time.process_time()
    error_from_response(400, CIMultiDict(), json.dumps(openai(text)).encode())
    assert time.process_time() - started < 2.5
