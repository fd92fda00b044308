"""Tests of calls with input images: multipart and JSON bodies that are read while they are sent, by provider."""

import asyncio
import base64
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from io import BytesIO
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from msgspec.structs import replace
from PIL import Image, ImageStat

from imagegen.errors import UpstreamError
from imagegen.providers.a1111 import A1111Provider
from imagegen.providers.input_bodies import StreamedBody, as_data_uri, form_body, json_body
from imagegen.providers.openai import OpenAICompatibleProvider
from imagegen.providers.protocol import Call, Edits, InputImage
from imagegen.providers.sandbox import SandboxProvider
from imagegen.providers.together import TogetherProvider
from tests.emulated_jobs import Recorder
from tests.emulator_fixtures import EmulatedUpstream
from tests.image_bytes import image_file
from tests.providers.conftest import MakeCall, RawServer, ScriptedUpstream, data_of
from tests.support import LoopTime, over_rows

LINK = "https://images.example/a.png"
PNG = b"\x89PNG fake"
UPLOADS = [f"upload:{digit * 64}" for digit in "abc"]
MASK = f"upload:{'f' * 64}"


def input_image(
    data: bytes, content_type: str = "image/png", *, piece: int = 65_537, size: int | None = None
) -> InputImage:
    async def read() -> AsyncGenerator[bytes, None]:
        for at in range(0, len(data), piece):
            yield data[at : at + piece]

    return InputImage(content_type, len(data) if size is None else size, read)


def edit(make_call: MakeCall, *images: bytes | str, mask: bytes | None = None, **fields: Any) -> Call:
    """Return a call with these input images: bytes of uploads, or links."""
    sources = [image if isinstance(image, str) else UPLOADS[place] for place, image in enumerate(images)]
    inputs = {
        source: input_image(image) for source, image in zip(sources, images, strict=True) if isinstance(image, bytes)
    }
    if mask is not None:
        inputs[MASK] = input_image(mask)
        fields["mask"] = MASK
    if len(sources) > 1:
        fields["reference_images"] = sources[1:]
    call = make_call(image_url=sources[0], **fields)
    return Call(call.request, call.count, seed=call.seed, without=call.without, inputs=inputs)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def png(colour: Any, mode: str = "RGB", size: tuple[int, int] = (64, 64)) -> bytes:
    return image_file(colour, size=size, mode=mode)


async def body_of(body: bytes | StreamedBody) -> bytes:
    assert isinstance(body, StreamedBody)
    return b"".join([piece async for piece in body.pieces()])


def openai(session: aiohttp.ClientSession, upstream: EmulatedUpstream, **more: Any) -> OpenAICompatibleProvider:
    return OpenAICompatibleProvider(session, base_url=f"{upstream.url}/v1", api_key="k", timeout_s=30, **more)


@pytest.fixture
async def emulator() -> AsyncIterator[EmulatedUpstream]:
    async with EmulatedUpstream(image="tiny") as emulator:
        yield emulator


@over_rows("size", [0, 1, 2, 3, 4, 100])
@over_rows("piece", [1, 2, 3, 1000])
async def test_json_with_an_image_is_valid_and_as_long_as_announced(size: int, piece: int) -> None:
    data = bytes(range(size))
    body = json_body({"a": [as_data_uri(input_image(data, piece=piece))], "b": 'x"y'})
    sent = await body_of(body)
    encoded = base64.b64encode(data).decode()
    assert sent == f'{{"a":["data:image/png;base64,{encoded}"],"b":"x\\"y"}}'.encode()
    assert len(body) == len(sent)


def test_json_without_an_image_is_sent_in_one_piece() -> None:
    assert json_body({"a": 1}) == b'{"a":1}'


async def test_no_field_of_a_form_can_add_a_header_or_a_field() -> None:
    name = 'a"\r\nContent-Type: text/html\r\n\r\nx'
    sent = await body_of(form_body({name: "v\r\n--"}, []))
    assert b'name="a%22%0D%0AContent-Type: text/html%0D%0A%0D%0Ax"\r\n\r\nv\r\n--\r\n' in sent
    assert sent.count(b"Content-Disposition") == 1


