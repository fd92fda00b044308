"""Tests of the workflow's deploy script against a fake Render API on loopback."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests import forked

SCRIPT = Path(__file__).resolve().parent.parent / ".github" / "render_deploy.py"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
API_KEY = "rnd_made_up_key"


@dataclass
class SmallRender:
    """Fake of Render's API for one service, its hook and the service itself. Each poll returns the next status."""

    statuses: list[str | int]
    accepts: int = 201
    ready: list[int] = field(default_factory=lambda: [200])
    names_deploy: bool = True
    calls: list[str] = field(default_factory=list)
    commits: list[object] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/services/srv-1/deploys", self.start)
        app.router.add_get("/v1/services/srv-1/deploys", self.list)
        app.router.add_get("/v1/services/srv-1/deploys/dep-1", self.state)
        app.router.add_get("/v1/services/srv-1", self.details)
        app.router.add_get("/readyz", self.readyz)
        app.router.add_post("/hook", self.hook)
        return app

    def note(self, request: web.Request, name: str) -> None:
        self.calls.append(name)
        if name not in {"readyz", "hook"}:
            self.keys.add(request.headers.get("Authorization", ""))
        else:
            assert "Authorization" not in request.headers

    async def start(self, request: web.Request) -> web.Response:
        self.note(request, "start")
        self.commits.append((await request.json())["commitId"])
        if self.accepts >= 300:
            headers = {"Location": "/hook"} if self.accepts < 400 else None
            return web.json_response({"message": "no such commit"}, status=self.accepts, headers=headers)
        deploy = {"id": "dep-1", "status": "created"} if self.names_deploy else None
        return web.json_response(deploy, status=self.accepts) if deploy else web.Response(status=self.accepts)

    async def list(self, request: web.Request) -> web.Response:
        self.note(request, "list")
        ids = ["dep-0", *(["dep-1"] if self.commits else [])]
        return web.json_response([{"deploy": {"id": name, "commit": {"id": COMMIT}}, "cursor": name} for name in ids])

    async def state(self, request: web.Request) -> web.Response:
        self.note(request, "state")
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if isinstance(status, int):
            return web.Response(status=status, text="a passing fault")
        return web.json_response({"id": "dep-1", "status": status})

    async def details(self, request: web.Request) -> web.Response:
        self.note(request, "details")
        return web.json_response({"id": "srv-1", "serviceDetails": {"url": str(request.url.origin())}})

    async def readyz(self, request: web.Request) -> web.Response:
        self.note(request, "readyz")
        return web.Response(status=self.ready.pop(0) if len(self.ready) > 1 else self.ready[0])

    async def hook(self, request: web.Request) -> web.Response:
        self.note(request, "hook")
        return web.Response(status=200 if request.query.get("key") == "made-up-hook-key" else 401)


Deploy = Callable[..., Awaitable[tuple[int, str]]]
API = {"RENDER_SERVICE_ID": "srv-1", "RENDER_API_KEY": API_KEY}


@pytest.fixture
def deploy(aiohttp_server: Callable[[web.Application], Awaitable[TestServer]]) -> Deploy:
    async def run(render: SmallRender, secrets: dict[str, str]) -> tuple[int, str]:
        server = await aiohttp_server(render.app())
        base = str(server.make_url("")).rstrip("/")
        settings = {
            "RENDER_API_URL": f"{base}/v1",
            "GITHUB_SHA": COMMIT,
            "DEPLOY_POLL_S": "0.01",
            "DEPLOY_WAIT_S": "30",
            "SMOKE_WAIT_S": "30",
        }
        env = settings | {name: value.replace("BASE", base) for name, value in secrets.items()}
        ended = await asyncio.to_thread(forked.run, [str(SCRIPT)], cwd=SCRIPT.parent, env=env)
        printed = ended.stdout + ended.stderr
        assert API_KEY not in printed
        assert "made-up-hook-key" not in printed
        assert "Traceback" not in printed
        return ended.returncode, printed

    return run


