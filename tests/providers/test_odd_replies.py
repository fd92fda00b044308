"""Tests of responses that hold their images at an unusual place."""

import base64
import json
import time
from typing import Any

from imagegen.errors import UpstreamError
from imagegen.providers.response_parser import parse_reply
from imagegen.tasks.image import ImageBytes, ImageLink
from tests.support import over_rows

PNG_START = b"\x89PNG\r\n\x1a\n"
LINK, B64 = "https://h.example/1.png", base64.b64encode(PNG_START + bytes(100)).decode()


def images_of(body: bytes) -> tuple[object, ...]:
    try:
        return parse_reply(200, {}, body).images
    except UpstreamError:
        return ()


@over_rows(
    "body",
    [
        {"result": {"data": [{"url": LINK}]}},
        {"data": {"data": [{"url": LINK}]}},
        {"data": {"images": [{"url": LINK}]}},
        {"data": [{"url": {"url": LINK}}]},
        {"data": [{"url": [LINK]}]},
        {"data": [{"image_url": {"url": LINK}}]},
        {"output": [LINK]},
        {"output": "https://h.example/files/1"},
        {"output": [{"image": {"large": LINK}}]},
        {"refined_image": LINK, "charge_url": "none"},
        {"data": {"resultUrls": ["https://h.example/files/1"]}},
        {"text": f"Here it is: ![a cat]({LINK}) as requested"},
        {"Images": [{"URL": LINK, "thumbnailUrl": "https://h.example/t.png"}]},
        {"request": {"image_url": "https://client.example/in.png"}, "results": [{"link": LINK}]},
        [{"data": [{"url": LINK}]}],
        json.dumps({"data": [{"url": LINK}]}),
        {"body": json.dumps({"data": [{"url": LINK}]})},
        {"data": [{"image_base64": B64}]},
        {"data": [{"B64_JSON": f"data:image/png;base64,{B64}"}]},
    ],
)
@over_rows("form", ["{}", "callback({});", ")]}}',\n{}", '{{"status":"queued"}}\n{}\n', "{}{{"])
def test_an_image_at_an_unusual_place_is_found(body: dict[str, Any] | list[dict[str, Any]] | str, form: str) -> None:
    images = images_of(form.format(json.dumps(body)).encode())
    assert images in (
        (ImageLink(LINK),),
        (ImageLink("https://h.example/files/1"),),
        (ImageBytes(PNG_START + bytes(100)),),
    )


@over_rows("start", [PNG_START, b"\xff\xd8\xff\xe0", b"RIFF\x10\0\0\0WEBPVP8 "])
def test_a_response_that_is_the_image_itself_is_read(start: bytes) -> None:
    assert images_of(start + bytes(300_000)) == (ImageBytes(start + bytes(300_000)),)


@over_rows(
    "body",
    [
        {"error": {"message": "no"}, "output": LINK},
        {"data": [], "request": {"image_url": LINK}, "input_images": [LINK], "preview": LINK},
        {"message": f"see {LINK}", "docs_url": "https://h.example/docs", "status_url": "https://h.example/s"},
        {"name": "https://h.example/some/page"},
        {"prompt": f"as in ![this]({LINK})", "args": {"url": LINK}},
        {"taskArgs": {"image": LINK}, "config": {"image_url": LINK}, "user": {"profile": LINK}, "icon_url": LINK},
        {"control_image": LINK, "ref_images": [LINK], "image_refs": [LINK], "refImageUrl": LINK},
    ],
)
def test_links_to_other_things_are_no_images(body: dict[str, Any]) -> None:
    assert images_of(json.dumps(body).encode()) == ()
    assert images_of(f"<html><a href='{LINK}'>{json.dumps(body)}".encode()) == ()


def test_a_link_with_half_a_character_can_be_stored() -> None:
    assert images_of(rb'{"output":"https://h.example/\ud83d.png"}') == (ImageLink("https://h.example/?.png"),)


def test_a_tree_of_any_size_is_searched_for_a_bounded_time() -> None:
    began_s = time.process_time()
    deep = b'{"a":' * 5_000 + b"1" + b"}" * 5_000
    wide = json.dumps({"x": [{"url": "https://h.example/1"}] * 10_000}).encode()
    very_wide = b'{"x":[%b{"a":1}]}' % (b'{"a":1},' * 499_999)
    long_names = json.dumps({"k" * 20_000: {"j" * 20_000: ["https://h.example/1"] * 15_000}}).encode()
    assert images_of(deep) == ()
    assert images_of(wide) == (ImageLink("https://h.example/1"),)
    assert images_of(very_wide) == ()
    assert images_of(long_names) == ()
    assert time.process_time() - began_s < 2


@over_rows(
    "body",
    [
        b'{"data":[{"url":"https://h/1"}],"data":[]}',
        b'{"data":[{"url":"https://h/1"}],"data":null}',
        b'{"data":[],"data":[{"url":"https://h/1"}]}',
        b'{"images":[{"url":"https://h/1"}],"images":[],"error":null}',
        b'{"data":[{"url":"https://h/1","url":""}]}',
        b'{"data":[{"url":"https://h/1"}],"data":[{"b64_json":null}]}',
        b'{"data":[{"url":"https://h/1"}],"data":[],"pad":"' + b"x" * 300_000 + b'"}',
    ],
)
def test_an_image_in_the_first_of_two_equal_fields_is_found(body: bytes) -> None:
    assert parse_reply(200, {}, body).images == (ImageLink("https://h/1"),)
