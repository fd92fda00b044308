"""`python older.py`: the service with the entries and records of its first schema version alone."""

from __future__ import annotations

import sys

for name in [name for name in sys.modules if name.partition(".")[0] == "imagegen"]:
    del sys.modules[name]  # this process is forked from one that has imported them

from imagegen.queue import codec as records  # noqa: E402
from imagegen.queue.codec import FIRST_VERSION  # noqa: E402

records.VERSION = FIRST_VERSION

from imagegen.process import main  # noqa: E402 - the verbs take the version when they are imported

if __name__ == "__main__":
    main()
