"""`python newer.py`: a future version of the service, with entries and records that this one can't read."""

from __future__ import annotations

from imagegen.queue import codec as records

records.VERSION = 2

from imagegen.redis_client import lua  # noqa: E402 - the scripts take the version when they are read
from imagegen.redis_client.multiplexer import Script  # noqa: E402 - as above

_load_script = lua.load_script


def _newer_script(package: str, *names: str) -> Script:
    return Script(_load_script(package, *names).text.replace("return '1 '", "return '2 '"))


lua.load_script = _newer_script

from imagegen.app import main  # noqa: E402 - as above

if __name__ == "__main__":
    main()
