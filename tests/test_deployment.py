"""Tests that the set-up, packaging and deployment files are valid for their platforms."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer
from packaging.requirements import Requirement

from imagegen import __version__
from imagegen.settings import Settings, read_listening, setting_names
from imagegen.start_checks import check_exposure
from tests.support import over_rows

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def env_names() -> set[str]:
    return set(re.findall(r"^#? ?([A-Z][A-Z0-9_]+)=", read(".env.example"), re.MULTILINE))


# render.yaml: https://render.com/docs/blueprint-spec

RENDER_KEYS = {
    "type", "name", "runtime", "plan", "region", "numInstances", "buildCommand", "startCommand", "preDeployCommand",
    "healthCheckPath", "autoDeployTrigger", "maxShutdownDelaySeconds", "envVars", "scaling", "disk", "buildFilter",
}  # fmt: skip
RENDER_PLANS = {"free", "starter", "standard", "pro", "pro plus", "pro max", "pro ultra"}


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    blueprint = yaml.safe_load(read("render.yaml"))
    assert set(blueprint) == {"services"}
    (only,) = blueprint["services"]
    return dict(only)


@pytest.fixture(scope="module")
def render_env(service: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {var["key"]: var for var in service["envVars"]}


def test_render_yaml_has_only_keys_and_values_of_render(service: dict[str, Any]) -> None:
    assert set(service) <= RENDER_KEYS
    assert service["type"] == "web"
    assert service["runtime"] == "python"
    assert service["buildCommand"]
    assert service["startCommand"]
    assert service["plan"] in RENDER_PLANS
    assert service["region"] in {"oregon", "ohio", "virginia", "frankfurt", "singapore"}
    assert service["healthCheckPath"] == "/healthz"


def test_render_leaves_deploys_to_the_workflow(service: dict[str, Any]) -> None:
    assert service["autoDeployTrigger"] == "off"  # a bare `off` would be read as false


def test_each_render_variable_has_one_source(service: dict[str, Any], render_env: dict[str, dict[str, Any]]) -> None:
    assert len(render_env) == len(service["envVars"])
    for name, var in render_env.items():
        assert len(var) == 2, name
        assert isinstance(var.get("value", ""), str), f"{name}: quote it"
        assert var.get("sync", False) is False
        assert var.get("generateValue", True) is True


def test_render_yaml_contains_no_secret_and_prompts_for_vendor_keys(render_env: dict[str, dict[str, Any]]) -> None:
    for name in ("API_KEYS", "ADMIN_TOKEN", "TASK_ID_SECRET"):
        assert render_env[name] == {"key": name, "generateValue": True}
    for name in ("TOGETHER_API_KEY", "REDIS_URL", "REDIS_TOKEN"):
        assert render_env[name] == {"key": name, "sync": False}
    assert not [name for name, var in render_env.items() if "value" in var and re.search("KEY|SECRET|TOKEN", name)]


def test_render_binds_every_interface_and_names_a_full_python_version(render_env: dict[str, dict[str, Any]]) -> None:
    assert render_env["HOST"]["value"] == "0.0.0.0"
    assert re.fullmatch(r"3\.1[123]\.\d+", render_env["PYTHON_VERSION"]["value"])


def test_render_starts_with_a_key_and_a_budget(render_env: dict[str, dict[str, Any]]) -> None:
    generated = base64.b64encode(bytes(range(200, 232))).decode()
    prompted = {"TOGETHER_API_KEY": "k", "REDIS_URL": "rediss://h", "REDIS_TOKEN": "", "PYTHON_VERSION": ""}
    values = {name: var.get("value", generated) for name, var in render_env.items()}
    settings = Settings.load({"RENDER": "true"} | values | prompted, dotenv=None)
    assert settings.budget_daily_micro_usd
    check_exposure(settings, has_keys=bool(settings.api_keys))


def test_render_kills_only_after_the_drain(service: dict[str, Any], render_env: dict[str, dict[str, Any]]) -> None:
    delay_s = service["maxShutdownDelaySeconds"]
    assert 1 <= delay_s <= 300
    assert float(render_env["DRAIN_SECONDS"]["value"]) + 5 <= delay_s
    assert service["plan"] != "free", "Render refuses maxShutdownDelaySeconds on free"
    assert "disk" not in service, "and beside a disk"


# Settings and their example


def test_the_example_names_every_setting_once() -> None:
    lines = re.findall(r"^#? ?([A-Z][A-Z0-9_]+)=(.*)$", read(".env.example"), re.MULTILINE)
    assert sorted(name for name, _ in lines) == sorted(setting_names())


def test_every_variable_in_the_deployment_files_is_a_setting(render_env: dict[str, dict[str, Any]]) -> None:
    assert set(render_env) - {"PYTHON_VERSION"} <= env_names()
    shipped = set(re.findall(r"^(?:ENV)?\s+([A-Z_]+)=", read("Dockerfile"), re.MULTILINE))
    assert shipped - {"PATH", "PYTHONUNBUFFERED"} <= env_names()


def readme_settings(readme: str) -> set[str]:
    rows = re.findall(r"^\| (`[A-Z].*?) \|", read(readme), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([A-Z][A-Z0-9_]+)`", row)}


def test_every_setting_that_the_readme_names_exists() -> None:
    assert readme_settings("README.md")
    assert readme_settings("README.md") <= env_names()


def test_both_readmes_have_the_same_settings_routes_and_commands() -> None:
    english, chinese = read("README.md"), read("README.zh-CN.md")
    assert readme_settings("README.md") == readme_settings("README.zh-CN.md")
    for shared in (r"`(?:GET|POST|DELETE) /[^`]*`", r"```bash\n(.*?)```"):
        blocks = [re.findall(shared, text, re.DOTALL) for text in (english, chinese)]
        assert blocks[0]
        assert [re.sub(r" +# .*", "", block) for block in blocks[0]] == [
            re.sub(r" +# .*", "", block) for block in blocks[1]
        ]


# Dockerfile


@pytest.fixture(scope="module")
def dockerfile() -> list[str]:
    """Return the instructions of the last stage, one line each."""
    lines = re.sub(r"\\\n\s*", " ", read("Dockerfile")).splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("FROM "))
    return [line for line in lines[last:] if line and not line.startswith("#")]


def instruction(dockerfile: list[str], name: str) -> str:
    (line,) = [line for line in dockerfile if line.startswith(f"{name} ")]
    return line.removeprefix(f"{name} ")


def test_the_image_is_slim_and_does_not_run_as_root(dockerfile: list[str]) -> None:
    assert re.fullmatch(r"python:3\.13-slim(@sha256:[0-9a-f]{64})?", instruction(dockerfile, "FROM"))
    assert instruction(dockerfile, "USER") == "imagegen"
    assert not [line for line in dockerfile[dockerfile.index("USER imagegen") :] if line.startswith("RUN ")]


def test_the_image_starts_the_service_without_a_shell(dockerfile: list[str]) -> None:
    assert yaml.safe_load(instruction(dockerfile, "CMD")) == ["imagegen"]
    assert not [line for line in dockerfile if line.startswith("ENTRYPOINT ")]


def test_the_image_keeps_its_data_in_a_volume_that_its_user_owns(dockerfile: list[str]) -> None:
    assert yaml.safe_load(instruction(dockerfile, "VOLUME")) == ["/data"]
    assert "DATA_DIR=/data" in instruction(dockerfile, "ENV")
    assert "install -d -o imagegen" in instruction(dockerfile, "RUN")


def test_the_image_is_built_from_named_files_only() -> None:
    lines = read(".dockerignore").splitlines()
    assert "*" in lines
    assert not [line for line in lines if line.startswith("!.")]


@pytest.mark.parametrize(
    ("host", "status", "code"),
    [
        ("0.0.0.0", 200, 0),
        ("0.0.0.0", 503, 1),
        ("::", 200, 0),
        ("[::1],127.0.0.1", 200, 0),
        ('"0.0.0.0"', 200, 0),
        (" 0:0:0:0:0:0:0:0 ", 200, 0),
        ("0", 200, 0),
    ],
)
async def test_the_health_check_of_the_image_follows_healthz(
    dockerfile: list[str], aiohttp_server: Callable[..., Awaitable[TestServer]], host: str, status: int, code: int
) -> None:
    async def healthz(_: web.Request) -> web.Response:
        return web.Response(status=status)

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    server = await aiohttp_server(app, host="::1" if ":" in host else "127.0.0.1")
    program, *arguments = yaml.safe_load(instruction(dockerfile, "HEALTHCHECK").split(" CMD ")[1])
    assert program == "python"
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, env={"HOST": host, "PORT": f'"{server.port}"', "MODELS_FILE": "absent"}
    )
    assert await asyncio.wait_for(process.wait(), 20) == code


def test_the_health_check_of_the_image_uses_the_default_for_an_empty_port_and_reads_the_file(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    assert read_listening({"HOST": "", "PORT": ""}, file) == ("127.0.0.1", 3000)
    file.write_text("PORT=4000\nTOGETHER_API_KEY=not a key\n")
    assert read_listening({"HOST": "0.0.0.0"}, file) == ("0.0.0.0", 4000)


# Set-up


def test_every_dependency_is_pinned_once_per_python() -> None:
    pins = [line for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r'[A-Za-z0-9._-]+==[\w.]+(; python_version (<|>=) "3\.\d+")?', pin) for pin in pins)
    pinned = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    project = tomllib.loads(read("pyproject.toml"))["project"]
    wanted = project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]
    names = {re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower() for requirement in wanted}  # type: ignore[index]
    assert names <= pinned


def locked(name: str) -> dict[str, list[str]]:
    """Return the pins of a lock, as `name==version; marker`, with their hashes."""
    pins: dict[str, list[str]] = {}
    for line in read(name).replace("\\\n", " ").splitlines():
        if line and not line.startswith("#"):
            pin, *hashes = line.split(" --hash=")
            pins[pin.strip()] = [each.strip() for each in hashes]
    return pins


@over_rows(
    ("lock", "extra"),
    [("requirements.lock", None), ("requirements-s3.lock", "s3"), ("requirements-build.lock", "build")],
)
def test_a_lock_pins_each_dependency_as_the_constraints_do_by_hashes(lock: str, extra: str | None) -> None:
    pins, pyproject = locked(lock), tomllib.loads(read("pyproject.toml"))
    assert all(
        hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes) for hashes in pins.values()
    )
    wanted = list(pyproject["project"]["dependencies"])
    if extra == "build":
        wanted = pyproject["build-system"]["requires"]
    elif extra:
        wanted += pyproject["project"]["optional-dependencies"][extra]
    named = {Requirement(pin).name.lower(): Requirement(pin) for pin in pins}
    for requirement in map(Requirement, wanted):
        pin = named[requirement.name.lower()]
        (version,) = pin.specifier
        assert requirement.specifier.contains(version.version), f"{pin}: run `make lock`"
    constrained = {pin.partition(";")[0] for pin in read("constraints.txt").lower().replace("_", "-").splitlines()}
    for pin in map(Requirement, pins):
        elsewhere = re.search(r"win32|3\.11\.3", str(pin.marker))  # never installed here, so not in the constraints
        assert extra == "build" or elsewhere or f"{pin.name}{pin.specifier}" in constrained, f"{pin}: run `make lock`"


def test_the_image_and_render_install_only_what_the_locks_name(service: dict[str, Any]) -> None:
    commands = [line for line in read("Dockerfile").replace("\\\n", "").split("\n") if line.startswith("RUN ")]
    commands = [step for line in [*commands, service["buildCommand"]] for step in line.split("&&") if "pip " in step]
    assert len(commands) == 6
    for command in commands:
        assert "--require-hashes" in command or "--no-deps" in command, command
    for lock in re.findall(r"-r (\S+)", " ".join(commands)):
        assert f"!{lock}" in read(".dockerignore").splitlines()


def test_make_alone_lists_its_targets() -> None:
    listed = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, check=True).stdout
    for target in ("install", "run", "test", "check", "bench", "faults", "help"):
        assert re.search(rf"^make {target} ", listed, re.MULTILINE), target


def test_make_reports_a_missing_recent_python(tmp_path: Path) -> None:
    made = subprocess.run(
        ["make", "-C", str(ROOT), f"VENV={tmp_path / 'venv'}", "PYTHON=", "install"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode != 0
    assert "Python >= 3.11" in made.stderr


def test_ci_runs_the_checks_and_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    assert script.read_text().split()[-4:] == ["make", "check", "make", "test"]


# Workflows


RELEASE_PERMISSIONS = {
    "packages": {"contents": "write"},
    "image": {"contents": "read", "packages": "write"},
}


def steps(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield job
        yield from job.get("steps", ())


@over_rows("path", WORKFLOWS)
def test_a_workflow_may_only_read_the_code_unless_it_releases(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    granted = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    assert granted == (RELEASE_PERMISSIONS if path.name == "release.yml" else {})
    assert "pull_request_target" not in workflow[True]  # YAML reads the key `on` as true


@over_rows("path", WORKFLOWS)
def test_actions_are_pinned_by_commit_and_keep_no_credentials(path: Path) -> None:
    for line in re.findall(r"uses: (.*)", path.read_text()):
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line) or line.startswith("./.github/")
    for step in steps(yaml.safe_load(path.read_text())):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@over_rows("path", WORKFLOWS)
def test_secrets_reach_a_step_only_through_its_environment(path: Path) -> None:
    for step in steps(yaml.safe_load(path.read_text())):
        shown = {key: value for key, value in step.items() if key not in {"env", "steps"}}
        assert "secrets." not in str(shown)
        assert "${{" not in str(step.get("run", ""))


def test_the_tests_run_on_every_supported_python() -> None:
    tests = yaml.safe_load(read(".github/workflows/tests.yml"))
    assert tests["jobs"]["tests"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert tests["jobs"]["tests"]["steps"][-1]["run"] == ".ci/run"


def test_a_deploy_follows_green_tests_of_main_one_at_a_time() -> None:
    deploy = yaml.safe_load(read(".github/workflows/render-webhook.yml"))
    assert deploy[True] == {"push": {"branches": ["main"]}}
    assert deploy["concurrency"] == {"group": "render-deploy", "cancel-in-progress": False}
    assert deploy["jobs"]["tests"]["uses"] == "./.github/workflows/tests.yml"
    assert deploy["jobs"]["deploy"]["needs"] == "tests"
    assert set(deploy["jobs"]["deploy"]["steps"][-1]["env"]) == {
        "RENDER_SERVICE_ID",
        "RENDER_API_KEY",
        "RENDER_DEPLOY_HOOK_URL",
    }


def test_a_release_follows_green_tests_of_a_version_tag() -> None:
    release = yaml.safe_load(read(".github/workflows/release.yml"))
    assert release[True] == {"push": {"tags": ["v*"]}}
    assert release["jobs"]["tests"]["uses"] == "./.github/workflows/tests.yml"
    assert release["jobs"]["packages"]["needs"] == "tests"
    assert release["jobs"]["image"]["needs"] == "packages"


def release_notes(tag: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / ".github" / "release_notes.py"
    return subprocess.run([sys.executable, script, tag], capture_output=True, text=True, check=False)


def test_the_notes_of_a_release_are_its_section_of_the_changelog() -> None:
    done = release_notes(f"v{__version__}")
    assert done.returncode == 0, done.stderr
    section = read("CHANGELOG.md").split(f"## {__version__}\n", 1)[1]
    assert section.lstrip().startswith(done.stdout.strip().split("\n## ")[0])
    assert "\n## " not in done.stdout


@over_rows("tag", [__version__, "v0.0.1", "main"])
def test_a_tag_that_is_not_the_version_releases_nothing(tag: str) -> None:
    done = release_notes(tag)
    assert done.returncode == 1
    assert not done.stdout
    assert __version__ in done.stderr


def test_the_newest_section_of_the_changelog_is_that_of_the_version() -> None:
    assert re.findall(r"^## (.*)$", read("CHANGELOG.md"), re.MULTILINE)[0] == __version__
