from __future__ import annotations

from imagegen.queue.checkpoint import Checkpoint
from imagegen.queue.claim import Claim
from imagegen.tasks.task import Task
from imagegen.worker.parking import ParkedClaims


def claim(name: str) -> Claim:
    return Claim(f"{name}-0", Task(name, 1, 1, "", "m", b"", 0.0), Checkpoint("here"))


def line(*claims: Claim, failed: tuple[Claim, ...] = (), suspect: tuple[Claim, ...] = ()) -> ParkedClaims:
    made = ParkedClaims(0.0)
    for each in (*suspect, *failed, *claims):
        made.add(each, has_failed=each in failed or each in suspect, is_suspect=each in suspect)
    return made


def test_claims_that_never_failed_probe_before_suspects() -> None:
    a, b, c, d, failed, suspect = map(claim, ("a", "b", "c", "d", "failed", "suspect"))
    waiting, parked = line(a, b, c, d, failed=(failed,), suspect=(suspect,)), {a, b, c, d, failed, suspect}
    assert [waiting.pop(parked) for _ in range(7)] == [a, d, b, c, failed, suspect, None]


def test_claims_of_a_limited_model_are_taken_in_the_order_of_their_entries() -> None:
    claims = [claim(str(number)) for number in range(8)]
    oldest, *others = claims
    waiting, parked = line(*others, failed=(oldest,)), set(claims)
    taken = [waiting.pop_oldest(parked) for _ in range(9)]
    assert taken == [*others[:3], oldest, *others[3:], None]


def test_the_newest_claims_are_taken_for_other_instances_but_for_lost_ones_and_those_that_failed() -> None:
    claims = [claim(str(number)) for number in range(6)]
    waiting = line(*claims[1:], failed=(claims[0],))
    claims[1].mark_lost()
    assert waiting.take_newest(set(claims), 2) == claims[4:]
    assert waiting.take_newest(set(claims), 2) == []
    assert waiting.all(set(claims)) == [claims[2], claims[3], claims[0]]


def test_lost_or_unparked_claims_are_skipped() -> None:
    a, b, c = map(claim, ("a", "b", "c"))
    waiting = line(a, b, c)
    b.mark_lost()
    assert waiting.all({b, c}) == [c]
    assert waiting.pop({b, c}) is c
    assert waiting.is_empty({b, c})


def test_each_parked_claim_is_taken_once() -> None:
    a, b, c = map(claim, ("a", "b", "c"))
    waiting = line(a, c, failed=(b,))
    waiting.add(a, has_failed=True, is_suspect=False)
    assert waiting.take_all({a, b, c}) == [a, c, b]
    assert waiting.is_empty({a, b, c})
