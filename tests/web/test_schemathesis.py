"""Schemathesis tests of a live service, generated from the OpenAPI document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from schemathesis.checks import CHECKS
from schemathesis.config import (
    ChecksConfig,
    CoveragePhaseConfig,
    GenerationConfig,
    HealthCheck,
    PhasesConfig,
    PositiveDataAcceptanceConfig,
    ProjectConfig,
    ProjectsConfig,
    SchemathesisConfig,
    SimpleCheckConfig,
)
from schemathesis.core.parameters import ParameterLocation
from schemathesis.generation.feedback import FeedbackSources
from schemathesis.generation.modes import GenerationMode
from schemathesis.pytest._test_builder import build_operation_test
from schemathesis.schemas import BaseSchema

from imagegen.tasks.field_faults import VISIBLE_TEXT
from imagegen.web.openai.operations import ALIASES
from imagegen.web.routes import build_document
from tests.service.running import Service
from tests.support import ADMIN_TOKEN, AS_ADMIN, examples

ACCEPTED = ["2xx", "3xx", "404", "409", "410", "412", "416"]
"""Statuses that schema-valid data may cause: 410 for another `v`, 412 for any `If-Match`."""

LENIENT = ("/api/images/batch", "images/generations", "images/generations/async", "images/edits", "images/edits/async")
"""Paths with bodies rejected entry by entry, or parsed as leniently as OpenAI's and Together's clients need."""

RELATED = ("/api/usage", "/api/admin/keys", "/rotate", "/mcp")
"""Paths with parameters that must fit each other, or with durations, which no schema says."""

FUZZED_ALONE = ("/api/images/batch", "/v1/images/generations/async", "/v1/images/edits")
"""Paths with bodies of other paths, whose boundary values are tested there: they get random bodies only."""

SAME_BODY = "/v1/images/edits/async"
"""Takes the body of the synchronous route, and generating such bodies takes long."""

IMAGES_IN = ("/api/uploads", "images/edits", "images/edits/async", "images/variations")
"""No schema says what an image is, and variations are never accepted."""

CHEAP: dict[str, Any] = {
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

pytestmark = pytest.mark.timeout(300)  # hundreds of requests, on a busy machine


SETTINGS = {
    "SANDBOX_DELAY": "0",
    "ADMIN_TOKEN": ADMIN_TOKEN,
    "API_KEYS": "client:a-key-that-no-request-has",
}
"""With a key, so that each route refuses a request without one, as the document says."""


def drop_keys(case: schemathesis.Case[Any], sent: set[str]) -> None:
    """Remove the generated API key: the requests have the admin token, and two different secrets are refused.

    Remove an idempotency key that an earlier request had: with another body it is refused before a task is submitted.
    """
    case.headers.pop("X-API-Key", None)
    key = case.headers.get("Idempotency-Key")
    if key in sent:
        del case.headers["Idempotency-Key"]
    elif key:
        sent.add(key)


GROUPED = f"^({VISIBLE_TEXT.removeprefix('^').removesuffix('$')})$"
"""The pattern of a visible text in a group, which changes nothing for a validator.

