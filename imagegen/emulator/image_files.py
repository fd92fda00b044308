"""Links of images: short ones that redirect, the files that they lead to, and the faults of both."""

from __future__ import annotations

import hashlib
import random
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import ascii_letters, digits
from typing import Final

from . import together_responses
from .fault_schedule import Fault
from .small_images import DrawnImage, draw
from .together_responses import Response

_ALPHABET: Final = ascii_letters + digits
_KEPT: Final = 100_000
_PRIVATE: Final = "http://169.254.169.254/latest/meta-data/"

_GONE: Final = Response(404, b"Not Found", together_responses.TEXT)
# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html: the store's word for a signature that is over.
_EXPIRED: Final = Response(
    403,
    b'<?xml version="1.0" encoding="UTF-8"?>\n'
    b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>",
    "application/xml",
)
_HTML: Final = b"<!DOCTYPE html><html><body><script>alert(1)</script>This is no picture.</body></html>"
_SVG: Final = b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"><script>alert(1)</script></svg>'


@dataclass(slots=True)
class Link:
    image: DrawnImage
    fault: Fault | None
    made_at: float
    fetches: int = 0


class ShortLinks:
    """Cache of the last 100,000 links. A link works for `ttl_s` seconds; times are monotonic seconds."""

    def __init__(self, rng: random.Random, ttl_s: float) -> None:
        self._rng = rng
        self._ttl_s = ttl_s
        self._links: dict[str, Link] = {}
        self._dead_before = float("-inf")

    def new_token(self) -> str:
        return "".join(self._rng.choices(_ALPHABET, k=16))

    def mint(self, image: DrawnImage, fault: Fault | None, now: float) -> str:
        """Return the path of a new short link."""
        if len(self._links) >= _KEPT:
            del self._links[next(iter(self._links))]
        token = self.new_token()
        self._links[token] = Link(image, fault, now)
        return f"/shrt/{token}"

    def expire_all(self, now: float) -> None:
        self._dead_before = now

    def answer(self, path: str, base_url: str, user_agent: str, now: float) -> Response:
        """Return the response to a GET of `path`. The CDN refuses clients without a User-Agent."""
        if not user_agent.strip():
            return together_responses.error("403", "")
        kind, _, rest = path.lstrip("/").partition("/")
        link = self._links.get(rest[:16])
        if link is None:
            return _GONE
        if kind == "shrt":
            return Response(302, b"", together_responses.TEXT, {"Location": _target(path, rest[:16], link, base_url)})
        if link.made_at <= self._dead_before or now - link.made_at > self._ttl_s:
            return _EXPIRED
        return _origin(link)


def _target(path: str, token: str, link: Link, base_url: str) -> str:
    name = link.fault.name if link.fault else ""
    if link.fault and name == "image_redirect_private":
        return link.fault.text("target", _PRIVATE)
    if name == "image_redirect_loop":
        return base_url + path
    # https://docs.imgproxy.net: signature, options, then the source's address in base64, here as in the captures.
    signature = token + hashlib.sha256(token.encode()).hexdigest()[:27]
    source = urlsafe_b64encode(f"https://images.invalid/{token}?X-Amz-Expires=3600".encode()).decode().rstrip("=")
    return f"{base_url}/imgproxy/{signature}/format:{link.image.format}/{source}"


def _origin(link: Link) -> Response:
    fault = link.fault
    link.fetches += 1
    if fault is None or (fault.number("link_times", 0) or link.fetches) < link.fetches:
        return _whole(link.image)
    return IMAGE_FAULTS[fault.name](link.image, fault)


def spoiled_bytes(image: DrawnImage, fault: Fault | None) -> bytes:
    """Return the image's bytes for a base64 response, which faults of the link alone do not change."""
    if fault is None:
        return draw(image)
    answer = IMAGE_FAULTS[fault.name](image, fault)
    return answer.body if answer.status == 200 and answer.delivery == "plain" else draw(image)


def _whole(image: DrawnImage) -> Response:
    return Response(200, draw(image), image.content_type, {"Cache-Control": "max-age=3600"})


def _cut(image: DrawnImage, kind: str) -> Response:
    forced = DrawnImage(kind, image.width, image.height, image.digest)
    data = draw(forced)
    return Response(200, data[: len(data) * 3 // 4], forced.content_type)


def _delivered(delivery: str) -> Callable[[DrawnImage, Fault], Response]:
    def made(image: DrawnImage, fault: Fault) -> Response:
        return Response(200, draw(image), image.content_type, delivery=delivery, options=fault.options)

    return made


def _status(status: int, text: bytes) -> Callable[[DrawnImage, Fault], Response]:
    return lambda _image, _fault: Response(status, text, together_responses.TEXT)


IMAGE_FAULTS: Final[Mapping[str, Callable[[DrawnImage, Fault], Response]]] = {
    "image_404": _status(404, b"Not Found"),
    "image_403": _status(403, b"Forbidden"),
    "image_500": _status(500, b"Internal error"),
    "image_empty": _status(200, b""),
    "image_expired": lambda _image, _fault: _EXPIRED,
    "image_html": lambda _image, _fault: Response(200, _HTML, together_responses.HTML),
    "image_svg": lambda _image, _fault: Response(200, _SVG, "image/svg+xml"),
    "image_wrong_type": lambda image, _fault: Response(200, draw(image), together_responses.HTML),
    "image_html_as_png": lambda _image, _fault: Response(200, _HTML, "image/png"),
    "image_truncated_png": lambda image, _fault: _cut(image, "png"),
    "image_truncated_jpeg": lambda image, _fault: _cut(image, "jpeg"),
    "image_short": _delivered("truncated"),
    "image_huge": _delivered("endless"),
    "image_slow": _delivered("trickle"),
    "image_hang": _delivered("hang"),
    "image_reset": _delivered("reset_mid_answer"),
    "image_redirect_loop": lambda image, _fault: _whole(image),
    "image_redirect_private": lambda image, _fault: _whole(image),
}
