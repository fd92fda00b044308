"""Form of a task's calls: the model, and the parameters that are left out because it refuses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from imagegen.errors import UpstreamError
from imagegen.images.store import VerifiedImage
from imagegen.providers.protocol import Call, InputImage
from imagegen.providers.refused_fields import sent_fields
from imagegen.queue.claim import Claim
from imagegen.tasks.call_plan import PlannedCall
from imagegen.tasks.infotext import infotext
from imagegen.tasks.provider_job import SentCall
from imagegen.tasks.request import GenerationRequest
from imagegen.worker.attempt_limits import AttemptLimits, ImageCounts, SeedSupport
from imagegen.worker.call_routes import Routes

MAX_DROPPED_FIELDS = 16
"""Fields that a task may lose because the upstream refuses them."""


class CallForm:
    """Form of the calls of one attempt. fallback_models: tried in this order if the requested one is not available.

    model: called now. first_refusal: why the requested model is not available; it counts if no other is.
    """

    def __init__(
        self,
        claim: Claim,
        request: GenerationRequest,
        counts: ImageCounts,
        seeds: SeedSupport,
        fallback_models: Sequence[str],
    ) -> None:
        self._claim = claim
        self._request = request
        self._counts = counts
        self._seeds = seeds
        self._untried = list(fallback_models)
        self.model = request.model
        self.first_refusal: UpstreamError | None = None

    def use(self, model: str) -> None:
        """Continue with the model of an earlier attempt's call."""
        self.model = model
        self._untried = [untried for untried in self._untried if untried != model]

    def call(self, share: PlannedCall, inputs: Mapping[str, InputImage]) -> Call:
        """Return the call that is to be made."""
        request, without = self._request, frozenset(self._claim.checkpoint.dropped_params)
        if self.model != request.model:
            request = replace(request, model=self.model)
        task = self._claim.task
        return Call(
            request,
            len(share.indexes),
            share.indexes[0],
            self.as_sent(share).seed,
            without,
            inputs,
            repeat=task.epoch if task.stale_images else 0,
            other_jobs=frozenset(self._claim.checkpoint.begun_jobs),
        )

    def sent(self, share: PlannedCall, now: float) -> SentCall:
        """Return what a checkpoint has of a call that is about to be made. now: Unix time."""
        seed, price = self.as_sent(share).seed, self._claim.cost.calling
        return SentCall(share.indexes, seed, self.model, now, price)

    def sent_call(self, sent: SentCall) -> Call:
        """Return a call of an earlier attempt, without the bytes of its input images."""
        request = replace(self._request, model=sent.model)
        checkpoint = self._claim.checkpoint
        without, jobs = frozenset(checkpoint.dropped_params), frozenset(checkpoint.begun_jobs)
        return Call(request, len(sent.indexes), sent.indexes[0], sent.seed, without, other_jobs=jobs)

    def as_sent(self, share: PlannedCall) -> PlannedCall:
        """Return the part of a call with the seed that it carries, None if the model takes none."""
        is_given = self._request.seed is not None
        if share.seed is None or (
            "seed" not in self._claim.checkpoint.dropped_params and self._seeds.sends(self.model, given=is_given)
        ):
            return share
        return PlannedCall(share.indexes, None)

    def describe(self, image: VerifiedImage, seed: int | None) -> tuple[str, str]:
        """Return the parameters and the title of an image, for the metadata of its file."""
        text = infotext(self._request, model=self.model, seed=seed, width=image.width, height=image.height)
        return text, self._request.prompt

    def warn(self, warnings: Sequence[str]) -> None:
        """Add the warnings of a reply, and one if another model than the requested one is called."""
        add_warnings(self._claim, *warnings)
        if self.model != self._request.model:
            add_warnings(self._claim, f"{self._request.model} is not available: {self.model} was used")

    def lower_count(self, error: UpstreamError, count: int) -> bool:
        """Return whether the model takes fewer images a call, so that the calls are to be planned again."""
        if error.max_count is None or count <= 1:
            return False
        self._counts.refused(self.model, count, error.max_count)
        return True

    def change(self, error: UpstreamError, cause: UpstreamError) -> bool:
        """Return whether the call is to be repeated in another form. cause: why no channel serves the present one."""
        withheld = self._withhold_seed(error)
        return self._drop_fields(error) or withheld or self._change_model(error, cause)

    def _withhold_seed(self, error: UpstreamError) -> bool:
        """Return whether the model refuses the seed of a variant, which is no parameter of the client."""
        if "seed" not in error.refused or self._request.seed is not None:
            return False
        if not self._request.variant or not self._seeds.sends(self.model, given=False):
            return False
        self._seeds.refused(self.model)
        return True

    def _drop_fields(self, error: UpstreamError) -> bool:
        """Return whether fields that the upstream refuses are left out from now on; a refused call is not paid."""
        checkpoint = self._claim.checkpoint
        names = [name for name in sent_fields(error.refused, self._request) if name not in checkpoint.dropped_params]
        if not names or len(checkpoint.dropped_params) + len(names) > MAX_DROPPED_FIELDS:
            return False
        self._claim.checkpoint = replace(checkpoint, dropped_params=(*checkpoint.dropped_params, *names))
        # `response_format` is the service's own, which no client gives.
        client_fields = [name for name in names if name != "response_format"]
        add_warnings(self._claim, *(f"{name} was left out: the model does not support it" for name in client_fields))
        return True

    def _change_model(self, error: UpstreamError, cause: UpstreamError) -> bool:
        """Return whether there is another model to try; if not, the refusal of the first one counts."""
        if error.code != "model_not_available":
            self.first_refusal = None
            return False
        self.first_refusal = self.first_refusal or cause
        if not self._untried:
            return False
        self.model = self._untried.pop(0)
        return True


def alternatives(claim: Claim, request: GenerationRequest, rules: AttemptLimits, routes: Routes) -> list[str]:
    """Return the fallback models that may take the place of the requested one, for the task's client too."""
    if not rules.fallback_models:
        return []
    return [
        model
        for model in rules.fallback_models
        if model != request.model
        and rules.may_use(claim.task.client, model)
        and routes.channels.serving(model)
        and not (request.image_sources and routes.edits(model) is None)
    ]


def add_warnings(claim: Claim, *warnings: str) -> None:
    """Add warnings to the checkpoint, each once."""
    earlier = claim.checkpoint.warnings
    if warnings and (new := [warning for warning in warnings if warning not in earlier]):
        claim.checkpoint = replace(claim.checkpoint, warnings=(*earlier, *new))
