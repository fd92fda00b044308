"""Forms of REDIS_URL with REDIS_TOKEN, and the URL for redis-py of each."""

from __future__ import annotations

import os
import re
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from msgspec import Struct

from imagegen.setting_parsers import is_host

_FORMS = (
    "redis://…, rediss://…, unix:///…, redis+sentinel://HOST:PORT,HOST:PORT/SERVICE, "
    "or Upstash's https://… with REDIS_TOKEN"
)
_SENTINEL = "+sentinel"
_SENTINEL_PORT = 26379
_UPSTASH = "upstash.io"
_UPSTASH_PORT = 6379

_OPTIONS = frozenset({"db", "username", "password", "client_name", "socket_keepalive", "socket_read_size"})
_TLS_OPTIONS = frozenset(
    {
        "ssl_ca_certs", "ssl_ca_path", "ssl_ca_data", "ssl_certfile", "ssl_keyfile", "ssl_password", "ssl_cert_reqs",
        "ssl_check_hostname", "ssl_min_version", "ssl_ciphers",
    }
)  # fmt: skip
_SENTINEL_OPTIONS = frozenset({"sentinel_username", "sentinel_password"})

_VALUES = {
    "db": (r"[0-9]{1,9}", "must be the number of a database"),
    "client_name": (r"[!-~]{1,500}", "must be printable ASCII without spaces"),
    "socket_read_size": (r"[1-9][0-9]{0,8}", "must be a number of bytes"),
    "socket_keepalive": (r"(?i:true|false|yes|no|1|0)", "must be true or false"),
    "ssl_check_hostname": (r"(?i:true|false|yes|no|1|0)", "must be true or false"),
}
"""Options with values that redis-py misunderstands in silence otherwise, each with its pattern and its rule."""

_WRONG_PORT = "its port must be from 1 to 65535"

MAX_SOCKET_PATH_BYTES = 107
"""Of `sun_path` without its end: https://man7.org/linux/man-pages/man7/unix.7.html"""


class SentinelUrl(Struct, frozen=True):
    """Parts of a redis+sentinel:// address. master_url: URL of the master without its host and port."""

    hosts: tuple[tuple[str, int], ...]
    service: str
    master_url: str
    tls: bool
    username: str | None
    password: str | None


def sentinel_url(url: str) -> SentinelUrl | None:
    """Return the parts of a redis+sentinel:// or rediss+sentinel:// address; None for any other address.

    Raises ValueError with a text that holds no part of the URL, since that may be a password.
    """
    scheme, separator, rest = url.partition("://")
    if scheme not in {f"redis{_SENTINEL}", f"rediss{_SENTINEL}"} or not separator:
        return None
    rest, _, query = rest.partition("?")
    netloc, _, path = rest.partition("/")
    login, _, places = netloc.rpartition("@")
    service, _, database = path.partition("/")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if not service or "/" in database:
        raise ValueError(
            "a sentinel address ends with the name of the service: redis+sentinel://HOST:26379/SERVICE?db=0"
        )
    if not re.fullmatch(r"[0-9]{0,9}", database):
        raise ValueError("after the service only the number of a database may follow")
    username, password = options.pop("sentinel_username", None), options.pop("sentinel_password", None)
    if database:
        options.setdefault("db", database)
    tls = scheme.startswith("rediss")
    query = f"?{urlencode(options)}" if options else ""
    master_url = f"{'rediss' if tls else 'redis'}://{f'{login}@' if login else ''}localhost{query}"
    hosts = tuple(_sentinel_host(place) for place in places.split(","))
    return SentinelUrl(hosts, unquote(service), master_url, tls, username, password)


def _sentinel_host(place: str) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+))(?::([0-9]{1,5}))?", place)
    is_place = match is not None and _names_host(match[1] or match[2])
    if match is None or not is_place or not 0 < int(match[3] or _SENTINEL_PORT) < 2**16:
        raise ValueError("its sentinels must be written as HOST:PORT,HOST:PORT")
    return match[1] or match[2], int(match[3] or _SENTINEL_PORT)


def redis_py_url(url: str, token: str | None, notes: list[str]) -> str:
    """Return the URL with the token as its password if it has no password.

    notes: receives warnings.

    Raises ValueError with a text that holds no part of the URL, since that may be a password.
    """
    _check_characters(url)
    if (parsed := sentinel_url(url)) is not None:
        return _sentinel_with_password(url, parsed, token, notes)
    parts = _split(url)
    if parts.scheme == "https":
        return _from_rest_address(parts, token)
    if parts.scheme not in {"redis", "rediss", "unix"}:
        raise ValueError(f"its scheme is not supported; allowed: {_FORMS}")
    _check_place(parts)
    parts = parts._replace(query=_without_repeats(parts.query, notes))
    _check_options(parts.query, tls=parts.scheme == "rediss")
    if parts.scheme != "unix":
        _note_database(parts.path.strip("/"), parts.query, notes)
    # Upstash speaks TLS only and resets plain connections: https://upstash.com/docs/redis/troubleshooting/econn_reset
    scheme = "rediss" if parts.scheme == "redis" and _is_upstash(parts.hostname or "") else parts.scheme
    query = f"?{parts.query}" if parts.query else ""
    return f"{scheme}://{_with_password(parts, token)}{parts.path}{query}"


