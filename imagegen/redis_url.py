"""Owns the forms that REDIS_URL may have with REDIS_TOKEN, and makes of each the URL that redis-py takes."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, parse_qs, quote, urlsplit

_FORMS = "redis://…, rediss://…, unix:///…, or Upstash's https://… with REDIS_TOKEN"
_UPSTASH = "upstash.io"
_UPSTASH_PORT = 6379


def redis_py_url(url: str, token: str | None) -> str:
    """The URL with the token as its password, where it has none of its own.

    Raises ValueError with a text that says what is wrong and holds no part of the URL, since that may be a password.
    """
    parts = _split(url)
    if parts.scheme == "https":
        return _from_rest_address(parts, token)
    if parts.scheme not in {"redis", "rediss", "unix"}:
        raise ValueError(f"its scheme is not known; allowed: {_FORMS}")
    _check_place(parts)
    # Upstash speaks TLS only and resets plain connections: https://upstash.com/docs/redis/troubleshooting/econn_reset
    scheme = "rediss" if parts.scheme == "redis" and _is_upstash(parts.hostname or "") else parts.scheme
    query = f"?{parts.query}" if parts.query else ""
    return f"{scheme}://{_with_password(parts, token)}{parts.path}{query}"


def _split(url: str) -> SplitResult:
    if not url.isprintable() or " " in url:
        raise ValueError(f"it holds a space or control character; allowed: {_FORMS}")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # its own text quotes the password, so it is not chained
        message = "it can't be read as an address; write characters like / # ? @ in the password as %2F %23 %3F %40"
        raise ValueError(message) from None
    if port == 0:
        raise ValueError("its port must be from 1 to 65535")
    return parts


def _check_place(parts: SplitResult) -> None:
    if parts.scheme == "unix":
        if not parts.path.startswith("/") or parts.netloc.rpartition("@")[2]:
            raise ValueError("a unix:// address needs the absolute path of the socket: unix:///run/redis.sock")
    elif not parts.hostname:
        raise ValueError("it names no host; allowed: redis://HOST:6379 and the like")
    elif not re.fullmatch(r"(/[0-9]*)?", parts.path):
        raise ValueError("after the host only the number of a database may follow: redis://HOST:6379/0")
    if parts.fragment:
        raise ValueError("it holds a #; write it as %23 in a password")


def _from_rest_address(parts: SplitResult, token: str | None) -> str:
    """Upstash's REST address and token open the TCP port of the same host, too."""
    password = parts.password or (quote(token, safe="") if token else "")
    if not parts.hostname or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError("an https:// address must be Upstash's REST address, a host and no more")
    if not password:
        raise ValueError("an https:// address needs REDIS_TOKEN beside it")
    return f"rediss://default:{password}@{_host(parts)}:{_UPSTASH_PORT}"


def _with_password(parts: SplitResult, token: str | None) -> str:
    place = parts.netloc.rpartition("@")[2]
    if token is None or parts.password or "password" in parse_qs(parts.query):
        return parts.netloc
    return f"{parts.username or 'default'}:{quote(token, safe='')}@{place}"


def _host(parts: SplitResult) -> str:
    host = parts.hostname or ""
    return f"[{host}]" if ":" in host else host


def _is_upstash(host: str) -> bool:
    return host == _UPSTASH or host.endswith(f".{_UPSTASH}")
