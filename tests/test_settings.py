"""Tests of settings: defaults, formats, faults, and settings that depend on each other."""

from __future__ import annotations

import hashlib
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from imagegen.errors import SettingsError
from imagegen.settings import Settings, setting_names
from imagegen.start_checks import warnings
from tests.loaded_settings import WEBHOOK_SECRET, faults, load
from tests.support import over_rows


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_defaults_are_the_sandbox_on_loopback_with_embedded_redis() -> None:
    settings = load()
    assert settings == Settings()
    assert (settings.hosts, settings.port, settings.provider) == (("127.0.0.1",), 3000, "sandbox")
    assert (settings.redis_url, settings.data_dir) == (None, Path(".imagegen"))
    assert (settings.rate_limit_window_s, settings.rate_limit_max, settings.image_rate_limit_max) == (60.0, 10, 5)
    assert (settings.lease_s, settings.drain_s, settings.result_ttl_s, settings.task_deadline_s) == (
        30,
        25,
        86400,
        3600,
    )
    assert (settings.image_store, settings.image_store_max_bytes) == ("disk", 2**30)
    assert (settings.trusted_proxy_hops, settings.on_render) == (0, False)


def test_settings_can_not_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        load().port = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        load(MODEL_ALIASES="a=b").model_aliases["c"] = "d"  # type: ignore[index]


@over_rows(
    ("name", "text", "attribute", "value"),
    [
        ("HOST", "0.0.0.0", "hosts", ("0.0.0.0",)),
        ("HOST", "[::1]", "hosts", ("::1",)),
        ("HOST", "localhost", "hosts", ("localhost",)),
        ("HOST", "127.0.0.1, [::1],", "hosts", ("127.0.0.1", "::1")),
        ("PORT", "0", "port", 0),
        ("PORT", " 8080 ", "port", 8080),
        ("PUBLIC_URL", "https://example.org/images/", "public_url", "https://example.org/images"),
        ("TOGETHER_API_URL", "http://127.0.0.1:9000/v1", "together_api_url", "http://127.0.0.1:9000/v1"),
        ("PROVIDER", "Sandbox", "provider", "sandbox"),
        ("REDIS_PREFIX", "shop:dev", "redis_prefix", "shop:dev"),
        ("DATA_DIR", "/srv/images", "data_dir", Path("/srv/images")),
        ("DATA_DIR", "~/images", "data_dir", Path.home() / "images"),
        ("SANDBOX_DELAY", "0", "sandbox_delay_s", 0.0),
        ("RETRY_BASE_SECONDS", ".5", "retry_base_s", 0.5),
        ("UPSTREAM_TIMEOUT", "0.25", "upstream_timeout_s", 0.25),
        ("LEASE_SECONDS", "1", "lease_s", 1.0),
        ("RESULT_TTL", "2", "result_ttl_s", 2.0),
        ("RATE_LIMIT_WINDOW", "1500", "rate_limit_window_s", 1.5),
        ("RATE_LIMIT_MAX", "0", "rate_limit_max", 0),
        ("MODEL_ALIASES", "old=new, a/b = c/d ,", "model_aliases", {"old": "new", "a/b": "c/d"}),
        ("FALLBACK_MODELS", "a, b,a", "fallback_models", ("a", "b")),
        ("UPSTREAM_RATE", "10/minute", "upstream_rate_per_min", 10.0),
        ("UPSTREAM_RATE", "2/second", "upstream_rate_per_min", 120.0),
        ("UPSTREAM_RATE", "600/hour", "upstream_rate_per_min", 10.0),
        ("UPSTREAM_RATE", "7.5", "upstream_rate_per_min", 7.5),
        ("IMAGE_STORE", "upstream", "image_store", "upstream"),
        ("IMAGE_STORE_MAX_BYTES", "5000", "image_store_max_bytes", 5000),
        ("IMAGE_STORE_MAX_BYTES", "100MiB", "image_store_max_bytes", 100 * 2**20),
        ("IMAGE_STORE_MAX_BYTES", "1.5 gb", "image_store_max_bytes", 1_500_000_000),
        (
            "API_KEYS",
            f"web:k-12345678, app:k:87654321, ci:sha256:{'AB' * 32}, bare-key+/=",
            "api_keys",
            {"web": sha("k-12345678"), "app": sha("k:87654321"), "ci": "ab" * 32, "default": sha("bare-key+/=")},
        ),
        ("TRUSTED_PROXY_HOPS", "2", "trusted_proxy_hops", 2),
        ("TRUSTED_PROXY_HOPS", "auto", "trusted_proxy_hops", "auto"),
        (
            "CORS_ORIGINS",
            "https://A.example:443,http://localhost:80,chrome-extension://abc",
            "cors_origins",
            ("https://a.example", "http://localhost", "chrome-extension://abc"),
        ),
        ("WEBHOOK_SECRET", WEBHOOK_SECRET, "webhook_secret", WEBHOOK_SECRET),
        ("WEBHOOK_ALLOW_PRIVATE", "yes", "webhook_allow_private", True),
        ("LOG_LEVEL", "debug", "log_level", "DEBUG"),
        ("LOG_FORMAT", "json", "log_format", "json"),
    ],
)
def test_a_valid_value_is_accepted(name: str, text: str, attribute: str, value: object) -> None:
    assert getattr(load(**{name: text}), attribute) == value


