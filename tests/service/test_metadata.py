"""Parameters in the files of images that the service stores, EMBED_METADATA=true."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.emulator_fixtures import EmulatorProcess
from tests.service.conftest import StartService
from tests.service.running import Service, eventually

USER_COMMENT, EXIF_POINTER = 0x9286, 0x8769
KINDS = ["png", "jpeg", "webp"]


@pytest.fixture(scope="module")
def plain(start_for_module: StartService, upstream: EmulatorProcess) -> Service:
    return start_for_module(upstream.url, REDIS_PREFIX="plain")


@pytest.fixture(scope="module", params=["disk", "redis"])
def embedding(request: pytest.FixtureRequest, start_for_module: StartService, upstream: EmulatorProcess) -> Service:
    store = request.param
    return start_for_module(upstream.url, EMBED_METADATA="true", IMAGE_STORE=store, REDIS_PREFIX=f"in-{store}")


def text_in(data: bytes) -> str:
    """Return the text that the web UI of AUTOMATIC1111 shows for a file."""
    with Image.open(io.BytesIO(data)) as image:
        if image.format == "PNG":
            return str(image.info.get("parameters", ""))
        comment = image.getexif().get_ifd(EXIF_POINTER).get(USER_COMMENT, b"")
        return bytes(comment[8:]).decode("utf-16-be")


def pixels(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        return image.tobytes()


def check_entries(service: Service, task: dict[str, Any], prompt: str) -> list[bytes]:
    """Check that each entry describes the served file, with the parameters in it; return the files."""
    served = []
    for entry in task["data"]:
        data = service.get(entry["url"]).body
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
        *lines, last = text_in(data).split("\n")
        assert lines == [prompt, "Negative prompt: 模糊"]
        assert f"Seed: {entry['seed']}, Size: {entry['width']}x{entry['height']}, Model: m/one, Version" in last
        assert last.startswith("Steps: 4, CFG scale: 3.5, ")
        served.append(data)
    spool = Path(service.settings["DATA_DIR"]) / "spool"
    eventually(lambda: not list(spool.glob("*/*.part")))
    return served


REQUEST = {"negativePrompt": "模糊", "steps": 4, "guidanceScale": 3.5, "seed": 11, "model": "m/one", "n": 2}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [128, 1024])
def test_linked_images_have_their_parameters_and_the_same_pixels(
    embedding: Service, plain: Service, kind: str, side: int
) -> None:
    request = REQUEST | {"prompt": f"{kind} {side} 狐狸", "width": side, "height": side, "outputFormat": kind}
    served = check_entries(embedding, embedding.made(**request), str(request["prompt"]))
    bare = [plain.get(entry["url"]).body for entry in plain.made(**request)["data"]]
    assert list(map(pixels, served)) == list(map(pixels, bare))
    assert {text_in(data) for data in bare} == {""}


@pytest.mark.parametrize("kind", KINDS)
def test_images_in_the_answer_have_their_parameters(start_service: StartService, kind: str) -> None:
    with EmulatorProcess("--image", "png") as upstream:
        service = start_service(
            PROVIDER="openai", OPENAI_API_URL=f"{upstream.url}/v1", OPENAI_API_KEY="k" * 20, EMBED_METADATA="true"
        )
        request = REQUEST | {"prompt": f"in the answer {kind}", "outputFormat": kind}
        assert len(check_entries(service, service.made(**request), str(request["prompt"]))) == 2


def test_files_stay_as_the_provider_made_them_unless_it_is_set(plain: Service) -> None:
    (entry,) = plain.made(prompt="as it came")["data"]
    assert text_in(plain.get(entry["url"]).body) == ""


def test_the_setting_has_no_effect_on_links_that_stay_with_the_provider(
    start_service: StartService, upstream: EmulatorProcess
) -> None:
    service = start_service(upstream.url, EMBED_METADATA="true", IMAGE_STORE="upstream")
    (entry,) = service.made(prompt="stays there")["data"]
    assert set(entry) == {"url", "index", "seed"}
    eventually(lambda: "EMBED_METADATA has no effect with IMAGE_STORE=upstream" in service.log)
