"""Settings: their names, defaults and rules, read once from the environment and `.env`."""

# ruff: noqa: RUF009 - the defaults are the table of the settings; each call makes a dataclass field

from __future__ import annotations

import errno
import ipaddress
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from msgspec import Struct

from imagegen import setting_parsers as values
from imagegen.channels_file import KINDS, SANDBOX, Channel, Channels, read_channels
from imagegen.did_you_mean import nearest
from imagegen.errors import SettingsError
from imagegen.redis_client.url import redis_py_url
from imagegen.secret_files import SUFFIX, read_secret_files
from imagegen.settings_file import read_settings_file

_T = TypeVar("_T")

_MIB = 1024**2

PROVIDERS = tuple(KINDS)

LOG_LEVELS = ("TRACE", "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

_ALIKE = 0.87
"""Other programs have settings too, XDG_DATA_DIRS for example: one or two letters may differ."""

_OTHERS = {
    "OPENAI_BASE_URL": "OPENAI_API_URL",
    "OPENAI_API_BASE": "OPENAI_API_URL",
    "TOGETHER_BASE_URL": "TOGETHER_API_URL",
    "TOGETHER_KEY": "TOGETHER_API_KEY",
    "TOGETHER_AI_KEY": "TOGETHER_API_KEY",
    "FAL_API_KEY": "FAL_KEY",
    "FAL_QUEUE_RUN_HOST": "FAL_API_URL",
    "REPLICATE_API_KEY": "REPLICATE_API_TOKEN",
    "REPLICATE_BASE_URL": "REPLICATE_API_URL",
    "BFL_KEY": "BFL_API_KEY",
    "BFL_BASE_URL": "BFL_API_URL",
    "DASHSCOPE_KEY": "DASHSCOPE_API_KEY",
    "DASHSCOPE_HTTP_BASE_URL": "DASHSCOPE_API_URL",
    "GOOGLE_API_KEY": "GEMINI_API_KEY",
    "GEMINI_BASE_URL": "GEMINI_API_URL",
    "GOOGLE_GEMINI_BASE_URL": "GEMINI_API_URL",
    "SILICONFLOW_BASE_URL": "SILICONFLOW_API_URL",
    **dict.fromkeys(("REDIS_URI", "REDIS_HOST", "REDISHOST", "REDIS_TLS_URL", "VALKEY_URL"), "REDIS_URL"),
    "REDIS_PASSWORD": "REDIS_TOKEN",
    "REDISPASSWORD": "REDIS_TOKEN",
    **dict.fromkeys(("CORS_ALLOWED_ORIGINS", "CORS_ALLOW_ORIGINS"), "CORS_ORIGINS"),
    **dict.fromkeys(("RATE_LIMIT", "RATE_LIMITS"), "RATE_LIMIT_MAX"),
    "TRUST_PROXY": "TRUSTED_PROXY_HOPS",
    "TRUSTED_PROXIES": "TRUSTED_PROXY_HOPS",
    "UPSTASH_REDIS_REST_URL": "REDIS_URL",
    "UPSTASH_REDIS_REST_TOKEN": "REDIS_TOKEN",
    "OPENAI_KEY": "OPENAI_API_KEY",
    "OPENAI_API_BASE_URL": "OPENAI_API_URL",
    **dict.fromkeys(("TOGETHER_TOKEN", "TOGETHER_API_TOKEN"), "TOGETHER_API_KEY"),
    "A1111_HOST": "A1111_URL",
    "S3_SECRET_KEY": "S3_SECRET_ACCESS_KEY",
    "S3_BUCKET_NAME": "S3_BUCKET",
    "S3_ENDPOINT_URL": "S3_ENDPOINT",
    "MODEL": "DEFAULT_MODEL",
    "MAX_QUEUE_SIZE": "MAX_QUEUE",
    "CONCURRENCY": "WORKER_CONCURRENCY",
}
"""Names that other programs use for one of these settings, which may be there for them if it is set too."""

_OWN_PREFIX = "IMAGEGEN_"
"""No setting has it, but many services' settings begin with their name."""

_UNITS = frozenset(("S", "SEC", "SECONDS", "MS", "MINUTES", "HOURS", "DAYS", "BYTES", "MB", "USD", "EUR"))
"""Words of a name that is another setting's with its words in another order, or with a unit of its own."""

_PROXY_NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
"""Other programs read these in lower case too, which counts where the upper case is not set."""


class _SettingRule(Struct, frozen=True):
    name: str
    parse: Callable[[str], object]
    default: object
    secret: bool


def _setting(name: str, default: _T, parse: Callable[[str], _T], *, secret: bool = False) -> _T:
    rule = _SettingRule(name, parse, default, secret)
    made: _T = field(default_factory=lambda: default, metadata={"rule": rule})
    return made


def _optional(name: str, parse: Callable[[str], _T], *, secret: bool = False) -> _T | None:
    made: _T | None = _setting(name, None, parse, secret=secret)
    return made


def _address(provider: str) -> str:
    kind = KINDS[provider]
    return _setting(kind.url_setting, kind.base_url, kind.parse_address)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Settings:
    """All settings, checked and resolved; its `repr` masks secrets.

    redis_url: what redis-py takes, with REDIS_TOKEN in it; None: the embedded server.
    misspelled: names that were set and are no settings, each with the probable setting.
    file_channels: those of CHANNELS_FILE; then `provider` is the one of the default model.
    replaced: names that were set, and that CHANNELS_FILE takes the place of.
    notes: warnings about texts that can be read in two ways, and how they were read.
    """

    hosts: tuple[str, ...] = _setting("HOST", ("127.0.0.1",), values.hosts)
    port: int = _setting("PORT", 3000, values.integer(0, 65535))
    public_url: str | None = _optional("PUBLIC_URL", values.public_url)
    together_api_key: str | None = _optional("TOGETHER_API_KEY", values.secret, secret=True)
    together_api_url: str = _address("together")
    provider: str = _setting("PROVIDER", "sandbox", values.one_of(*PROVIDERS))
    default_model: str = _setting("DEFAULT_MODEL", "black-forest-labs/FLUX.1-schnell", values.plain_text)
    redis_url: str | None = _optional("REDIS_URL", values.plain_text, secret=True)
    redis_token: str | None = _optional("REDIS_TOKEN", values.secret, secret=True)
    redis_prefix: str = _setting("REDIS_PREFIX", "imagegen", values.prefix)
    embedded_redis: str = _setting("EMBEDDED_REDIS", "auto", values.one_of("auto", "force", "off"))
    redis_server: str | None = _optional("REDIS_SERVER", values.plain_text)
    data_dir: Path = _setting("DATA_DIR", Path(".imagegen"), values.folder)
    openai_api_url: str | None = _optional("OPENAI_API_URL", KINDS["openai"].parse_address, secret=True)
    openai_api_key: str | None = _optional("OPENAI_API_KEY", values.secret, secret=True)
    a1111_url: str | None = _optional("A1111_URL", KINDS["a1111"].parse_address, secret=True)
    fal_key: str | None = _optional("FAL_KEY", values.secret, secret=True)
    fal_api_url: str = _address("fal")
    replicate_api_token: str | None = _optional("REPLICATE_API_TOKEN", values.secret, secret=True)
    replicate_api_url: str = _address("replicate")
    bfl_api_key: str | None = _optional("BFL_API_KEY", values.secret, secret=True)
    bfl_api_url: str = _address("bfl")
    dashscope_api_key: str | None = _optional("DASHSCOPE_API_KEY", values.secret, secret=True)
    dashscope_api_url: str = _address("dashscope")
    gemini_api_key: str | None = _optional("GEMINI_API_KEY", values.secret, secret=True)
    gemini_api_url: str = _address("gemini")
    siliconflow_api_key: str | None = _optional("SILICONFLOW_API_KEY", values.secret, secret=True)
    siliconflow_api_url: str = _address("siliconflow")
    sandbox_delay_s: float = _setting("SANDBOX_DELAY", 1.0, values.seconds())
    model_aliases: Mapping[str, str] = _setting("MODEL_ALIASES", MappingProxyType({}), values.aliases)
    models_file: Path | None = _optional("MODELS_FILE", values.folder)
    channels_file: Path | None = _optional("CHANNELS_FILE", values.folder)
    model_rules: bool = _setting("MODEL_RULES", default=True, parse=values.on_off)
    fallback_models: tuple[str, ...] = _setting("FALLBACK_MODELS", (), values.comma_separated(values.plain_text))
    rate_limit_window_s: float = _setting("RATE_LIMIT_WINDOW", 60.0, values.milliseconds)
    rate_limit_max: int = _setting("RATE_LIMIT_MAX", 10, values.integer(0, 10**9))
    image_rate_limit_max: int = _setting("IMAGE_RATE_LIMIT_MAX", 5, values.integer(0, 10**9))
    image_units_per_min: int | None = _optional("IMAGE_UNITS_PER_MINUTE", values.integer(0, 10**9))
    rate_limit_store: str = _setting("RATE_LIMIT_STORE", "memory", values.one_of("memory", "redis"))
    v1_reuse: str = _setting("V1_REUSE", "retries", values.one_of("retries", "always"))
    v1_max_wait_s: float = _setting("V1_MAX_WAIT", 300.0, values.seconds(0.001))
    v1_keepalive: bool = _setting("V1_KEEPALIVE", default=False, parse=values.boolean)
    v1_response_format: str | None = _optional("V1_RESPONSE_FORMAT", values.one_of("url", "b64_json"))
    worker_concurrency: int = _setting("WORKER_CONCURRENCY", 5, values.integer(1, 1000))
    max_attempts: int = _setting("MAX_ATTEMPTS", 3, values.integer(1, 1000))
    retry_base_s: float = _setting("RETRY_BASE_SECONDS", 5.0, values.seconds())
    upstream_timeout_s: float = _setting("UPSTREAM_TIMEOUT", 120.0, values.seconds(0.001))
    upstream_rate_per_min: float | None = _optional("UPSTREAM_RATE", values.rate_per_min)
    task_deadline_s: float = _setting("TASK_DEADLINE", 3600.0, values.seconds(1))
    lease_s: float = _setting("LEASE_SECONDS", 30.0, values.seconds(1))
    drain_s: float = _setting("DRAIN_SECONDS", 25.0, values.seconds())
    result_ttl_s: float = _setting("RESULT_TTL", 86400.0, values.seconds(1))
    max_queue: int = _setting("MAX_QUEUE", 10_000, values.integer(1, 10**9))
    image_store: str = _setting("IMAGE_STORE", "disk", values.one_of("disk", "redis", "s3", "upstream"))
    image_store_max_bytes: int = _setting("IMAGE_STORE_MAX_BYTES", 1024 * _MIB, values.byte_count)
    upload_max_bytes: int = _setting("UPLOAD_MAX_BYTES", 20 * _MIB, values.byte_count)
    upload_ttl_s: float = _setting("UPLOAD_TTL", 86400.0, values.seconds(1))
    embed_metadata: bool = _setting("EMBED_METADATA", default=False, parse=values.boolean)
    s3_endpoint: str | None = _optional("S3_ENDPOINT", values.base_url)
    s3_bucket: str | None = _optional("S3_BUCKET", values.plain_text)
    s3_region: str | None = _optional("S3_REGION", values.plain_text)
    s3_access_key_id: str | None = _optional("S3_ACCESS_KEY_ID", values.secret, secret=True)
    s3_secret_access_key: str | None = _optional("S3_SECRET_ACCESS_KEY", values.secret, secret=True)
    api_keys: Mapping[str, str] = _setting("API_KEYS", MappingProxyType({}), values.api_keys, secret=True)
    admin_token: str | None = _optional("ADMIN_TOKEN", values.long(values.secret), secret=True)
    open_to_all: bool = _setting("OPEN_TO_ALL", default=False, parse=values.boolean)
    budget_daily_micro_usd: int | None = _optional("BUDGET_DAILY_USD", values.dollars)
    unknown_price_micro_usd: int | None = _optional("UNKNOWN_PRICE_USD", values.dollars)
    alert_webhook: str | None = _optional("ALERT_WEBHOOK", values.receiver, secret=True)
    fair_window: int = _setting("FAIR_WINDOW", 10, values.integer(1, 10_000))
    cache_scope: str | None = _optional("CACHE_SCOPE", values.one_of("shared", "key"))
    task_id_secret: str | None = _optional("TASK_ID_SECRET", values.long(values.plain_text), secret=True)
    trusted_proxy_hops: int | Literal["auto"] = _setting("TRUSTED_PROXY_HOPS", 0, values.proxy_hops)
    cors_origins: tuple[str, ...] = _setting("CORS_ORIGINS", (), values.comma_separated(values.origin))
    webhook_secret: str | None = _optional("WEBHOOK_SECRET", values.webhook_secret, secret=True)
    webhook_sign_hosts: tuple[str, ...] = _setting("WEBHOOK_SIGN_HOSTS", (), values.comma_separated(values.host_name))
    webhook_allow_private: bool = _setting("WEBHOOK_ALLOW_PRIVATE", default=False, parse=values.boolean)
    webhook_proxy: str | None = _optional("WEBHOOK_PROXY", values.proxy, secret=True)
    https_proxy: str | None = _optional("HTTPS_PROXY", values.proxy, secret=True)
    http_proxy: str | None = _optional("HTTP_PROXY", values.proxy, secret=True)
    no_proxy: tuple[str, ...] = _setting("NO_PROXY", (), values.proxy_exceptions)
    log_level: str = _setting("LOG_LEVEL", "INFO", values.one_of(*LOG_LEVELS))
    log_format: str = _setting("LOG_FORMAT", "text", values.one_of("text", "json"))
    on_render: bool = False
    misspelled: tuple[tuple[str, str], ...] = ()
    file_channels: tuple[Channel, ...] = ()
    replaced: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None, dotenv: Path | None = Path(".env")) -> Settings:
        """Read and check them all. The environment comes before the file, also with an empty value (`NAME=`).

        Raises SettingsError with one line for each fault.
        """
        faults: dict[str, str] = {}
        notes: list[str] = []
        texts = {**read_settings_file(dotenv, faults, notes), **(os.environ if environ is None else environ)}
        texts |= {
            name: texts.get(name) or texts.get(name.lower(), "") for name in _PROXY_NAMES if name.lower() in texts
        }
        texts |= read_secret_files(texts, [rule.name for rule in _rules().values() if rule.secret], faults, notes)
        _check_tls_files(texts, faults, notes)
        parsed = _parse(texts, faults, notes)
        on_render = bool(texts.get("RENDER", "").strip("\"' "))
        settings = cls(**parsed, on_render=on_render, misspelled=_misspelled(texts))
        settings = _with_channels(settings, set(parsed), texts, faults)
        settings = _resolve(settings, set(parsed), faults, notes)
        for name, fault in _cross_field_errors(settings):
            faults.setdefault(name, fault)
        if faults:
            raise SettingsError("\n".join(f"{name}: {fault}" for name, fault in faults.items()))
        return replace(settings, notes=tuple(notes))

    def text_of(self, name: str) -> str:
        """Return the text of a setting of a provider, which has its attribute's name; empty if it is not set."""
        return str(getattr(self, name.lower()) or "") if name else ""

    @property
    def is_loopback(self) -> bool:
        """Return whether only this machine can connect."""
        return all(map(_is_loopback, self.hosts))

    @property
    def is_sandbox(self) -> bool:
        """Return whether no call is paid."""
        if self.file_channels:
            return all(channel.provider == SANDBOX for channel in self.file_channels)
        return self.provider == SANDBOX

    @property
    def may_be_open(self) -> bool:
        """Return whether clients may do without a key: only this machine connects, or what they spend is bounded."""
        bounded = self.open_to_all and self.budget_daily_micro_usd is not None
        return bounded or self.is_sandbox or (self.is_loopback and not self.on_render)

    def __repr__(self) -> str:
        items = ((item.name, getattr(self, item.name), item.metadata.get("rule")) for item in fields(self))
        texts = (f"{name}={'***' if rule and rule.secret and value else repr(value)}" for name, value, rule in items)
        return f"Settings({', '.join(texts)})"