@over_rows(
    ("name", "text"),
    [
        *[("HOST", text) for text in ("http://localhost", "localhost:3000", "a b", ",", "::1,a b")],
        *[("PORT", text) for text in ("65536", "-1", "http", "3000.5", "٣", "1_000")],
        *[
            ("PUBLIC_URL", text)
            for text in ("example.org", "ftp://a", "https://", "https://a?b", "https://a#b", "http://a:b")
        ],
        *[("TOGETHER_API_URL", text) for text in ("http://user@a", "http://a b", "http://[", "http://a:0")],
        *[("TOGETHER_API_KEY", text) for text in ("two words", "ключ", "a\nb")],
        *[(name, "only-15-letters") for name in ("ADMIN_TOKEN", "TASK_ID_SECRET")],
        ("PROVIDER", "midjourney"),
        ("DEFAULT_MODEL", "a\x00b"),
        *[("REDIS_PREFIX", text) for text in ("a{b}", "a b", "a\x01", "x" * 65)],
        ("EMBEDDED_REDIS", "maybe"),
        *[("SANDBOX_DELAY", text) for text in ("-1", "nan", "inf", "1e3", "1s")],
        *[("MODEL_ALIASES", text) for text in ("a", "=b", "a=", "a=b,a=c")],
        *[("RATE_LIMIT_WINDOW", text) for text in ("0", "a minute")],
        ("RATE_LIMIT_STORE", "disk"),
        *[("WORKER_CONCURRENCY", text) for text in ("0", "1001")],
        ("MAX_ATTEMPTS", "0"),
        ("UPSTREAM_TIMEOUT", "0"),
        *[("UPSTREAM_RATE", text) for text in ("0", "10/day", "-1/minute", "fast")],
        ("LEASE_SECONDS", "0.5"),
        ("RESULT_TTL", "0"),
        ("MAX_QUEUE", "0"),
        ("IMAGE_STORE", "tape"),
        *[("IMAGE_STORE_MAX_BYTES", text) for text in ("0", "1 pint", "-5", "1PiB")],
        *[
            ("API_KEYS", text)
            for text in (
                *("nokey", "a:short", "a:12345678,a:87654321", "a:12345678,b:12345678", "a b:12345678", ","),
                *("12345678,87654321", f"sha256:{'ab' * 32}", "a:sha256:abcdef01", f"a:sha256:{'ag' * 32}", "a:"),
                *(f"a:12345678,b:sha256:{sha('12345678')}", "ä:12345678", f"{'a' * 65}:12345678"),
            )
        ],
        ("CACHE_SCOPE", "all"),
        *[("TRUSTED_PROXY_HOPS", text) for text in ("-1", "all", "100")],
        *[("CORS_ORIGINS", text) for text in ("*", "https://*.a", "https://a/", "https://a/b", "example.org", "null")],
        *[
            ("WEBHOOK_SECRET", text)
            for text in ("hunter2", "whsec_!!", "whsec_c2hvcnQ=", WEBHOOK_SECRET.removeprefix("whsec_"))
        ],
        ("WEBHOOK_ALLOW_PRIVATE", "perhaps"),
        ("LOG_LEVEL", "loud"),
        ("LOG_FORMAT", "xml"),
    ],
)
def test_a_wrong_value_is_rejected_by_name(name: str, text: str) -> None:
    assert list(faults(**{name: text})) == [name]


@over_rows("name", ["ADMIN_TOKEN", "TASK_ID_SECRET"])
def test_a_secret_of_16_characters_is_long_enough(name: str) -> None:
    assert getattr(load(**{name: " 16-letters-each. "}), name.lower()) == "16-letters-each."
    assert "at least 16 characters" in faults(**{name: "only-15-letters"})[name]