async def test_an_image_that_is_shorter_than_announced_ends_the_call(
    make_call: MakeCall, session: aiohttp.ClientSession, emulator: EmulatedUpstream, watcher: Recorder
) -> None:
    short = {UPLOADS[0]: input_image(PNG, size=len(PNG) + 1)}
    call = replace(edit(make_call, PNG), inputs=short)
    with pytest.raises(UpstreamError) as caught:
        await openai(session, emulator).generate(call, watcher)
    assert (caught.value.code, caught.value.ambiguous, watcher.sent_count) == ("internal_error", False, 0)
    assert not emulator.ledger.paid


@pytest.mark.parametrize(("count", "name"), [(1, "image"), (3, "image[]")])
async def test_openai_gets_whole_files_and_fields_in_one_form(
    session: aiohttp.ClientSession,
    emulator: EmulatedUpstream,
    make_call: MakeCall,
    watcher: Recorder,
    count: int,
    name: str,
) -> None:
    files = [b"first" * 300_000, b"second", b"third"][:count]
    call = edit(make_call, *files, mask=b"the mask", quality="high", model="gpt-image-2", width=1024, height=768)
    reply = await openai(session, emulator).generate(call, watcher)
    (paid,) = emulator.ledger.paid
    assert [(file.field, file.sha256) for file in paid.inputs] == [
        *((name, sha256(file)) for file in files),
        ("mask", sha256(b"the mask")),
    ]
    assert {file.content_type for file in paid.inputs} == {"image/png"}
    assert (paid.path, paid.body["prompt"], paid.body["size"]) == ("/v1/images/edits", "a cat", "1024x768")
    assert not {"image_url", "reference_images", "mask"} & paid.body.keys()
    assert (len(reply.images), watcher.sent_count) == (1, 1)


async def test_an_edit_at_an_asynchronous_relay_goes_to_its_asynchronous_route(
    session: aiohttp.ClientSession, upstream: ScriptedUpstream, make_call: MakeCall, watcher: Recorder
) -> None:
    upstream.post("http://relay.example/v1/images/edits/async", payload={"data": [{"url": "https://x.example/a.png"}]})
    address = "http://relay.example/v1/images/generations/async"
    relay = OpenAICompatibleProvider(session, base_url=address, api_key=None, timeout_s=30)
    await relay.generate(edit(make_call, PNG), watcher)
    assert PNG in upstream.request.body


async def test_a_link_is_never_sent_to_a_service_that_takes_files(
    session: aiohttp.ClientSession, emulator: EmulatedUpstream, make_call: MakeCall, watcher: Recorder
) -> None:
    with pytest.raises(UpstreamError) as caught:
        await openai(session, emulator).generate(edit(make_call, LINK), watcher)
    assert (caught.value.code, emulator.ledger.total) == ("upstream_invalid_request", 0)


async def test_the_table_of_models_has_togethers_field_for_input_images(
    session: aiohttp.ClientSession, upstream: ScriptedUpstream, make_call: MakeCall, watcher: Recorder
) -> None:
    upstream.post("http://api.together.xyz/v1/images/generations", payload={"data": [{"url": "https://x.example/a"}]})
    together = TogetherProvider(
        session,
        api_key="k",
        base_url="http://api.together.xyz",
        timeout_s=30,
        input_field=lambda model: "reference_images" if model == "m" else "image_url",
    )
    await together.generate(edit(make_call, LINK), watcher)
    assert upstream.request.fields["reference_images"] == [LINK]
    assert "image_url" not in upstream.request.fields


DATA_URI = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


