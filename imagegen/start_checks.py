"""Checks before the service is built: each fault of the machine is one message that names the setting to change."""

from __future__ import annotations

import errno
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

from loguru import logger

from imagegen.channels_file import KINDS
from imagegen.disk_patience import answer_soon
from imagegen.errors import SettingsError
from imagegen.settings import Settings
from imagegen.ssrf import check_host
from imagegen.tasks.webhook import parse_url

_PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Errors of a disk or a machine that may be over while the service runs."""


MIN_STORE_BYTES = 10_000_000
"""Bytes of about five images of a usual size."""


MIN_OPENAI_TIMEOUT_S = 240.0
"""OpenAI's images of high quality take over two minutes: https://github.com/vercel-labs/ai-cli/pull/64"""

PROBE_NAME_BYTES = 60
"""Of the name of a file that is tried, which is as long as the longest path below DATA_DIR."""

MAX_READ_BYTES = 16 * 1024 * 1024
"""Of each file of an embedded Redis that is not used."""

_OPENAI_HOST = "api.openai.com"
_TASK_KEY = b"}:task:"
"""In the files of an embedded Redis that had a task."""


def check_data_dir(path: Path) -> None:
    """Make the data folder and a file in it. Raises SettingsError if this can't ever work.

    A disk that does not answer may do so later.
    """
    try:
        folder = path.absolute()
    except OSError as error:
        where = f"{path} is below the working folder, which can't be used ({error.strerror})"
        raise SettingsError(f"DATA_DIR: {where}; set an absolute path, or start in another folder") from error
    probe = folder / f".probe-{secrets.token_hex(PROBE_NAME_BYTES)}"
    try:
        answer_soon(_probe, probe)
    except TimeoutError:
        logger.warning("DATA_DIR: {} does not answer, as a mount of a network without its server", folder)
    except RecursionError as error:
        raise SettingsError("DATA_DIR: has too many folders in each other; set a shorter path") from error
    except OSError as error:
        if error.errno not in _PASSING:
            why = f"{str(folder)[:200]} can't be used as a folder to write to ({error.strerror})"
            way = "set a shorter path" if error.errno == errno.ENAMETOOLONG else "set another one"
            raise SettingsError(f"DATA_DIR: {why}; make it writable for this user, or {way}") from error


