"""`python dying.py`: the service, which kills itself at the step that the file `KILL_FILE` names.

Steps: `sent` (the submit is on the wire, and the provider has it), `accepted` (the provider has answered, and the
handle of the job is not written), `polled N` (before poll N of a job), `saved` (an image is in DATA_DIR). The instance
that dies removes the file, so that of several with one file one dies.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

from imagegen.images.disk import DiskStore
from imagegen.process import main
from imagegen.providers.job_api import JobApiProvider
from imagegen.queue.worker_queue import WorkerQueue
from imagegen.worker.progress import ProgressReporter

STEP = Path(os.environ["KILL_FILE"])
ARRIVED_S = 0.15


def reached(*steps: str) -> bool:
    try:
        return STEP.read_text() in steps
    except FileNotFoundError:
        return False


def kill() -> None:
    """Kill this process, unless another one has removed the file."""
    try:
        STEP.unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def on_sent(sent: Any) -> Any:
    def watched(self: ProgressReporter) -> None:
        if reached("sent"):
            threading.Timer(ARRIVED_S, kill).start()
        sent(self)

    return watched


def on_record_job(record_job: Any) -> Any:
    async def watched(self: WorkerQueue, *args: Any) -> Any:
        if reached("accepted", "sent"):  # after a pause of the process its timer may be late
            kill()
        return await record_job(self, *args)

    return watched


def on_ask(ask: Any) -> Any:
    polls: dict[str, int] = {}

    async def watched(self: JobApiProvider, handle: Any) -> Any:
        polls[handle.id] = polls.get(handle.id, 0) + 1
        if reached(f"polled {polls[handle.id]}"):
            kill()
        return await ask(self, handle)

    return watched


def on_save(save: Any) -> Any:
    async def watched(self: DiskStore, *args: Any) -> None:
        await save(self, *args)
        if reached("saved"):
            kill()

    return watched


if __name__ == "__main__":
    DiskStore.save = on_save(DiskStore.save)  # type: ignore[method-assign]
    ProgressReporter.sent = on_sent(ProgressReporter.sent)  # type: ignore[method-assign]
    WorkerQueue.record_job = on_record_job(WorkerQueue.record_job)  # type: ignore[method-assign]
    JobApiProvider._poll_checked = on_ask(JobApiProvider._poll_checked)  # type: ignore[method-assign]
    main()
