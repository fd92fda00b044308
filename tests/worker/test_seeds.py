"""Tests of the seeds that an attempt sends and records."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from imagegen.errors import UpstreamError
from imagegen.queue.checkpoint import Checkpoint
from imagegen.tasks.image import StoredImage
from imagegen.tasks.retry import Failed, Succeeded
from imagegen.worker.attempt_limits import SeedSupport
from tests.worker.attempt_steps import no_parameter
from tests.worker.conftest import MakeHarness


async def test_a_variant_sends_a_seed_of_its_own_and_records_it(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False, per_call=1)
    outcomes = [await harness.run(await harness.claim(variant=number, n=2), Succeeded) for number in (0, 1, 2)]
    plain, first, second = ([image.seed for image in outcome.images] for outcome in outcomes)
    assert plain == [None, None]
    for seed, following in (first, second):
        assert seed is not None
        assert following == seed + 1
    assert set(first).isdisjoint(second)
    assert harness.provider.seeds == [None, None, *first, *second]


async def test_the_clients_seed_comes_before_that_of_a_variant(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False)
    outcome = await harness.run(await harness.claim(variant=3, seed=7), Succeeded)
    assert harness.provider.seeds == [image.seed for image in outcome.images] == [7]


async def test_a_refused_seed_of_a_variant_is_left_out_for_all_later_ones(make_harness: MakeHarness) -> None:
    harness = make_harness(no_parameter("seed"), pool=False)
    outcomes = [await harness.run(await harness.claim(variant=number), Succeeded) for number in (1, 2)]
    first, *later = harness.provider.seeds
    assert first is not None
    assert later == [None, None]
    assert [(image.seed, outcome.warnings) for outcome in outcomes for image in outcome.images] == [(None, ())] * 2
    await harness.attempts.run(await harness.claim(variant=1, model="other"))
    assert harness.provider.seeds[-1] is not None


async def test_a_seed_refused_with_other_fields_is_left_out_with_them(make_harness: MakeHarness) -> None:
    both = UpstreamError("upstream_invalid_request", "no", refused=("seed", "steps"), status=400)
    harness = make_harness(both, pool=False)
    outcome = await harness.run(await harness.claim(variant=1, steps=4), Succeeded)
    assert [(call.seed is None, call.without) for call in harness.provider.calls] == [
        (False, frozenset()),
        (True, frozenset({"steps"})),
    ]
    assert outcome.warnings == ("steps was left out: the model does not support it",)


async def test_a_seed_that_is_refused_though_none_was_sent_fails_the_task(make_harness: MakeHarness) -> None:
    harness = make_harness(default=no_parameter("seed"), pool=False)
    for fields in ({"variant": 0}, {"variant": 1}):
        assert isinstance(await harness.attempts.run(await harness.claim(**fields)), Failed)
    assert len(harness.provider.calls) == 3


async def test_a_refused_seed_of_the_client_is_not_recorded_as_sent(make_harness: MakeHarness) -> None:
    harness = make_harness(no_parameter("seed"), pool=False)
    outcome = await harness.run(await harness.claim(seed=7), Succeeded)
    assert [image.seed for image in outcome.images] == [None]
    assert outcome.warnings == ("seed was left out: the model does not support it",)


@pytest.mark.parametrize(
    ("carried", "published", "of_client", "of_variant"),
    [(True, None, 7, True), (True, True, 7, True), (True, False, 7, False), (False, None, None, False)],
)
async def test_seeds_are_sent_where_provider_and_model_take_them(
    make_harness: MakeHarness, carried: bool, published: bool | None, of_client: int | None, of_variant: bool
) -> None:
    harness = make_harness(pool=False)
    support = SeedSupport(lambda _model: carried, lambda _model: published)
    object.__setattr__(harness.attempts, "seeds", support)
    given = await harness.run(await harness.claim(seed=7), Succeeded)
    variant = await harness.run(await harness.claim(variant=1), Succeeded)
    assert [image.seed for image in given.images] == [of_client]
    assert [image.seed is not None for image in variant.images] == [of_variant]


async def test_images_that_are_made_afresh_have_a_number_of_their_own(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False)
    claim = await harness.claim()
    await harness.attempts.run(claim)
    claim.task = replace(claim.task, stale_images=True, images=(StoredImage(0, sha256="a" * 64),))
    claim.checkpoint = Checkpoint(claim.checkpoint.owner)
    await harness.attempts.run(claim)
    assert [call.repeat for call in harness.provider.calls] == [0, claim.task.epoch]