def test_all_faults_are_reported_together_with_the_allowed_values() -> None:
    found = faults(PORT="http", LOG_LEVEL="loud", LEASE_SECONDS="0", PROVIDER="together")
    assert found == {
        "PORT": "'http' is not allowed; a whole number from 0 to 65535 is",
        "LEASE_SECONDS": "'0' is not allowed; a number of seconds from 1 to 315360000 is",
        "LOG_LEVEL": "'loud' is not allowed; allowed: TRACE, DEBUG, INFO, WARNING, ERROR, CRITICAL",
        "TOGETHER_API_KEY": "is not set, and PROVIDER=together needs it",
    }


@over_rows("name", setting_names())
def test_an_empty_value_is_not_set(name: str) -> None:
    assert load(**{name: "  "}) == Settings()


@pytest.mark.parametrize(
    ("name", "text", "attribute", "value"),
    [
        ("DATA_DIR", '"/data"', "data_dir", Path("/data")),
        ("DATA_DIR", " '/my data' \r\n", "data_dir", Path("/my data")),
        ("DATA_DIR", "\u201c/data\u201d", "data_dir", Path("/data")),
        ("DATA_DIR", """/it's/"quoted"/x""", "data_dir", Path("""/it's/"quoted"/x""")),
        ("TOGETHER_API_KEY", "'sk-1'", "together_api_key", "sk-1"),
        ("TOGETHER_API_KEY", "\ufeffsk\u200b-1\u00a0\r", "together_api_key", "sk-1"),
        ("TOGETHER_API_KEY", '" sk-1 "', "together_api_key", "sk-1"),
        ("REDIS_URL", '"rediss://default:p\'w@h:6379"', "redis_url", "rediss://default:p'w@h:6379"),
        ("PORT", '"8080"', "port", 8080),
        ("PORT", '""', "port", 3000),
        ("WEBHOOK_ALLOW_PRIVATE", "'true'", "webhook_allow_private", True),
        ("MODEL_ALIASES", '"a=b,c=d"', "model_aliases", {"a": "b", "c": "d"}),
        ("RENDER", '""', "on_render", False),
    ],
)
def test_quotes_and_invisible_characters_around_a_value_are_stripped(
    name: str, text: str, attribute: str, value: object, tmp_path: Path
) -> None:
    assert getattr(load(**{name: text}), attribute) == value
    file = tmp_path / ".env"
    file.write_text(f"{name}={text.strip()}\n")
    assert getattr(Settings.load({}, dotenv=file), attribute) == value


@over_rows("text", ['"/data', "/data'", '"', "\"/data'", "\u201c/data"])
@over_rows("name", ["DATA_DIR", "TOGETHER_API_KEY", "REDIS_URL"])
def test_an_unbalanced_quote_is_a_fault_that_hides_the_value(name: str, text: str) -> None:
    found = faults(**{name: text})
    assert list(found) == [name]
    assert "quote" in found[name]
    assert "data" not in found[name]


def test_a_comment_after_a_path_is_a_fault() -> None:
    assert "comment" in faults(DATA_DIR="/data # the volume")["DATA_DIR"]


@pytest.mark.parametrize(
    ("home", "path"), [("/home/me", "~nobody-of-this-name/images"), ("", "~/images"), ("/", "~/x")]
)
def test_an_unknown_home_folder_is_a_fault(monkeypatch: pytest.MonkeyPatch, home: str, path: str) -> None:
    monkeypatch.setenv("HOME", home)
    assert "whole path" in faults(DATA_DIR=path)["DATA_DIR"]


def test_misspelled_settings_are_detected() -> None:
    others = (
        "XDG_DATA_DIRS",
        "HOSTNAME",
        "LOG_FILE",
        "REDIS_SERVICE_HOST",
        "PATH",
        "HOME",
        "IMAGEGEN_KEY",
        "IMAGEGEN_URL",
    )
    near = {
        "TOGETHER_APIKEY": "TOGETHER_API_KEY",
        "RATE_LIMITMAX": "RATE_LIMIT_MAX",
        "port": "PORT",
        "LEASE_SECOND": "LEASE_SECONDS",
        "OPENAI_BASE_URL": "OPENAI_API_URL",
        "REDIS_ULR": "REDIS_URL",
        "IMAGEGEN_PORT": "PORT",
        "IMAGEGEN_REDIS_URL": "REDIS_URL",
        "S3_SECRET_KEY": "S3_SECRET_ACCESS_KEY",
        "MODEL": "DEFAULT_MODEL",
        "REDIS_HOST": "REDIS_URL",
        "CORS_ALLOWED_ORIGINS": "CORS_ORIGINS",
        "TOGETHER_API_TOKEN": "TOGETHER_API_KEY",
        "ADMIN_TOKEN_FILES": "ADMIN_TOKEN_FILE",
        "REDIS_URL_FIL": "REDIS_URL_FILE",
    }
    environ = dict.fromkeys([*others, *near], "1")
    assert dict(load(**environ).misspelled) == near


