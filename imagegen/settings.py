"""Owns the settings: their names, defaults and rules, read once from the environment and `.env`."""

# ruff: noqa: RUF009 - the defaults are the table of the settings; each call makes a dataclass field

from __future__ import annotations

import base64
import binascii
import ipaddress
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar
from urllib.parse import SplitResult, urlsplit

from imagegen.errors import SettingsError
from imagegen.redis_url import redis_py_url

_T = TypeVar("_T")

_TEN_YEARS_S = 315_360_000
_MIB = 1024**2

UNBUILT: frozenset[str] = frozenset(
    {
        *("PROVIDER=openai", "OPENAI_API_URL", "OPENAI_API_KEY", "PROVIDER=a1111", "A1111_URL"),
        *("FALLBACK_MODELS", "UPSTREAM_RATE"),
        *("IMAGE_STORE=redis", "IMAGE_STORE=s3"),
        *("S3_ENDPOINT", "S3_BUCKET", "S3_REGION", "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY"),
        *("API_KEYS", "CACHE_SCOPE", "CORS_ORIGINS"),
        *("WEBHOOK_SECRET", "WEBHOOK_ALLOW_PRIVATE"),
    }
)
"""Settings, and values of settings, whose feature is not built yet: other than the default they stop the start."""


# Parsers: each turns a text that is not empty into a value, or raises ValueError with a text for the operator.
# The text of a setting that may hold a secret never repeats the value.


