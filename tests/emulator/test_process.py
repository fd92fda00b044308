"""Tests of the emulator as a separate process."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

from imagegen.emulator.__main__ import main
from tests import forked
from tests.emulator_fixtures import EmulatedUpstream, EmulatorProcess
from tests.support import eventually

REQUEST = {"model": "m", "prompt": "a cat"}
HEADERS = {"Authorization": "Bearer any"}


async def test_the_program_prints_readiness_and_exits_on_sigterm(session: aiohttp.ClientSession) -> None:
    with EmulatorProcess("--fault", "503 retry_after=4", "--delay", "0.05") as upstream:
        async with session.post(upstream.url + "/images/generations", json=REQUEST, headers=HEADERS) as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "4")
        assert (upstream.ledger()["total"], upstream.ledger()["paid"]) == (1, 1)
        upstream.clear()
        upstream.script("ok", {"fault": "hang"})
        async with session.post(upstream.url + "/images/generations", json=REQUEST, headers=HEADERS) as response:
            assert response.status == 200
        upstream.expire_links()
        url = upstream.url + "/images/generations"
        hanging = asyncio.ensure_future(session.post(url, json=REQUEST, headers=HEADERS))
        await eventually(lambda: upstream.ledger()["in_flight"])
        hanging.cancel()
        await eventually(lambda: not upstream.ledger()["in_flight"])
        assert [call["outcome"] for call in upstream.ledger()["calls"]] == [200, "hang"]
        assert len(upstream.ledger("a cat")["calls"]) == 2
        assert upstream.ledger("a dog & a cat")["calls"] == []
    assert upstream.process.returncode == 0  # not killed after a while


async def test_a_taken_port_is_one_line_and_exit_code_2(upstream: EmulatedUpstream) -> None:
    port = upstream.host.split(":")[1]
    command = ["-m", "imagegen.emulator", "--port", port]
    ended = await asyncio.to_thread(forked.run, command, cwd=Path.cwd(), env=os.environ)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("the emulator can't start: ")
    assert ended.stderr.count("\n") == 1


def test_an_unknown_fault_on_the_command_line_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--fault", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--rate-per-minute", "0"], ["--delay", "-1"], ["--image", "gif"]])
def test_a_wrong_argument_is_rejected(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_the_emulator_imports_nothing_else_of_this_project() -> None:
    code = "import sys, imagegen.emulator.__main__; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    loaded = ended.stdout.split()
    ours = [name for name in loaded if name.startswith("imagegen.") and not name.startswith("imagegen.emulator")]
    assert (ours, "PIL" in loaded) == ([], False)
