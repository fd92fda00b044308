"""Models of DashScope, and calls of them."""

from __future__ import annotations

from typing import Any

from imagegen.providers.protocol import Call
from tests.providers.conftest import MakeCall

OLD, MESSAGE, SYNC = "wanx2.1-t2i-turbo", "wan2.6-t2i", "qwen-image-2.0"


def prompted(make_call: MakeCall, switch: str = "", model: str = OLD, **fields: Any) -> Call:
    prompt = f"a cat {{{{fault:{switch}}}}}" if switch else "a cat"
    return make_call(model=model, prompt=prompt, count=fields.get("n", 1), **fields)
