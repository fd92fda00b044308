"""Schemathesis tests of a live service, generated from the OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import CHECKS
from schemathesis.config import (
    ChecksConfig,
    GenerationConfig,
    PositiveDataAcceptanceConfig,
    ProjectConfig,
    ProjectsConfig,
    SchemathesisConfig,
)
from schemathesis.generation.modes import GenerationMode
from service.running import Service

from imagegen.web.openai.operations import ALIASES
from imagegen.web.routes import build_document

ACCEPTED = ["2xx", "3xx", "404", "409", "410", "416", "422"]
"""Statuses that schema-valid data may cause: 410 for another `v`, 422 for an Idempotency-Key with several bodies."""

LENIENT = ("/api/images/batch", "images/generations", "images/edits", "images/edits/async")
"""Paths with bodies rejected entry by entry, or parsed as leniently as OpenAI's and Together's clients need."""

RELATED = ("/api/usage",)
"""Paths with parameters that must fit each other, which no schema says."""

SAME_BODY = "/v1/images/edits/async"
"""Takes the body of the synchronous route, and generating such bodies takes long."""

IMAGES_IN = ("/api/uploads", "images/edits", "images/edits/async", "images/variations")
"""No schema says what an image is, and variations are never accepted."""

CHEAP = {
    "width": 64,
    "height": 64,
    "size": "64x64",
    "n": 1,
    "webhook": None,
    "imageUrl": None,
    "referenceImages": None,
    "mask": None,
}
CHEAP |= {"extra": {"x_style": 1}} | dict.fromkeys(
    (
        "aspectRatio",
        "aspect_ratio",
        "resolution",
        "imageUrl",
        "image_url",
        "referenceImages",
        "reference_images",
        "mask",
    )
)

schema = schemathesis.openapi.from_dict(
    build_document(),
    config=SchemathesisConfig(
        projects=ProjectsConfig(
            default=ProjectConfig(
                checks=ChecksConfig(
                    positive_data_acceptance=PositiveDataAcceptanceConfig(expected_statuses=ACCEPTED),
                ),
                generation=GenerationConfig(
                    modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE],
                    max_examples=12,
                    deterministic=True,
                    database="none",
                ),
                request_timeout=10,
            )
        )
    ),
)


def is_lenient(case: schemathesis.Case) -> bool:
    return case.operation.path.endswith(LENIENT)


def limit_cost(case: schemathesis.Case) -> None:
    """Request small images, without fields that exclude each other and without webhooks, if the body is valid."""
    refused = case.meta is not None and case.meta.generation.mode.is_negative and not is_lenient(case)
    if refused or not isinstance(case.body, dict):
        return
    entries = case.body.get("requests", [case.body])
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict):
            entry |= {name: value for name, value in CHEAP.items() if name in entry}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("service"), {"SANDBOX_DELAY": "0"}).start()
    yield service
    service.end()


@schema.exclude(tag=ALIASES).exclude(path=SAME_BODY).parametrize()
def test_every_response_is_documented(case: schemathesis.Case, service: Service) -> None:
    limit_cost(case)
    names = ["negative_data_rejection"] if is_lenient(case) else []
    if case.operation.path.endswith((*IMAGES_IN, *RELATED)):
        names.append("positive_data_acceptance")
    case.call_and_validate(base_url=service.url, excluded_checks=CHECKS.get_by_names(names))


def test_every_linked_response_is_documented(service: Service) -> None:
    """Walk that submits tasks, then reads, follows and cancels them in many orders."""
    machine = schema.as_state_machine()

    class Walk(machine):
        def before_call(self, case: schemathesis.Case) -> None:
            limit_cost(case)

        def get_call_kwargs(self, case: schemathesis.Case) -> dict[str, Any]:
            return {"base_url": service.url}

    Walk.run(
        settings=hypothesis.settings(
            max_examples=8, stateful_step_count=6, deadline=None, database=None, derandomize=True
        )
    )
