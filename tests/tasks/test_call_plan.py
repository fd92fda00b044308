from __future__ import annotations

from imagegen.tasks.call_plan import MAX_VARIANT_SEED, PlannedCall, plan_calls, plan_missing_calls, variant_seed
from imagegen.tasks.request import MAX_IMAGES, MAX_SEED, GenerationRequest
from imagegen.tasks.validation import parse


def test_each_call_sends_the_seed_plus_the_images_before_it() -> None:
    assert list(plan_calls(6, (), 4, 10)) == [PlannedCall((0, 1, 2, 3), 10), PlannedCall((4, 5), 14)]
    assert list(plan_calls(3, (), 1, 10)) == [PlannedCall((0,), 10), PlannedCall((1,), 11), PlannedCall((2,), 12)]


def test_no_seed_is_sent_without_one() -> None:
    assert list(plan_calls(2, (), 1, None)) == [PlannedCall((0,), None), PlannedCall((1,), None)]
    assert list(plan_missing_calls(2, (0,), 4, None)) == [PlannedCall((1,), None)]


def test_existing_images_are_not_requested_again() -> None:
    assert list(plan_calls(6, (0, 1, 2, 3), 4, 10)) == [PlannedCall((4, 5), 14)]
    assert list(plan_calls(2, (0, 1), 4, 10)) == []


def test_the_rest_of_a_call_gets_the_seed_of_its_first_image() -> None:
    assert list(plan_calls(4, (0,), 4, 10)) == [PlannedCall((1, 2, 3), 11)]


def test_missing_images_are_requested_with_unused_seeds() -> None:
    assert list(plan_missing_calls(4, (0, 2), 4, 10)) == [PlannedCall((1, 3), 14)]
    assert list(plan_missing_calls(4, (0, 2), 1, 10)) == [PlannedCall((1,), 14), PlannedCall((3,), 15)]


def test_an_interrupted_second_round_continues_above_its_seeds() -> None:
    assert list(plan_missing_calls(4, (0, 1, 2), 1, 10, {10, 12, 14})) == [PlannedCall((3,), 15)]
    assert list(plan_missing_calls(6, (0, 1, 2, 4), 4, 10, {10, 14})) == [PlannedCall((3, 5), 16)]


def test_seeds_wrap_around_at_their_end() -> None:
    assert [share.seed for share in plan_calls(2, (), 1, MAX_SEED)] == [MAX_SEED, 0]
    assert [share.seed for share in plan_missing_calls(2, (1,), 1, MAX_SEED, {0})] == [1]


def request(**fields: object) -> GenerationRequest:
    return parse({"prompt": "a fox"} | fields, default_model="m", aliases={})


def test_the_seed_of_a_variant_is_the_same_for_every_number_of_images() -> None:
    assert {variant_seed(request(variant=1, n=n), "p") for n in range(1, MAX_IMAGES + 1)} == {2_145_986_953}
    assert variant_seed(request(variant=1, steps=None), "p") == variant_seed(request(variant="1"), "p")


def test_each_variant_request_and_provider_has_another_seed() -> None:
    requests = [request(variant=number) for number in range(1, 200)]
    requests += [request(variant=1, prompt="a hare"), request(variant=1, width=640), request(variant=1, steps=4)]
    assert len({variant_seed(each, "p") for each in requests} | {variant_seed(requests[0], "q")}) == 203


def test_the_seeds_of_a_variant_fit_into_a_positive_integer_of_32_bits() -> None:
    seeds = [variant_seed(request(variant=number), "p") for number in range(1, 2_000)]
    assert min(seeds) >= 1
    assert max(seeds) <= MAX_VARIANT_SEED
    assert max(seeds) > MAX_VARIANT_SEED * 0.99
    (last,) = plan_missing_calls(
        MAX_IMAGES, range(MAX_IMAGES - 1), 1, MAX_VARIANT_SEED, [MAX_VARIANT_SEED + MAX_IMAGES]
    )
    assert last.seed is not None
    assert last.seed < 2**31
