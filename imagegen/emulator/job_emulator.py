"""Base of the emulators of providers with jobs: HTTP, switches, the jobs themselves, and the ledger.

A provider's own module has its routes and the shape of its responses. Switches are faults, in the prompt
(`a cat {{fault:job end=failed}}`), queued by `POST /_emulator/script`, or the default of all calls (`--fault`):

* `job` accepts the call; its options: job_s= (seconds it runs), end= (one of ENDS), error= (text of a failed one),
  unknown_s= (seconds in which it is not found by polls, lists and cancellations), poll_fault=STATUS with polls=N (the
  first N polls get that status), dead_links=N (the links of the first N results have expired), answer=lost (accepted,
  and the connection is reset), answer_s= (seconds from the acceptance to its response), held=1 (its response follows
  `POST /_emulator/release`), images=N, cost= (US dollars);
* the name of a refusal of the provider, such as `429 retry_after=2`: nothing is begun;
* `reset`, `hang`, `close`: the request is read, nothing is begun, and no response comes.

`POST /_emulator/revoke` with a key as its body: the key is refused from then on. `GET /_emulator/ledger` shows each
call, with `?prompt=TEXT` those with the text in their prompt, and the sums over all jobs: submitted, charged,
cancelled, listed, cost_usd.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import uuid
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from time import monotonic, time
from typing import ClassVar, Final

import orjson
from aiohttp import hdrs, web

from . import delivery
from .base_emulator import ListeningEmulator
from .call_ledger import CallLedger, EmulatedCall
from .fault_schedule import Fault, FaultSchedule, UnknownFault
from .image_files import ShortLinks
from .input_files import files_in
from .jobs import Job
from .small_images import DrawnImage, digest_of
from .together_responses import HTML, TEXT, Response

ENDS: Final = ("completed", "failed", "moderated", "expired", "partial")
NO_ANSWER: Final = frozenset(("reset", "hang", "close"))

BAD_GATEWAY: Final = Response(
    502, b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>nginx</body>\r\n</html>\r\n", HTML
)

_NOTHING: Final = Response(404, b"404 page not found", TEXT)
_MAX_SIDE: Final = 4096


def as_json(status: int, fields: object, headers: Mapping[str, str] | None = None) -> Response:
    return Response(status, orjson.dumps(fields), headers=headers or {})


@dataclass(frozen=True, slots=True)
class JobOptions:
    """Behaviour of an emulator without a switch.

    port: 0 takes a free one; key: the only key accepted, else any; job_s: seconds that a job runs; kept_s: seconds
    that a job can be polled after its end; image: `png`, `jpeg`, `webp`, or `tiny` for a PNG of 8 x 8; fault: of each
    call, or of a share `fail_rate` (0 to 1) of them; seed: makes chance repeatable; price_usd: of one image;
    one_account: all keys are of one account, and each reads the jobs of the others.
    """

    host: str = "127.0.0.1"
    port: int = 0
    key: str | None = None
    job_s: float = 0.3
    kept_s: float = 3600.0
    link_ttl_s: float = 3600.0
    image: str = "png"
    fault: str | None = None
    fail_rate: float = 1.0
    seed: int | None = None
    price_usd: float = 0.01
    one_account: bool = False


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request, read whole."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    base_url: str

    def fields(self) -> dict[str, object] | None:
        """Return the body's JSON object; None if it is none."""
        try:
            value = orjson.loads(self.body)
        except orjson.JSONDecodeError:
            return None
        return value if isinstance(value, dict) else None


@dataclass(frozen=True, slots=True)
class JobCall:
    """A call that begins a job. body: as it was sent; size: width and height in pixels."""

    prompt: str
    model: str
    body: Mapping[str, object]
    count: int = 1
    seed: int | None = None
    size: tuple[int, int] = (1024, 1024)
    output_format: str | None = None


@dataclass(slots=True)
class RunningJob:
    """A job with what its polls need. begun_at, cancelled_at: monotonic time. kept_s: see JobOptions."""

    job: Job
    call: JobCall
    fault: Fault
    key: str
    run_s: float
    kept_s: float
    begun_at: float
    base_url: str
    number: int
    entry: EmulatedCall | None = None
    cancelled_at: float | None = None
    links: list[str] = field(default_factory=list)
    results: int = 0

    @property
    def age_s(self) -> float:
        return monotonic() - self.begun_at

    @property
    def progress(self) -> float:
        """Return the part of its time that is over, 1 at its end."""
        return min(1.0, self.age_s / self.run_s) if self.run_s > 0 else 1.0

    @property
    def is_over(self) -> bool:
        return self.cancelled_at is not None or self.progress >= 1

    @property
    def is_known(self) -> bool:
        """Return whether the provider finds it: not right after the submit, and not long after its end."""
        if self.age_s < self.fault.number("unknown_s", 0):
            return False
        gone = self.job.end == "expired" and self.progress >= 1
        return not gone and self.age_s < self.run_s + self.kept_s

    @property
    def end(self) -> str:
        """Return `running`, `cancelled`, or its end."""
        if self.cancelled_at is not None:
            return "cancelled"
        return self.job.end if self.progress >= 1 else "running"


