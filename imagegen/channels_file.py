"""Channels: providers with their keys, models and limits, as CHANNELS_FILE names them."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from msgspec import Struct

from imagegen import setting_parsers as values
from imagegen.did_you_mean import nearest
from imagegen.secret_files import SUFFIX, read_secret_file

MAX_FILE_BYTES = 1024 * 1024
MAX_CHANNELS = 100
MAX_KEYS = 100
"""Of one channel."""

MAX_CACHED_MODELS = 1_000
"""Clients may name any model."""

SANDBOX = "sandbox"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FIELDS = ("name", "provider", "keys", "models", "weight", "priority", "rate", "concurrency", "base_url")

_T = TypeVar("_T")


class ProviderKind(Struct, frozen=True):
    """Needs of a provider's channels.

    base_url: by default, empty if the channel must name one. key: whether it has one: `needed`, `optional` or `none`.
    default_model: None if it has Together's. shares_jobs: whether each key of an account reads the jobs of all its
    keys. lists_jobs: whether the job of a call with a lost response can be found. key_setting, url_setting: names of
    the settings for PROVIDER, empty without one. routes: pattern of what an address must not have behind its base,
    which would be doubled in each call. refused_address: pattern of addresses with another API.
    """

    base_url: str = ""
    key: str = "needed"
    default_model: str | None = None
    shares_jobs: bool = False
    lists_jobs: bool = False
    key_setting: str = ""
    url_setting: str = ""
    routes: str = "/images/(generations|edits)"
    refused_address: str | None = None

    @property
    def takes_login(self) -> bool:
        """Whether `user:password@` may be in its address."""
        return self.key != "needed"

    def parse_address(self, text: str) -> str:
        """Return the address of its API. Raises ValueError with the base of a whole route."""
        url = (values.base_url_with_login if self.takes_login else values.base_url)(text)
        path = "/" + url.partition("://")[2].partition("/")[2]
        if match := re.search(f"(?:{self.routes})(?:[/:].*)?$", path):
            raise ValueError(f"must be the base of the API, without {match[0].rstrip('/')[:40]} at its end")
        if self.refused_address and re.search(self.refused_address, url):
            raise ValueError(f"is another API of the provider; set {self.base_url}")
        return url

    @property
    def needed_setting(self) -> str:
        """The setting without which PROVIDER can't be this provider; empty if there is none."""
        return self.key_setting if self.key == "needed" else "" if self.base_url else self.url_setting


KINDS: Mapping[str, ProviderKind] = {
    "together": ProviderKind(
        "https://api.together.xyz", key_setting="TOGETHER_API_KEY", url_setting="TOGETHER_API_URL"
    ),
    "openai": ProviderKind(
        key="optional",
        key_setting="OPENAI_API_KEY",
        url_setting="OPENAI_API_URL",
        routes="/images/(?:edits|variations)|/responses",
    ),
    "a1111": ProviderKind(key="none", url_setting="A1111_URL", routes="/sdapi"),
    "fal": ProviderKind(
        "https://queue.fal.run",
        default_model="fal-ai/flux/schnell",
        key_setting="FAL_KEY",
        url_setting="FAL_API_URL",
        routes="/fal-ai/.+",
        refused_address="//fal[.]run(?:[:/]|$)",  # it answers at once and has no jobs
    ),
    "replicate": ProviderKind(
        "https://api.replicate.com",
        default_model="black-forest-labs/flux-schnell",
        lists_jobs=True,
        key_setting="REPLICATE_API_TOKEN",
        url_setting="REPLICATE_API_URL",
        routes="(?<=/v1)/(?:predictions|models|deployments)",
    ),
    "bfl": ProviderKind(
        "https://api.bfl.ai",
        default_model="flux-2-klein-4b",
        key_setting="BFL_API_KEY",
        url_setting="BFL_API_URL",
        routes="(?<=/v1)/(?:flux[^/]*|get_result)",
    ),
    "dashscope": ProviderKind(
        "https://dashscope.aliyuncs.com",
        default_model="wan2.2-t2i-flash",
        shares_jobs=True,
        lists_jobs=True,
        key_setting="DASHSCOPE_API_KEY",
        url_setting="DASHSCOPE_API_URL",
        routes="/services/aigc|(?<=/api/v1)/tasks|/compatible-mode",
    ),
    "gemini": ProviderKind(
        "https://generativelanguage.googleapis.com",
        default_model="gemini-2.5-flash-image",
        key_setting="GEMINI_API_KEY",
        url_setting="GEMINI_API_URL",
        routes="(?<=/v1beta)/models|/images/(?:generations|edits)",
    ),
    "siliconflow": ProviderKind(
        "https://api.siliconflow.cn",
        default_model="Kwai-Kolors/Kolors",
        key_setting="SILICONFLOW_API_KEY",
        url_setting="SILICONFLOW_API_URL",
    ),
    SANDBOX: ProviderKind(key="none"),
}


