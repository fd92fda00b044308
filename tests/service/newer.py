"""`python newer.py`: a future version of the service, with entries and records that this one can't read."""

from __future__ import annotations

from imagegen.queue import codec

NEWER = codec.INPUTS_VERSION + 1
codec.version_of = lambda _task: NEWER
codec.VERSION = NEWER

from imagegen.process import main  # noqa: E402 - the verbs take function and version when they are imported

if __name__ == "__main__":
    main()
