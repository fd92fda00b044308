"""Program `python -m bench` of which the services, emulators and loads are forked: `python forked_bench.py NAME …`.

They are forked from this process, which has imported all that they need, and start in a tenth of the CPU time. What a
benchmark measures of a start is wrong here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.__main__ import main
from tests import orphans
from tests.forked import PipedProcess, fork_parent

new_process = subprocess.Popen


def start(command: Sequence[str], **options: Any) -> object:
    if command[0] != sys.executable or command[1] == "-c" or "--help" in command:
        return new_process(command, **options)
    stderr = 2 if options.get("stderr") is None else options["stderr"]
    with Path(os.devnull).open("w") as nothing:
        return PipedProcess(
            command[1:],
            cwd=options["cwd"],
            env=options.get("env") or os.environ,
            stderr=nothing if stderr == subprocess.DEVNULL else stderr,
        )


if __name__ == "__main__":
    orphans.end_started_programs()
    fork_parent()
    subprocess.Popen = start  # type: ignore[assignment, misc]  # a function in place of a class
    main()
