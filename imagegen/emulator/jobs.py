"""Provider jobs: calls that are accepted and polled, in the dialects of relays.

The fault `job` makes a job of a call; `--dialect` does so with each call, and the routes of sub2api and Bifrost always
do. Options: dialect=, job_s= (seconds it runs), end= (one of ENDS), error=TEXT (of `failed`), unknown_s= (seconds in
which polls do not find it), poll_fault=STATUS with polls=N (the first N polls get that status), answer=lost (accepted,
and the connection is reset), poll_url= (the address that the acceptance names), keys=all (each key polls it, as keys
of one account), cost= (in US dollars).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import monotonic, time
from typing import TYPE_CHECKING, Final

import orjson

from .fault_schedule import Fault, UnknownFault
from .together_responses import Entry, Response, error_body

if TYPE_CHECKING:
    from .generation import Generation

DIALECTS: Final = ("apimart", "sub2api", "bifrost", "modelscope", "newapi")
ENDS: Final = ("completed", "failed", "policy", "empty", "expired")

_ROUTE: Final = re.compile(r"/(?:v1/)?(tasks|images/tasks|(?:async/)?images/(?:generations|edits))/([A-Za-z0-9_-]+)")
_ROUTE_OF: Final = {
    "apimart": "tasks",
    "modelscope": "tasks",
    "newapi": "images/tasks",
    "sub2api": "images/tasks",
    "bifrost": "images/generations",
}
_LINKS_ONLY: Final = frozenset(("apimart", "modelscope", "sub2api"))
"""Dialects with results that are links for each `response_format`."""

_RUN_S: Final = 0.3
_LIFE_S: Final = 86_400
_POLICY: Final = "Your request was rejected by the safety system"
_NOT_FOUND: Final = Response(404, error_body("task not found", "not_found_error", "task_not_found", None))


@dataclass(slots=True)
class Job:
    """One job, as the ledger shows it. charged: a failed job is refunded. collected: a poll returned its images.

    cancelled: before its end. cancels, listed: requests that cancel it, and lists with it. cost_usd: if it is charged.
    """

    id: str
    dialect: str
    submitted_at: float
    end: str
    charged: bool
    answer_lost: bool
    polls: int = 0
    collected: bool = False
    cancelled: bool = False
    cancels: int = 0
    listed: int = 0
    cost_usd: float = 0.0


@dataclass(slots=True)
class _Running:
    """A job with what its polls need. begun_at: monotonic time."""

    job: Job
    generation: Generation
    fault: Fault
    begun_at: float
    entries: list[Entry] | None = None

    @property
    def progress(self) -> float:
        """Part of its time that is over, 1 at its end."""
        run_s = self.fault.number("job_s", _RUN_S)
        return min(1.0, self.age_s / run_s) if run_s else 1.0

    @property
    def age_s(self) -> float:
        return monotonic() - self.begun_at

    def images(self) -> list[Entry]:
        """Return its images, the same at each poll."""
        if self.job.end == "empty":
            return []
        if self.entries is None:
            self.entries = self.generation.entries()
        return self.entries


class Jobs:
    """The jobs since the start."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Running] = {}

    def accept(self, generation: Generation, fault: Fault) -> Response:
        """Begin a job. Raises UnknownFault."""
        dialect = fault.text("dialect", generation.dialect or "apimart")
        end, lost = fault.text("end", "completed"), fault.text("answer", "") == "lost"
        if dialect not in DIALECTS or end not in ENDS:
            raise UnknownFault(f"dialect is one of {', '.join(DIALECTS)}, end one of {', '.join(ENDS)}")
        if dialect in _LINKS_ONLY:
            generation = replace(generation, image_request=replace(generation.image_request, wants_base64=False))
        number = generation.studio.rng.getrandbits(64)
        charged = end not in ("failed", "policy")
        job = Job(f"task_{number:016x}", dialect, time(), end, charged, lost)
        self._jobs[job.id] = _Running(job, generation, fault, monotonic())
        answer = _acceptance(job, generation, fault)
        return Response(
            answer.status,
            answer.body,
            headers=answer.headers,
            delivery="reset" if lost else "plain",
            job=job,
        )

    def answer(self, path: str, key: str, headers: Mapping[str, str]) -> Response | None:
        """Return the response to a poll; None if the path is not of one."""
        match = _ROUTE.fullmatch(path)
        if match is None:
            return None
        running = self._jobs.get(match[2])
        if running is None or (running.generation.key != key and running.fault.text("keys", "own") != "all"):
            return _NOT_FOUND
        job, fault = running.job, running.fault
        job.polls += 1
        route = match[1].removeprefix("async/").replace("edits", "generations")
        is_unknown = route != _ROUTE_OF[job.dialect] or running.age_s < fault.number("unknown_s", 0)
        if is_unknown or (job.end == "expired" and running.progress >= 1):
            return _NOT_FOUND
        if job.polls <= fault.number("polls", 0):
            status = int(fault.number("poll_fault", 500))
            return Response(status, error_body(f"Status {status}", "server_error", None, None))
        return self._state(running, headers)

    @staticmethod
    def _state(running: _Running, headers: Mapping[str, str]) -> Response:
        job = running.job
        if job.dialect == "modelscope" and headers.get("X-ModelScope-Task-Type") != "image_generation":
            failed = {"task_id": job.id, "task_status": "FAILED", "errors": {"message": "task not found"}}
            return Response(200, orjson.dumps(failed))
        answer = _STATES[job.dialect](running)
        if running.progress >= 1 and job.end == "completed":
            job.collected = True
        return answer


