"""Money of an attempt's calls: what each may cost is in the checkpoint before it is made, and what it cost after it."""

from __future__ import annotations

from collections.abc import Callable, Collection

from msgspec import Struct, field
from msgspec.structs import replace

from imagegen.errors import UpstreamError
from imagegen.providers.protocol import Reply
from imagegen.queue.claim import Claim
from imagegen.queue.verbs.budget_counters import Limits
from imagegen.queue.worker_queue import WorkerQueue
from imagegen.tasks.cost import UNKNOWN, Cost
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.retry import ClaimLost, Failed, is_useless_response
from imagegen.tasks.task import TaskError
from imagegen.worker.call_routes import Route, Routes
from imagegen.worker.permits import Choice
from imagegen.worker.saving import AttemptEnded

NO_BUDGET = "the budget of the day is used up, so no further call was made"
OVER_MOST = "a further call would cost more than maxCostUsd, so it was not made"

_BAD_RESPONSE = "upstream_bad_response"


class PaymentRules(Struct, frozen=True):
    """Rules of payments that all claims share.

    limits_of_slots: returns the present limits of the budgets of a task.
    """

    limits_of_slots: Callable[[Collection[int]], Limits]


class Payments(Struct, frozen=True):
    """Payments of one claim. over_budget: channels with a price beyond the budget."""

    rules: PaymentRules
    claims: WorkerQueue
    routes: Routes
    claim: Claim
    request: GenerationRequest
    over_budget: set[str] = field(default_factory=set)

    def affordable(self, model: str, choice: Choice) -> Choice:
        """Return the choice without channels that a limit of the task's cost rules out, unless that leaves none.

        After a lost response the channel is decided already.
        """
        cost, n = self.claim.cost, self.request.n
        if self.routes.only or choice.only or not (cost.slots or cost.most is not None):
            return choice
        missing = max(n - len(self.claim.checkpoint.images), 1)
        most_left = None if cost.most is None else cost.most + n - cost.charged
        too_dear = self.routes.too_dear(self.request, model, missing, most_left)
        left_out = too_dear | self.over_budget
        if left_out.issuperset(channel.name for channel in self.routes.channels.serving(model)):
            left_out = too_dear
        return replace(choice, channels=choice.channels | left_out) if left_out else choice

    async def reserve(self, route: Route, model: str, count: int, refusal: UpstreamError | None) -> bool:
        """Note the price of the next call in the checkpoint. The part that is not reserved yet is reserved first.

        Return False if this channel is beyond the budget, and a cheaper one serves the model: `affordable` leaves it
        out then.

        refusal: why another model than the requested one is called. Raises AttemptEnded if a budget is used up, the
        call would cost more than the submit allows, or the claim is lost.
        """
        price, cost = self._call_price(route, model, count), self.claim.cost
        if cost.exceeds_most(price, self.request.n):
            raise self._unaffordable(refusal, OVER_MOST)
        if cost.slots and price is None:
            raise self._unaffordable(refusal, NO_BUDGET)
        if missing := cost.rest_for(price or 0):
            reserved = await self.claims.reserve_more(self.claim, missing, self.rules.limits_of_slots(cost.slots))
            if reserved is None:
                raise AttemptEnded(ClaimLost())
            if not reserved and self._has_cheaper(model, count, price):
                return False
            if not reserved:
                raise self._unaffordable(refusal, NO_BUDGET)
            cost = self.claim.cost
        self._record(cost.before_call(price))
        return True

    def _has_cheaper(self, model: str, count: int, price: int | None) -> bool:
        """Leave out channels that are as dear as a refused call; return whether a cheaper one serves the model."""
        if self.routes.only or price is None or self.claim.checkpoint.ambiguous_calls:
            return False
        prices = self.routes.prices(self.request, model, count).items()
        cheaper = {name for name, each in prices if each is not None and each < price and name not in self.over_budget}
        if cheaper:
            self.over_budget.update(name for name, _ in prices if name not in cheaper)
        return bool(cheaper)

    def answered(self, route: Route, model: str, count: int, reply: Reply) -> None:
        """Note the price of a call that was answered. With fewer images than requested it is charged all the same.

        What the call was noted with counts: since a job began, another instance may have come with other prices.
        """
        price, cost = route.pricing.reported_price(route.sent_name(model), reply.details), self.claim.cost
        if price is None:
            price = self._call_price(route, model, count) if cost.calling == UNKNOWN else cost.calling
        self._count(route, price or 0)
        self._record(cost.paid(price, _BAD_RESPONSE if len(reply.images) < count else ""))

    def rejected(self) -> None:
        """Note that an image of a paid call can't be used, so that its place needs another call."""
        cost = replace(self.claim.cost, fault=self.claim.cost.fault or _BAD_RESPONSE)
        self.claim.checkpoint = replace(self.claim.checkpoint, cost=cost)

    def failed(self, route: Route | None, model: str, error: UpstreamError) -> None:
        """Note whether a call without images may have been paid. route: None if its key is not here any more."""
        cost = self.claim.cost
        price = None if cost.calling == UNKNOWN else cost.calling
        if error.ambiguous:  # the next attempt searches for its job
            if route:
                self._count(route, price or 0)
                self.claim.spent_on_lost = (price or 0) if self.claim.checkpoint.sent else 0
            self.claim.checkpoint = replace(self.claim.checkpoint, cost=cost.lost(error.code))
            return
        if route and error.usage is not None:
            used = route.pricing.usage_price(route.sent_name(model), error.usage)
            price = price if used is None else used
        if is_useless_response(error):
            cost = cost.paid(price, error.code)
        elif error.charged or (error.code == "content_policy" and route and route.charges_refusal(model)):
            cost = cost.paid(price)
        else:
            cost = cost.unpaid()
        if route:
            self._count(route, cost.charged - self.claim.cost.charged)
        self._record(cost)

    def _count(self, route: Route, amount: int) -> None:
        """Add micro-dollars to the counts of a key, which never fall: they are a counter of the metrics.

        The price of a lost call is in them already when its job is found.
        """
        counted, self.claim.spent_on_lost = self.claim.spent_on_lost, 0
        route.counts.spent += max(amount - counted, 0)

    def _call_price(self, route: Route, model: str, count: int) -> int | None:
        """Return the price of a call; where this instance has none for the requested model, as it was submitted."""
        price = route.call_price(self.request, model, count)
        if price is None and model == self.request.model and (total := self.claim.cost.total) is not None:
            return total * count // self.request.n
        return price

    def _unaffordable(self, refusal: UpstreamError | None, detail: str) -> AttemptEnded:
        """Return the end of a task that may not cost more, with the code of why it needs another call."""
        code = refusal.code if refusal else self.claim.cost.fault or "internal_error"
        return AttemptEnded(Failed(TaskError(code, detail, retryable=True), keeps_images=True))

    def _record(self, cost: Cost) -> None:
        self.claim.checkpoint = replace(self.claim.checkpoint, cost=cost, sent=None)