def credential_setting(provider: str) -> str:
    """Return the setting with the credentials of a provider, for the operator; its name if there is none."""
    kind = KINDS.get(provider, ProviderKind())
    return kind.key_setting or kind.url_setting or provider


class ChannelKey(Struct, frozen=True):
    """A provider key. source: `env:NAME`, the setting that has it, or `file`; empty if the channel needs no key."""

    secret: str = ""
    source: str = ""

    def __repr__(self) -> str:
        return f"ChannelKey({self.source!r})"


class ModelName(Struct, frozen=True):
    """Models that a channel serves: a pattern of requested names, and the name to send, None for the requested one."""

    pattern: str
    sent: str | None = None

    def sent_name(self, model: str) -> str | None:
        """Return the name to send for a requested model, None if it is another one."""
        if model == self.pattern:
            return self.sent or model
        if not fnmatchcase(model, self.pattern):
            return None
        if self.sent is None or "*" not in self.sent:
            return self.sent or model
        before, _, after = self.pattern.partition("*")
        return self.sent.replace("*", model[len(before) : len(model) - len(after)], 1)

    def __str__(self) -> str:
        return self.pattern if self.sent is None else f"{self.pattern}={self.sent}"


EVERY_MODEL = (ModelName("*"),)


class Channel(Struct, frozen=True):
    """A provider with its credentials and limits.

    keys: at least one. priority: a higher one is preferred. weight: share of the calls among channels of one priority.
    rate_per_min, concurrency: of all its keys together in one instance, None without a limit.
    """

    name: str
    provider: str
    keys: tuple[ChannelKey, ...] = (ChannelKey(),)
    models: tuple[ModelName, ...] = EVERY_MODEL
    weight: int = 1
    priority: int = 0
    rate_per_min: float | None = None
    concurrency: int | None = None
    base_url: str = ""

    def __repr__(self) -> str:
        return f"Channel({self.name!r})"  # base_url may hold a login

    def sent_name(self, model: str) -> str | None:
        """Return the provider's name of a model; None if the channel does not serve it. Exact names come first."""
        if self.models is EVERY_MODEL:
            return model
        exact = (name for name in self.models if name.pattern == model)
        return next((sent for name in (*exact, *self.models) if (sent := name.sent_name(model)) is not None), None)


class Channels:
    """All channels of this instance.

    A model that has a paid channel is never drawn by a sandbox channel, so that its images are real ones.
    serves_every_model: whether one of them serves every name that clients use.
    """

    def __init__(self, channels: Sequence[Channel]) -> None:
        self.all = tuple(channels)
        self.serves_every_model = any(channel.models is EVERY_MODEL for channel in self.all)
        self._serving: dict[str, tuple[Channel, ...]] = {}

    def serving(self, model: str) -> tuple[Channel, ...]:
        """Return the channels that serve a model, those of the highest priority first."""
        channels = self._serving.get(model)
        if channels is None:
            if len(self._serving) >= MAX_CACHED_MODELS:
                self._serving.clear()
            able = [channel for channel in self.all if channel.sent_name(model) is not None]
            paid = [channel for channel in able if channel.provider != SANDBOX]
            channels = tuple(sorted(paid or able, key=lambda channel: -channel.priority))
            self._serving[model] = channels
        return channels

    def preferred(self, model: str) -> Channel | None:
        """Return the first channel of the highest priority that serves a model."""
        serving = self.serving(model)
        return serving[0] if serving else None

    def is_sandbox(self, model: str) -> bool:
        """Return whether a model is drawn by the sandbox; a model without a channel is drawn as the others are."""
        serving = self.serving(model) or self.all
        return all(channel.provider == SANDBOX for channel in serving)

    @property
    def named_models(self) -> tuple[str, ...]:
        """Return the requested names without wildcard, in the order of the file."""
        names = (name.pattern for channel in self.all for name in channel.models if not _is_pattern(name.pattern))
        return tuple(dict.fromkeys(names))


