"""Deploys one commit to Render: by its API (start, wait until live, try /readyz), else by a deploy hook, else a notice.

Standard library only, since it runs before anything is installed. https://api-docs.render.com/reference/create-deploy
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

REQUEST_TIMEOUT_S = 30
SHOWN_CHARS = 500
ENDED_BADLY = {"build_failed", "update_failed", "pre_deploy_failed", "canceled", "deactivated"}
PASSING_FAULTS = {0, HTTPStatus.TOO_MANY_REQUESTS}


class DeployError(Exception):
    """The deploy did not come about; the text has the reason."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the API key to another host."""

    def redirect_request(self, *_: object) -> None:
        return None


@dataclass(frozen=True)
class Answer:
    """What came back; status 0: no connection, or none in time."""

    status: int
    body: str

    @property
    def passing(self) -> bool:
        """Whether the same call may work a little later."""
        return self.status in PASSING_FAULTS or self.status >= HTTPStatus.INTERNAL_SERVER_ERROR

    def json(self) -> Any:
        """Return the parsed body, an empty object unless it is JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return {}


def call(method: str, url: str, *, key: str = "", body: object = None) -> Answer:
    headers = {"Accept": "application/json", "User-Agent": "imagegen-deploy"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None
    if body is not None:
        data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
    try:
        request = urllib.request.Request(url, data=data, headers=headers, method=method)
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=REQUEST_TIMEOUT_S) as response:
            return Answer(response.status, response.read().decode(errors="replace"))
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read().decode(errors="replace"))
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Answer(0, type(error).__name__)  # not its text, which may quote the address


@dataclass(frozen=True)
class Render:
    """Render's API for one service."""

    api_url: str
    service_id: str
    api_key: str = field(repr=False)

    def get(self, path: str) -> Answer:
        return call("GET", self._url(path), key=self.api_key)

    def post(self, path: str, body: object) -> Answer:
        return call("POST", self._url(path), key=self.api_key, body=body)

    def _url(self, path: str) -> str:
        return f"{self.api_url.rstrip('/')}/services/{self.service_id}{path}"

    def recent_deploys(self) -> list[dict[str, Any]]:
        found = self.get("/deploys?limit=20").json()
        return [entry["deploy"] for entry in found if "deploy" in entry] if isinstance(found, list) else []


@dataclass(frozen=True)
class Pace:
    """Time to wait, and interval of the requests."""

    wait_s: float
    poll_s: float

    def ticks(self) -> Iterator[None]:
        ends_at = time.monotonic() + self.wait_s
        while True:
            yield
            if time.monotonic() + self.poll_s > ends_at:
                return
            time.sleep(self.poll_s)


def start(render: Render, commit: str, pace: Pace) -> str:
    """Start a deploy of this commit and return its id."""
    known = {deploy["id"] for deploy in render.recent_deploys()}
    answer = render.post("/deploys", {"commitId": commit})
    if answer.status not in {HTTPStatus.OK, HTTPStatus.CREATED, HTTPStatus.ACCEPTED}:
        raise DeployError(f"Render refused the deploy: {answer.status} {answer.body[:SHOWN_CHARS]}")
    match answer.json():
        case {"id": str(deploy_id)}:
            return deploy_id
    # A 202 may have no body: the deploy waits behind another one and shows up in the list.
    for _ in pace.ticks():
        for deploy in render.recent_deploys():
            if deploy["id"] not in known and (deploy.get("commit") or {}).get("id") == commit:
                return str(deploy["id"])
    raise DeployError("Render queued the deploy, but it did not show up in time")


def wait_until_live(render: Render, deploy_id: str, pace: Pace) -> None:
    shown = None
    for _ in pace.ticks():
        answer = render.get(f"/deploys/{deploy_id}")
        if answer.status != HTTPStatus.OK:
            if not answer.passing:
                raise DeployError(f"asking for {deploy_id}: {answer.status} {answer.body[:SHOWN_CHARS]}")
            continue
        status = answer.json().get("status")
        if status != shown:
            print(f"{deploy_id}: {status}", flush=True)
            shown = status
        if status == "live":
            return
        if status in ENDED_BADLY:
            raise DeployError(f"{deploy_id} ended as {status}; its log is in Render's dashboard")
    raise DeployError(f"{deploy_id} was still {shown} after {pace.wait_s:g} s")


def smoke_test(render: Render, pace: Pace) -> None:
    """Waits for a 200 of the live service's /readyz."""
    details = render.get("").json().get("serviceDetails") or {}
    if not (url := details.get("url")):
        raise DeployError("Render named no address of this service; is it a web service?")
    answer = Answer(0, "")
    for _ in pace.ticks():
        answer = call("GET", f"{url.rstrip('/')}/readyz")
        if answer.status == HTTPStatus.OK:
            print(f"{url}/readyz: 200", flush=True)
            return
    raise DeployError(f"{url}/readyz: {answer.status} {answer.body[:SHOWN_CHARS]}")


def by_api(env: Callable[[str, str], str]) -> None:
    render = Render(
        env("RENDER_API_URL", "https://api.render.com/v1"), env("RENDER_SERVICE_ID", ""), env("RENDER_API_KEY", "")
    )
    poll_s = float(env("DEPLOY_POLL_S", "10"))
    pace = Pace(float(env("DEPLOY_WAIT_S", "1500")), poll_s)  # Render gives up after 15 minutes without a healthy start
    deploy_id = start(render, env("GITHUB_SHA", ""), pace)
    wait_until_live(render, deploy_id, pace)
    smoke_test(render, Pace(float(env("SMOKE_WAIT_S", "180")), poll_s))


def by_hook(hook_url: str) -> None:
    """The whole address is the secret, so it is never printed."""
    answer = call("POST", hook_url)
    if not HTTPStatus.OK <= answer.status < HTTPStatus.MULTIPLE_CHOICES:
        raise DeployError(f"the deploy hook answered {answer.status} {answer.body[:SHOWN_CHARS]}")
    print("::notice title=Deploy asked for::The hook accepted it; whether it goes live is in Render's dashboard.")


def main() -> int:
    def env(name: str, default: str) -> str:
        return os.environ.get(name, "").strip() or default

    try:
        if env("RENDER_SERVICE_ID", "") and env("RENDER_API_KEY", ""):
            by_api(env)
        elif hook_url := env("RENDER_DEPLOY_HOOK_URL", ""):
            by_hook(hook_url)
        else:
            print(
                "::notice title=Deploy skipped::Set the secrets RENDER_SERVICE_ID and RENDER_API_KEY, "
                "or RENDER_DEPLOY_HOOK_URL, to deploy from here."
            )
    except DeployError as error:
        print(f"::error title=Deploy failed::{' '.join(str(error).split())}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
