"""Tests of `make install` on a machine whose Python was upgraded since the virtual environment was made."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def make(folder: Path, *arguments: str) -> str:
    """Run make with a virtual environment in a folder; return what it printed. Raises CalledProcessError."""
    command = ["make", "-C", str(ROOT), f"VENV={folder}", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def lose_python(folder: Path) -> None:
    for name in ("python", "python3", f"python3.{sys.version_info.minor}"):
        (folder / "bin" / name).unlink(missing_ok=True)
    (folder / "bin" / "python3").symlink_to(folder / "no" / "python3")
    (folder / "bin" / "python").symlink_to("python3")


def get_packages_of_another_version(folder: Path) -> None:
    (library,) = (folder / "lib").iterdir()
    library.rename(library.with_name("python3.10"))


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Return a virtual environment in which make has installed the service, as far as make sees."""
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (folder / ".runtime-installed").touch()
    return folder


def test_an_installed_service_is_not_installed_again(installed: Path) -> None:
    assert "-m pip" not in make(installed, "-n", "install")


@pytest.mark.parametrize("change", [lose_python, get_packages_of_another_version])
def test_after_an_upgrade_of_python_the_service_is_installed_into_a_new_virtual_environment(
    installed: Path, change: Callable[[Path], None]
) -> None:
    change(installed)
    steps = make(installed, "-n", "install")
    assert 0 < steps.index("-m venv --clear") < steps.index("install -c constraints.txt -e .")


def test_a_virtual_environment_whose_python_is_gone_is_made_again(installed: Path) -> None:
    lose_python(installed)
    make(installed, f"{installed}/bin/python")
    subprocess.run([f"{installed}/bin/python", "-m", "pip", "--version"], capture_output=True, check=True)


def test_a_folder_that_is_no_virtual_environment_is_not_cleared(tmp_path: Path) -> None:
    steps = make(tmp_path, "-n", f"{tmp_path}/bin/python")
    assert " -m venv " in steps
    assert "--clear" not in steps
