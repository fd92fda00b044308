"""The command `imagegen usage`, while the service runs and after it."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from pathlib import Path

from tests import forked
from tests.service.conftest import StartService
from tests.service.running import RUN, environment


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = environment(folder, {"DATA_DIR": str(folder / "data")})
    return forked.run([str(RUN), "usage", *arguments], cwd=folder, env=environ)


def test_the_command_prints_what_the_service_has_reported(start_service: StartService, tmp_path: Path) -> None:
    service = start_service()
    service.made(prompt="a lighthouse", width=64, height=64, n=2)
    ended = run(tmp_path, "--by", "model")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1].split()[:2] == ["total", "0"], "the last minute is not written yet"
    service.end()
    ended = run(tmp_path, "--json")
    assert ended.returncode == 0, ended.stderr
    assert {name: json.loads(ended.stdout)["total"][name] for name in ("submitted", "completed", "images")} == {
        "submitted": 1,
        "completed": 1,
        "images": 2,
    }
    (row,) = csv.DictReader(io.StringIO(run(tmp_path, "--csv", "--by", "model").stdout))
    assert (row["model"], row["images"]) == ("black-forest-labs/FLUX.1-schnell", "2")
    header, model, total = run(tmp_path, "--by=model").stdout.splitlines()
    assert header.split()[:2] == ["model", "submitted"]
    assert model.split()[:2] == ["black-forest-labs/FLUX.1-schnell", "1"]
    assert total.split()[:2] == ["total", "1"]
    ended = run(tmp_path, "--from", "yesterday")
    text = "--from: must be a date of the form YYYY-MM-DD, from 1970-01-01 on\n"
    assert (ended.returncode, ended.stderr) == (2, text)