def read_channels(path: Path, environ: Mapping[str, str]) -> tuple[Channel, ...]:
    """Read a file of channels. environ: values of `env:NAME`.

    Raises ValueError with the table and the rule that it breaks, one line for each fault. It never quotes a key.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ValueError(f"can't be read: {why}; name a readable TOML file, or leave it out") from error
    if len(raw) > MAX_FILE_BYTES:
        raise ValueError(f"is over {MAX_FILE_BYTES} bytes")
    try:
        return parse_channels(raw.decode("utf-8-sig"), environ)
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8") from error


def parse_channels(text: str, environ: Mapping[str, str]) -> tuple[Channel, ...]:
    """Parse the text of a file of channels, as `read_channels` does."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"is no TOML: {error}") from error
    tables = raw.pop("channels", None)
    faults = [f"has no key {_shown(name)} outside of [[channels]]" for name in raw]
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables) or not tables:
        raise ValueError("\n".join(["must have at least one table [[channels]]", *faults]))
    if len(tables) > MAX_CHANNELS:
        raise ValueError(f"has {len(tables)} channels, and at most {MAX_CHANNELS} are possible")
    channels = []
    for number, table in enumerate(tables, start=1):
        name = table.get("name")
        where = f"[[channels]] number {number}" + (f" ({name[:64]!r})" if isinstance(name, str) else "")
        table_faults: list[str] = []
        channel = _Table(table, table_faults, environ).channel()
        faults += [f"{where}: {fault}" for fault in table_faults]
        channels.append(channel)
    counts = Counter(channel.name for channel in channels if channel.name)
    faults += [f"{name!r} is the name of {count} channels" for name, count in counts.items() if count > 1]
    if faults:
        raise ValueError("\n".join(faults))
    return tuple(channels)


