"""Tests of what an upstream reports with the images: usage, cost, parameters, and their sum over calls."""

from __future__ import annotations

import orjson

from imagegen.providers.details_parser import parse_details
from imagegen.providers.response_parser import parse_reply
from imagegen.tasks.image import ImageBase64
from imagegen.tasks.reply_details import ReplyDetails, add_details
from tests.support import over_rows

USAGE: dict[str, int | dict[str, int]] = {
    "input_tokens": 9,
    "output_tokens": 272,
    "total_tokens": 281,
    "input_tokens_details": {"text_tokens": 9},
}
LARGE = "A" * 300_000


@over_rows("text", [LARGE, LARGE.replace("AAAA", "AA\\/A", 1)])
@over_rows("name", ["data", "images"])
def test_a_large_answer_has_its_usage_too(name: str, text: str) -> None:
    body = b'{"usage":%b,"%b":[{"b64_json":"%b"}],"size":"2048x2048"}' % (
        orjson.dumps(USAGE),
        name.encode(),
        text.encode(),
    )
    reply = parse_reply(200, {}, body)
    assert isinstance(reply.images[0], ImageBase64)
    assert reply.details == ReplyDetails(usage=USAGE, size="2048x2048")


def test_a_small_answer_has_its_revised_prompt() -> None:
    entry = {"url": "https://a.example/1.png", "revised_prompt": "a cat, " + "x" * 5_000}
    reply = parse_reply(200, {}, orjson.dumps({"data": [entry], "quality": "high"}))
    assert reply.details is not None
    assert (len(reply.details.revised_prompt), reply.details.quality) == (1_000, "high")


@over_rows(
    "fields",
    [
        {},
        {"usage": None},
        {"usage": ["tokens"]},
        {
            "usage": {
                "tokens": "9",
                "share": 0.5,
                "flag": True,
                "less": -1,
                "more": 2**60,
                "x" * 50: 1,
                "parts": {"a": "b"},
            }
        },
        {"size": 512, "quality": ["low"], "background": "x" * 50, "output_format": "p\nng"},
        {"cost": "free"},
        {"cost": float("nan")},
        {"cost": -1},
        {"cost": 1e9},
        {"cost": True},
        {"data": [{"revised_prompt": 7}]},
        {"data": {"revised_prompt": "a"}},
    ],
)
def test_what_is_no_usage_cost_or_parameter_is_dropped(fields: dict[str, object]) -> None:
    assert parse_details(fields) is None


def test_usage_is_bounded() -> None:
    details = parse_details({"usage": {f"count_{number}": number for number in range(1_000)}})
    assert details is not None
    assert details.usage is not None
    assert len(details.usage) == 16


@over_rows("fields", [{"cost": 0.0425}, {"cost": "0.0425"}, {"usage": {"cost": 0.0425}}])
def test_the_own_figure_of_an_upstream_is_kept_in_micro_dollars(fields: dict[str, object]) -> None:
    details = parse_details(fields)
    assert details is not None
    assert details.cost_micro_usd == 42_500


def test_the_details_of_several_calls_are_summed() -> None:
    first = ReplyDetails(usage={"a": 1, "parts": {"x": 1}}, size="512x512", cost_micro_usd=40)
    second = ReplyDetails(usage={"a": 2, "b": 5, "parts": {"x": 2, "y": 3}}, quality="low", cost_micro_usd=2)
    total = ReplyDetails(
        usage={"a": 3, "b": 5, "parts": {"x": 3, "y": 3}}, size="512x512", quality="low", cost_micro_usd=42
    )
    assert add_details(first, second) == total
    assert add_details(None, second) == second
    assert add_details(first, None) == first
