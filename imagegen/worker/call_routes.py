"""Routes of paid calls: each key of each channel, and which of them serve a task."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

from loguru import logger
from msgspec import Struct, field
from msgspec.structs import replace
from yarl import URL

from imagegen.channels_file import KINDS, Channel, ChannelKey, Channels
from imagegen.errors import UpstreamError
from imagegen.providers.channel_counts import CallCounts
from imagegen.providers.metered import MeteredProvider
from imagegen.providers.model_rules import Pricing
from imagegen.providers.protocol import Call, CallObserver, Edits, ForwardingObserver, Reply, forgotten_job
from imagegen.tasks.call_plan import most_inline
from imagegen.tasks.cost import Cost
from imagegen.tasks.image import GivenImage, ImageLink
from imagegen.tasks.provider_job import FailedPolls, JobHandle
from imagegen.tasks.request import GenerationRequest

PAID_IDENTITY = "together"
"""Name in the fingerprint of all paid channels of a file: that of the first provider, so that ids of tasks stay when
its settings move into the file."""

MAX_SUBSTITUTES = 10
"""Keys that are tried for a job or a call of a key that is not here any more, or is refused."""

REFUSED_POLLS = 3
"""Useless polls in sequence after which a job is polled with the other keys of its channel too. That costs nothing: a
key of another account does not find it."""

_COLLECTED_BY_OTHERS = (
    "; the other keys of the channel collect it if they belong to the same account, else its images are lost"
)
_IMAGES_LOST = ", so its images can't be fetched; keep a key in the file until its jobs have ended"


class Route(Struct, frozen=True, eq=False):
    """One key of a channel, as attempts call it.

    account: fingerprint of the key, as in the handles of its jobs. pricing: of the channel. counts: of its calls.
    title: the key in words for the operator, empty with the simple settings.
    base: against which relative image links are resolved here; None if that is left to who fetches them.
    others: of keys that may belong to the same account, for a job of a key that is not here any more, or is refused.
    """

    channel: Channel
    account: str
    provider: MeteredProvider
    pricing: Pricing
    key: ChannelKey = ChannelKey()
    title: str = ""
    base: URL | None = None
    counts: CallCounts = field(default_factory=CallCounts)
    others: tuple[Route, ...] = ()

    @property
    def place(self) -> str:
        """Return the name of this key in this channel; another channel may have it too, with other names of models."""
        return f"{self.channel.name}/{self.account}"

    def sent_name(self, model: str) -> str:
        """Return the provider's name of a model."""
        return self.channel.sent_name(model) or model

    def image_price(self, request: GenerationRequest) -> int | None:
        """Return the price of one image of a request, in micro-dollars; None if it is unknown."""
        return self.pricing.image_price(request, self.sent_name(request.model))

    def call_price(self, request: GenerationRequest, model: str, count: int) -> int | None:
        """Return the price of a call for some images of a request, in micro-dollars; None if it is unknown."""
        return self.pricing.call_price(request, self.sent_name(model), count)

    def charges_refusal(self, model: str) -> bool:
        """Return whether the provider charges a call that its content policy refuses."""
        return self.pricing.charges_refusal(self.sent_name(model))

    async def generate(self, call: Call, observer: CallObserver) -> Reply:
        """Make a call with the channel's name of its model. Raises UpstreamError."""
        self.counts.in_flight += 1
        try:
            reply = await self.provider.generate(
                self._as_sent(call), _NamingObserver(observer, self.channel.name, self.account)
            )
        except UpstreamError as error:
            self.counts.errors[error.code] += 1
            raise
        finally:
            self.counts.calls += 1
            self.counts.in_flight -= 1
        return reply if self.base is None else with_absolute_links(reply, self.base)

    async def find(self, call: Call, sent_at: float) -> JobHandle | None:
        """Return the job of a call with a lost response, None if there is none. Raises UpstreamError.

        Keys of one account list the same job, which counts once. A key that is refused hides no job that another lists.
        """
        sent, handles = self._as_sent(call), dict[str, JobHandle]()
        fault: UpstreamError | None = None
        for route in (self, *self.others):
            try:
                handle = await route.provider.find(sent, sent_at)
            except UpstreamError as error:
                if error.retryable:
                    raise
                fault = error
                continue
            if handle is not None:
                handles.setdefault(handle.id, handle)
        if fault is not None and not handles:
            raise fault
        return next(iter(handles.values())) if len(handles) == 1 else None

    def _as_sent(self, call: Call) -> Call:
        sent = self.sent_name(call.request.model)
        return call if sent == call.request.model else replace(call, request=replace(call.request, model=sent))

    async def resume(self, handle: JobHandle, observer: CallObserver) -> Reply:
        """Poll a job that this route, or another key of its account, has begun. Raises UpstreamError."""
        reply = await self._result(handle, observer)
        return reply if self.base is None else with_absolute_links(reply, self.base)

    async def _result(self, handle: JobHandle, observer: CallObserver) -> Reply:
        for route in self.others:
            try:
                return await route.provider.resume(handle, _KeyTrial(observer))
            except _PollsFail:
                continue
            except UpstreamError as error:
                if not error.ambiguous:
                    raise
        return await self.provider.resume(handle, observer)


