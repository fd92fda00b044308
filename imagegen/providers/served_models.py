"""Check that a channel serves the model of a request, so that a wrong name fails at the submit."""

from __future__ import annotations

from collections.abc import Callable, Collection

from msgspec import Struct

from imagegen.channels_file import Channels
from imagegen.errors import FieldError, InvalidRequest
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.validation import Adjust


class ServedModels(Struct, frozen=True):
    """Rule of the channels. fallbacks: models that may take the place of others.

    elsewhere: returns whether another instance may serve a model. then: the rules that follow.
    """

    channels: Channels
    fallbacks: tuple[str, ...]
    elsewhere: Callable[[str], bool]
    then: Adjust

    def __call__(self, request: GenerationRequest, given: Collection[str]) -> GenerationRequest:
        """Return the request. Raises InvalidRequest with the field `model`."""
        is_served = any(map(self.channels.serving, (request.model, *self.fallbacks)))
        if not is_served and not self.elsewhere(request.model):
            rule = "must be a model that a channel serves; GET /api/models lists them"
            raise InvalidRequest(details=[FieldError("model", rule)])
        return self.then(request, given)
