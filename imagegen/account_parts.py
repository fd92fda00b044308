"""Parts that authenticate clients, for the composition root: the guard of the routes and the store of the keys."""

from __future__ import annotations

from imagegen.accounts.api_keys import fixed_keys
from imagegen.accounts.budgets import Budgets
from imagegen.accounts.key_store import CHANGED, KeyRing, KeyStore
from imagegen.queue.instance import QueueInstance
from imagegen.ratelimit.limits import RateLimits
from imagegen.settings import Settings
from imagegen.supervisor import Supervisor
from imagegen.web.guard import AccessRules, Guard
from imagegen.web.handler_services import SERVICES
from imagegen.web.ops.admin import AdminAuth


def create_guard(settings: Settings, admin: AdminAuth, rates: RateLimits) -> Guard:
    """Return the guard of the routes; it has only the keys of the settings until those in Redis are read."""
    rules = AccessRules(
        is_admin=admin.admits,
        verify_link=lambda request, path: request.app[SERVICES].links.verify(path, request.query),
        count_refusal=rates.count_unauthorized,
        hops=settings.trusted_proxy_hops,
        own_tasks=settings.cache_scope != "shared",
        may_be_open=settings.may_be_open,
    )
    return Guard(KeyRing(fixed_keys(settings.api_keys)), rules)


def create_budgets(settings: Settings, ring: KeyRing) -> Budgets:
    """Return the budgets of all clients together and of the keys."""
    budgets = Budgets(settings.budget_daily_micro_usd, lambda: ring.keys)
    ring.on_change.append(budgets.refresh)
    return budgets


async def open_key_store(queue: QueueInstance, guard: Guard, supervisor: Supervisor) -> KeyStore:
    """Return the store of the keys, which the messages of other instances keep up to date, after its first read."""
    ring, notifier = guard.ring, queue.notifier
    store = KeyStore(queue.connection, queue.keys, ring, notifier)
    ring.use_clock(queue.connection.clock)
    ring.on_change.append(queue.feed.wake_all)  # streams and waits of a revoked key end
    notifier.on_join.append(store.on_joined)
    notifier.handlers[CHANGED] = store.on_changed
    queue.connection.on_new_server.append(lambda _known, _new: store.on_joined())
    guard.use(store)
    await store.start()
    supervisor.run("keys", store.read_forever())
    return store
