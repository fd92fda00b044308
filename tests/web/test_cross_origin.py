"""Tests of requests that web pages send: CORS, pages of other sites, and foreign names on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from imagegen.errors import ApiError, BadRequest, CrossSiteRefused, ForeignHost
from imagegen.web.http.cross_origin import CrossOriginPolicy, is_local_host
from imagegen.web.routes import build_document
from tests.support import over_rows
from tests.web.conftest import Client, StartService

SHOP = "https://shop.example"
EVIL = "https://evil.example"
GENERATE = "/api/images/generate"
EXPOSED = {"Location", "X-Cache", "ETag", "Retry-After", "RateLimit", "X-RateLimit-Remaining", "X-Request-Id"}
ADMIN = {"Authorization": "Bearer the-operators-token"}


@pytest.fixture
async def shop(start_service: StartService) -> Client:
    """Start a service whose images the pages of SHOP may use."""
    return await start_service(cors_origins=(SHOP,), rate_limit_max=1000, admin_token="the-operators-token")


def preflight_of(method: str, origin: str = SHOP, **more: str) -> dict[str, str]:
    return {"Origin": origin, "Access-Control-Request-Method": method} | {
        name.replace("_", "-"): value for name, value in more.items()
    }


def words_of(header: str) -> set[str]:
    return {word.strip().lower() for word in header.split(",")}


async def image_of(client: Client) -> dict[str, Any]:
    answer = await client.post(f"{GENERATE}?wait=10", json={"prompt": "a lighthouse"}, headers={"Origin": SHOP})
    body: dict[str, Any] = await answer.json()
    return body


async def test_a_preflight_of_an_allowed_origin_is_answered_for_a_day(shop: Client) -> None:
    for path, method in [(GENERATE, "POST"), ("/v1/images/generations", "POST"), ("/api/images/x", "DELETE")]:
        answer = await shop.options(path, headers=preflight_of(method))
        assert (answer.status, await answer.read()) == (204, b"")
        assert answer.headers["Access-Control-Allow-Origin"] == SHOP
        assert answer.headers["Access-Control-Max-Age"] == "86400"
        assert method.lower() in words_of(answer.headers["Access-Control-Allow-Methods"])
        assert words_of(answer.headers["Access-Control-Allow-Headers"]) >= words_of(
            "Authorization,X-API-Key,Content-Type,Idempotency-Key,Last-Event-ID,Prefer,Cache-Control,If-None-Match,"
            "Range,x-stainless-retry-count,x-stainless-timeout,x-stainless-os"
        )
        assert "origin" in words_of(answer.headers["Vary"])
        assert "Access-Control-Allow-Credentials" not in answer.headers
        assert not any("ratelimit" in name.lower() for name in answer.headers)


async def test_a_page_may_send_each_documented_header(shop: Client) -> None:
    document = orjson.loads(orjson.dumps(build_document()))
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    shared = document["components"]["parameters"]
    parameters = [
        shared[each["$ref"].rpartition("/")[2]] if "$ref" in each else each
        for operation in operations
        for each in operation.get("parameters", ())
    ]
    names = {parameter["name"].lower() for parameter in parameters if parameter["in"] == "header"}
    answer = await shop.options(GENERATE, headers=preflight_of("POST"))
    assert {"idempotency-key", "if-match"} <= names <= words_of(answer.headers["Access-Control-Allow-Headers"])


async def test_a_preflight_of_another_origin_is_an_ordinary_options_request(shop: Client) -> None:
    answer = await shop.options(GENERATE, headers=preflight_of("POST", EVIL))
    assert (answer.status, (await answer.json())["code"]) == (405, "method_not_allowed")
    assert not any(name.lower().startswith("access-control") for name in answer.headers)


async def test_a_preflight_counts_against_no_limit(start_service: StartService) -> None:
    client = await start_service(cors_origins=(SHOP,), rate_limit_max=1, image_rate_limit_max=1)
    for _ in range(5):
        assert (await client.options(GENERATE, headers=preflight_of("POST"))).status == 204
    assert (await client.post(GENERATE, json={"prompt": "a"}, headers={"Origin": SHOP})).status == 202


async def test_a_page_on_the_web_may_reach_the_local_network_if_its_origin_is_allowed(shop: Client) -> None:
    headers = preflight_of("POST", Access_Control_Request_Private_Network="true")
    answer = await shop.options(GENERATE, headers=headers)
    assert answer.headers["Access-Control-Allow-Private-Network"] == "true"


@over_rows("origin", [SHOP, EVIL, None])
async def test_every_answer_varies_by_origin_and_only_an_allowed_one_may_read_it(shop: Client, origin: str) -> None:
    task = await image_of(shop)
    image = task["data"][0]["url"].partition("/api")[2]
    headers = {"Origin": origin} if origin else {}
    for path, more, status in [
        (f"/api{image}", {}, 200),
        (f"/api{image}", {"Range": "bytes=0-9"}, 206),
        (f"/api{image}&size=64", {}, 200),
        (f"/api/images/{task['taskId']}", {}, 200),
        (f"/api/images/{task['taskId']}/events", {}, 200),
        ("/api/images/unknown", {}, 404),
        ("/api/health", {}, 200),
        ("/v1/models", {}, 200),
        ("/nowhere", {}, 404),
        ("/healthz", {}, 200),
        ("/openapi.json", {}, 200),
    ]:
        answer = await shop.get(path, headers=headers | more)
        assert answer.status == status, path
        assert "origin" in words_of(answer.headers["Vary"]), path
        assert answer.headers.get("Access-Control-Allow-Origin") == (SHOP if origin == SHOP else None), path
        exposed = words_of(answer.headers.get("Access-Control-Expose-Headers", ""))
        assert exposed >= words_of(",".join(EXPOSED)) if origin == SHOP else exposed == {""}
        assert "Access-Control-Allow-Credentials" not in answer.headers


async def test_a_page_may_read_refusals_and_unchanged_answers_too(start_service: StartService) -> None:
    client = await start_service(cors_origins=(SHOP,), image_rate_limit_max=1)
    task = await image_of(client)
    limited = await client.post(GENERATE, json={"prompt": "b"}, headers={"Origin": SHOP})
    etag = (await client.get(f"/api/images/{task['taskId']}")).headers["ETag"]
    unchanged = await client.get(f"/api/images/{task['taskId']}", headers={"Origin": SHOP, "If-None-Match": etag})
    long = await client.get("/api/health", headers={"Origin": SHOP, "X-Long": "x" * 70_000})
    assert (limited.status, unchanged.status, long.status) == (429, 304, 431)
    for answer in (limited, unchanged):
        assert answer.headers["Access-Control-Allow-Origin"] == SHOP
    assert {answer.headers["Vary"] for answer in (limited, unchanged, long)} == {"Origin"}


async def test_a_page_without_a_key_may_read_that_it_needs_one(start_service: StartService) -> None:
    client = await start_service(cors_origins=(SHOP,), api_keys={"web": "0" * 64})
    assert (await client.options(GENERATE, headers=preflight_of("POST"))).status == 204
    answer = await client.post(GENERATE, json={"prompt": "a"}, headers={"Origin": SHOP})
    assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (401, SHOP)
    refused = await client.post(GENERATE, json={"prompt": "a"}, headers={"Origin": EVIL})
    assert (refused.status, (await refused.json())["code"]) == (403, "cross_site")


async def test_no_page_may_read_what_is_for_the_operator(shop: Client) -> None:
    for path in ("/api/images", "/api/stats", "/metrics"):
        assert (await shop.options(path, headers=preflight_of("GET"))).status == 405
        for answer in (
            await shop.options(path, headers=preflight_of("GET")),
            await shop.get(path, headers={"Origin": SHOP} | ADMIN),
            await shop.get(path, headers={"Origin": SHOP}),
        ):
            assert "Access-Control-Allow-Origin" not in answer.headers
            assert answer.headers["Vary"] == "Origin"


async def test_without_origins_no_answer_has_a_header_of_cors(service: Client) -> None:
    for answer in (
        await service.get("/api/health", headers={"Origin": SHOP}),
        await service.options(GENERATE, headers=preflight_of("POST")),
    ):
        assert "Vary" not in answer.headers
        assert not any(name.lower().startswith("access-control") for name in answer.headers)


async def test_an_allowed_page_makes_images_and_another_makes_none(shop: Client) -> None:
    made = await shop.post(GENERATE, json={"prompt": "a"}, headers={"Origin": SHOP, "Sec-Fetch-Site": "cross-site"})
    refused = await shop.post(GENERATE, json={"prompt": "b"}, headers={"Origin": EVIL, "Sec-Fetch-Site": "cross-site"})
    assert (made.status, refused.status) == (202, 403)
    assert (await refused.json())["code"] == "cross_site"
    assert "Access-Control-Allow-Origin" not in refused.headers


@over_rows("path", [GENERATE, "/api/images/x/retry", "/api/images/x/cancel", "/api/uploads", "/nowhere"])
async def test_a_form_of_another_site_is_refused_before_its_body_and_any_look_up(service: Client, path: str) -> None:
    async def endless() -> Any:
        yield b"a=b"
        await asyncio.Event().wait()

    headers = {"Origin": EVIL, "Content-Type": "application/x-www-form-urlencoded"}
    answer = await service.post(path, data=endless(), headers=headers, expect100=False)
    assert (answer.status, (await answer.json())["code"]) == (403, "cross_site")


async def test_a_refusal_on_v1_has_the_envelope_of_its_clients(start_service: StartService) -> None:
    client = await start_service(public_url="https://img.example/sub")
    for path in ("/v1/images/generations", "/sub/v1/images/generations", "/v1//images/generations/"):
        answer = await client.post(path, json={"prompt": "a"}, headers={"Origin": "null"})
        assert (answer.status, (await answer.json())["error"]["code"]) == (403, "cross_site")
        assert answer.headers["x-should-retry"] == "false"


def request_of(method: str = "POST", host: str = "localhost:3000", **headers: str) -> web.Request:
    pairs = CIMultiDict({"Host": host} | {name.replace("_", "-"): value for name, value in headers.items()})
    return make_mocked_request(method, "/", headers=pairs)


BEHIND_PROXY = CrossOriginPolicy(hops=1)
PUBLIC = CrossOriginPolicy(public_url="https://img.example:443/sub")
ALLOWING = CrossOriginPolicy(allowed=frozenset({SHOP, "chrome-extension://abc"}))
PLAIN = CrossOriginPolicy()


@over_rows(
    ("policy", "headers"),
    [
        (PLAIN, {}),
        (PLAIN, {"User_Agent": "curl/8"}),
        (PLAIN, {"Sec_Fetch_Mode": "cors"}),
        (PLAIN, {"Origin": "http://localhost:3000"}),
        (PLAIN, {"Origin": "https://localhost:3000", "Sec_Fetch_Site": "same-origin"}),
        (PLAIN, {"Origin": "https://img.example", "Sec_Fetch_Site": "same-origin"}),
        (PLAIN, {"Origin": "https://img.example", "host": "img.example"}),
        (PLAIN, {"Origin": "https://img.example", "host": "IMG.example:443"}),
        (PLAIN, {"Origin": "chrome-extension://xyz", "Sec_Fetch_Site": "none"}),
        (PLAIN, {"Origin": "null", "Sec_Fetch_Site": "same-origin"}),
        (PLAIN, {"method": "GET", "Origin": EVIL, "Sec_Fetch_Site": "cross-site"}),
        (PLAIN, {"method": "HEAD", "Origin": EVIL}),
        (ALLOWING, {"Origin": SHOP, "Sec_Fetch_Site": "cross-site"}),
        (ALLOWING, {"Origin": "chrome-extension://abc", "Sec_Fetch_Site": "cross-site"}),
        (PUBLIC, {"Origin": "https://img.example"}),
        (BEHIND_PROXY, {"Origin": "https://img.example", "X_Forwarded_Host": "img.example"}),
    ],
)
def test_programs_own_pages_and_allowed_pages_are_not_refused(
    policy: CrossOriginPolicy, headers: Mapping[str, str]
) -> None:
    policy.check_site(request_of(**headers))


@over_rows(
    ("policy", "headers"),
    [
        (PLAIN, {"Origin": EVIL}),
        (PLAIN, {"Origin": EVIL, "method": "DELETE"}),
        (PLAIN, {"Origin": EVIL, "method": "PUT"}),
        (PLAIN, {"Origin": EVIL, "Sec_Fetch_Site": "cross-site"}),
        (PLAIN, {"Sec_Fetch_Site": "cross-site"}),
        (PLAIN, {"Origin": "null"}),
        (PLAIN, {"Origin": "null", "Sec_Fetch_Site": "cross-site"}),
        (PLAIN, {"Origin": ""}),
        (PLAIN, {"Origin": "http://localhost:5173", "Sec_Fetch_Site": "same-site"}),
        (PLAIN, {"Origin": "http://localhost:30000"}),
        (PLAIN, {"Origin": "http://localhost:3000.evil.example"}),
        (PLAIN, {"Origin": "http://localhost:3000", "Sec_Fetch_Site": "cross-site"}),
        (PLAIN, {"Origin": EVIL, "X_Forwarded_Host": "evil.example"}),
        (PLAIN, {"Origin": "chrome-extension://xyz"}),
        (PLAIN, {"Origin": "file://localhost:3000"}),
        (ALLOWING, {"Origin": f"{SHOP}.evil.example"}),
        (ALLOWING, {"Origin": "http://shop.example"}),
        (PUBLIC, {"Origin": "http://img.example"}),
        (PUBLIC, {"Origin": "https://img.example", "Sec_Fetch_Site": "cross-site"}),
        (BEHIND_PROXY, {"Origin": EVIL, "X_Forwarded_Host": "evil.example, img.example"}),
    ],
)
def test_a_page_of_another_site_changes_nothing(policy: CrossOriginPolicy, headers: Mapping[str, str]) -> None:
    with pytest.raises(CrossSiteRefused):
        policy.check_site(request_of(**headers))


LOOPBACK = CrossOriginPolicy(loopback_only=True)
LOCAL_HOSTS = "localhost LOCALHOST:3000 localhost. 127.0.0.1:80 127.8.9.1 [::1]:3000 [::ffff:7f00:1] img.localhost:3000"
DOCKER_HOSTS = "imagegen:3000 host.docker.internal:3000 host.containers.internal"
FOREIGN_HOSTS = (
    "evil.example evil.example:3000 localhost.evil.example 127.0.0.1.nip.io 10.0.0.1 0.0.0.0 [::2] a.internal.example"
)
MALFORMED_HOSTS = "::1 localhost:x localhost@evil.example"


@over_rows("host", [*LOCAL_HOSTS.split(), *DOCKER_HOSTS.split()])
def test_a_name_that_only_this_machine_can_have_is_local(host: str) -> None:
    assert is_local_host(host)
    LOOPBACK.check_host(request_of(host=host), host)


@over_rows("host", FOREIGN_HOSTS.split())
def test_a_foreign_name_on_loopback_is_refused(host: str) -> None:
    assert not is_local_host(host)
    with pytest.raises(ForeignHost):
        LOOPBACK.check_host(request_of(host=host), host)
    PLAIN.check_host(request_of(host=host), host)


@over_rows("host", MALFORMED_HOSTS.split())
def test_a_malformed_host_is_a_bad_request_everywhere(host: str) -> None:
    for policy in (LOOPBACK, PLAIN):
        assert not policy.is_known_host(host)
        with pytest.raises(BadRequest):
            policy.check_host(request_of(host=host), host)


@over_rows(
    ("policy", "headers", "passes"),
    [
        (CrossOriginPolicy(public_url="https://img.example/sub", loopback_only=True), {}, True),
        (CrossOriginPolicy(public_url="https://other.example", loopback_only=True), {}, False),
        (CrossOriginPolicy(hops=1, loopback_only=True), {"X_Forwarded_For": "198.51.100.1"}, True),
        (CrossOriginPolicy(hops=1, loopback_only=True), {"X_Forwarded_Proto": "https"}, True),
        (CrossOriginPolicy(hops=1, loopback_only=True), {}, False),
        (LOOPBACK, {"X_Forwarded_For": "198.51.100.1", "X_Forwarded_Host": "localhost"}, False),
    ],
)
def test_a_proxy_on_the_same_machine_serves_the_names_that_the_operator_set(
    policy: CrossOriginPolicy, headers: Mapping[str, str], passes: bool
) -> None:
    request = request_of(host="img.example:8443", **headers)
    if passes:
        policy.check_host(request, "img.example:8443")
    else:
        with pytest.raises(ForeignHost):
            policy.check_host(request, "img.example:8443")


@over_rows("method", ["GET", "POST"])
async def test_a_proxy_that_needs_a_setting_gets_an_answer_that_names_it(service: Client, method: str) -> None:
    headers = {"Host": "img.example", "Accept-Language": "en", "X-Forwarded-For": "198.51.100.1"}
    answer = await service.request(method, "/api/health", headers=headers)
    body = await answer.json()
    assert (answer.status, body["code"]) == (403, "cross_site")
    assert "PUBLIC_URL" in body["message"]
    assert "TRUSTED_PROXY_HOPS=1" in body["message"]


async def test_a_service_on_all_addresses_is_called_by_any_name(start_service: StartService) -> None:
    client = await start_service(hosts=("0.0.0.0",))
    assert (await client.get("/api/health", headers={"Host": "img.example"})).status == 200


def test_the_texts_of_refusals_fit_both_languages() -> None:
    for kind in (CrossSiteRefused, ForeignHost):
        error: ApiError = kind()
        assert "PUBLIC_URL" in error.message("zh")
        assert "PUBLIC_URL" in error.message("en")


async def test_pages_have_more_headers_against_frames_and_devices(service: Client) -> None:
    page = await service.get("/docs")
    assert page.headers["X-Frame-Options"] == "DENY"
    assert "camera=()" in page.headers["Permissions-Policy"]
    assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]
    for answer in (page, await service.get("/api/health"), await service.get("/nowhere")):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert "Strict-Transport-Security" not in answer.headers
        assert "Server" not in answer.headers


async def test_a_refusal_before_the_route_has_the_headers_of_every_answer(shop: Client) -> None:
    for headers in ({"Origin": EVIL}, {"Host": "evil.example"}, {"Host": "a b"}):
        answer = await shop.post(GENERATE, json={"prompt": "a"}, headers=headers)
        assert answer.status in (400, 403)
        assert answer.headers["X-Request-Id"] == (await answer.json())["requestId"]
        assert (answer.headers["X-Content-Type-Options"], answer.headers["Vary"]) == ("nosniff", "Origin")
        assert "Server" not in answer.headers