@pytest.mark.parametrize(
    ("host", "path", "count", "expected"),
    [
        ("api.x.ai", "images/edits", 1, {"image": {"url": LINK, "type": "image_url"}}),
        ("api.x.ai", "images/edits", 2, {"images": [{"url": url, "type": "image_url"} for url in (LINK, DATA_URI)]}),
        ("api.siliconflow.cn", "images/generations", 2, {"image": LINK, "image2": DATA_URI}),
        ("gpu-box:8080", "images/generations", 2, {"ref_images": [LINK, base64.b64encode(PNG).decode()]}),
    ],
)
async def test_services_without_forms_get_links_and_bytes_in_json(
    session: aiohttp.ClientSession,
    upstream: ScriptedUpstream,
    make_call: MakeCall,
    watcher: Recorder,
    host: str,
    path: str,
    count: int,
    expected: dict[str, Any],
) -> None:
    upstream.post(f"http://{host}/v1/{path}", payload={"data": [{"url": "https://x.example/a.png"}]})
    service = OpenAICompatibleProvider(session, base_url=f"http://{host}/v1", api_key=None, timeout_s=30)
    images: list[bytes | str] = [LINK, PNG]
    await service.generate(edit(make_call, *images[:count]), watcher)
    fields = upstream.request.fields
    assert {name: value for name, value in fields.items() if "image" in name and name != "image_size"} == expected


@over_rows(
    ("base_url", "model", "expected"),
    [
        ("https://api.openai.com/v1", "gpt-image-2", Edits(mask=True, links=False)),
        ("https://gateway.example/v1", "m", Edits(mask=True, links=False)),
        ("https://api.x.ai/v1", "grok-imagine-image", Edits(max_images=3)),
        ("https://api.tokenfactory.nebius.com/v1", "flux", None),
        ("https://api.tokenfactory.nebius.com/v1", "openai/gpt-image-2", Edits(mask=True, links=False)),
    ],
)
async def test_the_input_images_that_a_service_takes_are_known(
    session: aiohttp.ClientSession, base_url: str, model: str, expected: Edits | None
) -> None:
    service = OpenAICompatibleProvider(session, base_url=base_url, api_key=None, timeout_s=30)
    assert service.edits(model) == expected


def test_together_takes_links_and_no_mask(session: aiohttp.ClientSession) -> None:
    assert TogetherProvider(session, api_key="k", base_url="http://x", timeout_s=30).edits("any") == Edits()


@pytest.mark.parametrize(
    ("model", "images", "expected"),
    [
        ("black-forest-labs/FLUX.1-kontext-pro", [LINK], {"image_url": LINK}),
        ("black-forest-labs/FLUX.2-pro", [LINK, PNG], {"reference_images": [LINK, DATA_URI]}),
        ("google/flash-image-2.5", [PNG], {"reference_images": [DATA_URI]}),
        ("some/new-model", [PNG, LINK], {"image_url": DATA_URI, "reference_images": [LINK]}),
    ],
)
async def test_together_gets_input_images_under_the_models_names(
    session: aiohttp.ClientSession,
    upstream: ScriptedUpstream,
    make_call: MakeCall,
    watcher: Recorder,
    model: str,
    images: list[str] | list[str | bytes] | list[bytes] | list[bytes | str],
    expected: dict[str, Any],
) -> None:
    upstream.post("http://api.together.xyz/v1/images/generations", payload={"data": [{"url": "https://x.example/a"}]})
    together = TogetherProvider(session, api_key="k", base_url="http://api.together.xyz", timeout_s=30)
    await together.generate(edit(make_call, *images, model=model), watcher)
    fields = upstream.request.fields
    assert {name: fields[name] for name in ("image_url", "reference_images") if name in fields} == expected


@pytest.mark.parametrize("without", [(), ("image_url", "image", "reference_images")])
async def test_an_edit_is_never_made_without_its_images(
    session: aiohttp.ClientSession,
    emulator: EmulatedUpstream,
    make_call: MakeCall,
    watcher: Recorder,
    without: tuple[str, ...],
) -> None:
    together = TogetherProvider(session, api_key="k", base_url=emulator.url, timeout_s=30)
    call = edit(make_call, PNG, model="black-forest-labs/FLUX.1-schnell", without=without)
    with pytest.raises(UpstreamError):
        await together.generate(call, watcher)
    assert emulator.ledger.calls[0].body["image_url"] == DATA_URI