def read_listening(environ: Mapping[str, str] | None = None, dotenv: Path = Path(".env")) -> tuple[str, int]:
    """Return the first HOST and the PORT; faults of other settings do not matter. Raises SettingsError."""
    faults: dict[str, str] = {}
    texts = {**read_settings_file(dotenv, faults, []), **(os.environ if environ is None else environ)}
    parsed = _parse({name: texts.get(name, "") for name in ("HOST", "PORT")}, faults, [])
    if faults:
        raise SettingsError("\n".join(f"{name}: {fault}" for name, fault in faults.items()))
    settings = Settings(**parsed)
    return settings.hosts[0], settings.port


def setting_names() -> tuple[str, ...]:
    """Return the names of all settings, as in the environment."""
    return tuple(rule.name for rule in _rules().values())


def _rules() -> dict[str, _SettingRule]:
    return {item.name: item.metadata["rule"] for item in fields(Settings) if "rule" in item.metadata}


def _misspelled(texts: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return the names that are set and nearly that of a setting, sorted."""
    names = setting_names()
    files = [rule.name + SUFFIX for rule in _rules().values() if rule.secret]
    read_names = {*names, *files, *map(str.lower, _PROXY_NAMES)}
    unknown = sorted(
        name for name, text in texts.items() if text and name not in read_names and not _is_service_link(name, text)
    )
    foreign = {name for name, own in _OTHERS.items() if texts.get(own)}
    guesses = (
        (name, _OTHERS.get(name) or _probable(name.removeprefix(_OWN_PREFIX), [*names, *files]))
        for name in unknown
        if name not in foreign
    )
    return tuple((name, near) for name, near in guesses if near)


def _probable(name: str, names: Sequence[str]) -> str | None:
    words = frozenset(name.split("_")) - _UNITS
    of_these = {frozenset(each.split("_")) - _UNITS: each for each in names if len(words) > 1}
    return nearest(name, names, alike=_ALIKE) or of_these.get(words)


def _is_service_link(name: str, text: str) -> bool:
    """Return whether Kubernetes or Docker made the variable: they pass the address of each service in one.

    https://kubernetes.io/docs/tutorials/services/connect-applications-service/#environment-variables
    """
    return name.endswith("_PORT") and text.startswith(("tcp://", "udp://", "sctp://"))


def _parse(texts: Mapping[str, str], faults: dict[str, str], notes: list[str]) -> dict[str, Any]:
    """Return the valid values, by attribute."""
    parsed = {}
    for attribute, rule in _rules().items():
        try:
            if not (text := values.unwrapped(texts.get(rule.name, ""))):
                continue
            if rule.parse is values.folder and values.has_reference(text) and _exists(text):
                name = f"{text[:200]!r} by this very name"
                notes.append(
                    f"{rule.name} is {name}, which is there: rename it, and write its path without a reference"
                )
            else:
                values.check_replaced(text)
            parsed[attribute] = rule.parse(text)
        except ValueError as error:
            faults[rule.name] = str(error)
    return parsed


def _check_tls_files(texts: Mapping[str, str], faults: dict[str, str], notes: list[str]) -> None:
    """Check the paths that OpenSSL and Python read from variables of their own: a wrong one fails without its name."""
    paths = {name: texts.get(name, "").partition(os.pathsep)[0] for name in ("SSL_CERT_FILE", "SSL_CERT_DIR")}
    notes.extend(
        f"{name} names {path[:200]!r}, which is not there, so certificates of providers may be refused"
        for name, path in paths.items()
        if path and not _exists(path)
    )
    if path := texts.get("SSLKEYLOGFILE", ""):
        try:
            _check_appendable(path)
        except (OSError, ValueError) as error:
            faults["SSLKEYLOGFILE"] = f"{path[:200]!r} can't be written ({error}); take the variable away"


def _check_appendable(path: str) -> None:
    """Check that a file can be appended to, without making it. Raises OSError, ValueError."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC))
    except FileNotFoundError:
        folder = Path(path).resolve().parent
        if not folder.is_dir():
            raise
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path) from None


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def _with_channels(settings: Settings, parsed: set[str], texts: Mapping[str, str], faults: dict[str, str]) -> Settings:
    """Read the file of channels, with the default model and its provider."""
    if settings.channels_file is None:
        return settings
    try:
        read = read_channels(settings.channels_file, texts)
    except ValueError as error:
        faults["CHANNELS_FILE"] = f"{settings.channels_file}: " + f"\nCHANNELS_FILE: {settings.channels_file}: ".join(
            str(error).splitlines()
        )
        return settings
    channels = Channels(read)
    default = settings.model_aliases.get(settings.default_model, settings.default_model)
    if "default_model" not in parsed and not channels.serving(default):
        kinds = (KINDS[channel.provider].default_model for channel in channels.all)
        default = next((model for model in (*channels.named_models, *kinds) if model and channels.serving(model)), "")
        settings = replace(settings, default_model=default or settings.default_model)
    if (preferred := channels.preferred(default)) is None:
        faults["DEFAULT_MODEL"] = "is served by no channel of CHANNELS_FILE; set it to a model that one of them serves"
    provider = preferred.provider if preferred else SANDBOX
    used = {key.source.removeprefix("env:") for channel in read for key in channel.keys}
    misspelled = tuple((name, near) for name, near in settings.misspelled if name.removesuffix(SUFFIX) not in used)
    replaced = _replaced(used, parsed)
    return replace(settings, file_channels=read, provider=provider, replaced=replaced, misspelled=misspelled)