Schemathesis writes the maximum length of a text into other patterns. One with 32,000 repetitions takes a second to
compile, in each operation.
"""


@cache
def described(*, has_boundaries: bool = True) -> BaseSchema:
    """Return the schema of the OpenAPI document. has_boundaries: whether the boundary values of each field are sent."""
    document = json.dumps(build_document()).replace(json.dumps(VISIBLE_TEXT), json.dumps(GROUPED))
    return schemathesis.openapi.from_dict(
        json.loads(document),
        config=SchemathesisConfig(
            suppress_health_check=[HealthCheck.too_slow],
            projects=ProjectsConfig(
                default=ProjectConfig(
                    checks=ChecksConfig(
                        positive_data_acceptance=PositiveDataAcceptanceConfig(expected_statuses=ACCEPTED),
                        ignored_auth=SimpleCheckConfig(enabled=False),  # of each route, in test_guard.py
                    ),
                    generation=GenerationConfig(
                        modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE],
                        max_examples=examples(4),
                        deterministic=True,
                        database="none",
                    ),
                    phases=PhasesConfig(coverage=CoveragePhaseConfig(enabled=has_boundaries)),
                    request_timeout=60,
                )
            ),
        ),
    )


OPERATIONS = [
    (path, method)
    for path, methods in build_document()["paths"].items()
    for method, operation in methods.items()
    if path != SAME_BODY and ALIASES not in operation["tags"]
]


def is_lenient(case: schemathesis.Case[Any]) -> bool:
    return str(case.operation.path).endswith(LENIENT)


def is_valid_here(case: schemathesis.Case[Any]) -> bool:
    """Return whether what is invalid in a request may be accepted.

    The admin token of each request replaces an invalid header, and null and an empty text in a body count as absent.
    """
    if case.meta is None:
        return False
    headers = case.meta.components.get(ParameterLocation.HEADER)
    ignored = isinstance(case.body, dict) and any(value in (None, "") for value in case.body.values())
    return ignored or (headers is not None and headers.mode.is_negative)


def has_long_number(value: object) -> bool:
    """Return whether an integer of more than 64 bits is in it, which a field that the schema does not have may be."""
    if isinstance(value, dict | list):
        return any(map(has_long_number, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and not -(2**63) <= value < 2**64


def limit_cost(case: schemathesis.Case[Any]) -> None:
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
    service = Service(tmp_path_factory.mktemp("service"), SETTINGS).start()
    yield service
    service.end()


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    """Open a session whose connections all requests share. It reads no settings of a proxy for each request."""
    with requests.Session() as session:
        session.trust_env = False
        yield session


@pytest.fixture(scope="module")
def sent_keys() -> set[str]:
    """Return the set of the idempotency keys that requests have had."""
    return set()


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_response_is_documented(
    path: str, method: str, service: Service, session: requests.Session, sent_keys: set[str]
) -> None:
    """The requests are generated here, since `schema.parametrize` does so in each process that collects the tests."""

    def check(case: schemathesis.Case[Any]) -> None:
        names = ["negative_data_rejection"] if is_lenient(case) or is_valid_here(case) else []
        limit_cost(case)
        drop_keys(case, sent_keys)
        if path.endswith((*IMAGES_IN, *RELATED)) or has_long_number(case.body):
            names.append("positive_data_acceptance")
        excluded: Any = CHECKS.get_by_names(names)
        case.call_and_validate(base_url=service.url, session=session, headers=AS_ADMIN, excluded_checks=excluded)

    schema = described(has_boundaries=path not in FUZZED_ALONE)
    build_operation_test(
        config=schema.config,
        operation=schema[path][method],
        test_func=check,
        given_kwargs={},
        feedback=FeedbackSources(),
    )()


def test_every_linked_response_is_documented(service: Service, session: requests.Session, sent_keys: set[str]) -> None:
    """Walks that submit tasks, then read, follow and cancel them in many orders.

    Hypothesis refuses a walk that begins as a former one and then draws from other responses (a task may have ended
    meanwhile), so each walk is a run of its own, decided by its seed. Hypothesis puts the simplest walk before it.
    """
    machine = described().as_state_machine()

    class Walk(machine):  # type: ignore[misc, valid-type]  # of this document
        def before_call(self, case: schemathesis.Case[Any]) -> None:
            limit_cost(case)
            drop_keys(case, sent_keys)

        def get_call_kwargs(self, case: schemathesis.Case[Any]) -> dict[str, Any]:
            return {"base_url": service.url, "session": session, "headers": AS_ADMIN}

    for seed in range(examples(6)):
        hypothesis.seed(seed)(Walk).run(
            settings=hypothesis.settings(
                max_examples=1,
                stateful_step_count=6,
                deadline=None,
                database=None,
                suppress_health_check=[hypothesis.HealthCheck.too_slow],
            )
        )
