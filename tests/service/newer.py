"""`python newer.py`: a future version of the service, with entries and records that this one can't read."""

from __future__ import annotations

from imagegen.tasks import stored_version

NEWER = stored_version.INPUTS_VERSION + 1
stored_version.version_of = lambda _task: NEWER

from imagegen.queue import codec  # noqa: E402 - it takes the function when it is imported

codec.VERSION = NEWER

from imagegen.process import main  # noqa: E402 - the verbs take the version when they are imported

if __name__ == "__main__":
    main()
