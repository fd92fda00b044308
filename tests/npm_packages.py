"""Packages for Node that tests use, installed once for each lock file."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.certificates import with_whole_bundle

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".sdks"

_FAST = ("--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline", "--fetch-timeout=15000")
_ATTEMPTS = 3
_ATTEMPT_S = 100.0


def installed_packages(folder: Path) -> Path:
    """Return a copy of a folder with the packages of its lock file. Skips without Node or a registry."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    lock = hashlib.sha256((folder / "package-lock.json").read_bytes()).hexdigest()[:12]
    place = CACHE / f"npm-{lock}"
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        place.mkdir(exist_ok=True)
        for source in folder.iterdir():
            if source.is_file():
                shutil.copy(source, place / source.name)
        if not (place / "node_modules" / ".package-lock.json").exists():
            failure: str | None = None
            for _ in range(_ATTEMPTS):
                failure = _install(npm, place)
                if failure is None:
                    break
            else:
                pytest.skip(f"the packages for Node could not be installed: {failure}")
    return place


def _install(npm: str, place: Path) -> str | None:
    """Return why the packages were not installed, or None.

    npm doesn't repeat a download that stops in its middle; the next attempt continues with what its cache has.
    """
    try:
        command, environ = [npm, "ci", *_FAST], with_whole_bundle()
        done = subprocess.run(
            command, cwd=place, env=environ, capture_output=True, text=True, timeout=_ATTEMPT_S, check=False
        )
    except subprocess.TimeoutExpired as late:
        return str(late)
    return done.stderr[-300:] if done.returncode else None