def _replaced(used: set[str], parsed: set[str]) -> tuple[str, ...]:
    """Return the names of settings of providers that were set and that no channel uses."""
    names = ["PROVIDER", *(name for kind in KINDS.values() for name in (kind.key_setting, kind.url_setting))]
    return tuple(name for name in names if name.lower() in parsed and name not in used)


def _resolve(settings: Settings, parsed: set[str], faults: dict[str, str], notes: list[str]) -> Settings:
    """Fill in the defaults that depend on other settings."""
    if "provider" not in parsed and settings.together_api_key and not settings.file_channels:
        settings = replace(settings, provider="together")
    if "default_model" not in parsed and not settings.file_channels:
        settings = replace(settings, default_model=KINDS[settings.provider].default_model or settings.default_model)
    if "image_store_max_bytes" not in parsed and settings.image_store == "redis":
        settings = replace(settings, image_store_max_bytes=100 * _MIB)
    if "trusted_proxy_hops" not in parsed and settings.on_render:
        settings = replace(settings, trusted_proxy_hops="auto")
    if settings.redis_url:
        try:
            settings = replace(settings, redis_url=redis_py_url(settings.redis_url, settings.redis_token, notes))
        except ValueError as error:
            faults["REDIS_URL"] = str(error)
    return settings


