"""Check of image bytes: whole PNG, JPEG and WebP files, read in pieces as they arrive and never decoded."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Generator

from imagegen.images.store import VerifiedImage

try:
    from isal.isal_zlib import crc32, crc32_combine  # three times as fast as zlib's
except ImportError:  # no wheel for this platform
    from imagegen.images.crc import crc32, crc32_combine

MAX_SIDE = 16_384
MAX_PIXELS = 50_000_000
MAX_PARTS = 65_536
"""Chunks or segments in one file: keeps the walk over a hostile file short."""

MAX_STEPS, QUICK_STEPS = 4 * MAX_PARTS, 4_000
"""Steps of a walk: some for each part and one for each fill byte. 4,000 take 5 to 10 ms, and suffice for usual images
of 256 KiB."""

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTHS = {0: {1, 2, 4, 8, 16}, 2: {8, 16}, 3: {1, 2, 4, 8}, 4: {8, 16}, 6: {8, 16}}

_EOI, _SOS = 0xD9, 0xDA
_JPEG_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA, 0xCB}
_JPEG_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_IN_A_SCAN = frozenset({0x00, *range(0xD0, 0xD8)})
"""What follows 0xFF within the pixels of a scan: a stuffed zero or a restart marker."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SHOWN_BYTES = 1_024
_MAGIC_BYTES = 12


class NotAnImage(ValueError):
    """The bytes are no whole image of a supported kind. The text reads well after "the image can't be used:".

    lasting: another call would return the same (a GIF, too many pixels), as opposed to damage on the way.
    is_text: they are a page or a message, which a host may send for a moment in place of the image.
    """

    def __init__(self, text: str, *, lasting: bool = False, is_text: bool = False) -> None:
        super().__init__(text)
        self.lasting = lasting
        self.is_text = is_text


class TooManySteps(NotAnImage):
    """The image has more parts than were to be checked."""


class TooManyPixels(NotAnImage):
    """The image has more pixels, or longer sides, than any image here may have."""


def sniff(data: bytes, max_steps: int = MAX_STEPS) -> VerifiedImage:
    """Return the image that `data` is, without what follows its end. Raises NotAnImage, TooManySteps."""
    checker = ImageChecker(max_steps)
    length = checker.feed(data)
    return checker.finish(data if length == len(data) else data[:length])


_SCAN = -1
_Request = tuple[int, int]
_Walk = Generator[_Request, bytes, None]
"""A format's walk over its file. It yields `(n, m)` to pass over n bytes and be sent the next m; with `_SCAN` as m the
pixels of a JPEG scan follow, which are passed over, and it is sent the marker behind them."""


