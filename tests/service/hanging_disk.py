"""`python hanging_disk.py`: the service with its images on a network mount, which hangs while `HANG_FILE` exists.

Calls of the system for the folders of images and of the spool then wait, as those on NFS do without its server; others
may be in HANG_PLACES, with colons between. A disk that does not answer for a second counts as one that does not answer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imagegen import disk_patience
from imagegen.images import disk_watch, mounts, spool, store
from imagegen.process import main

HANG = os.environ["HANG_FILE"]
PLACES = os.environ.get("HANG_PLACES", f"{os.sep}images{os.sep}:{os.sep}spool{os.sep}").split(":")

stat = os.stat


def hangs() -> bool:
    try:
        stat(HANG)
    except FileNotFoundError:
        return False
    return True


def waiting(call: Callable[..., Any]) -> Callable[..., Any]:
    def wait(*args: Any, **kwargs: Any) -> Any:
        place = f"{args[0]}{os.sep}" if args and isinstance(args[0], str | os.PathLike) else ""
        while any(name in place for name in PLACES) and hangs():
            time.sleep(0.01)
        return call(*args, **kwargs)

    return wait


if __name__ == "__main__":
    for name in ("link", "mkdir", "open", "replace", "scandir", "stat", "statvfs", "unlink", "utime"):
        setattr(os, name, waiting(getattr(os, name)))
    mounts.MOUNTS = Path(os.environ["MOUNTS_FILE"])
    disk_patience.ANSWER_S = 0.5
    disk_watch.SLOW_CHECK_S = spool.FILL_S = store.READ_S = 1.0
    main()
