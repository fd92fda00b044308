"""Drawing of the sandbox at next to no cost, for tests of what becomes of its images.

A real one of the usual size takes 0.2 s of CPU. What they show is tested in tests/providers/test_sandbox.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from imagegen.emulator.small_images import DrawnImage, draw
from imagegen.providers.drawing import render
from imagegen.providers.drawing.input_thumbnails import InputThumbnails
from imagegen.providers.drawing.render import DrawingSpec

RealDrawing = render.Drawing


class QuickDrawing:
    """Bands of colour in the requested size and format, others for each spec; it has the methods of `Drawing`."""

    def __init__(self, spec: DrawingSpec) -> None:
        self._spec = spec

    def paint(self) -> None:
        """Do nothing."""

    def blur_card(self) -> None:
        """Do nothing."""

    def write_words(self) -> None:
        """Do nothing."""

    def show_inputs(self, inputs: InputThumbnails) -> None:
        """Do nothing."""

    def encode(self) -> bytes:
        digest = hashlib.md5(repr(self._spec).encode(), usedforsecurity=False).hexdigest()
        return draw(DrawnImage(self._spec.output_format, self._spec.width, self._spec.height, digest))


def install() -> None:
    """Let the sandbox of this process draw in this way."""
    render.Drawing = QuickDrawing  # type: ignore[assignment, misc]  # a class in place of another one


def restore() -> None:
    """Let the sandbox of this process draw its images itself."""
    render.Drawing = RealDrawing  # type: ignore[misc]  # the class that was there


@contextmanager
def draw_quickly() -> Iterator[None]:
    """Let the sandbox of this process draw in this way meanwhile."""
    install()
    try:
        yield
    finally:
        restore()
