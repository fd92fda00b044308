"""Thumbnails: GET /api/images/{taskId}/{index}?size=256."""

from __future__ import annotations

import base64
import io
import json
import re
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

import pytest
from PIL import Image

from tests.emulator_fixtures import EmulatorProcess
from tests.image_bytes import black_webp, deflated_zeros, encoded
from tests.ports import free_port
from tests.service.conftest import StartService
from tests.service.running import Service, at_once, eventually, redis_server


@pytest.fixture(scope="module")
def service(start_for_module: StartService, upstream: EmulatorProcess) -> Service:
    return start_for_module(upstream.url)


def shown(data: bytes) -> tuple[str, tuple[int, int]]:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return str(image.format), image.size


def made(*services: Service) -> int:
    """Return how many thumbnails the services have made."""
    pages = [service.get_as_admin("/metrics").body.decode() for service in services]
    return sum(int(float(re.findall(r"^imagegen_thumbnails_total (\S+)", page, re.MULTILINE)[0])) for page in pages)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_a_thumbnail_is_a_webp_of_the_requested_size(service: Service, kind: str, size: int) -> None:
    (entry,) = service.made(prompt=f"a {kind}", outputFormat=kind, width=768, height=512)["data"]
    answer = service.get(f"{entry['url']}&size={size}")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "image/webp")
    assert shown(answer.body) == ("WEBP", (size, round(size * 512 / 768)))
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert f"-{size}.webp" in answer.headers["Content-Disposition"]


def test_a_small_image_is_not_enlarged(service: Service) -> None:
    (entry,) = service.made(prompt="small", width=128, height=64)["data"]
    assert shown(service.get(f"{entry['url']}&size=512").body) == ("WEBP", (128, 64))


def test_a_thumbnail_is_cached_and_versioned_as_its_image(service: Service) -> None:
    task = service.made(prompt="cached thumbnail")
    url, path = task["data"][0]["url"], f"/api/images/{task['taskId']}/0"
    image, thumbnail = service.get(url), service.get(f"{url}&size=64")
    assert re.fullmatch(r"public, max-age=\d+, immutable", thumbnail.headers["Cache-Control"])
    plain = service.get(f"{path}?size=64")
    assert (plain.status, plain.headers["Cache-Control"], plain.body) == (200, "no-cache", thumbnail.body)
    etags = {answer.headers["ETag"] for answer in (image, thumbnail, service.get(f"{path}?size=128"))}
    assert len(etags) == 3
    again = service.get(f"{url}&size=64", If_None_Match=thumbnail.headers["ETag"])
    assert (again.status, again.body, again.headers["ETag"]) == (304, b"", thumbnail.headers["ETag"])
    head = service.request("HEAD", f"{path}?size=64")
    assert (head.status, head.headers["Content-Length"], head.body) == (200, str(len(thumbnail.body)), b"")
    assert service.get(f"{path}?v=000000000000&size=64").error == (410, "image_expired")
    assert service.get(f"{url}&size=64", Range="bytes=0-9").body == thumbnail.body


def test_another_size_is_a_fault_that_names_the_sizes(service: Service) -> None:
    url = service.made(prompt="sizes")["data"][0]["url"]
    for query in ("size=", "size=100", "size=0256", "size=256.0", "size=-1", "size=256&size=64", "size=٢٥٦", "size=1K"):
        answer = service.request("GET", f"{url.removeprefix(service.url)}&{quote(query, safe='=&')}")
        assert answer.error == (400, "invalid_request"), query
        assert answer.json["details"] == [{"field": "size", "message": "must be one of 64, 128, 256, 512"}]


def test_an_unknown_task_is_404_and_an_image_that_is_gone_410(service: Service) -> None:
    assert service.get(f"/api/images/{'0' * 32}/0?size=256").status == 404
    task = service.made(prompt="gone")
    url = task["data"][0]["url"]
    assert service.get(f"{url}&size=64").status == 200
    assert service.get(f"/api/images/{task['taskId']}/1?size=256").status == 404
    paths = (Path(service.settings["DATA_DIR"]) / "images").rglob("*0-*.png")
    (file,) = (path for path in paths if task["taskId"] in str(path))
    file.unlink()
    assert [service.get(f"{url}&size={size}").error for size in (64, 256)] == [(410, "image_expired")] * 2


def test_a_thumbnail_survives_a_restart(start_service: StartService, upstream: EmulatorProcess, tmp_path: Path) -> None:
    port = free_port()
    with redis_server(tmp_path, port):
        service = start_service(upstream.url, REDIS_URL=f"redis://127.0.0.1:{port}")
        path = f"/api/images/{service.made(prompt='kept')['taskId']}/0?size=256"
        before = service.get(path).body
        service.end()
        later = start_service(upstream.url, REDIS_URL=f"redis://127.0.0.1:{port}")
        assert later.get(path).body == before
        assert made(later) == 0


