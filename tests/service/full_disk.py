"""Disk without space, for the tests that may mount one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def full_disk(folder: Path, limit: str) -> Iterator[Path]:
    """Mount a disk without space there."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", limit, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("no right to mount a small disk here")
    try:
        (folder / "rest").write_bytes(bytes(2**16))
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
