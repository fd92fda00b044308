"""Check of a request's input images against what the provider takes, so that an edit it can't make costs no call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from imagegen.errors import FieldError, InvalidRequest
from imagegen.providers.protocol import Edits
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.validation import Adjust


@dataclass(frozen=True, slots=True)
class EditRules:
    """Rules of a provider. edits: what it takes for a model. then: the rules that follow."""

    edits: Callable[[str], Edits | None]
    then: Adjust | None = None

    def __call__(self, request: GenerationRequest, given: Collection[str]) -> GenerationRequest:
        """Return the request. Raises InvalidRequest with our name of each field, as `Adjust` does."""
        if request.image_sources and (errors := list(_errors(request, self.edits(request.model)))):
            raise InvalidRequest(details=errors)
        return request if self.then is None else self.then(request, given)


def _errors(request: GenerationRequest, edits: Edits | None) -> Iterator[FieldError]:
    count = len(request.input_images)
    field = "reference_images" if request.image_url is None else "image_url"
    if edits is None:
        absent = field if count else "mask"
        yield FieldError(absent, f"must be absent: this provider takes no input images for {request.model}")
        return
    if count > edits.max_images:
        rule = f"this provider takes at most {edits.max_images} for {request.model}"
        yield FieldError("reference_images", f"must leave at most {edits.max_images} input images: {rule}")
    if request.mask is None:
        return
    if not edits.mask:
        yield FieldError("mask", f"must be absent: this provider takes no mask for {request.model}")
    elif not count:
        yield FieldError("mask", "needs an image that it belongs to: send image_url too")
