"""Form of a task's calls: the model, and the parameters that are left out because it refuses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from imagegen.errors import UpstreamError
from imagegen.providers.protocol import Call, InputImage
from imagegen.queue.claim import Claim
from imagegen.tasks.call_plan import PlannedCall
from imagegen.tasks.request import GenerationRequest
from imagegen.worker.limits import Counts

NEEDED_PARAMETERS = frozenset({"prompt", "model", "n", "image_url", "reference_images", "image", "images", "mask"})
"""Parameters that a call can't go without, even if a model refuses them."""


class CallForm:
    """Form of the calls of one attempt. fallback_models: tried in this order if the requested one is not available.

    model: the one that is called. first_refusal: why the requested model is not available; it counts if no other is.
    """

    def __init__(
        self, claim: Claim, request: GenerationRequest, counts: Counts, fallback_models: Sequence[str]
    ) -> None:
        self._claim = claim
        self._request = request
        self._counts = counts
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
        return Call(request, len(share.indexes), share.indexes[0], share.seed, without, inputs)

    def warn_of_model(self) -> None:
        """Add a warning if another model than the requested one is called."""
        if self.model != self._request.model:
            add_warnings(self._claim, f"{self._request.model} is not available: {self.model} was used")

    def learn_count(self, error: UpstreamError, count: int) -> bool:
        """Return whether the model takes fewer images a call, so that the calls are to be planned again."""
        if error.max_count is None or count <= 1:
            return False
        self._counts.refused(self.model, count, error.max_count)
        return True

    def mend(self, error: UpstreamError) -> bool:
        """Return whether the call is to be repeated in another form."""
        return self._drop_parameter(error) or self._change_model(error)

    def _drop_parameter(self, error: UpstreamError) -> bool:
        """Return whether the one parameter that the model may refuse is left out from now on."""
        run = self._claim.checkpoint
        if error.parameter is None or error.parameter in NEEDED_PARAMETERS or run.dropped_params:
            return False
        self._claim.checkpoint = replace(run, dropped_params=(error.parameter,))
        add_warnings(self._claim, f"{error.parameter} was left out: the model does not support it")
        return True

    def _change_model(self, error: UpstreamError) -> bool:
        """Return whether there is another model to try; if not, the refusal of the first one counts."""
        if error.code != "model_not_available":
            self.first_refusal = None
            return False
        self.first_refusal = self.first_refusal or error
        if not self._untried:
            return False
        self.model = self._untried.pop(0)
        return True


def add_warnings(claim: Claim, *warnings: str) -> None:
    """Add warnings to the checkpoint, each once."""
    earlier = claim.checkpoint.warnings
    if warnings and (new := [warning for warning in warnings if warning not in earlier]):
        claim.checkpoint = replace(claim.checkpoint, warnings=(*earlier, *new))
