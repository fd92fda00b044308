"""Parsers of the texts of settings.

Each function here turns a text that is not empty into a value, or raises ValueError with a text for the operator. The
text of a setting that may hold a secret never repeats the value.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeVar
from urllib.parse import SplitResult, urlsplit

T = TypeVar("T")

TEN_YEARS_S = 315_360_000

MAX_HOST_CHARS = 253
"""https://www.rfc-editor.org/rfc/rfc1035#section-2.3.4"""

MIN_SECRET_CHARS = 16
"""Of a secret that this service compares or signs with, as nothing else keeps others from trying all short ones."""

_INVISIBLE = "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad"
"""Characters without a width, which copying from a web page or a chat leaves in a text."""

_AROUND = re.compile(rf"^[\s{_INVISIBLE}]+|[\s{_INVISIBLE}]+$")
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019"}

_REFERENCE = re.compile(
    r"(?<![A-Za-z0-9])(?:\$\{[^}]*\}|\{\{.*\}\})(?![A-Za-z0-9])|^\$[A-Z][A-Z0-9_]+(?=/|$)|^%[A-Z][A-Z0-9_]+%"
)
"""`${NAME}`, `${{ secrets.NAME }}`, `{{ .Values.name }}`, `$HOME/…`, `%NAME%`: what shells, compose and CI replace.

Between letters and digits of a password they are none.
"""

_HOST_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")


def unwrapped(text: str) -> str:
    """Return a setting's text without spaces and invisible characters around it, nor a pair of quotes.

    `docker run --env-file` keeps quotes as a part of the value. Raises ValueError for a quote at one end only.
    """
    text = _AROUND.sub("", text)
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        text = _AROUND.sub("", text[1:-1])
    elif text and (text[0] in _QUOTES or text[-1] in {*_QUOTES, *_QUOTES.values()}):
        raise ValueError("has a quote at one end only: write it without quotes, or with the same one at both ends")
    return text


def has_reference(text: str) -> bool:
    """Return whether a text has a variable that nothing has replaced."""
    return _REFERENCE.search(text) is not None


def check_replaced(text: str) -> None:
    """Raise ValueError for a reference to a variable: with the text `${API_KEYS}` as a key, all would have it."""
    if has_reference(text):
        raise ValueError("holds a reference such as ${NAME} that was not replaced here: write the value itself")


def plain_text(text: str) -> str:
    if not text.isprintable():
        is_utf8 = text == text.encode(errors="replace").decode()
        raise ValueError("must not hold control characters" if is_utf8 else "is not UTF-8")
    if " #" in text:
        raise ValueError("holds a # after a space: no comment can follow a value")
    return text


def folder(text: str) -> Path:
    """Parse a path. A container's user without a name has the home folder `/` or none, which is never meant."""
    path = Path(plain_text(text))
    try:
        if text.startswith("~") and Path(path.parts[0]).expanduser() == Path("/"):
            raise RuntimeError
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text[:100]!r} has a ~ for an unknown home folder; write the whole path") from error


def secret(text: str) -> str:
    text = text.translate(dict.fromkeys(map(ord, _INVISIBLE)))
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError("must be visible ASCII characters without spaces")
    return text


def long(parse: Callable[[str], str]) -> Callable[[str], str]:
    """Return a parser of secrets that can't be guessed by trying."""

    def parse_long(text: str) -> str:
        text = parse(text)
        if len(text) < MIN_SECRET_CHARS:
            raise ValueError(f"must have at least {MIN_SECRET_CHARS} characters, as from `openssl rand -hex 32`")
        return text

    return parse_long


def number(low: float, high: float, unit: str = "") -> Callable[[str], float]:
    def parse(text: str) -> float:
        if not re.fullmatch(r"[0-9]{1,15}(\.[0-9]{0,9})?|\.[0-9]{1,9}", text) or not low <= float(text) <= high:
            raise ValueError(f"{text[:40]!r} is not allowed; a number{unit} from {low:.12g} to {high:.12g} is")
        return float(text)

    return parse


def integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise ValueError(f"{text[:40]!r} is not allowed; a whole number from {low} to {high} is")
        return int(text)

    return parse


def dollars(text: str) -> int:
    """Return micro-dollars: `5`, `0.25`, `$10`."""
    match = re.fullmatch(r"\$?([0-9]{1,9})(?:\.([0-9]{1,6}))?", text)
    if not match:
        raise ValueError(f"{text[:40]!r} is not allowed; US dollars are, as 5 or 0.25, with at most 6 decimals")
    return int(match[1]) * 10**6 + int((match[2] or "").ljust(6, "0"))