class ImageChecker:
    """Incremental check and SHA-256 of one image file."""

    def __init__(self, max_steps: int = MAX_STEPS) -> None:
        self._steps_left = max_steps
        self.content_type = ""
        self.width = self.height = 0
        self.size_bytes = 0
        self._sha256 = hashlib.sha256()
        self._start = b""
        self._held = b""
        self._crc = self._expected_crc = 0
        self._after_ff = False
        self._scanned = 0
        self._ended = False
        self._walk = self._walk_any()
        self._skipped, self._needed = next(self._walk)

    def feed(self, data: bytes | bytearray | memoryview) -> int:
        """Check the next bytes of the file. Returns how many belong to the image. Raises NotAnImage."""
        if len(self._start) < _SHOWN_BYTES:
            self._start += bytes(data[: _SHOWN_BYTES - len(self._start)])
        with memoryview(data) as view:
            at = self._advance(view)
            with view[:at] as used:
                self._sha256.update(used)
                if self.content_type in ("", "image/png"):
                    self._crc = crc32(used, self._crc)
        self.size_bytes += at
        return at

    def finish(self, data: bytes) -> VerifiedImage:
        """Return the image of the bytes that were fed and are `data`. Raises NotAnImage if it is not whole."""
        self.check_ended()
        return VerifiedImage(self.content_type, self.size_bytes, self.width, self.height, self.digest, data)

    def check_ended(self) -> None:
        """Raise NotAnImage if the file is not whole."""
        if not self._start:
            raise NotAnImage("it is empty")
        if not self.content_type and not _begins_an_image(self._start):
            raise _foreign(self._start)
        if not self._ended:
            raise NotAnImage("it is cut off")
        if self.content_type == "image/png" and self._crc != self._expected_crc:
            raise NotAnImage("a check sum in the PNG is wrong")

    @property
    def digest(self) -> str:
        """SHA-256 of the image's bytes so far, 64 hex digits."""
        return self._sha256.hexdigest()

    def _advance(self, view: memoryview) -> int:
        """Continue the walk up to a request that needs more bytes. Return how many belong to the image."""
        at, end, walk = 0, len(view), self._walk
        while at < end and not self._ended:
            start = at + self._skipped
            if start >= end and (start > end or self._needed):
                self._skipped = start - end
                return end
            self._skipped = 0
            if self._needed == _SCAN:
                at = self._scan(view, start)
                continue
            at = start + self._needed - len(self._held)
            if at > end:
                self._held += view[start:]
                return end
            answer, self._held = self._held + view[start:at], b""
            self._steps_left -= 1
            if not self._steps_left:
                raise TooManySteps("it has too many parts", lasting=True)
            try:
                self._skipped, self._needed = walk.send(answer)
                while not (self._skipped or self._needed):
                    self._skipped, self._needed = walk.send(b"")
            except StopIteration:
                self._ended = True
        return at

    def _scan(self, view: memoryview, at: int) -> int:
        """Pass over a scan's pixels; the marker behind them may be split over two pieces."""
        if self._after_ff:
            while view[at] == 0xFF:
                at += 1
                if at == len(view):
                    return at
            self._after_ff = False
            if view[at] not in _IN_A_SCAN:
                return self._end_of_scan(at)
            self._scanned += 1
            at += 1
        match = _JPEG_SCAN_END.search(view, at)
        if match is not None:
            self._scanned += match.start() - at
            return self._end_of_scan(match.start() + 1)
        self._after_ff = at < len(view) and view[len(view) - 1] == 0xFF
        self._scanned += len(view) - at - self._after_ff
        return len(view)

    def _end_of_scan(self, at: int) -> int:
        """Let the walk be sent the marker next, which is at `at`."""
        if not self._scanned:
            raise NotAnImage("the JPEG has no image in it")
        self._needed = 1
        return at

    def _set_size(self, width: int, height: int) -> None:
        """Take the size from a header. Raises NotAnImage before any pixel is read."""
        if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
            kind = TooManyPixels if width and height else NotAnImage
            raise kind(f"it has {width}x{height} pixels; a side may have 1 to {MAX_SIDE}", lasting=True)
        if width * height > MAX_PIXELS:
            raise TooManyPixels(
                f"it has {width}x{height} pixels; at most {MAX_PIXELS // 1_000_000} million", lasting=True
            )
        self.width, self.height = width, height

    def _walk_any(self) -> _Walk:
        start = yield 0, 3
        if start == b"\xff\xd8\xff":
            self.content_type = "image/jpeg"
            yield from self._walk_jpeg()
            return
        start += yield 0, _MAGIC_BYTES - 3
        if start.startswith(_PNG_MAGIC):
            self.content_type = "image/png"
            yield from self._walk_png(start[len(_PNG_MAGIC) :])
        elif start[:4] == b"RIFF" and start[8:12] == b"WEBP":
            self.content_type = "image/webp"
            yield from self._walk_webp(int.from_bytes(start[4:8], "little") + 8)
        else:
            raise _foreign(self._start)

    def _walk_png(self, start: bytes) -> _Walk:
        """https://www.w3.org/TR/png-3/#5DataRep

        The check sums of the chunks give that of the file, which is counted in one go: a call for each chunk would
        release the interpreter lock as often.
        """
        head = start + (yield 0, 8 - len(start))
        length, kind = struct.unpack(">I4s", head)
        if kind != b"IHDR" or length != 13:
            raise NotAnImage("its PNG header is broken")
        colour, skipped = self._read_png_header((yield 0, length)), 0
        palette, pixel_bytes, crc = False, 0, crc32(_PNG_MAGIC + head[:4])
        for _ in range(MAX_PARTS - 1):
            head = yield skipped, 12  # that of the next chunk, behind the check sum of this one
            checksum, next_length, kind = struct.unpack(">II4s", head)
            crc = crc32(head[:8], crc32_combine(crc, checksum, 4 + length))
            length = skipped = next_length
            if kind == b"IDAT":
                pixel_bytes += length
            elif kind == b"IEND":
                checksum = yield length, 4
                if not pixel_bytes or length or (colour == 3 and not palette):
                    raise NotAnImage("the PNG has no image in it")
                self._expected_crc = crc32(checksum, crc32_combine(crc, int.from_bytes(checksum, "big"), 4 + length))
                return
            elif kind == b"IHDR":
                raise NotAnImage("its PNG header is broken")
            elif kind == b"PLTE":
                palette = True
            elif not kind[0] & 0x20:
                raise NotAnImage("the PNG has a chunk that no reader supports")
        raise NotAnImage("it has too many parts", lasting=True)

    def _read_png_header(self, header: bytes) -> int:
        width, height, depth, colour, *methods = struct.unpack(">IIBBBBB", header)
        if depth not in _PNG_DEPTHS.get(colour, ()) or methods[0] or methods[1] or methods[2] > 1:
            raise NotAnImage("its PNG header is broken")
        self._set_size(width, height)
        return int(colour)

    def _walk_jpeg(self) -> _Walk:
        """Check the segments of a JPEG from the first 0xFF after SOI: https://www.w3.org/Graphics/JPEG/itu-t81.pdf."""
        scans, marker = 0, (yield 0, 1)[0]
        for _ in range(MAX_PARTS):
            while marker == 0xFF:  # any number of fill bytes before a marker is legal
                marker = (yield 0, 1)[0]
            if marker == _EOI:
                if not self.width or not scans:
                    raise NotAnImage("the JPEG has no image in it")
                return
            length = int.from_bytes((yield 0, 2), "big") - 2
            if marker < 0xC0 or 0xD0 <= marker <= 0xD8 or length < 0 or (marker in _JPEG_FRAMES and self.width):
                raise NotAnImage("its JPEG markers are broken")
            if marker in _JPEG_FRAMES:
                self._read_jpeg_frame((yield 0, min(length, 6)), length)
                length -= 6
            if marker != _SOS:
                after = yield length, 2
                if after[0] != 0xFF:
                    raise NotAnImage("its JPEG markers are broken")
                marker = after[1]
            elif not self.width:
                raise NotAnImage("its JPEG markers are broken")
            else:
                scans, self._scanned, self._after_ff = scans + 1, 0, False
                marker = (yield length, _SCAN)[0]
        raise NotAnImage("it has too many parts", lasting=True)

    def _read_jpeg_frame(self, frame: bytes, length: int) -> None:
        if len(frame) < 6 or frame[5] not in (1, 2, 3, 4) or length != 6 + 3 * frame[5]:
            raise NotAnImage("its JPEG header is broken")
        height, width = struct.unpack_from(">HH", frame, 1)
        self._set_size(width, height)

    def _walk_webp(self, end: int) -> _Walk:
        """Check the chunks of a WebP: https://developers.google.com/speed/webp/docs/riff_container

        end: of the file, by its header.
        """
        at, first, animated, has_frame = _MAGIC_BYTES, b"", False, False
        for _ in range(MAX_PARTS):
            if at >= end:
                if not has_frame:
                    raise NotAnImage("the WebP has no image in it")
                return
            kind, length = struct.unpack("<4sI", (yield 0, 8))
            at += 8
            if at + length > end:
                raise NotAnImage("its WebP chunks are broken")
            start = yield 0, min(length, 10)
            if not first:
                first, animated = kind, kind == b"VP8X" and bool(start[:1]) and bool(start[0] & 0x02)
                self._read_webp_first(kind, start, length)
                has_frame = kind in _WEBP_FRAMES
            elif kind == b"ANMF" and animated and length > 16 + 8:
                has_frame = True
            elif kind in _WEBP_FRAMES and not animated and not has_frame:
                if _WEBP_FRAMES[kind](start, length) != (self.width, self.height):
                    raise NotAnImage("its WebP header is broken")
                has_frame = True
            padded = min(length + length % 2, end - at)
            yield padded - len(start), 0
            at += padded
        raise NotAnImage("it has too many parts", lasting=True)

    def _read_webp_first(self, kind: bytes, start: bytes, length: int) -> None:
        if kind in _WEBP_FRAMES:
            self._set_size(*_WEBP_FRAMES[kind](start, length))
        elif kind == b"VP8X" and length >= 10:
            self._set_size(int.from_bytes(start[4:7], "little") + 1, int.from_bytes(start[7:10], "little") + 1)
        else:
            raise NotAnImage("the WebP has no image in it")


