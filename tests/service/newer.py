"""`python newer.py`: a future version of the service, with entries and records that this one can't read."""

from __future__ import annotations

import sys

for name in [name for name in sys.modules if name.partition(".")[0] == "imagegen"]:
    del sys.modules[name]  # this process is forked from one that has imported them

from imagegen.queue import codec  # noqa: E402

NEWER = codec.INPUTS_VERSION + 1
codec.version_of = lambda task: NEWER
codec.VERSION = NEWER

from imagegen.process import main  # noqa: E402 - the verbs take function and version when they are imported

if __name__ == "__main__":
    main()