def _check_characters(url: str) -> None:
    if not url.isprintable() or " " in url:
        raise ValueError(f"it holds a space or control character; allowed: {_FORMS}")


def _note_database(path: str, query: str, notes: list[str]) -> None:
    """Add a warning if the path and the option name two databases: redis-py takes the option."""
    option = dict(parse_qsl(query)).get("db")
    if path and option is not None and int(path) != int(option):
        notes.append(f"REDIS_URL names database {path} in its path and {option} in its option db: {option} is used")


def _without_repeats(query: str, notes: list[str]) -> str:
    """Return the options without repeats, of which redis-py takes the first. Add a warning if one is left out."""
    pairs = query.split("&")
    first = {pair.partition("=")[0]: pair for pair in reversed(pairs)}
    if set(first.values()) != set(pairs):
        notes.append("REDIS_URL has an option twice: the first one is used")
    return "&".join(reversed(first.values()))


def _check_options(query: str, *, tls: bool, sentinel: bool = False) -> None:
    """Raise ValueError for options that redis-py would refuse or ignore only when it connects."""
    pairs = parse_qsl(query, keep_blank_values=True)
    options = dict(pairs)
    if len(options) < len(pairs):
        raise ValueError("an option in it is there twice")
    allowed = _OPTIONS | (_TLS_OPTIONS if tls else set()) | (_SENTINEL_OPTIONS if sentinel else set())
    for name in options:
        if name in allowed:
            continue
        if name == "ssl" or name in _TLS_OPTIONS:
            raise ValueError(f"its option {name} is not for this scheme; TLS is switched on by rediss:// alone")
        raise ValueError(f"an option in it is not supported; allowed: {', '.join(sorted(allowed))}")
    for name, (pattern, rule) in _VALUES.items():
        if name in options and not re.fullmatch(pattern, options[name]):
            raise ValueError(f"its option {name} {rule}")


def _sentinel_with_password(url: str, parsed: SentinelUrl, token: str | None, notes: list[str]) -> str:
    scheme, _, rest = url.partition("://")
    _check_options(urlsplit(f"redis://{rest.partition('/')[2]}").query, tls=parsed.tls, sentinel=True)
    if "#" in url:
        raise ValueError("it holds a #; write it as %23 in a password")
    master, (place, _, query) = _split(parsed.master_url), rest.partition("?")
    _note_database(place.rpartition("@")[2].partition("/")[2].partition("/")[2], query, notes)
    login = _with_password(master, token).rpartition("@")[0]
    return f"{scheme}://{f'{login}@' if login else ''}{rest.partition('?')[0].rpartition('@')[2]}{_query(rest)}"


def _query(rest: str) -> str:
    query = rest.partition("?")[2]
    return f"?{query}" if query else ""


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:  # its own text quotes the password, so it is not chained
        if "out of range" in str(error):
            raise ValueError(_WRONG_PORT) from None
        message = "it can't be read as an address; write characters like / # ? @ in the password as %2F %23 %3F %40"
        raise ValueError(message) from None
    if port == 0:
        raise ValueError(_WRONG_PORT)
    return parts


def _check_place(parts: SplitResult) -> None:
    if parts.scheme == "unix":
        if not parts.path.startswith("/") or parts.netloc.rpartition("@")[2]:
            raise ValueError("a unix:// address needs the absolute path of the socket: unix:///run/redis.sock")
        if len(os.fsencode(unquote(parts.path))) > MAX_SOCKET_PATH_BYTES:
            raise ValueError(
                f"the path of its socket has more than {MAX_SOCKET_PATH_BYTES} bytes, which no system takes"
            )
    elif not parts.hostname:
        raise ValueError("it names no host; allowed: redis://HOST:6379 and the like")
    elif not _names_host(parts.hostname):
        raise ValueError("its host is no name and no address; allowed: redis://HOST:6379 and the like")
    elif not re.fullmatch(r"(/[0-9]{0,9})?", parts.path):
        raise ValueError("after the host only the number of a database may follow: redis://HOST:6379/0")
    if parts.fragment:
        raise ValueError("it holds a #; write it as %23 in a password")


def _from_rest_address(parts: SplitResult, token: str | None) -> str:
    """Return the TCP URL for Upstash's REST address and token, which open the same host."""
    password = parts.password or (quote(token, safe="") if token else "")
    if not _names_host(parts.hostname or "") or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError("an https:// address must be Upstash's REST address, a host and no more")
    if not password:
        raise ValueError("an https:// address needs REDIS_TOKEN too")
    return f"rediss://default:{password}@{_host(parts)}:{_UPSTASH_PORT}"


def _with_password(parts: SplitResult, token: str | None) -> str:
    place = parts.netloc.rpartition("@")[2]
    if token is None or parts.password or "password" in dict(parse_qsl(parts.query)):
        return parts.netloc
    return f"{parts.username or 'default'}:{quote(token, safe='')}@{place}"


def _host(parts: SplitResult) -> str:
    host = parts.hostname or ""
    return f"[{host}]" if ":" in host else host


def _names_host(host: str) -> bool:
    """Return whether a resolver takes the name of a host, which may have letters that are not ASCII."""
    try:
        return is_host(host.encode("idna").decode())
    except UnicodeError:
        return False


def _is_upstash(host: str) -> bool:
    return host == _UPSTASH or host.endswith(f".{_UPSTASH}")