class _Table:
    """One table of the file. faults: filled with every rule that it breaks."""

    def __init__(self, fields: Mapping[str, Any], faults: list[str], environ: Mapping[str, str]) -> None:
        self._fields = fields
        self._faults = faults
        self._environ = environ

    def channel(self) -> Channel:
        for name in self._fields:
            if name not in _FIELDS:
                near = nearest(name, _FIELDS)
                advice = f"did you mean {near}?" if near else f"the keys are {', '.join(_FIELDS)}"
                self._faults.append(f"{_shown(name)} is no key of a channel: {advice}")
        provider = self._get("provider", _provider, "")
        kind = KINDS.get(provider, ProviderKind(key="optional"))
        needs_address = bool(kind.url_setting) and not kind.base_url
        return Channel(
            name=self._get("name", _channel_name, ""),
            provider=provider,
            keys=self._keys(kind),
            models=self._get("models", _models, EVERY_MODEL, required=False),
            weight=self._get("weight", _whole(1, 1_000_000), 1, required=False),
            priority=self._get("priority", _whole(-1_000_000, 1_000_000), 0, required=False),
            rate_per_min=self._get("rate", _rate, None, required=False),
            concurrency=self._get("concurrency", _whole(1, 1_000), None, required=False),
            base_url=self._get("base_url", _address(kind), kind.base_url, required=needs_address),
        )

    def _get(self, name: str, parse: Callable[[Any], _T], default: _T, *, required: bool = True) -> _T:
        if name not in self._fields:
            if required:
                self._faults.append(f"{name} is missing")
            return default
        try:
            return parse(self._fields[name])
        except ValueError as error:
            self._faults.append(f"{name}: {error}")
            return default

    def _keys(self, kind: ProviderKind) -> tuple[ChannelKey, ...]:
        texts = self._fields.get("keys", [])
        if not isinstance(texts, list) or not all(isinstance(key, str) for key in texts):
            self._faults.append('keys: must be a list of texts, as ["env:TOGETHER_API_KEY"]')
            return (ChannelKey(),)
        if kind.key == "none" and texts:
            self._faults.append("keys: must be absent, since this provider has no keys; a login goes into base_url")
        if kind.key == "needed" and not texts:
            self._faults.append('keys: is missing; name at least one, as ["env:TOGETHER_API_KEY"]')
        if len(texts) > MAX_KEYS:
            self._faults.append(f"keys: has {len(texts)} keys, and at most {MAX_KEYS} are possible")
        keys = []
        for number, text in enumerate(texts[:MAX_KEYS], start=1):
            try:
                keys.append(self._key(text))
            except ValueError as error:
                self._faults.append(f"keys: number {number} {error}")
        secrets = Counter(key.secret for key in keys)
        if any(count > 1 for count in secrets.values()):
            self._faults.append("keys: one key is named twice")
        if "@" in str(self._fields.get("base_url", "")) and keys:
            self._faults.append("keys: must be absent, since base_url has a user; name one of them")
        return tuple(keys) or (ChannelKey(),)

    def _key(self, text: str) -> ChannelKey:
        """Return a key. Raises ValueError, which never quotes it."""
        values.check_replaced(text)
        if not text.startswith("env:"):
            return ChannelKey(values.secret(text.strip()), "file")
        name = text.removeprefix("env:").strip()
        if not _ENV_NAME.fullmatch(name):
            raise ValueError("must be env:NAME with the name of a variable")
        secret = values.unwrapped(self._environ.get(name, ""))
        if not secret and (file := self._environ.get(name + SUFFIX, "").strip()):
            secret = _of_file(name, file)
        if not secret:
            raise ValueError(f"is env:{name}, and the variable {name} is not set")
        values.check_replaced(secret)
        return ChannelKey(values.secret(secret), f"env:{name}")


def _of_file(name: str, file: str) -> str:
    try:
        return read_secret_file(file)
    except ValueError as error:
        raise ValueError(f"is env:{name}, and {name}{SUFFIX}: {error}") from error


def _shown(name: str) -> str:
    return repr(name[:40])


def _is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[")


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError("must be a text")
    return value.strip()


def _channel_name(value: object) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError("must be 1 to 64 letters, digits and . _ - and begin with a letter or a digit")
    return value


def _provider(value: object) -> str:
    name = _text(value)
    if name not in KINDS:
        raise ValueError(f"{_shown(name)} is not allowed; it is one of {', '.join(KINDS)}")
    return name


def _whole(low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return parse


def _rate(value: object) -> float:
    return values.rate_per_min(str(value) if isinstance(value, int | float) else _text(value))


def _address(kind: ProviderKind) -> Callable[[object], str]:
    return lambda value: kind.parse_address(_text(value))


def _models(value: object) -> tuple[ModelName, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError('must be a list of patterns and renames, as ["black-forest-labs/*", "flux=org/model"]')
    return tuple(map(_model, value))


def _model(value: object) -> ModelName:
    pattern, renames, sent = (part.strip() for part in _text(value).partition("="))
    if not pattern or (renames and not sent):
        raise ValueError(f"{_shown(str(value))} must be a pattern, or a rename as asked=sent")
    if renames and ("*" in sent) and (sent.count("*") != 1 or pattern.count("*") != 1):
        raise ValueError(f"{_shown(str(value))}: a rename may have one * in both names")
    if renames and _is_pattern(sent.replace("*", "")):
        raise ValueError(f"{_shown(str(value))}: the name to send may have no ? and no [")
    return ModelName(pattern, sent or None)