def _cross_field_errors(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield the name and the fault of settings that are good alone but not together."""
    needed = KINDS[settings.provider].needed_setting
    if needed and not settings.text_of(needed) and not settings.channels_file:
        yield needed, f"is not set, and PROVIDER={settings.provider} needs it"
    keys = {"S3_ACCESS_KEY_ID": settings.s3_access_key_id, "S3_SECRET_ACCESS_KEY": settings.s3_secret_access_key}
    for name, value in ({"S3_BUCKET": settings.s3_bucket} | keys).items():
        if settings.image_store == "s3" and not value:
            yield name, "is not set, and IMAGE_STORE=s3 needs it"
    if settings.openai_api_key and "@" in (settings.openai_api_url or ""):
        yield "OPENAI_API_KEY", "is set, and OPENAI_API_URL has a user; name one of them"
    if settings.redis_url is None:
        yield from _embedded_redis_errors(settings)


def _embedded_redis_errors(settings: Settings) -> Iterator[tuple[str, str]]:
    if settings.redis_token:
        yield "REDIS_TOKEN", "is set without REDIS_URL; set both, or none for the embedded Redis"
    elif settings.embedded_redis == "off":
        yield "REDIS_URL", "is not set, and EMBEDDED_REDIS=off; set REDIS_URL, or EMBEDDED_REDIS=auto"
    elif settings.embedded_redis == "auto" and settings.on_render:
        lost = "is not set, and Render does not keep the disk of an embedded Redis over a deploy"
        yield "REDIS_URL", f"{lost}; set it to that of an Upstash database, or EMBEDDED_REDIS=force to lose tasks"


def _is_loopback(host: str) -> bool:
    return host.lower() == "localhost" or (values.is_address(host) and ipaddress.ip_address(host).is_loopback)