async def test_a_web_ui_gets_the_image_and_a_white_mask_where_it_was_transparent(
    session: aiohttp.ClientSession, emulator: EmulatedUpstream, make_call: MakeCall, watcher: Recorder
) -> None:
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    file = BytesIO()
    mask.save(file, "png")
    image = png("red")
    received = {}

    async def img2img(request: web.Request) -> web.Response:
        received.update(await request.json())
        return web.json_response({"images": [base64.b64encode(image).decode()], "info": "{}"})

    app = web.Application(client_max_size=2**24)
    app.router.add_post("/sdapi/v1/img2img", img2img)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    try:
        webui = A1111Provider(session, base_url=f"http://{host}:{port}", timeout_s=30, default_model="m")
        await webui.generate(edit(make_call, image, mask=file.getvalue()), watcher)
    finally:
        await runner.cleanup()
    assert [base64.b64decode(text) for text in received["init_images"]] == [image]
    with Image.open(BytesIO(base64.b64decode(received["mask"]))) as sent:
        assert (sent.mode, sent.getpixel((5, 5)), sent.getpixel((60, 60))) == ("L", 255, 0)


async def test_a_web_ui_gets_a_mask_without_transparency_as_it_is(
    session: aiohttp.ClientSession, emulator: EmulatedUpstream, make_call: MakeCall, watcher: Recorder
) -> None:
    webui = A1111Provider(session, base_url=emulator.url, timeout_s=30, default_model="m")
    call = edit(make_call, png("red"), mask=png("white"), extra={"denoising_strength": 0.4})
    reply = await webui.generate(call, watcher)
    (paid,) = emulator.ledger.paid
    assert paid.body["denoising_strength"] == 0.4
    assert (len(reply.images), paid.path, paid.body["prompt"]) == (1, "/sdapi/v1/img2img", "a cat")
    assert [file.field for file in paid.inputs] == ["init_images", "mask"]
    assert paid.inputs[0].sha256 == sha256(png("red"))
    with Image.open(BytesIO(base64.b64decode(str(paid.body["mask"])))) as sent:
        assert (sent.mode, sent.getpixel((5, 5))) == ("L", 255)


def test_a_web_ui_takes_one_image_and_a_mask(session: aiohttp.ClientSession) -> None:
    webui = A1111Provider(session, base_url="http://127.0.0.1:7860", timeout_s=30)
    assert webui.edits("any") == Edits(max_images=1, mask=True, links=False)


async def drawn(make_call: MakeCall, watcher: Recorder, *images: Any, **fields: Any) -> Image.Image:
    reply = await SandboxProvider(0).generate(edit(make_call, *images, **fields), watcher)
    return Image.open(BytesIO(data_of(reply.images[0]))).convert("RGB")


def area(image: Image.Image, box: tuple[int, int, int, int]) -> tuple[float, ...]:
    return tuple(ImageStat.Stat(image.crop(box)).mean)


async def test_the_sandbox_shows_each_input_image(make_call: MakeCall, watcher: Recorder) -> None:
    image = await drawn(make_call, watcher, png("#ff0000"), png("#0000ff"))
    left, right = area(image, (60, 60, 200, 120)), area(image, (300, 60, 440, 120))
    assert left[0] > left[2]
    assert right[2] > right[0]


async def test_the_sandbox_draws_the_same_from_the_same_input_only(make_call: MakeCall, watcher: Recorder) -> None:
    first, again, other = [
        (await drawn(make_call, watcher, png(colour), seed=1)).tobytes() for colour in ("red", "red", "blue")
    ]
    assert first == again != other


