"""Installation of the peers under `.bench/<name>/`, and their processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.servers import ROOT

HERE = Path(__file__).resolve().parent
FOLDER = ROOT / ".bench"
INSTALL_S = 300.0


class NotMeasured(Exception):
    """Reason why a peer has no figures."""


def script(name: str) -> Path:
    return next(path for path in HERE.glob(f"{name}_peer.*") if path.suffix in {".py", ".mjs"})


def pins(name: str) -> Path:
    """Return the file of its exact versions."""
    return HERE / name / "package.json" if script(name).suffix == ".mjs" else HERE / f"{name}.txt"


def command(name: str) -> list[str]:
    """Run its script. Installs the peer first if it is missing or its pins have changed. Raises NotMeasured."""
    folder, wanted = FOLDER / name, pins(name)
    done = folder / "installed-pins"
    if not done.is_file() or done.read_bytes() != wanted.read_bytes():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (_install_node if wanted.suffix == ".json" else _install_python)(folder, wanted)
        shutil.copyfile(wanted, done)
    program = "node" if wanted.suffix == ".json" else str(_python(folder))
    return [program, str(script(name))]


def output(arguments: Sequence[str], folder: Path, limit_s: float) -> str:
    """Return the output of a program. Raises NotMeasured if it failed, is missing or took too long."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(
            arguments, cwd=folder, env=kept, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except FileNotFoundError:
        raise NotMeasured(f"there is no {Path(arguments[0]).name} here") from None
    except subprocess.TimeoutExpired:
        raise NotMeasured(f"not done in {limit_s:g} s") from None
    if done.returncode:
        raise NotMeasured(_reason(done.stderr))
    return done.stdout


def _install_python(folder: Path, wanted: Path) -> None:
    output([sys.executable, "-m", "venv", str(folder)], folder, INSTALL_S)
    pip = [str(_python(folder)), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    output([*pip, "-r", str(wanted)], folder, INSTALL_S)


def _install_node(folder: Path, wanted: Path) -> None:
    shutil.copyfile(wanted, folder / "package.json")
    output(["npm", "install", "--no-package-lock", "--no-audit", "--no-fund"], folder, INSTALL_S)


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _reason(errors: str) -> str:
    """Return the line with the cause: the first that names an error, else the last, as in a traceback."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    called = [line for line in lines if line.lower().startswith(("error", "npm err"))]
    return (called or lines[-1:] or ["failed without a word"])[0][:120]