def _text(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must not hold control characters")
    return text


def _secret(text: str) -> str:
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError("must be visible ASCII characters without spaces")
    return text


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if not re.fullmatch(r"[0-9]{1,15}(\.[0-9]{0,9})?|\.[0-9]{1,9}", text) or not low <= float(text) <= high:
            raise ValueError(f"{text[:40]!r} is not allowed; a number from {low:.10g} to {high:.10g} is")
        return float(text)

    return parse


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise ValueError(f"{text[:40]!r} is not allowed; a whole number from {low} to {high} is")
        return int(text)

    return parse


def _seconds(low: float = 0.0) -> Callable[[str], float]:
    return _number(low, _TEN_YEARS_S)


def _milliseconds(text: str) -> float:
    return _number(1, _TEN_YEARS_S * 1000)(text) / 1000


def _one_of(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        for value in allowed:
            if text.lower() == value.lower():
                return value
        raise ValueError(f"{text[:40]!r} is not allowed; allowed: {', '.join(allowed)}")

    return parse


def _flag(text: str) -> bool:
    return _one_of("true", "false", "1", "0", "yes", "no")(text) in {"true", "1", "yes"}


def _hops(text: str) -> int | Literal["auto"]:
    if text.lower() == "auto":
        return "auto"
    if not re.fullmatch(r"[0-9]{1,2}", text):
        raise ValueError(f"{text[:40]!r} is not allowed; a whole number from 0 to 99, or auto, is")
    return int(text)


def _host(text: str) -> str:
    host = text.removeprefix("[").removesuffix("]")
    if not re.fullmatch(r"[0-9A-Za-z:._%-]+", host) or (":" in host and not _is_address(host)):
        raise ValueError(f"{text[:40]!r} is not allowed; a host name or address is, without scheme and port")
    return host


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _byte_count(text: str) -> int:
    """`1048576`, `100MiB`, `1.5 GB`."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?(?:([KMGT])(I?)B)?", text.upper())
    if not found:
        raise ValueError(f"{text[:40]!r} is not allowed; bytes are, as 1073741824, 100MiB or 1GiB")
    number, unit, binary = found.groups()
    count = int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(unit) if unit else 0))
    if count < 1:
        raise ValueError("must be at least 1 byte")
    return count


def _rate_per_min(text: str) -> float:
    """`10/minute`, `2/second`, `600/hour`, or a bare number a minute."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(?: ?/ ?(second|minute|hour))?", text.lower())
    if not found or float(found[1]) <= 0:
        raise ValueError(f"{text[:40]!r} is not allowed; a rate is, as 10/minute, 2/second or 600/hour")
    return float(found[1]) * {"second": 60.0, "hour": 1 / 60}.get(found[2], 1.0)


def _web_address(text: str, rule: str) -> SplitResult:
    """The parts of an http(s) address with no user, query and fragment."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:  # its own text quotes the address, which may hold a password
        raise ValueError(rule) from None
    good = parts.scheme in {"http", "https"} and parts.hostname and port != 0 and re.fullmatch(r"[!-~]+", text)
    if not good or "@" in parts.netloc or "?" in text or "#" in text:
        raise ValueError(rule)
    return parts


def _base_url(text: str) -> str:
    _web_address(text, "must be an http:// or https:// address in ASCII, without user, query and fragment")
    return text.rstrip("/")


def _origin(text: str) -> str:
    rule = "must be exact origins, as https://example.org or http://localhost:8080, with no path and no *"
    parts = _web_address(text, rule)
    if parts.path:
        raise ValueError(rule)
    return text.lower()


def _list_of(parse: Callable[[str], _T]) -> Callable[[str], tuple[_T, ...]]:
    def parse_all(text: str) -> tuple[_T, ...]:
        return tuple(dict.fromkeys(parse(item.strip()) for item in text.split(",") if item.strip()))

    return parse_all


def _aliases(text: str) -> Mapping[str, str]:
    pairs = [(old.strip(), new.strip()) for old, _, new in (item.partition("=") for item in _list_of(_text)(text))]
    if not all(old and new for old, new in pairs) or len({old for old, _ in pairs}) < len(pairs):
        raise ValueError("must be old=new,… with each old name once")
    return MappingProxyType(dict(pairs))


def _api_keys(text: str) -> Mapping[str, str]:
    pairs = [[half.strip() for half in item.split(":", 1)] for item in text.split(",") if item.strip()]
    if not pairs or not all(len(pair) == 2 and re.fullmatch(r"[\w.-]{1,64}", pair[0], re.ASCII) for pair in pairs):
        raise ValueError("must be name:key,… with names of letters, digits and . _ -")
    if not all(re.fullmatch(r"[!-~]{8,}", key) for _, key in pairs):
        raise ValueError("each key must be at least 8 visible ASCII characters without spaces and commas")
    if len({name for name, _ in pairs}) < len(pairs) or len({key for _, key in pairs}) < len(pairs):
        raise ValueError("each name and each key may stand there once")
    return MappingProxyType(dict(pairs))


def _prefix(text: str) -> str:
    if not text.isprintable() or re.search(r"[\s{}]", text) or len(text) > 64:
        raise ValueError("must be at most 64 characters without braces, spaces and control characters")
    return text


def _webhook_secret(text: str) -> str:
    """https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md#signature-scheme"""
    try:
        key = base64.b64decode(text.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not text.startswith("whsec_") or not 24 <= len(key) <= 64:
        raise ValueError("must be whsec_ and the base64 of 24 to 64 bytes")
    return text


@dataclass(frozen=True, slots=True)
class _Rule:
    name: str
    parse: Callable[[str], object]
    default: object
    secret: bool


def _setting(name: str, default: _T, parse: Callable[[str], _T], *, secret: bool = False) -> _T:
    rule = _Rule(name, parse, default, secret)
    made: _T = field(default_factory=lambda: default, metadata={"rule": rule})
    return made


def _optional(name: str, parse: Callable[[str], _T], *, secret: bool = False) -> _T | None:
    made: _T | None = _setting(name, None, parse, secret=secret)
    return made


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Settings:
    """All settings, checked and resolved; its `repr` masks secrets.

    redis_url: what redis-py takes, with REDIS_TOKEN in it; None: the embedded server.
    """

    host: str = _setting("HOST", "127.0.0.1", _host)
    port: int = _setting("PORT", 3000, _integer(0, 65535))
    public_url: str | None = _optional("PUBLIC_URL", _base_url)
    together_api_key: str | None = _optional("TOGETHER_API_KEY", _secret, secret=True)
    together_api_url: str = _setting("TOGETHER_API_URL", "https://api.together.xyz", _base_url)
    provider: str = _setting("PROVIDER", "sandbox", _one_of("together", "openai", "a1111", "sandbox"))
    default_model: str = _setting("DEFAULT_MODEL", "black-forest-labs/FLUX.1-schnell", _text)
    redis_url: str | None = _optional("REDIS_URL", _text, secret=True)
    redis_token: str | None = _optional("REDIS_TOKEN", _secret, secret=True)
    redis_prefix: str = _setting("REDIS_PREFIX", "imagegen", _prefix)
    embedded_redis: str = _setting("EMBEDDED_REDIS", "auto", _one_of("auto", "force", "off"))
    redis_server: str | None = _optional("REDIS_SERVER", _text)
    data_dir: Path = _setting("DATA_DIR", Path(".imagegen"), lambda text: Path(_text(text)).expanduser())
    openai_api_url: str | None = _optional("OPENAI_API_URL", _base_url)
    openai_api_key: str | None = _optional("OPENAI_API_KEY", _secret, secret=True)
    a1111_url: str | None = _optional("A1111_URL", _base_url)
    sandbox_delay_s: float = _setting("SANDBOX_DELAY", 1.0, _seconds())
    model_aliases: Mapping[str, str] = _setting("MODEL_ALIASES", MappingProxyType({}), _aliases)
    fallback_models: tuple[str, ...] = _setting("FALLBACK_MODELS", (), _list_of(_text))
    rate_limit_window_s: float = _setting("RATE_LIMIT_WINDOW", 60.0, _milliseconds)
    rate_limit_max: int = _setting("RATE_LIMIT_MAX", 10, _integer(0, 10**9))
    image_rate_limit_max: int = _setting("IMAGE_RATE_LIMIT_MAX", 5, _integer(0, 10**9))
    rate_limit_store: str = _setting("RATE_LIMIT_STORE", "memory", _one_of("memory", "redis"))
    worker_concurrency: int = _setting("WORKER_CONCURRENCY", 5, _integer(1, 1000))
    max_attempts: int = _setting("MAX_ATTEMPTS", 3, _integer(1, 1000))
    retry_base_s: float = _setting("RETRY_BASE_SECONDS", 5.0, _seconds())
    upstream_timeout_s: float = _setting("UPSTREAM_TIMEOUT", 120.0, _seconds(0.001))
    upstream_rate_per_min: float | None = _optional("UPSTREAM_RATE", _rate_per_min)
    task_deadline_s: float = _setting("TASK_DEADLINE", 3600.0, _seconds(1))
    lease_s: float = _setting("LEASE_SECONDS", 30.0, _seconds(1))
    drain_s: float = _setting("DRAIN_SECONDS", 25.0, _seconds())
    result_ttl_s: float = _setting("RESULT_TTL", 86400.0, _seconds(1))
    max_queue: int = _setting("MAX_QUEUE", 10_000, _integer(1, 10**9))
    image_store: str = _setting("IMAGE_STORE", "disk", _one_of("disk", "redis", "s3", "upstream"))
    image_store_max_bytes: int = _setting("IMAGE_STORE_MAX_BYTES", 1024 * _MIB, _byte_count)
    s3_endpoint: str | None = _optional("S3_ENDPOINT", _base_url)
    s3_bucket: str | None = _optional("S3_BUCKET", _text)
    s3_region: str | None = _optional("S3_REGION", _text)
    s3_access_key_id: str | None = _optional("S3_ACCESS_KEY_ID", _secret, secret=True)
    s3_secret_access_key: str | None = _optional("S3_SECRET_ACCESS_KEY", _secret, secret=True)
    api_keys: Mapping[str, str] = _setting("API_KEYS", MappingProxyType({}), _api_keys, secret=True)
    admin_token: str | None = _optional("ADMIN_TOKEN", _secret, secret=True)
    cache_scope: str = _setting("CACHE_SCOPE", "shared", _one_of("shared", "key"))
    task_id_secret: str | None = _optional("TASK_ID_SECRET", _text, secret=True)
    trusted_proxy_hops: int | Literal["auto"] = _setting("TRUSTED_PROXY_HOPS", 0, _hops)
    cors_origins: tuple[str, ...] = _setting("CORS_ORIGINS", (), _list_of(_origin))
    webhook_secret: str | None = _optional("WEBHOOK_SECRET", _webhook_secret, secret=True)
    webhook_allow_private: bool = _setting("WEBHOOK_ALLOW_PRIVATE", default=False, parse=_flag)
    log_level: str = _setting("LOG_LEVEL", "INFO", _one_of("TRACE", "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"))
    log_format: str = _setting("LOG_FORMAT", "text", _one_of("text", "json"))
    on_render: bool = False

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None, dotenv: Path | None = Path(".env")) -> Settings:
        """Reads and checks them all. The environment comes before the file, also where it says nothing (`NAME=`).

        Raises SettingsError with one line for each fault.
        """
        faults: dict[str, str] = {}
        texts = {**_read_dotenv(dotenv, faults), **(os.environ if environ is None else environ)}
        given = _parse(cls, texts, faults)
        settings = _resolve(cls(**given, on_render=bool(texts.get("RENDER"))), set(given), faults)
        for name, fault in _contradictions(settings):
            faults.setdefault(name, fault)
        if faults:
            raise SettingsError("\n".join(f"{name}: {fault}" for name, fault in faults.items()))
        return settings

    @property
    def exposed_without_keys(self) -> bool:
        """Whether anybody who reaches the port spends the credit of a provider's key."""
        key = {"together": self.together_api_key, "openai": self.openai_api_key}.get(self.provider)
        return key is not None and not self.api_keys and not _is_loopback(self.host)

    def __repr__(self) -> str:
        shown = ((item.name, getattr(self, item.name), item.metadata.get("rule")) for item in fields(self))
        texts = (f"{name}={'***' if rule and rule.secret and value else repr(value)}" for name, value, rule in shown)
        return f"Settings({', '.join(texts)})"


def setting_names() -> tuple[str, ...]:
    """The names of all settings, as in the environment."""
    return tuple(rule.name for rule in _rules(Settings).values())


def _rules(cls: type[Settings]) -> dict[str, _Rule]:
    return {item.name: item.metadata["rule"] for item in fields(cls) if "rule" in item.metadata}


def _read_dotenv(path: Path | None, faults: dict[str, str]) -> dict[str, str]:
    if path is None or not path.is_file():
        return {}
    from dotenv.parser import parse_stream  # noqa: PLC0415 - it takes 20 ms, and most starts have no file

    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = list(parse_stream(file))
    except (OSError, UnicodeDecodeError) as error:
        faults[str(path)] = f"can't be read: {error.strerror if isinstance(error, OSError) else 'it is not UTF-8'}"
        return {}
    for line in lines:
        if line.error:
            faults[f"{path}, line {line.original.line}"] = "is not of the form NAME=value"
    return {line.key: line.value or "" for line in lines if line.key}


def _parse(cls: type[Settings], texts: Mapping[str, str], faults: dict[str, str]) -> dict[str, Any]:
    """The values that are given and good, by attribute."""
    values = {}
    for attribute, rule in _rules(cls).items():
        if not (text := texts.get(rule.name, "").strip()):
            continue
        try:
            value = rule.parse(text)
        except ValueError as error:
            faults[rule.name] = str(error)
            continue
        if value == rule.default or not UNBUILT & {rule.name, f"{rule.name}={value}"}:
            values[attribute] = value
        else:
            what = "this setting" if rule.name in UNBUILT else repr(value)
            faults[rule.name] = f"{what} has no effect yet, its feature is not built; leave it out"
    return values


def _resolve(settings: Settings, given: set[str], faults: dict[str, str]) -> Settings:
    """Fills in the defaults that depend on other settings."""
    if "provider" not in given and settings.together_api_key:
        settings = replace(settings, provider="together")
    if "image_store_max_bytes" not in given and settings.image_store == "redis":
        settings = replace(settings, image_store_max_bytes=100 * _MIB)
    if "trusted_proxy_hops" not in given and settings.on_render:
        settings = replace(settings, trusted_proxy_hops="auto")
    if settings.redis_url:
        try:
            settings = replace(settings, redis_url=redis_py_url(settings.redis_url, settings.redis_token))
        except ValueError as error:
            faults["REDIS_URL"] = str(error)
    return settings


def _contradictions(settings: Settings) -> Iterator[tuple[str, str]]:
    """Settings that are good alone and not together: the name, and what is wrong."""
    needed = {
        "together": {"TOGETHER_API_KEY": settings.together_api_key},
        "openai": {"OPENAI_API_URL": settings.openai_api_url, "OPENAI_API_KEY": settings.openai_api_key},
        "a1111": {"A1111_URL": settings.a1111_url},
    }
    for name, value in needed.get(settings.provider, {}).items():
        if not value:
            yield name, f"is not set, and PROVIDER={settings.provider} needs it"
    keys = {"S3_ACCESS_KEY_ID": settings.s3_access_key_id, "S3_SECRET_ACCESS_KEY": settings.s3_secret_access_key}
    for name, value in ({"S3_BUCKET": settings.s3_bucket} | keys).items():
        if settings.image_store == "s3" and not value:
            yield name, "is not set, and IMAGE_STORE=s3 needs it"
    if settings.redis_url is None:
        yield from _embedded_faults(settings)


def _embedded_faults(settings: Settings) -> Iterator[tuple[str, str]]:
    if settings.redis_token:
        yield "REDIS_TOKEN", "is set without REDIS_URL; set both, or none for the embedded Redis"
    elif settings.embedded_redis == "off":
        yield "REDIS_URL", "is not set, and EMBEDDED_REDIS=off; set REDIS_URL, or EMBEDDED_REDIS=auto"
    elif settings.embedded_redis == "auto" and settings.on_render:
        lost = "is not set, and Render does not keep the disk of an embedded Redis over a deploy"
        yield "REDIS_URL", f"{lost}; set it to that of an Upstash database, or EMBEDDED_REDIS=force to lose tasks"


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
