"""Real client packages, both majors of each, in separate processes that run calls for the tests.

The versions of this environment are used unchanged, and share one process. Two majors can't share one environment, so
others are installed once into `.sdks/`, with those dependencies that this environment lacks.
"""

from __future__ import annotations

import asyncio
import fcntl
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.certificates import with_whole_bundle

ROOT = Path(__file__).resolve().parents[3]
CACHE = ROOT / ".sdks"
SCRIPT = Path(__file__).with_name("sdk_calls.py")

LACKING = {"openai": ("httpx2==2.16.2", "httpcore2==2.16.2", "truststore==0.10.5")}
"""Dependencies of the installed versions that are not in this environment."""

_ATTEMPTS = 3
_ATTEMPT_S = 100.0
_RUN_S = 180.0
_END_S = 10.0


@dataclass(frozen=True, slots=True)
class Sdk:
    """Version of a client package with its mode (`sync` or `async`)."""

    name: str
    version: str
    mode: str = "sync"

    def __str__(self) -> str:
        return f"{self.name}-{self.version}-{self.mode}"

    @property
    def major(self) -> int:
        return int(self.version.partition(".")[0])


@dataclass(frozen=True, slots=True)
class Call:
    """Call of a client. base: its base URL; method: dotted; options: of the client; fields: of the call.

    files: one base64 text or a list of them for each field.
    """

    base: str
    fields: dict[str, Any] = field(default_factory=dict)
    method: str = "images.generate"
    options: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str | list[str]] = field(default_factory=dict)


class Packages:
    """Processes with the real packages: one for each environment, started at its first call, until `close`."""

    def __init__(self) -> None:
        self._processes: dict[Path | None, subprocess.Popen[str]] = {}

    async def run(self, sdk: Sdk, calls: Sequence[Call], *, at_once: bool = False) -> list[dict[str, Any]]:
        """Return each call's result: `{"answer": …}`, `{"events": […]}`, or `{"error": class, "status_code": …, …}`.

        at_once: the calls of an asynchronous client begin together.
        """
        process = await asyncio.to_thread(self._process, sdk)
        batch = {
            "sdk": sdk.name,
            "version": sdk.version,
            "mode": sdk.mode,
            "at_once": at_once,
            "calls": [asdict(call) for call in calls],
        }
        answering = asyncio.ensure_future(asyncio.to_thread(_exchange, process, json.dumps(batch)))
        try:
            async with asyncio.timeout(_RUN_S):
                line = await asyncio.shield(answering)
        except TimeoutError:
            process.kill()
            await answering
            raise
        return list(json.loads(line))

    def close(self) -> None:
        for process in self._processes.values():
            process.communicate(timeout=_END_S)

    def _process(self, sdk: Sdk) -> subprocess.Popen[str]:
        place = installed(sdk.name, sdk.version)
        if place not in self._processes or self._processes[place].poll() is not None:
            self._processes[place] = _start(place)
        return self._processes[place]


def _start(place: Path | None) -> subprocess.Popen[str]:
    """Start a process with the packages of a folder, or with those of this environment."""
    others = ("OPENAI_", "TOGETHER_", "PYTHONDONTWRITEBYTECODE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    environment["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise it loads prices from the network
    if place is not None:
        environment["PYTHONPATH"] = str(place)
    command = [sys.executable, "-P", str(SCRIPT)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _exchange(process: subprocess.Popen[str], line: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    assert answer, "the process ended; its last words are on stderr"
    return answer


def installed(name: str, version: str) -> Path | None:
    """Return the folder of that version, installed if missing; None if it is this environment's version."""
    try:
        if importlib.metadata.version(name) == version:
            return None
    except importlib.metadata.PackageNotFoundError:
        pass
    place = CACHE / f"{name}-{version}-{sys.implementation.cache_tag}"
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            _install(name, version, place)
    return place


def _install(name: str, version: str, place: Path) -> None:
    """Install atomically, without compiling the many modules that no test imports. Raises RuntimeError if it can't."""
    failure = ""
    for _ in range(_ATTEMPTS):
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            target = Path(folder) / "packages"
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
            command += ["--no-deps", "--target", str(target), f"{name}=={version}", *LACKING.get(name, ())]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=_ATTEMPT_S, env=with_whole_bundle(), check=False
                )
            except subprocess.TimeoutExpired as late:
                failure = str(late)
                continue
            if not done.returncode:
                target.rename(place)
                return
            failure = done.stderr[-2000:]
    raise RuntimeError(f"{name} {version} could not be installed:\n{failure}")