@pytest.mark.parametrize("store", ["disk", "redis"])
def test_a_hundred_requests_on_two_instances_make_one(
    start_service: StartService, upstream: EmulatorProcess, tmp_path: Path, store: str
) -> None:
    port = free_port()
    with redis_server(tmp_path, port):
        settings = {"REDIS_URL": f"redis://127.0.0.1:{port}", "IMAGE_STORE": store}
        first, second = start_service(upstream.url, **settings), start_service(upstream.url, **settings)
        task = first.made(prompt=f"once in {store}", width=1024, height=1024)
        eventually(lambda: second.task(task["taskId"])["status"] == "completed")
        path = f"/api/images/{task['taskId']}/0?size=256"
        answers = at_once([partial(instance.get, path) for _ in range(50) for instance in (first, second)])
        assert {(answer.status, shown(answer.body)) for answer in answers} == {(200, ("WEBP", (256, 256)))}
        assert len({answer.body for answer in answers}) == 1
        assert made(first, second) == 1
        first.end()
        second.end()


def test_with_the_providers_own_links_there_are_none(start_service: StartService, upstream: EmulatorProcess) -> None:
    service = start_service(upstream.url, IMAGE_STORE="upstream")
    task = service.made(prompt="elsewhere")
    answer = service.get(f"/api/images/{task['taskId']}/0?size=256")
    assert (answer.status, answer.headers["Location"]) == (302, task["data"][0]["url"])


class Serving(BaseHTTPRequestHandler):
    """An upstream whose images are those that the test puts here, by prompt."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = json.dumps({"data": [{"b64_json": base64.b64encode(self.files[body["prompt"]]).decode()}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def hosting(start_for_module: StartService) -> Iterator[Service]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Serving)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield start_for_module(
        PROVIDER="openai",
        OPENAI_API_URL=f"http://127.0.0.1:{server.server_port}/v1",
        OPENAI_API_KEY="k" * 20,
        REDIS_PREFIX="hosted",
    )
    server.shutdown()
    server.server_close()


def gradient() -> Image.Image:
    return Image.linear_gradient("L").resize((900, 600)).convert("RGB")


def turned(kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(gradient(), kind, exif=exif)


def animated(kind: str) -> bytes:
    frames = [gradient(), gradient().rotate(90), gradient().rotate(180)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=40)


def cut_scan() -> bytes:
    data = encoded(Image.effect_noise((900, 600), 80).convert("RGB"), "JPEG")
    return data[: len(data) // 2] + b"\xff\xd9"


def bad_stream() -> bytes:
    data, pixels = encoded(gradient(), "PNG"), b"IDATx"
    chunk = struct.pack(">I", 1) + pixels + zlib.crc32(pixels).to_bytes(4, "big")
    return data[:33] + chunk + data[-12:]


HOSTILE: dict[str, tuple[Callable[[], bytes], tuple[int, int] | None]] = {
    "a turned jpeg": (lambda: turned("JPEG"), (171, 256)),
    "a turned png": (lambda: turned("PNG"), (171, 256)),
    "a turned webp": (lambda: turned("WEBP"), (171, 256)),
    "an animated webp": (lambda: animated("WEBP"), (256, 171)),
    "an animated png": (lambda: animated("PNG"), (256, 171)),
    "a jpeg whose pixels are cut off": (cut_scan, (256, 171)),
    "a cmyk jpeg": (lambda: encoded(gradient().convert("CMYK"), "JPEG"), (256, 171)),
    "a progressive jpeg": (lambda: encoded(gradient(), "JPEG", progressive=True), (256, 171)),
    "a png of 16 bits": (lambda: encoded(Image.new("I;16", (900, 600), 40_000), "PNG"), (256, 171)),
    "a palette with transparency": (lambda: encoded(gradient().quantize(64), "PNG", transparency=3), (256, 171)),
    "a png of fifty megapixels": (lambda: encoded(Image.new("L", (8_000, 6_200)), "PNG"), (256, 198)),
    "a png whose pixels are no stream": (bad_stream, None),
    "a webp of 48 megapixels": (lambda: black_webp(8_000, 6_000), None),
}


@pytest.mark.parametrize("prompt", HOSTILE)
def test_odd_and_hostile_images_have_a_thumbnail_or_a_clear_error(hosting: Service, prompt: str) -> None:
    make, size = HOSTILE[prompt]
    Serving.files[prompt] = make()
    (entry,) = hosting.made(prompt=prompt)["data"]
    before = made(hosting)
    answers = [hosting.get(f"{entry['url']}&size=256") for _ in range(3)]
    if size is None:
        assert [answer.error for answer in answers] == [(415, "unsupported_image")] * 3
        assert made(hosting) == before
    else:
        assert {(answer.status, shown(answer.body)) for answer in answers} == {(200, ("WEBP", size))}
        assert made(hosting) == before + 1
    assert hosting.get(entry["url"]).status == 200


def test_a_png_of_268_megapixels_never_becomes_an_image(hosting: Service) -> None:
    header = struct.pack(">IIBBBBB", 16_384, 16_384, 8, 0, 0, 0, 0)
    stream = deflated_zeros(16_385 * 64, 256)
    chunks = [(b"IHDR", header), (b"IDAT", stream), (b"IEND", b"")]
    framed = [struct.pack(">I", len(d)) + k + d + zlib.crc32(k + d).to_bytes(4, "big") for k, d in chunks]
    Serving.files["a bomb"] = b"\x89PNG\r\n\x1a\n" + b"".join(framed)
    task = hosting.finished(hosting.accepted(prompt="a bomb"))
    assert (task["status"], task["error"]["code"]) == ("failed", "upstream_bad_response")
    assert hosting.get(f"/api/images/{task['taskId']}/0?size=256").status == 404
