"""Lua scripts of the packages, read from the files next to their code."""

from __future__ import annotations

from importlib.resources import files

from imagegen.redis_client.multiplexer import Script


def load_script(package: str, *names: str) -> Script:
    """Return the script made of the files `<name>.lua` of a package, in this order."""
    return Script("".join(files(package).joinpath(f"{name}.lua").read_text() for name in names))