def _acceptance(job: Job, generation: Generation, fault: Fault) -> Response:
    poll_url = fault.text("poll_url", "")
    address: dict[str, object] = {"poll_url": poll_url} if poll_url else {}
    if job.dialect == "sub2api":
        path = f"/v1/images/tasks/{job.id}"
        body = {
            **_sub2api(job, "processing"),
            "poll_url": poll_url or generation.base_url + path,
        }
        return Response(202, orjson.dumps(body), headers={"Location": poll_url or path, "Retry-After": "1"})
    if job.dialect == "bifrost":
        return Response(202, orjson.dumps({"id": job.id, "status": "pending", **address}))
    if job.dialect == "modelscope":
        return Response(200, orjson.dumps({"task_id": job.id, "task_status": "PENDING", **address}))
    if job.dialect == "newapi":
        return Response(200, orjson.dumps({"id": job.id, "task_id": job.id, "status": "queued", **address}))
    entry = {"status": "submitted", "task_id": job.id, **address}
    return Response(200, orjson.dumps({"code": 200, "data": [entry]}))


def _fault_of(running: _Running) -> dict[str, object]:
    if running.job.end == "policy":
        return {"message": _POLICY, "type": "image_generation_user_error", "code": "moderation_blocked"}
    message = running.fault.text("error", "The upstream failed")
    return {"message": message, "type": "server_error", "code": "upstream_error"}


def _result(running: _Running) -> dict[str, object]:
    created = int(running.job.submitted_at)
    return {"created": created, "data": [_openai_entry(entry) for entry in running.images()]}


def _openai_entry(entry: Entry) -> Entry:
    return {name: entry[name] for name in ("url", "b64_json") if name in entry}


def _urls(running: _Running) -> list[object]:
    return [entry.get("url") for entry in running.images()]


def _apimart_state(running: _Running) -> Response:
    job, progress = running.job, running.progress
    state: dict[str, object] = {"id": job.id, "created": int(job.submitted_at), "progress": int(progress * 100)}
    if progress < 1:
        state["status"] = "processing"
    elif job.charged:
        expires_at = int(time()) + _LIFE_S
        images = [{"url": [url], "expires_at": expires_at} for url in _urls(running)]
        cost = running.fault.number("cost", 0.04)
        state |= {"status": "completed", "cost": cost, "credits_cost": cost * 100, "result": {"images": images}}
    else:
        state |= {"status": "failed", "error": _fault_of(running)}
    return Response(200, orjson.dumps({"code": 200, "data": state}))


def _sub2api(job: Job, status: str) -> dict[str, object]:
    created = int(job.submitted_at)
    return {
        "id": job.id,
        "task_id": job.id,
        "object": "image.generation.task",
        "status": status,
        "created_at": created,
        "expires_at": created + _LIFE_S,
    }


def _sub2api_state(running: _Running) -> Response:
    job = running.job
    if running.progress < 1:
        return Response(200, orjson.dumps(_sub2api(job, "processing")), headers={"Retry-After": "1"})
    if not job.charged:
        status = 400 if job.end == "policy" else 502
        return Response(
            200, orjson.dumps({**_sub2api(job, "failed"), "http_status": status, "error": _fault_of(running)})
        )
    body = {**_sub2api(job, "completed"), "http_status": 200, "result": _result(running)}
    first = next(iter(_urls(running)), None)
    return Response(200, orjson.dumps(body | ({"image_url": first} if first else {})))


def _bifrost_state(running: _Running) -> Response:
    job = running.job
    if running.progress < 1:
        return Response(202, orjson.dumps({"id": job.id, "status": "processing"}))
    if job.charged:
        body = {"id": job.id, "status": "completed", "status_code": 200, "result": _result(running)}
    else:
        body = {"id": job.id, "status": "failed", "status_code": 500, "error": {"error": _fault_of(running)}}
    return Response(200, orjson.dumps(body))


def _modelscope_state(running: _Running) -> Response:
    job = running.job
    body: dict[str, object] = {"task_id": job.id, "request_id": job.id, "time_taken": 0}
    if running.progress < 1:
        body["task_status"] = "RUNNING"
    elif job.charged:
        body |= {"task_status": "SUCCEED", "output_images": _urls(running)}
    else:
        body |= {"task_status": "FAILED", "errors": _fault_of(running)}
    return Response(200, orjson.dumps(body))


def _newapi_state(running: _Running) -> Response:
    job, progress = running.job, running.progress
    state: dict[str, object] = {"task_id": job.id, "progress": f"{int(progress * 100)}%", "fail_reason": ""}
    if progress < 1:
        state["status"] = "IN_PROGRESS"
    elif job.charged:
        state |= {"status": "SUCCESS", "data": _result(running)}
    else:
        state |= {"status": "FAILURE", "fail_reason": _fault_of(running)["message"]}
    return Response(200, orjson.dumps({"code": "success", "message": "", "data": state}))


_STATES: Final[Mapping[str, Callable[[_Running], Response]]] = {
    "apimart": _apimart_state,
    "sub2api": _sub2api_state,
    "bifrost": _bifrost_state,
    "modelscope": _modelscope_state,
    "newapi": _newapi_state,
}
