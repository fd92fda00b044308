"""`python newer.py`: the service as its next version may be, with entries and records that this one can't read."""

from __future__ import annotations

from imagegen.queue import records

records.VERSION = 2

from imagegen.queue import scripts  # noqa: E402 - it takes the version from there

_lua = scripts.lua


def _newer_lua(name: str) -> str:
    return _lua(name).replace("return '1 '", "return '2 '")


scripts.lua = _newer_lua

from imagegen.app import main  # noqa: E402 - as above

if __name__ == "__main__":
    main()
