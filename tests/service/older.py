"""`python older.py`: the service with the entries and records of its first schema version alone."""

from __future__ import annotations

from imagegen.queue import codec as records
from imagegen.queue.codec import FIRST_VERSION

records.VERSION = FIRST_VERSION

from imagegen.process import main  # noqa: E402 - the verbs take the version when they are imported

if __name__ == "__main__":
    main()