def host_name(text: str) -> str:
    if not re.fullmatch(r"(?:[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,252})|\[[0-9A-Fa-f:.]{2,45}\])", text):
        raise ValueError(f"{text[:40]!r} is not allowed; host names are, as example.org, without scheme, port and path")
    return text.lower()


def seconds(low: float = 0.0) -> Callable[[str], float]:
    return number(low, TEN_YEARS_S, " of seconds")


def milliseconds(text: str) -> float:
    return number(1, TEN_YEARS_S * 1000, " of milliseconds")(text) / 1000


def one_of(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        for value in allowed:
            if text.lower() == value.lower():
                return value
        raise ValueError(f"{text[:40]!r} is not allowed; allowed: {', '.join(allowed)}")

    return parse


def boolean(text: str) -> bool:
    return one_of("true", "false", "1", "0", "yes", "no")(text) in {"true", "1", "yes"}


def on_off(text: str) -> bool:
    return one_of("on", "off", "true", "false", "1", "0", "yes", "no")(text) in {"on", "true", "1", "yes"}


def proxy_hops(text: str) -> int | Literal["auto"]:
    if text.lower() == "auto":
        return "auto"
    if not re.fullmatch(r"[0-9]{1,2}", text):
        raise ValueError(f"{text[:40]!r} is not allowed; a whole number from 0 to 99, or auto, is")
    return int(text)


def host(text: str) -> str:
    host = text.removeprefix("[").removesuffix("]")
    if not re.fullmatch(r"[0-9A-Za-z:._%-]+", host) or (":" in host and not is_address(host)):
        raise ValueError(f"{text[:40]!r} is not allowed; a host name or address is, without scheme and port")
    return host


def hosts(text: str) -> tuple[str, ...]:
    """Parse `127.0.0.1,::1`: at least one host."""
    listed = comma_separated(host)(text)
    if not listed:
        raise ValueError("must name at least one host name or address")
    return listed


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def byte_count(text: str) -> int:
    """Parse `1048576`, `100MiB`, `1.5 GB`."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?(?:([KMGT])(I?)B)?", text.upper())
    if not match:
        raise ValueError(f"{text[:40]!r} is not allowed; bytes are, as 1073741824, 100MiB or 1GiB")
    number, unit, binary = match.groups()
    count = int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(unit) if unit else 0))
    if count < 1:
        raise ValueError("must be at least 1 byte")
    return count


def rate_per_min(text: str) -> float:
    """Parse `10/minute`, `2/second`, `600/hour`, or a number a minute."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(?: ?/ ?(second|minute|hour))?", text.lower())
    if not match or float(match[1]) <= 0:
        raise ValueError(f"{text[:40]!r} is not allowed; a rate is, as 10/minute, 2/second or 600/hour")
    return float(match[1]) * {"second": 60.0, "hour": 1 / 60}.get(match[2], 1.0)


