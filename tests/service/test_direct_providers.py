"""Gemini, a chat with images and SiliconFlow through the running service: images, errors, retries and money."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.service.running import KEY, Service, calls_about

Start = Callable[..., Service]


@dataclass(frozen=True)
class Provider:
    """An emulated provider, and a service that uses it."""

    name: str
    upstream: EmulatorProcess
    service: Service

    def jobs(self, text: str) -> list[dict[str, Any]]:
        return [call["job"] for call in calls_about(self.upstream, text) if call["job"]]


def settings_of(name: str, url: str) -> dict[str, str]:
    match name:
        case "gemini":
            return {"PROVIDER": "gemini", "GEMINI_API_KEY": KEY, "GEMINI_API_URL": url}
        case "chat":
            address = f"{url}/v1/chat/completions"
            return {"PROVIDER": "gemini", "GEMINI_API_KEY": KEY, "GEMINI_API_URL": address}
    return {"PROVIDER": "siliconflow", "SILICONFLOW_API_KEY": KEY, "SILICONFLOW_API_URL": url}


@pytest.fixture(scope="module", params=["gemini", "chat", "siliconflow"])
def provider(
    request: pytest.FixtureRequest, start_for_module: Start, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Provider]:
    """Run each provider's service on a queue of its own: the services of a module end together."""
    name = {"chat": "gemini"}.get(request.param, request.param)
    with EmulatorProcess(name, "--job", "0.05", module="imagegen.emulator.job_command") as upstream:
        settings = settings_of(request.param, upstream.url)
        service = start_for_module(home=tmp_path_factory.mktemp(request.param), UPSTREAM_TIMEOUT="5", **settings)
        yield Provider(request.param, upstream, service)


def test_images_are_made_and_kept_here(provider: Provider) -> None:
    task = provider.service.made(prompt="two of them", n=2)
    assert len({image["sha256"] for image in task["data"]}) == 2
    for image in task["data"]:
        assert provider.service.get(image["url"]).body.startswith(b"\x89PNG")
    assert len(provider.jobs("two of them")) == (1 if provider.name == "siliconflow" else 2)
    assert task.get("possiblyBilledTwice") is None


@pytest.mark.parametrize(
    ("switch", "code", "calls"),
    [
        ("job end=moderated", "content_policy", 1),
        ("400", "upstream_invalid_request", 1),
        ("500", "upstream_error", 3),
    ],
)
def test_what_goes_wrong_has_its_code(provider: Provider, switch: str, code: str, calls: int) -> None:
    text = f"wrong by {switch}"
    task = provider.service.finished(provider.service.accepted(prompt=f"{text} {{{{fault:{switch}}}}}"))
    assert (task["status"], task["error"]["code"]) == ("failed", code)
    assert len(calls_about(provider.upstream, text)) == calls


def test_a_text_in_place_of_an_image_is_requested_again_and_charged(provider: Provider) -> None:
    if provider.name == "siliconflow":
        pytest.skip("it answers with images alone")
    task = provider.service.made(prompt='at first a text {{fault:job text="Which one?" times=1}}')
    assert len(provider.jobs("at first a text")) == 2
    spent = sum(job["cost_usd"] for job in provider.jobs("at first a text"))
    assert task["cost"]["charged"] == pytest.approx(spent, abs=3e-6)


def test_a_lost_answer_is_repeated_once_and_recorded(provider: Provider) -> None:
    task = provider.service.made(prompt="lost answer {{fault:job answer=lost times=1}}")
    assert (len(provider.jobs("lost answer")), task["possiblyBilledTwice"]) == (2, 1)


def test_a_rate_limit_is_waited_out_and_is_no_attempt(provider: Provider) -> None:
    switch = "429 retry_after=1 times=1" if provider.name != "gemini" else "429_short times=1"
    task = provider.service.made(prompt=f"limited {{{{fault:{switch}}}}}")
    assert (task["attempts"], len(provider.jobs("limited"))) == (1, 1)


def test_an_edit_sends_the_image(provider: Provider) -> None:
    source = provider.service.made(prompt="the source")["data"][0]
    image = provider.service.get(source["url"]).body
    upload = provider.service.request("POST", "/api/uploads", image, headers={"Content-Type": "image/png"})
    provider.service.made(prompt="the edit", imageUrl=upload.json["uploadId"])
    (call,) = calls_about(provider.upstream, "the edit")
    assert [file["sha256"] for file in call["inputs"]] == [source["sha256"]]


def test_the_ledger_of_the_provider_has_what_was_charged(provider: Provider) -> None:
    provider.upstream.clear()
    tasks = [provider.service.made(prompt=f"counted {number}") for number in range(3)]
    ledger = provider.upstream.ledger()
    assert (ledger["submitted"], ledger["charged"]) == (3, 3)
    if provider.name != "siliconflow":
        charged = sum(task["cost"]["charged"] for task in tasks)
        assert charged == pytest.approx(ledger["cost_usd"], abs=1e-5)