@over_rows(
    ("name", "meant"),
    [
        ("DAILY_BUDGET_USD", "BUDGET_DAILY_USD"),
        ("BUDGET_DAILY_EUR", "BUDGET_DAILY_USD"),
        ("DAILY_BUDGET", "BUDGET_DAILY_USD"),
        ("RESULT_TTL_SECONDS", "RESULT_TTL"),
        ("MAX_UPLOAD_BYTES", "UPLOAD_MAX_BYTES"),
        ("UPLOAD_MAX_MB", "UPLOAD_MAX_BYTES"),
    ],
)
def test_a_setting_with_its_words_in_another_order_or_another_unit_is_detected(name: str, meant: str) -> None:
    assert load(**{name: "1"}).misspelled == ((name, meant),)


def test_a_name_of_another_program_is_none_where_our_own_setting_is_there_too() -> None:
    assert load(REDIS_HOST="h", REDIS_PASSWORD="p", REDIS_URL="redis://h", REDIS_TOKEN="p").misspelled == ()
    assert dict(load(REDIS_HOST="h", REDIS_URL="").misspelled) == {"REDIS_HOST": "REDIS_URL"}
    assert dict(load(REDIS_ULR="h", REDIS_URL="redis://h").misspelled) == {"REDIS_ULR": "REDIS_URL"}


