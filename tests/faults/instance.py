"""Service that kills itself at the step that the file `KILL_FILE` names.

`SURE_DEAD_S`: seconds until what a dead instance has ended is counted.

Steps: those of `fleet.KILL_STEPS`. The package has no code for this.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from imagegen.accounts import ledger_recovery
from imagegen.process import main
from imagegen.queue.worker_queue import WorkerQueue

KILL_FILE = Path(os.environ["KILL_FILE"])

ledger_recovery.SURE_DEAD_S = float(os.environ.get("SURE_DEAD_S", ledger_recovery.SURE_DEAD_S))


def reached(step: str) -> None:
    if KILL_FILE.exists() and KILL_FILE.read_text() == step:
        KILL_FILE.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


def watch(name: str) -> None:
    verb: Callable[..., Awaitable[Any]] = getattr(WorkerQueue, name)

    async def watched(self: WorkerQueue, *args: Any) -> Any:
        reached(f"{name}.before")
        result = await verb(self, *args)
        reached(f"{name}.after")
        return result

    setattr(WorkerQueue, name, watched)


if __name__ == "__main__":
    watch("start")
    watch("finish")
    main()
