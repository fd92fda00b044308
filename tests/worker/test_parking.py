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