async def test_the_sandbox_shows_the_mask_over_the_first_image(make_call: MakeCall, watcher: Recorder) -> None:
    clear = png((0, 0, 0, 0), "RGBA")
    plain, masked = [await drawn(make_call, watcher, png("white"), mask=mask) for mask in (png("black"), clear)]
    assert plain.tobytes() != masked.tobytes()


@pytest.mark.parametrize(
    ("mode", "colour"), [("P", 1), ("L", 200), ("1", 1), ("LA", (9, 99)), ("RGBA", "red"), ("I;16", 9)]
)
async def test_the_sandbox_draws_from_images_of_every_mode(
    make_call: MakeCall, watcher: Recorder, mode: str, colour: int | tuple[int, int] | str
) -> None:
    large = png(colour, mode, (900, 30))
    assert (await drawn(make_call, watcher, large, mask=large)).size == (512, 512)


async def test_an_input_image_that_the_sandbox_cannot_decode_is_refused(make_call: MakeCall, watcher: Recorder) -> None:
    with pytest.raises(UpstreamError) as caught:
        await drawn(make_call, watcher, PNG)
    assert (caught.value.code, watcher.sent_count) == ("upstream_invalid_request", 0)


def large_edit(make_call: MakeCall) -> Call:
    return edit(make_call, b"x" * 16_000_000, model="gpt-image-2")


async def lose(session: aiohttp.ClientSession, url: str, call: Call, watcher: Recorder) -> UpstreamError:
    service = OpenAICompatibleProvider(session, base_url=url, api_key=None, timeout_s=30)
    with pytest.raises(UpstreamError) as caught:
        await service.generate(call, watcher)
    return caught.value


async def test_a_connection_lost_within_the_body_was_not_paid_for(
    session: aiohttp.ClientSession, raw_server: RawServer, make_call: MakeCall, watcher: Recorder
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()

    error = await lose(session, await raw_server(serve), large_edit(make_call), watcher)
    assert (error.code, error.ambiguous, error.partly_sent, error.retryable) == ("upstream_error", False, True, True)
    assert watcher.sent_count == 0


async def test_a_connection_lost_after_the_body_may_have_been_paid_for(
    session: aiohttp.ClientSession, raw_server: RawServer, make_call: MakeCall, watcher: Recorder
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        writer.transport.abort()

    error = await lose(session, await raw_server(serve), large_edit(make_call), watcher)
    assert (error.code, error.ambiguous, error.partly_sent) == ("upstream_error", True, False)
    assert watcher.sent_count == 1


async def test_a_body_that_is_not_taken_in_time_was_not_paid_for(
    session: aiohttp.ClientSession, raw_server: RawServer, make_call: MakeCall, watcher: Recorder
) -> None:
    released = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await LoopTime().move(30)
        await released.wait()

    error = await lose(session, await raw_server(serve), large_edit(make_call), watcher)
    released.set()
    assert (error.code, error.ambiguous, error.partly_sent) == ("upstream_timeout", False, True)
    assert watcher.sent_count == 0


REFUSAL = b'{"error":{"message":"too large","type":"invalid_request_error"}}'


async def test_a_refusal_before_the_end_of_the_body_is_read(
    session: aiohttp.ClientSession, raw_server: RawServer, make_call: MakeCall, watcher: Recorder
) -> None:
    released = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: %d\r\n\r\n%b" % (len(REFUSAL), REFUSAL))
        await released.wait()

    error = await lose(session, await raw_server(serve), large_edit(make_call), watcher)
    released.set()
    assert (error.status, error.retryable, error.ambiguous) == (413, False, False)


async def test_a_connection_is_not_reused_after_a_refusal_within_the_body(
    session: aiohttp.ClientSession, raw_server: RawServer, make_call: MakeCall, watcher: Recorder
) -> None:
    connections = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: %d\r\n\r\n%b" % (len(REFUSAL), REFUSAL))
        await reader.read()

    url = await raw_server(serve)
    for _ in range(2):
        await lose(session, url, large_edit(make_call), watcher)
    assert len(connections) == 2