class _NamingObserver(ForwardingObserver, frozen=True):
    """Observer of a call that adds its channel and its key to the handle of its job, if that has none from a relay."""

    channel: str
    account: str

    async def accepted(self, handle: JobHandle) -> None:
        if not handle.channel:
            handle = replace(handle, channel=self.channel, account=self.account)
        await self.observer.accepted(handle)


class _PollsFail(Exception):
    """Polls with one of several keys fail: the next key is tried at once."""


class _KeyTrial(ForwardingObserver, frozen=True):
    """Observer of the polls with one of several keys; it ends them when a poll fails."""

    def polls_failed(self, polls: FailedPolls) -> None:
        if polls.count:
            raise _PollsFail
        self.observer.polls_failed(polls)


class Routes:
    """Routes of this instance; with the simple settings there is one.

    only: the route if there is one alone. own_hosts: of image links that may be fetched from addresses that are not
    public.
    """

    def __init__(self, channels: Channels, routes: Sequence[Route], *, from_file: bool = False) -> None:
        self.channels = channels
        self.all = tuple(routes)
        self._from_file = from_file
        self.only = self.all[0] if len(self.all) == 1 else None
        self._by_channel = {
            channel.name: tuple(route for route in self.all if route.channel is channel) for channel in channels.all
        }
        self.own_hosts = frozenset[str]().union(*(route.provider.own_hosts for route in self.all))
        self.base_url: URL | None = self.only.provider.base_url if self.only else None
        self._reported: set[str] = set()

    def of_channel(self, channel: Channel) -> tuple[Route, ...]:
        """Return the routes of a channel, one for each of its keys."""
        return self._by_channel[channel.name]

    def identity(self, model: str) -> str:
        """Return the name of the provider in the fingerprint of a model's tasks."""
        if not self._from_file:
            return self.all[0].provider.name
        return "sandbox" if self.channels.is_sandbox(model) else PAID_IDENTITY

    def serves(self, model: str, *, sandbox: bool | None) -> bool:
        """Return whether a task may run here. sandbox: whether the sandbox is to draw it, None if that is unknown."""
        serving = self.channels.serving(model)
        return bool(serving) and (sandbox is None or sandbox == self.channels.is_sandbox(model))

    def find(self, channel: str, account: str) -> Route | None:
        """Return the route of a channel and a key, None if there is none any more."""
        if self.only:
            return self.only
        matching = (route for route in self.all if (route.channel.name, route.account) == (channel, account))
        route = next(matching, None) or (self._substitute(channel) if self._shares_jobs(channel) else None)
        if route is None:
            self._report(channel, account, _IMAGES_LOST)
        return route

    def lists_jobs(self, channel: str) -> bool:
        """Return whether the job of a call of a channel with a lost response can be found."""
        routes = self.all if self.only else self._by_channel.get(channel, ())
        return any(KINDS[route.channel.provider].lists_jobs for route in routes if route.channel.provider in KINDS)

    def has_key_of(self, handle: JobHandle) -> bool:
        """Return whether the key that made a job is here, or another one of its account."""
        return any(route.account == handle.account for route in self.all) or self._shares_jobs(handle.channel)

    def of_job(self, handle: JobHandle) -> Route:
        """Return the route with the key that made a job, else with the keys that its channel has now: a new key of the
        same account finds the job, and the polls of another one cost nothing.

        Raises UpstreamError, as for a job that is forgotten.
        """
        if self.only:
            return self.only
        matching = [route for route in self.all if route.account == handle.account]
        for route in sorted(matching, key=lambda route: route.channel.name != handle.channel):
            return self._with_others(route) if handle.failed_polls.useless >= REFUSED_POLLS else route
        if substitute := self._substitute(handle.channel):
            if not self._shares_jobs(handle.channel):
                self._report(handle.channel, handle.account, _COLLECTED_BY_OTHERS)
            return substitute
        self._report(handle.channel or handle.provider, handle.account, _IMAGES_LOST)
        raise forgotten_job()

    def _with_others(self, route: Route) -> Route:
        """Return a route that polls with the other keys of its channel first: its own may have been revoked."""
        others = [other for other in self.of_channel(route.channel) if other is not route]
        return replace(route, others=tuple(others[:MAX_SUBSTITUTES]))

    def _substitute(self, channel: str) -> Route | None:
        """Return the keys of a channel in place of a key that left it, None without a channel of the name."""
        routes = self._by_channel.get(channel, ())[:MAX_SUBSTITUTES]
        return replace(routes[0], others=routes[1:]) if routes else None

    def _shares_jobs(self, channel: str) -> bool:
        """Return whether each key of an account of a channel reads all its jobs."""
        routes = self._by_channel.get(channel, ())
        return bool(routes) and KINDS[routes[0].channel.provider].shares_jobs

    def _report(self, channel: str, account: str, consequence: str) -> None:
        """Warn once of a key that left the file while it had calls or jobs."""
        if account not in self._reported:
            self._reported.add(account)
            logger.warning(
                "A paid job of channel {} belongs to a key that is not in CHANNELS_FILE any more (fingerprint {}){}",
                channel,
                account[:8],
                consequence,
            )

    @property
    def key_accepted(self) -> bool:
        """Whether some key was not refused since a call with it was accepted."""
        return any(route.provider.key_accepted for route in self.all)

    def serving(self, model: str) -> Iterable[Route]:
        """Yield the routes that serve a model."""
        if self.only:
            return self.all
        return (route for channel in self.channels.serving(model) for route in self.of_channel(channel))

    def most_images(self, model: str, pixels: int) -> int:
        """Return how many images of a size one call for a model may request, whichever channel it goes to."""
        most, images_inline = 0, False
        for route in self.serving(model):
            provider = route.provider
            most = min(most or provider.max_images_per_call, provider.max_images_per_call)
            images_inline = images_inline or provider.images_inline
        return min(most, most_inline(pixels)) if images_inline else most or 1

    def edits(self, model: str) -> Edits | None:
        """Return the input images that every channel of a model takes, None if one takes none."""
        if self.only:
            return self.only.provider.edits(self.only.sent_name(model))
        taken = [route.provider.edits(route.sent_name(model)) for route in self.serving(model)]
        able = [edits for edits in taken if edits is not None]
        if not able or len(able) < len(taken):
            return None
        return Edits(
            min(edits.max_images for edits in able),
            all(edits.mask for edits in able),
            all(edits.links for edits in able),
        )

    def sent_request(self, request: GenerationRequest) -> GenerationRequest:
        """Return the request as its fingerprint has it: without what no channel of the model sends."""
        kinds = {route.channel.provider: route.provider for route in self.serving(request.model)}
        if len(kinds) != 1:
            return request
        (provider,) = kinds.values()
        return replace(provider.plain.sent_request(request), model=request.model)

    def estimate(self, request: GenerationRequest, most: int | None = None) -> Cost:
        """Return the cost of all images of a request: of the dearest channel of those that are preferred for it.

        most: micro-dollars that they may cost; None without a limit.
        """
        serving = self.channels.serving(request.model)
        if most is not None:
            left_out = self.too_dear(request, request.model, request.n, most)
            serving = tuple(channel for channel in serving if channel.name not in left_out)
        preferred = [channel for channel in serving if channel.priority == serving[0].priority]
        prices = [self.of_channel(channel)[0].image_price(request) for channel in preferred]
        known_prices = [price for price in prices if price is not None]
        return Cost(max(known_prices) * request.n if known_prices and len(known_prices) == len(prices) else None)

    def prices(self, request: GenerationRequest, model: str, count: int) -> dict[str, int | None]:
        """Return the price of some images of a request by each channel that serves a model; None if it is unknown."""
        serving = self.channels.serving(model)
        return {channel.name: self.of_channel(channel)[0].call_price(request, model, count) for channel in serving}

    def too_dear(self, request: GenerationRequest, model: str, count: int, most: int | None) -> frozenset[str]:
        """Return the channels that get no call for some images of a request under a limit: those beyond `most`, and
        those without a price. If all are beyond it the cheapest stay; if none has a price, all stay.

        most: micro-dollars; None without a limit of the submit.
        """
        prices = self.prices(request, model, count)
        known_prices = {name: price for name, price in prices.items() if price is not None}
        if not known_prices:
            return frozenset()
        limit = max(known_prices.values()) if most is None else max(most, min(known_prices.values()))
        return frozenset(name for name, price in prices.items() if price is None or price > limit)

    def sends_seed(self, model: str) -> bool:
        """Return whether the channels of a model send seeds."""
        request = GenerationRequest(prompt="", model=model, width=64, height=64, n=1, seed=1)
        return any(
            route.provider.plain.sent_request(replace(request, model=route.sent_name(model))).seed is not None
            for route in self.serving(model)
        )

    async def cancel(self, handle: JobHandle) -> bool | None:
        """Request the end of a job. Return whether its provider confirmed it, None if that is open."""
        try:
            route = self.of_job(handle)
        except UpstreamError:
            return None
        return await route.provider.cancel(handle)

    async def models(self) -> tuple[Mapping[str, object], ...]:
        """Return the models that the providers list and a channel serves, by the names that clients use."""
        if self.only and not self._from_file:
            return await self.only.provider.models()
        first = {route.channel.name: route for route in reversed(self.all)}
        lists = await asyncio.gather(*(route.provider.models() for route in first.values()), return_exceptions=True)
        listed: dict[str, Mapping[str, object]] = {}
        faults = [error for error in lists if isinstance(error, UpstreamError)]
        for entries in lists:
            if isinstance(entries, BaseException):
                if not isinstance(entries, UpstreamError):
                    raise entries
                continue
            for entry in entries:
                model = str(entry["id"])
                if (preferred := self.channels.preferred(model)) and preferred.sent_name(model) == model:
                    listed.setdefault(model, entry)
        if faults and len(faults) == len(lists):
            raise faults[0]
        return tuple(listed.values())

    async def close(self) -> None:
        for route in self.all:
            await route.provider.close()


def with_absolute_links(reply: Reply, base: URL) -> Reply:
    """Return the reply with relative links below the address of its provider; a bad link stays for who fetches it."""
    return replace(reply, images=tuple(_absolute(image, base) for image in reply.images))


def _absolute(image: GivenImage, base: URL) -> GivenImage:
    if not isinstance(image, ImageLink) or "://" in image.url or image.url.startswith("data:"):
        return image
    try:
        return ImageLink(str(base.join(URL(image.url))))
    except ValueError:
        return image
