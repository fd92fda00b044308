"""Submission of a request: what a task is stored as, and how its id and its price follow from the request."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from msgspec import Struct
from msgspec.structs import replace

from imagegen.channels_file import SANDBOX
from imagegen.tasks.cost import Cost
from imagegen.tasks.family import RequestFamily
from imagegen.tasks.request import GenerationRequest, fingerprint, request_digest
from imagegen.tasks.task import Task
from imagegen.tasks.validation import Adjust
from imagegen.tasks.webhook import Webhook


class FormerIdentity(Struct, frozen=True, gc=False):
    """Identity of a request in version 0.5.5 and before, if it was another one."""

    task_id: str
    digest: str
    request_json: bytes
    family: RequestFamily | None


class Submission(Struct, frozen=True, gc=False):
    """Submitted request in its stored form, the two hashes of its canonical form, its webhooks, and its siblings.

    client, scope, cost, sandbox, submitter: see Task. max_micro_usd: the most that it may cost; None without a limit.
    former: None if the request had the same identity in each version.
    has_siblings: whether images of tasks that differ only in `n` are used for it.
    """

    task_id: str
    digest: str
    model: str
    request_json: bytes
    webhooks: tuple[Webhook, ...] = ()
    family: RequestFamily | None = None
    client: str = ""
    scope: str | None = None
    cost: Cost | None = None
    sandbox: bool | None = None
    max_micro_usd: int | None = None
    submitter: str = ""
    former: FormerIdentity | None = None
    has_siblings: bool = True

    def as_former(self) -> Submission:
        """Return the submission for the task that a former version made of the request."""
        former = self.former
        if former is None:
            return self
        task_id, digest, stored, family = former.task_id, former.digest, former.request_json, former.family
        return replace(self, task_id=task_id, digest=digest, request_json=stored, family=family, former=None)

    @property
    def wanted(self) -> int:
        """Number of images, 1 if it belongs to no family."""
        return self.family.request.n if self.family else 1

    @property
    def may_cost_too_much(self) -> bool:
        """Return whether it may cost more than its own limit."""
        limit, estimated = self.max_micro_usd, self.cost.estimated if self.cost else None
        return limit is not None and (estimated is None or estimated > limit)


def _with_first_image(request: GenerationRequest) -> GenerationRequest:
    """Return a request with its first input image as `image_url`: a provider is sent the same in either field."""
    if request.image_url is not None or not request.reference_images:
        return request
    first, *others = request.reference_images
    return replace(request, image_url=first, reference_images=tuple(others) or None)


def _unchanged(request: GenerationRequest) -> GenerationRequest:
    return request


def _unknown_cost(_request: GenerationRequest, _most: int | None = None) -> Cost:
    return Cost()


class TaskIdentity(Struct, frozen=True):
    """Rules by which a request becomes a task id. secret: see fingerprint.

    provider: of the default model. provider_of: returns that of a model, as its canonical form has it; None if all
    models have the same one.

    adjust: fits a request to its model, see validation.parse; None if no model's limits are checked.
    sent_request: returns the part of a request that the provider is sent, which alone decides the id.
    estimate: returns what all images of a request cost, by the channels that a limit in micro-dollars allows.
    """

    provider: str
    default_model: str
    aliases: Mapping[str, str]
    secret: str | None
    adjust: Adjust | None = None
    sent_request: Callable[[GenerationRequest], GenerationRequest] = _unchanged
    estimate: Callable[[GenerationRequest, int | None], Cost] = _unknown_cost
    provider_of: Callable[[str], str] | None = None

    def __repr__(self) -> str:
        return f"TaskIdentity({self.provider!r}, {self.default_model!r})"

    def submission(
        self, request: GenerationRequest, scope: str | None, webhooks: tuple[Webhook, ...] = (), client: str = ""
    ) -> Submission:
        """Return the submission for a request.

        scope: name of the key that owns the task, None if tasks are shared. client: name of the key that submits it.
        """
        normal = _with_first_image(request)
        submission = self._submission(normal, scope, webhooks, client)
        if normal is request:
            return submission
        given = self._submission(request, scope, webhooks, client)
        former = FormerIdentity(given.task_id, given.digest, given.request_json, given.family)
        return replace(submission, former=former)

    def _submission(
        self, request: GenerationRequest, scope: str | None, webhooks: tuple[Webhook, ...], client: str
    ) -> Submission:
        sent = self.sent_request(request)
        provider = self.provider if self.provider_of is None else self.provider_of(request.model)
        canonical = sent.canonical(provider, scope)
        task_id = fingerprint(canonical, self.secret)
        family = RequestFamily(sent, provider, scope, self.secret)
        digest, stored, cost = request_digest(canonical), request.to_json(), self.estimate(request, None)
        is_sandbox = provider == SANDBOX
        return Submission(task_id, digest, request.model, stored, webhooks, family, client, scope, cost, is_sandbox)

    def resubmission(self, task: Task, webhooks: tuple[Webhook, ...]) -> Submission:
        """Return the submission for the request of a task, with its limit of the cost.

        Under other settings than now it belongs to no family.
        """
        request, most = GenerationRequest.from_json(task.request_json), task.cost.most if task.cost else None
        submission = self.submission(request, task.scope, webhooks, task.client)
        if most is not None:
            submission = replace(submission, max_micro_usd=most, cost=self.estimate(request, most))
        if submission.task_id == task.id:
            return submission
        return replace(submission, task_id=task.id, digest=task.digest, request_json=task.request_json, family=None)