def _vp8_size(start: bytes, length: int) -> tuple[int, int]:
    """Return the size in the header of a lossy frame: https://www.rfc-editor.org/rfc/rfc6386#section-9.1"""
    if len(start) < 10:
        raise NotAnImage("its WebP header is broken")
    tag_low, tag_high, start_code, width, height = struct.unpack("<HB3sHH", start)
    first_partition_bytes = (tag_high << 16 | tag_low) >> 5
    if tag_low & 1 or start_code != b"\x9d\x01\x2a" or 10 + first_partition_bytes > length:
        raise NotAnImage("its WebP header is broken")
    return width & 0x3FFF, height & 0x3FFF


def _vp8l_size(start: bytes, length: int) -> tuple[int, int]:
    """Return the size in a lossless header.

    https://developers.google.com/speed/webp/docs/webp_lossless_bitstream_specification
    """
    if length < 6 or start[0] != 0x2F or (bits := int.from_bytes(start[1:5], "little")) >> 29:
        raise NotAnImage("its WebP header is broken")
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1


_WEBP_FRAMES = {b"VP8 ": _vp8_size, b"VP8L": _vp8l_size}


def _begins_an_image(start: bytes) -> bool:
    return any(start[: len(magic)] == magic[: len(start)] for magic in (_PNG_MAGIC, b"\xff\xd8\xff", b"RIFF"))


def _foreign(start: bytes) -> NotAnImage:
    """Return the reason why a file is of no supported kind, from its first bytes."""
    text = start.removeprefix(_BYTE_ORDER_MARK).lstrip().lower()
    is_text = text.startswith((b"<", b"{", b"[")) and b"<svg" not in text
    if text.startswith(b"<"):
        what = "it is an SVG, not a PNG, JPEG or WebP" if b"<svg" in text else "it is an HTML or XML page"
    elif text.startswith(b"gif8"):
        what = "it is a GIF, not a PNG, JPEG or WebP"
    else:
        what = "it is JSON" if text.startswith((b"{", b"[")) else "it is not a PNG, JPEG or WebP"
    return NotAnImage(what, lasting=True, is_text=is_text)