class JobLedger(CallLedger):
    """A ledger with the sums over all jobs."""

    def sums(self) -> dict[str, float]:
        """Return the counts of jobs that were submitted, charged, cancelled and listed, and the cost in US dollars."""
        jobs = self.jobs
        return {
            "submitted": len(jobs),
            "charged": sum(job.charged for job in jobs),
            "cancelled": sum(job.cancelled for job in jobs),
            "listed": sum(job.listed > 0 for job in jobs),
            "cost_usd": round(sum(job.cost_usd for job in jobs if job.charged), 6),
        }

    def to_json(self, text: str = "") -> bytes:
        return orjson.dumps({**orjson.loads(super().to_json(text)), **self.sums()})


class JobEmulator(ListeningEmulator):
    """Base of the emulators of providers with jobs."""

    name: ClassVar[str]
    refusals: ClassVar[Mapping[str, Response]]
    """What each refusal answers, by the name of its switch."""

    def __init__(self, options: JobOptions | None = None) -> None:
        self.options = options = options or JobOptions()
        super().__init__(options.host, options.port)
        self.rng = random.Random(options.seed)
        self.ledger = JobLedger()
        self.running: dict[str, RunningJob] = {}
        self.revoked: set[str] = set()
        self._links = ShortLinks(self.rng, options.link_ttl_s)
        self._script = FaultSchedule(self._check, random.Random(options.seed))
        self._script.set_default(options.fault, options.fail_rate, monotonic())

    @abstractmethod
    def answer(self, exchange: Exchange) -> Response | None:
        """Return the response to a request; None if there is no such route."""

    def new_id(self) -> str:
        """Return the id of a new job."""
        return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))

    def charges(self, end: str, _fault: Fault) -> bool:
        """Return whether a job that ends so is charged."""
        return end not in ("failed", "moderated")

    def accepts(self, key: str) -> bool:
        """Return whether a key may call."""
        return bool(key) and self.options.key in (None, key) and key not in self.revoked

    def begin(self, exchange: Exchange, key: str, call: JobCall) -> RunningJob | Response:
        """Begin the job of a call, or return the refusal that a switch has set."""
        fault = self._script.take(call.prompt, monotonic()) or Fault("job")
        if fault.name not in ("job", "ok"):
            return self._refused(fault, exchange, call)
        end, lost = fault.text("end", "completed"), fault.text("answer", "") == "lost"
        cost = fault.number("cost", self.options.price_usd * call.count)
        job = Job(self.new_id(), self.name, time(), end, self.charges(end, fault), lost, cost_usd=cost)
        running = RunningJob(
            job,
            call,
            fault,
            key,
            fault.number("job_s", self.options.job_s),
            self.options.kept_s,
            monotonic(),
            exchange.base_url,
            len(self.running),
        )
        self.running[job.id] = running
        running.entry = self._record(exchange, call, "reset" if lost else 200, job)
        return running

    def find(self, job_id: str, key: str) -> RunningJob | None:
        """Return the job, as a poll finds it: of the same account, and not forgotten."""
        running = self.running.get(job_id)
        return running if running and running.is_known and self.may_read(running, key) else None

    def may_read(self, running: RunningJob, key: str) -> bool:
        """Return whether a job belongs to the account of a key."""
        return self.options.one_account or running.key == key

    def polled(self, running: RunningJob) -> int | None:
        """Count a poll. Return the status with which it fails, None if it does not."""
        running.job.polls += 1
        if running.job.polls <= running.fault.number("polls", 0):
            return int(running.fault.number("poll_fault", 500))
        return None

    def cancel(self, running: RunningJob) -> bool:
        """Cancel a job; a job that is over stays unchanged. Return whether it was cancelled by this."""
        running.job.cancels += 1
        if running.is_over:
            return False
        running.cancelled_at = monotonic()
        running.job.cancelled, running.job.charged = True, False
        if running.entry:
            running.entry.paid = False
        return True

    def images(self, running: RunningJob) -> list[str]:
        """Return the links of a job's images, the same at each poll once they live."""
        call = running.call
        count = int(
            running.fault.number("images", max(1, call.count - 1) if running.job.end == "partial" else call.count)
        )
        running.results += 1
        is_dead = running.results <= running.fault.number("dead_links", 0)
        if is_dead or running.results == running.fault.number("dead_links", 0) + 1:
            running.links.clear()
        if not running.links:
            seed, link_fault = self.seed_of(running), Fault("image_expired") if is_dead else None
            for index in range(count):
                image = self._image(call, digest_of(call.prompt, seed, index))
                running.links.append(running.base_url + self._links.mint(image, link_fault, self.link_made_at(running)))
        running.job.collected = True
        return running.links

    def link_made_at(self, _running: RunningJob) -> float:
        """Return the monotonic time from which the life of a job's links counts."""
        return monotonic()

    @staticmethod
    def seed_of(running: RunningJob) -> int:
        """Return the seed that was sent, else one of the job's own."""
        own = int(hashlib.sha256(running.job.id.encode()).hexdigest()[:8], 16)
        return own if running.call.seed is None else running.call.seed

    def _image(self, call: JobCall, digest: str) -> DrawnImage:
        if self.options.image == "tiny":
            return DrawnImage("png", 8, 8, digest)
        kind = {"jpg": "jpeg"}.get(call.output_format or "", call.output_format) or self.options.image
        width, height = (min(max(side, 1), _MAX_SIDE) for side in call.size)
        return DrawnImage(kind, width, height, digest)

    def _check(self, fault: Fault) -> None:
        """Raise UnknownFault for a switch that there is not."""
        if fault.name not in ("job", "ok", *NO_ANSWER, *self.refusals):
            raise UnknownFault(
                f"no such switch: {fault.name}; there are job, {', '.join((*NO_ANSWER, *self.refusals))}"
            )
        if fault.text("end", "completed") not in ENDS:
            raise UnknownFault(f"end is one of {', '.join(ENDS)}")

    def _refused(self, fault: Fault, exchange: Exchange, call: JobCall) -> Response:
        if fault.name in NO_ANSWER:
            answer = Response(0, b"", delivery=fault.name)
        else:
            answer = self.refusals[fault.name]
            if (retry_after := fault.optional_number("retry_after")) is not None:
                answer = answer.with_headers({"Retry-After": f"{retry_after:g}"})
        self._record(exchange, call, answer.outcome, None)
        return answer

    def refuse(self, exchange: Exchange, answer: Response) -> Response:
        """Record a call that begins nothing, and return its response."""
        self._record(exchange, JobCall("", "", {}), answer.outcome, None)
        return answer

    def _record(self, exchange: Exchange, call: JobCall, outcome: int | str, job: Job | None) -> EmulatedCall:
        entry = EmulatedCall(
            received_at=time(),
            outcome=outcome,
            paid=job is not None and job.charged,
            body_hash=hashlib.sha256(exchange.body).hexdigest(),
            prompt=call.prompt,
            model=call.model,
            n=call.count,
            seed=call.seed,
            body=call.body,
            inputs=files_in(call.body),
            path=exchange.path,
            job=job,
        )
        self.ledger.opened(entry)
        self.ledger.closed(entry, client_there=True)
        return entry

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.raw_path.partition("?")[0]
        base_url = f"http://{request.headers.get(hdrs.HOST, 'localhost')}"
        if path.startswith(("/shrt/", "/imgproxy/")):
            agent = request.headers.get(hdrs.USER_AGENT, "")
            return await self._deliver(request, self._links.answer(path, base_url, agent, monotonic()))
        body = await request.content.read()
        if path.startswith("/_emulator/"):
            return await self._deliver(request, self._operate(request, path.removeprefix("/_emulator/"), body))
        exchange = Exchange(request.method, path, request.query, request.headers, body, base_url)
        try:
            answer = self.answer(exchange)
        except UnknownFault as failure:
            answer = Response(400, f"emulator: {failure}".encode(), TEXT)
        return await self._deliver(request, answer or _NOTHING)

    async def _deliver(self, request: web.BaseRequest, answer: Response) -> web.StreamResponse:
        try:
            if answer.held:
                await self._hold()
            if answer.delay_s:
                await asyncio.sleep(answer.delay_s)
            return await delivery.deliver(request, answer)
        except ConnectionError:
            return web.Response()

    def _operate(self, request: web.BaseRequest, name: str, body: bytes) -> Response:
        match (request.method, name):
            case ("GET", "ledger"):
                return Response(200, self.ledger.to_json(request.query.get("prompt", "")))
            case ("DELETE", "ledger"):
                self.ledger.clear()
            case ("DELETE", "script"):
                self.clear_script()
            case ("POST", "script"):
                steps = orjson.loads(body)
                self.script(steps if isinstance(steps, list) else [steps])
            case ("POST", "expire"):
                self.expire_links()
            case ("POST", "release"):
                self.release()
            case ("POST", "revoke"):
                self.revoked.add(body.decode().strip())
            case _:
                return _NOTHING
        return Response(204, b"")


def after_loss(running: RunningJob, answer: Response) -> Response:
    """Return the response to a submit, or the reset connection of a lost one."""
    if running.job.answer_lost:
        answer = Response(0, b"", delivery="reset", job=running.job)
    fault = running.fault
    return replace(answer, delay_s=fault.number("answer_s", 0), held=bool(fault.number("held", 0)))