@over_rows("name", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_missing_certificates_of_the_environment_are_warned_of(tmp_path: Path, name: str) -> None:
    (warning,) = warnings(load(**{name: str(tmp_path / "absent")}))
    assert warning.startswith(f"{name} names ")
    assert list(warnings(load(**{name: str(tmp_path)}))) == []


def test_a_log_of_tls_keys_that_can_not_be_written_is_a_fault(tmp_path: Path) -> None:
    assert list(faults(SSLKEYLOGFILE=str(tmp_path / "absent" / "keys"))) == ["SSLKEYLOGFILE"]
    assert list(faults(SSLKEYLOGFILE=str(tmp_path))) == ["SSLKEYLOGFILE"]
    load(SSLKEYLOGFILE=str(tmp_path / "keys"))


def test_reading_the_settings_makes_no_log_of_tls_keys(tmp_path: Path) -> None:
    load(SSLKEYLOGFILE=str(tmp_path / "keys"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "keys").write_text("as it was")
    load(SSLKEYLOGFILE=str(tmp_path / "keys"))
    assert (tmp_path / "keys").read_text() == "as it was"


def test_a_variable_that_a_channel_reads_is_no_misspelled_setting() -> None:
    example = Path(__file__).resolve().parents[1] / "channels.example.toml"
    keys = {"TOGETHER_API_KEY": "a", "TOGETHER_API_KEY_2": "b", "TOGETHER_API_KEY_3": "c", "FAL_KEY": "d"}
    settings = load(CHANNELS_FILE=str(example), **keys)
    assert settings.misspelled == (("TOGETHER_API_KEY_3", "TOGETHER_API_KEY"),)


def test_the_addresses_of_services_that_kubernetes_names_are_no_misspelled_settings() -> None:
    links = {"IMAGEGEN_PORT": "tcp://10.0.0.7:3000", "IMAGEGEN_SERVICE_PORT": "3000"}
    assert load(**links, REDIS_PORT="tcp://10.0.0.8:6379").misspelled == ()


def test_a_together_key_selects_together_by_default() -> None:
    assert load(TOGETHER_API_KEY="k").provider == "together"
    assert load(TOGETHER_API_KEY="k", PROVIDER="sandbox").provider == "sandbox"


def test_a_provider_with_other_names_of_models_has_its_own_default_model() -> None:
    assert load(PROVIDER="fal", FAL_KEY="k").default_model == "fal-ai/flux/schnell"
    assert load(PROVIDER="replicate", REPLICATE_API_TOKEN="k").default_model == "black-forest-labs/flux-schnell"
    assert load(PROVIDER="fal", FAL_KEY="k", DEFAULT_MODEL="fal-ai/flux/dev").default_model == "fal-ai/flux/dev"
    assert load(PROVIDER="bfl", BFL_API_KEY="k").default_model == "flux-2-klein-4b"
    assert load(PROVIDER="dashscope", DASHSCOPE_API_KEY="k").default_model == "wan2.2-t2i-flash"
    assert load(PROVIDER="gemini", GEMINI_API_KEY="k").default_model == "gemini-2.5-flash-image"
    assert load(PROVIDER="siliconflow", SILICONFLOW_API_KEY="k").default_model == "Kwai-Kolors/Kolors"
    assert load(FAL_KEY="k").provider == "sandbox"


@over_rows(
    ("environ", "missing"),
    [
        ({"PROVIDER": "together"}, ["TOGETHER_API_KEY"]),
        ({"PROVIDER": "openai"}, ["OPENAI_API_URL"]),
        ({"PROVIDER": "a1111"}, ["A1111_URL"]),
        ({"PROVIDER": "fal"}, ["FAL_KEY"]),
        ({"PROVIDER": "replicate"}, ["REPLICATE_API_TOKEN"]),
        ({"PROVIDER": "bfl"}, ["BFL_API_KEY"]),
        ({"PROVIDER": "dashscope"}, ["DASHSCOPE_API_KEY"]),
        ({"PROVIDER": "gemini"}, ["GEMINI_API_KEY"]),
        ({"PROVIDER": "siliconflow"}, ["SILICONFLOW_API_KEY"]),
        ({"IMAGE_STORE": "s3"}, ["S3_BUCKET", "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY"]),
        ({"IMAGE_STORE": "s3", "S3_BUCKET": "b", "S3_ACCESS_KEY_ID": "i"}, ["S3_SECRET_ACCESS_KEY"]),
    ],
)
def test_settings_required_by_a_choice_must_be_set(environ: dict[str, str], missing: list[str]) -> None:
    assert list(faults(**environ)) == missing


def test_images_in_redis_have_a_smaller_cap() -> None:
    assert load(IMAGE_STORE="redis").image_store_max_bytes == 100 * 2**20
    assert load(IMAGE_STORE="redis", IMAGE_STORE_MAX_BYTES="1GiB").image_store_max_bytes == 2**30


def test_render_trusts_proxies_and_rejects_an_embedded_redis() -> None:
    found = faults(RENDER="true")
    assert "EMBEDDED_REDIS=force" in found["REDIS_URL"]
    forced = load(RENDER="true", EMBEDDED_REDIS="force")
    assert (forced.on_render, forced.trusted_proxy_hops, forced.redis_url) == (True, "auto", None)
    assert load(RENDER="true", REDIS_URL="redis://h", TRUSTED_PROXY_HOPS="1").trusted_proxy_hops == 1


def test_a_missing_redis_is_rejected() -> None:
    assert "EMBEDDED_REDIS=auto" in faults(EMBEDDED_REDIS="off")["REDIS_URL"]
    assert load(EMBEDDED_REDIS="off", REDIS_URL="redis://h").redis_url == "redis://h"


@over_rows("name", ["HTTP_PROXY", "HTTPS_PROXY", "WEBHOOK_PROXY"])
def test_a_proxy_is_an_address_with_or_without_scheme_and_login(name: str) -> None:
    field = name.lower()
    assert getattr(load(**{name: "http://user:p%40ss@proxy:3128/"}), field) == "http://user:p%40ss@proxy:3128"
    assert getattr(load(**{name: "proxy:3128"}), field) == "http://proxy:3128"
    assert "p%40ss" not in repr(load(**{name: "http://user:p%40ss@proxy:3128"}))
    for bad in ("socks5://user:hunter2@proxy:1", "http://user:hunter2@h:x", "http://h:1/path", "http://u:hunter2@h?a"):
        assert list(faults(**{name: bad})) == [name]
        assert "hunter2" not in faults(**{name: bad})[name]


def test_lower_case_proxy_variables_are_the_fallback() -> None:
    assert load(http_proxy="a:1", https_proxy="b:2", no_proxy="c, .D  e").http_proxy == "http://a:1"
    assert load(http_proxy="a:1", https_proxy="b:2", no_proxy="c").misspelled == ()
    assert load(https_proxy="b:2", HTTPS_PROXY="c:3").https_proxy == "http://c:3"
    assert load(https_proxy="b:2", HTTPS_PROXY="").https_proxy == "http://b:2"
    assert load(no_proxy="c, .D  e").no_proxy == ("c", ".d", "e")
    assert load(webhook_proxy="a:1").webhook_proxy is None


def test_a_value_that_is_not_utf8_is_refused_as_that() -> None:
    """Python reads such bytes of the environment as halves of characters."""
    with pytest.raises(SettingsError, match="DATA_DIR: is not UTF-8"):
        Settings.load({"DATA_DIR": "d\udcc3\udca4"}, dotenv=None)
