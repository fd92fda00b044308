"""Tests of request families: their ids, and which images of one request fit another."""

from __future__ import annotations

from msgspec.structs import replace

from imagegen.queue.families import family_key
from imagegen.tasks.call_plan import variant_seed
from imagegen.tasks.family import RequestFamily, reusable_images
from imagegen.tasks.image import StoredImage
from imagegen.tasks.request import MAX_IMAGES, MAX_SEED, GenerationRequest, fingerprint
from imagegen.tasks.task import State, Task
from tests.support import over_rows

PLAIN = GenerationRequest(prompt="a cat", model="m", width=512, height=512, n=2)
ODD = replace(
    PLAIN,
    prompt='"n":4,\\"n":5 n',
    seed=7,
    guidance_scale=3.0,
    negative_prompt=',"n":3',
    extra={"nested": {"n": 9}, "m": 1, "o": 2},
)


@over_rows("request_", [PLAIN, ODD])
@over_rows("scope", [None, "a key"])
@over_rows("secret", [None, "a secret"])
def test_siblings_are_the_same_request_with_every_other_n(
    request_: GenerationRequest, scope: str | None, secret: str | None
) -> None:
    expected = [
        fingerprint(replace(request_, n=n).canonical("together", scope), secret)
        for n in range(1, MAX_IMAGES + 1)
        if n != request_.n
    ]
    assert list(RequestFamily(request_, "together", scope, secret).sibling_ids()) == expected


@over_rows("request_", [PLAIN, ODD])
def test_the_key_of_a_family_depends_on_all_but_n(request_: GenerationRequest) -> None:
    keys = {family_key(replace(request_, n=n).to_json()) for n in (1, 4, MAX_IMAGES)}
    assert len(keys) == 1
    others = [replace(request_, steps=3), replace(request_, prompt="another"), replace(request_, seed=None, width=256)]
    assert keys.isdisjoint(family_key(other.to_json()) for other in others)
    assert keys.isdisjoint(family_key(request_.to_json(), scope) for scope in ("a", "b"))


def completed(*seeds: int | None, indexes: tuple[int, ...] = ()) -> Task:
    """Return a completed task with an image for each seed, at the indexes or in order."""
    places = indexes or tuple(range(len(seeds)))
    images = tuple(StoredImage(index, seed=seed) for index, seed in zip(places, seeds, strict=True))
    return Task("id", 1, 1, "d", "m", b"", 0.0, State.COMPLETED, images=images)


def family(request_: GenerationRequest) -> RequestFamily:
    return RequestFamily(request_, "together", None, None)


def places(request_: GenerationRequest, finished: Task) -> list[int | None]:
    return [place for place, _ in reusable_images(family(request_), finished)]


def test_without_a_seed_every_image_fits() -> None:
    finished = completed(None, 5, None, None, indexes=(1, 2, 3, 4))
    assert reusable_images(family(replace(PLAIN, n=3)), finished) == list(
        zip((1, 2, None, None), finished.images, strict=True)
    )


@over_rows(
    ("seeds", "n", "fitting"),
    [
        ((7, 8, 9, 10), 2, [0, 1]),
        ((7, 7, 7, 7), 2, [0, 1]),
        ((7, 7, 9, 9), 3, [0, 1, 2]),
        ((7, 7), 4, [0, 1]),
        ((7, 11, 9, 10), 4, [0, 2, 3]),
        ((7, 7, 11, 11), 4, [0, 1]),
        ((8, 9), 4, []),
        ((None, None), 4, []),
    ],
)
def test_with_a_seed_an_image_fits_where_the_same_seed_would_be_sent(
    seeds: tuple[int | None, ...], n: int, fitting: list[int]
) -> None:
    assert places(replace(PLAIN, seed=7, n=n), completed(*seeds)) == fitting


def test_seeds_that_wrap_around_fit() -> None:
    assert places(replace(PLAIN, seed=MAX_SEED, n=4), completed(MAX_SEED, 0)) == [0, 1]


def test_the_place_of_an_image_counts_where_others_are_missing() -> None:
    assert places(replace(PLAIN, seed=7, n=4), completed(7, 9, indexes=(0, 2))) == [0, 2]


def test_a_variant_without_a_seed_has_the_places_of_the_seeds_that_were_sent() -> None:
    variant = replace(PLAIN, variant=1, n=4)
    first = variant_seed(variant, "together")
    assert places(variant, completed(first, first + 2)) == [0]
    assert places(variant, completed(first, first)) == [0, 1]
    assert places(variant, completed(first + 1, first + 2, indexes=(1, 2))) == [1, 2]
    assert places(variant, completed(first + 3, first + 1)) == [1]
    assert places(variant, completed(None, None)) == [0, 1]