def http_url(text: str, rule: str) -> SplitResult:
    """Return the parts of an http(s) address that has no query and no fragment."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:  # its own text quotes the address, which may hold a password
        raise ValueError(rule) from None
    good = parts.scheme in {"http", "https"} and port != 0 and re.fullmatch(r"[!-~]+", text)
    if not good or "?" in text or "#" in text or "\\" in text or not is_host(parts.hostname or ""):
        raise ValueError(rule)
    if parts.netloc.endswith(":"):
        raise ValueError(f"{rule}; it ends its host with a : and names no port")
    return parts


def is_host(host: str) -> bool:
    """Return whether an address can name a host so: an IP address, or labels that a resolver takes."""
    if ":" in host:
        return is_address(host)
    labels = host.removesuffix(".").split(".")
    return len(host) <= MAX_HOST_CHARS and all(map(_HOST_LABEL.fullmatch, labels))


def base_url(text: str) -> str:
    rule = "must be an http:// or https:// address in ASCII, without user, query and fragment"
    if "@" in http_url(text, rule).netloc:
        raise ValueError(rule)
    return text.rstrip("/")


def public_url(text: str) -> str:
    """Parse the base of links: its path may be in front of the paths that are routed."""
    url = base_url(text)
    path = urlsplit(url).path
    if path and not re.fullmatch(r"(/(?!\.+(/|$))[A-Za-z0-9._~-]+)+", path):
        raise ValueError("must have no other path than letters, digits and . _ ~ - between single slashes")
    return url


def base_url_with_login(text: str) -> str:
    """Parse a base address with an optional `user:password@` of basic authentication."""
    rule = "must be an http:// or https:// address in ASCII, without query and fragment"
    login, at, _ = http_url(text, rule).netloc.rpartition("@")
    if at and (not login.partition(":")[0] or re.search(r"[^A-Za-z0-9._~!$&'()*+,;=:%-]|%(?![0-9A-Fa-f]{2})", login)):
        raise ValueError(f"{rule}; special characters of its user and password as %40 for @, %2F for / and so on")
    return text.rstrip("/")


def receiver(text: str) -> str:
    """Parse an address that is called; its path and query may be a secret."""
    rule = "must be an https:// address in ASCII, without user and fragment"
    if "@" in http_url(text.partition("?")[0], rule).netloc or "#" in text or not re.fullmatch(r"[!-~]+", text):
        raise ValueError(rule)
    return text


def proxy(text: str) -> str:
    """Parse an address of an HTTP proxy; `host:port` alone is one too, as for curl."""
    scheme = text.partition("://")[0].lower() if "://" in text else ""
    if scheme not in {"", "http", "https"}:
        raise ValueError("must be an http:// or https:// proxy; others, such as socks5://, are not supported")
    address = base_url_with_login(text if scheme else f"http://{text}")
    if urlsplit(address).path:
        raise ValueError("must be http://host:port without a path")
    return address


def proxy_exceptions(text: str) -> tuple[str, ...]:
    """Parse `localhost,.example.com,10.0.0.0/8`, with commas or spaces between; return it in lower case."""
    return tuple(dict.fromkeys(part.lower() for part in re.split(r"[,\s]+", text) if part))


def origin(text: str) -> str:
    """Return an origin as browsers send it; also that of an extension or of a desktop program's pages."""
    rule = "must be exact origins, as https://example.org or chrome-extension://abc, with no path, no * and no null"
    text = text.lower()
    if re.fullmatch(r"(?!https?:)[a-z][a-z0-9+.-]*://[a-z0-9._-]*", text):
        return text
    parts = http_url(text, rule)
    if parts.path or "@" in parts.netloc or "*" in text:
        raise ValueError(rule)
    default = {"http": ":80", "https": ":443"}[parts.scheme]
    return f"{parts.scheme}://{parts.netloc.removesuffix(default)}"


def comma_separated(parse: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    def parse_all(text: str) -> tuple[T, ...]:
        return tuple(dict.fromkeys(parse(item.strip()) for item in text.split(",") if item.strip()))

    return parse_all


def aliases(text: str) -> Mapping[str, str]:
    pairs = [
        (old.strip(), new.strip())
        for old, _, new in (item.partition("=") for item in comma_separated(plain_text)(text))
    ]
    if not all(old and new for old, new in pairs) or len({old for old, _ in pairs}) < len(pairs):
        raise ValueError("must be old=new,… with each old name once")
    return MappingProxyType(dict(pairs))


def api_keys(text: str) -> Mapping[str, str]:
    """Return the SHA-256 of each key in hex, by the key's name: `name:key`, `name:sha256:<hex>`, or one key alone."""
    hashes: dict[str, str] = {}
    for item in (item.strip() for item in text.split(",")):
        if not item:
            continue
        name, colon, key = (part.strip() for part in item.partition(":"))
        if not colon:
            name, key = "default", name
        sha256 = _api_key_hash(name, key)
        if name in hashes or sha256 in hashes.values():
            raise ValueError("each name and each key may be there once, and one key alone is named default")
        hashes[name] = sha256
    if not hashes:
        raise ValueError("must be name:key,… or one key")
    return MappingProxyType(hashes)


def _api_key_hash(name: str, key: str) -> str:
    if name == "sha256" or not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise ValueError("must be name:key or name:sha256:<hex>, with names of letters, digits and . _ -, or one key")
    kind, colon, digest = key.partition(":")
    if colon and kind == "sha256":
        if not re.fullmatch(r"[0-9A-Fa-f]{64}", digest):
            raise ValueError("must have 64 hexadecimal digits after sha256:, as `sha256sum` prints them")
        return digest.lower()
    if not re.fullmatch(r"[!-~]{8,}", key):
        raise ValueError("each key must be at least 8 visible ASCII characters without spaces and commas")
    return hashlib.sha256(key.encode()).hexdigest()


def prefix(text: str) -> str:
    """Parse a part of the name of each key."""
    if not text.isprintable() or re.search(r"[\s{}]", text) or len(text) > 64:
        raise ValueError("must be at most 64 characters without braces, spaces and control characters")
    return text


def webhook_secret(text: str) -> str:
    """Parse a secret as https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md#signature-scheme"""
    try:
        key = base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not text.startswith("whsec_") or not 24 <= len(key) <= 64:
        raise ValueError("must be whsec_ and the base64 of 24 to 64 bytes")
    return text