async def test_the_api_deploys_this_commit_and_waits_for_readyz(deploy: Deploy) -> None:
    render = SmallRender(["build_in_progress", 502, 429, "update_in_progress", "live"], ready=[502, 503, 200])
    code, printed = await deploy(render, API)
    assert code == 0
    assert "dep-1: live" in printed
    assert render.commits == [COMMIT]
    assert render.keys == {f"Bearer {API_KEY}"}
    assert render.calls == ["list", "start", *["state"] * 5, "details", *["readyz"] * 3]


async def test_a_deploy_that_waits_behind_another_is_found_in_the_list(deploy: Deploy) -> None:
    render = SmallRender(["queued", "live"], accepts=202, names_deploy=False)
    code, printed = await deploy(render, API)
    assert code == 0, printed
    assert render.commits == [COMMIT]


@pytest.mark.parametrize("status", ["build_failed", "update_failed", "pre_deploy_failed", "canceled", "deactivated"])
async def test_a_failed_deploy_exits_with_an_error(deploy: Deploy, status: str) -> None:
    render = SmallRender(["build_in_progress", status])
    code, printed = await deploy(render, API)
    assert code == 1
    assert f"::error title=Deploy failed::dep-1 ended as {status}" in printed
    assert "readyz" not in render.calls


async def test_an_endless_deploy_times_out(deploy: Deploy) -> None:
    code, printed = await deploy(SmallRender(["build_in_progress"]), API | {"DEPLOY_WAIT_S": "0.5"})
    assert code == 1
    assert "still build_in_progress after 0.5 s" in printed


@pytest.mark.parametrize("status", [302, 401, 404, 500])
async def test_a_rejected_deploy_exits_with_an_error_after_one_request(deploy: Deploy, status: int) -> None:
    render = SmallRender(["live"], accepts=status)
    code, printed = await deploy(render, API)
    assert code == 1
    assert f"Render refused the deploy: {status}" in printed
    assert render.calls == ["list", "start"]


async def test_a_live_service_that_is_not_ready_is_an_error(deploy: Deploy) -> None:
    code, printed = await deploy(SmallRender(["live"], ready=[503]), API | {"SMOKE_WAIT_S": "0.5"})
    assert code == 1
    assert "/readyz: 503" in printed


async def test_the_hook_is_called_once_without_an_api_key(deploy: Deploy) -> None:
    render = SmallRender([])
    secrets = {"RENDER_SERVICE_ID": "srv-1", "RENDER_DEPLOY_HOOK_URL": "BASE/hook?key=made-up-hook-key"}
    code, printed = await deploy(render, secrets)
    assert code == 0
    assert printed.startswith("::notice")
    assert render.calls == ["hook"]


@pytest.mark.parametrize(
    "hook", ["BASE/hook?key=wrong", "made-up-hook-key", "http://127.0.0.1:1/?key=made-up-hook-key"]
)
async def test_a_wrong_hook_is_an_error_and_never_printed(deploy: Deploy, hook: str) -> None:
    code, printed = await deploy(SmallRender([]), {"RENDER_DEPLOY_HOOK_URL": hook})
    assert code == 1
    assert "the deploy hook answered" in printed
    assert hook.rsplit("?", 1)[-1] not in printed


async def test_the_api_is_preferred_over_the_hook(deploy: Deploy) -> None:
    render = SmallRender(["live"])
    code, _ = await deploy(render, API | {"RENDER_DEPLOY_HOOK_URL": "BASE/hook?key=made-up-hook-key"})
    assert code == 0
    assert "hook" not in render.calls


async def test_the_deploy_is_skipped_with_a_notice_without_secrets(deploy: Deploy) -> None:
    render = SmallRender([])
    code, printed = await deploy(render, {"RENDER_API_KEY": "", "RENDER_SERVICE_ID": "srv-1"})
    assert code == 0
    assert printed.startswith("::notice title=Deploy skipped::")
    assert render.calls == []


def test_the_script_needs_the_standard_library_alone() -> None:
    command = [sys.executable, "-I", "-S", str(SCRIPT)]
    ended = subprocess.run(command, env={}, capture_output=True, text=True, timeout=30, check=True)
    assert ended.stdout.startswith("::notice title=Deploy skipped::")
