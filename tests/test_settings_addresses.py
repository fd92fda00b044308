"""Tests of addresses in settings: what no resolver and no client takes, and routes that do not belong to a base."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagegen.channels_file import KINDS, parse_channels
from imagegen.start_checks import warnings
from tests.loaded_settings import faults, load
from tests.support import over_rows

ADDRESSES = {
    "PUBLIC_URL": "https://",
    "TOGETHER_API_URL": "https://",
    "OPENAI_API_URL": "https://",
    "A1111_URL": "http://",
    "FAL_API_URL": "https://",
    "S3_ENDPOINT": "https://",
    "CORS_ORIGINS": "https://",
    "HTTPS_PROXY": "http://",
    "HTTP_PROXY": "http://",
    "WEBHOOK_PROXY": "http://",
    "ALERT_WEBHOOK": "https://",
    "REDIS_URL": "redis://",
}


@over_rows(
    "host", ["x.org\\evil", "a..b", "..", "-x", "x|y", '"x"', "<host>", "x,,y", f"{'a' * 64}.org", "a." * 127 + "b"]
)
@over_rows("name", ADDRESSES)
def test_a_host_that_no_resolver_takes_is_a_fault(name: str, host: str) -> None:
    assert list(faults(**{name: ADDRESSES[name] + host})) == [name]


@over_rows("host", ["x_y.example", "x.example.", "1.2.3.4", "[2001:db8::1]", "redis-1", "XN--BCHER-KVA.example"])
@over_rows("name", ADDRESSES)
def test_a_usual_host_is_taken(name: str, host: str) -> None:
    load(**{name: ADDRESSES[name] + host})


@over_rows("name", [name for name in ADDRESSES if name != "REDIS_URL"])
def test_a_colon_without_a_port_is_a_fault(name: str) -> None:
    assert list(faults(**{name: f"{ADDRESSES[name]}x.example:"})) == [name]


BASES = {
    "together": ["", "/v1", "/v1/", "/together"],
    "openai": [
        "",
        "/v1",
        "/v1/images/generations",
        "/v1/images/generations/async",
        "/v1/chat/completions",
        "/models/v1",
    ],
    "a1111": ["", "/webui"],
    "fal": ["", "/fal-ai"],
    "replicate": ["", "/v1", "/models"],
    "bfl": ["", "/v1", "/flux/v1"],
    "dashscope": ["", "/api/v1", "/services"],
    "gemini": ["", "/v1beta", "/v1", "/v1beta/openai", "/v1/chat/completions", "/models"],
    "siliconflow": ["", "/v1"],
}

ROUTES = {
    "together": ["/v1/images/generations", "/v1/images/generations/"],
    "openai": ["/v1/images/edits", "/v1/responses"],
    "a1111": ["/sdapi/v1", "/sdapi/v1/txt2img"],
    "fal": ["/fal-ai/flux/schnell"],
    "replicate": ["/v1/predictions", "/v1/models/black-forest-labs/flux-schnell/predictions"],
    "bfl": ["/v1/flux-2-pro"],
    "dashscope": ["/compatible-mode/v1", "/api/v1/services/aigc/text2image/image-synthesis", "/api/v1/tasks"],
    "gemini": ["/v1beta/models", "/v1beta/models/gemini-2.5-flash-image:generateContent"],
    "siliconflow": ["/v1/images/generations"],
}


@over_rows(("provider", "path"), [(provider, path) for provider, paths in BASES.items() for path in paths])
def test_a_base_address_of_a_provider_is_taken(provider: str, path: str) -> None:
    load(**{KINDS[provider].url_setting: f"https://relay.example{path}"})


@over_rows(("provider", "path"), [(provider, path) for provider, paths in ROUTES.items() for path in paths])
def test_a_route_behind_the_base_address_is_a_fault_that_names_it(provider: str, path: str) -> None:
    name = KINDS[provider].url_setting
    found = faults(**{name: f"https://relay.example{path}"})
    assert list(found) == [name]
    assert found[name].startswith("must be the base of the API, without /")


def test_the_api_of_fal_that_has_no_jobs_is_a_fault_that_names_the_queue() -> None:
    assert "https://queue.fal.run" in faults(FAL_API_URL="https://fal.run/")["FAL_API_URL"]


def test_a_channel_with_a_route_in_its_address_is_a_fault_too() -> None:
    table = '[[channels]]\nname = "a"\nprovider = "together"\nkeys = ["k"]\nbase_url = "{}"'
    parse_channels(table.format("https://relay.example/v1"), {})
    with pytest.raises(ValueError, match="base_url: must be the base of the API"):
        parse_channels(table.format("https://relay.example/v1/images/generations"), {})


@over_rows(
    "text", ["${NAME}", "${{ secrets.NAME }}", "{{ .Values.name }}", "$SOME_NAME", "%SOME_NAME%", "${NAME:-default}"]
)
@over_rows("name", ["API_KEYS", "ADMIN_TOKEN", "TOGETHER_API_KEY", "DATA_DIR", "DEFAULT_MODEL", "S3_BUCKET", "PORT"])
def test_a_reference_that_was_not_replaced_is_a_fault(name: str, text: str) -> None:
    assert "write the value itself" in faults(**{name: text})[name]


@over_rows(
    ("name", "text"),
    [
        ("DATA_DIR", "$HOME/images"),
        ("DATA_DIR", "${HOME}/images"),
        ("REDIS_URL", "redis://:${REDIS_PASSWORD}@redis:6379"),
        ("API_KEYS", "web:${WEB_KEY}"),
        ("PUBLIC_URL", "https://${DOMAIN}"),
    ],
)
def test_a_reference_in_a_part_of_a_value_is_a_fault(name: str, text: str) -> None:
    assert "write the value itself" in faults(**{name: text})[name]


@over_rows("key", ["env:KEY", "${KEY}", "{{ key }}"])
def test_a_reference_that_was_not_replaced_is_a_fault_of_a_channel_too(key: str) -> None:
    table = f'[[channels]]\nname = "a"\nprovider = "together"\nkeys = ["{key}"]'
    with pytest.raises(ValueError, match="write the value itself"):
        parse_channels(table, {"KEY": "${KEY}"})


@over_rows("text", ["pa$word-of-16-signs", "$tr0ng-and-16-signs", "0123456789a${HOME}b", "{16-signs-in-one}"])
def test_a_dollar_or_a_brace_in_a_secret_is_a_sign_like_others(text: str) -> None:
    assert load(ADMIN_TOKEN=text).admin_token == text


@over_rows("name", ["$HOME/images", "${DATA}", "{{ data }}"])
def test_a_folder_that_has_the_name_of_a_reference_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir(parents=True)
    settings = load(DATA_DIR=name)
    assert settings.data_dir == Path(name)
    (warning,) = warnings(settings)
    assert warning.startswith("DATA_DIR is ")


@over_rows(
    ("name", "unit"), [("LEASE_SECONDS", "seconds"), ("RESULT_TTL", "seconds"), ("RATE_LIMIT_WINDOW", "milliseconds")]
)
def test_a_wrong_duration_is_answered_with_its_unit(name: str, unit: str) -> None:
    assert f"a number of {unit} from" in faults(**{name: "10s"})[name]