def _probe(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    file.unlink()


def check_exposure(settings: Settings, *, has_keys: bool) -> None:
    """Raise SettingsError if everybody who reaches the port could spend the provider's credit.

    has_keys: whether there is an API key, in the settings or in Redis.
    """
    if has_keys or settings.may_be_open:
        return
    name, why = (
        ("RENDER", "is set") if settings.is_loopback else ("HOST", f"{','.join(settings.hosts)} is not loopback")
    )
    ways = "API_KEYS=NAME:KEY with a long random KEY, or OPEN_TO_ALL=true together with BUDGET_DAILY_USD"
    if not settings.on_render:
        ways += ", or HOST=127.0.0.1"
    raise SettingsError(
        f"{name}: {why}, and there is no key, so everybody who reaches the port would spend your provider's credit; "
        f"set {ways}; or make a key in this Redis by `imagegen keys create NAME`"
    )


def check_alert_webhook(settings: Settings) -> None:
    """Check the address by the rules of webhooks. Raises SettingsError."""
    if settings.alert_webhook is not None:
        try:
            parse_url(settings.alert_webhook, None if settings.webhook_allow_private else check_host)
        except ValueError as error:
            remedy = "WEBHOOK_ALLOW_PRIVATE=true allows http:// and private addresses"
            raise SettingsError(f"ALERT_WEBHOOK: {error}; {remedy}") from error


def warnings(settings: Settings) -> Iterator[str]:
    """Yield a line for each setting that does not do what its writer expects."""
    for name, probable in settings.misspelled:
        yield f"{name} is no setting of this service and has no effect: did you mean {probable}?"
    yield from settings.notes
    for name, remedy in _unused(settings):
        yield f"{name} has no effect while the sandbox draws the images: set {remedy}"
    if settings.on_render and not settings.admin_token:
        yield "ADMIN_TOKEN is not set, and Render keeps no disk: each deploy makes another token; set it to keep one"
    if settings.embed_metadata and settings.image_store == "upstream":
        yield "EMBED_METADATA has no effect with IMAGE_STORE=upstream, which keeps the provider's own files"
    if settings.image_store_max_bytes < MIN_STORE_BYTES and settings.image_store != "upstream":
        yield "IMAGE_STORE_MAX_BYTES is below 10 MB, which a few images fill: each is deleted once others are saved"
    for name in settings.replaced:
        yield f"{name} has no effect while CHANNELS_FILE is set, which names all providers and their keys"
    yield from _contradictions(settings)
    if settings.redis_url is not None and (folder := _recent_embedded_data(settings)):
        yield (
            f"REDIS_URL is set, so the tasks and keys that the embedded Redis has in {folder} are not read, and their "
            "requests are paid again; start once without REDIS_URL to collect them"
        )
    if _calls_openai(settings) and settings.upstream_timeout_s < MIN_OPENAI_TIMEOUT_S:
        yield (
            f"UPSTREAM_TIMEOUT is {settings.upstream_timeout_s:g} s, and OpenAI's images of high quality take longer: "
            "a call that it cuts off is paid for, and made once more; set 300"
        )


def _contradictions(settings: Settings) -> Iterator[str]:
    """Yield a line for each setting that another one makes useless or harmful."""
    with_redis, keys = settings.redis_url is not None, settings.api_keys
    token_hash = sha256((settings.admin_token or "").encode()).hexdigest()
    rules = {
        f"S3_BUCKET is only read from with IMAGE_STORE={settings.image_store}: set IMAGE_STORE=s3 to save there": (
            settings.s3_bucket and settings.image_store != "s3"
        ),
        "REDIS_SERVER has no effect while REDIS_URL is set": with_redis and settings.redis_server,
        "EMBEDDED_REDIS=force has no effect while REDIS_URL is set": with_redis and settings.embedded_redis == "force",
        "WEBHOOK_SIGN_HOSTS has no effect without WEBHOOK_SECRET, which signs webhooks to these hosts": (
            settings.webhook_sign_hosts and not settings.webhook_secret
        ),
        "OPEN_TO_ALL has no effect while API_KEYS has keys: each client needs one of them": (
            settings.open_to_all and keys
        ),
        "ADMIN_TOKEN is also a key in API_KEYS, so that client may use all admin routes: set another one": (
            token_hash in keys.values()
        ),
    }
    yield from (text for text, applies in rules.items() if applies)
    yield from _useless_times(settings)


def _useless_times(settings: Settings) -> Iterator[str]:
    if settings.rate_limit_window_s < 1:
        window = f"RATE_LIMIT_WINDOW is {settings.rate_limit_window_s * 1000:g} milliseconds"
        yield f"{window}, so its limits hardly stop a client: a minute is 60000"
    if settings.is_sandbox and settings.sandbox_delay_s >= settings.upstream_timeout_s:
        yield "SANDBOX_DELAY is not below UPSTREAM_TIMEOUT, so each image of the sandbox takes too long and fails"
    if not settings.is_sandbox and settings.task_deadline_s <= settings.upstream_timeout_s:
        yield (
            f"TASK_DEADLINE is {settings.task_deadline_s:g} s, and UPSTREAM_TIMEOUT {settings.upstream_timeout_s:g} s: "
            "a call that the deadline cuts off is paid for; set a deadline of several calls"
        )


def _recent_embedded_data(settings: Settings) -> Path | None:
    """Return the folder of an embedded Redis that may have tasks which have not expired, None if there is none."""
    with suppress(OSError):
        return answer_soon(_find_embedded_data, settings)
    return None


def _find_embedded_data(settings: Settings) -> Path | None:
    since = time.time() - settings.task_deadline_s - settings.result_ttl_s
    with suppress(OSError):
        for file in settings.data_dir.glob("*-*/appendonlydir/*"):
            if file.stat().st_mtime > since and _TASK_KEY in _head_of(file):
                return file.parent.parent
    return None


def _head_of(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(MAX_READ_BYTES)


def _calls_openai(settings: Settings) -> bool:
    addresses = [channel.base_url for channel in settings.file_channels if channel.provider == "openai"]
    if not settings.file_channels and settings.provider == "openai":
        addresses = [settings.openai_api_url or ""]
    return any(urlsplit(address).hostname == _OPENAI_HOST for address in addresses)


def _unused(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield the keys and addresses of providers that are set while the sandbox draws the images, with a remedy."""
    if not settings.is_sandbox or settings.file_channels:
        return
    for provider, kind in KINDS.items():
        for name in (kind.key_setting, kind.url_setting):
            is_default = name == kind.url_setting and kind.base_url
            if not is_default and provider != "together" and settings.text_of(name):
                needed = kind.needed_setting
                yield name, f"PROVIDER={provider}" + (f" and {needed}" if needed not in ("", name) else "")


def overview(settings: Settings, address: str, call_slots: int) -> Iterator[str]:
    """Yield the lines of the log that show how this service is set; no secret is in them.

    address: where it listens. call_slots: upstream calls at once.
    """
    names = ", ".join(channel.name for channel in settings.file_channels)
    providers = f"Channels {names}" if names else f"Provider {settings.provider}"
    yield f"{providers}, default model {settings.default_model}, images in {_store(settings)}"
    general, generation = settings.rate_limit_max, settings.image_rate_limit_max
    limits = [f"{limit} {unit}" for limit, unit in ((general, "requests"), (generation, "generations")) if limit]
    each = f"{' and '.join(limits)} in {settings.rate_limit_window_s:g} s" if limits else "none"
    yield f"Redis {_redis(settings)}, limits of a client: {each}, {call_slots} upstream calls at once"
    base = settings.public_url or address
    yield f"The studio is at {base}/ and the API is shown at {base}/docs"
    if settings.is_sandbox:
        yield "The sandbox draws the images itself: for real ones set TOGETHER_API_KEY, or PROVIDER and what it needs"


def _store(settings: Settings) -> str:
    return {
        "disk": f"{settings.data_dir / 'images'}",
        "s3": f"the bucket {settings.s3_bucket}",
        "redis": "Redis",
        "upstream": "the provider's own links",
    }.get(settings.image_store, settings.image_store)


def _redis(settings: Settings) -> str:
    if settings.redis_url is None:
        return f"embedded in {settings.data_dir}"
    parts = urlsplit(settings.redis_url)
    return parts.netloc.rpartition("@")[2] or parts.path
