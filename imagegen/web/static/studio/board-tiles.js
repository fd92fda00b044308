// Badges and tiles of the board: what is at this moment.

import { hourOf, lastHour, shortTime } from "./board-series.js";
import { html, localTime, useText } from "./ui.js";

export function Badges({ state }) {
  const { t, language } = useText();
  const { snapshot, isLive } = state;
  const badges = [isLive ? ["live", t("live")] : ["bad", t("lost")]];
  if (snapshot) {
    const { instance, queue, redis } = snapshot;
    if (queue.pausedSince) badges.push(["warn", t("paused", { time: localTime(queue.pausedSince, language) })]);
    if (!instance.loops) badges.push(["bad", t("loops.none")]);
    if (!redis.up) badges.push(["bad", t("redis.away")]);
    if (!instance.storeWritable) badges.push(["bad", t("store.refuses")]);
    if (!instance.providerKeyAccepted) badges.push(["bad", t("key.refused")]);
    if (instance.draining) badges.push(["warn", t("draining")]);
  }
  return html`<ul class="badges" aria-live="polite">${badges.map(([kind, text]) => html`<li key=${text} class=${`mark ${kind}`}>${text}</li>`)}</ul>`;
}

export function Tiles({ state }) {
  const { t, language } = useText();
  return html`<dl class="tiles">${tilesOf(state, t, language).map(([name, value, ...notes]) => html`<div key=${name}><dt>${t(name)}</dt><dd><strong>${value}</strong>${notes.filter(Boolean).map((note) => html`<span key=${note}>${note}</span>`)}</dd></div>`)}</dl>`;
}

function tilesOf({ snapshot, minutes }, t, language) {
  const { queue, instance, today, waitSeconds, runSeconds, upstream, redis, budgets } = snapshot;
  const hour = lastHour(minutes, Date.now() / 1000);
  const [budget] = budgets;
  const rate = upstream.ratePerMinute ? t("rate", { rate: upstream.ratePerMinute }) : t("rate.none");
  const { blocked } = upstream;
  return [
    ["tile.waiting", queue.depth, queue.depth > 0 && t("tile.oldest", { time: shortTime(queue.oldestAgeSeconds) })],
    ["tile.running", queue.inFlight, t("tile.slots", { slots: instance.slots, retrying: queue.retrying })],
    ["tile.today", today.completed, t("tile.failed", today)],
    ["tile.wait", shortTime(waitSeconds.p50), t("tile.p95", { time: shortTime(waitSeconds.p95) })],
    ["tile.run", shortTime(runSeconds.p50), t("tile.p95", { time: shortTime(runSeconds.p95) })],
    ["tile.spent", money(today.spent), t("tile.saved", { saved: money(today.savedByCache + today.savedByCoalescing) }), budget && t("tile.budget", { left: money(budget.left), limit: money(budget.limit) })],
    ["tile.hits", hour.submits ? `${Math.round((hour.hits / hour.submits) * 100)} %` : "–", t("tile.hits.of")],
    ["tile.redis", hour.commands, t("tile.plan", { share: Math.round((hour.commands / hourOf(redis.monthPlan)) * 100), plan: redis.monthPlan.toLocaleString(language) })],
    ["tile.instances", instance.alive.length, ...instance.alive],
    ["tile.upstream", blocked ? t("tile.upstream.until", { time: localTime(blocked.until, language), reason: blocked.reason }) : t("tile.upstream.free"), t("tile.limits", { calls: upstream.concurrency, rate })],
  ];
}

export function money(dollars) {
  return `$${dollars < 1 ? dollars.toFixed(4) : dollars.toFixed(2)}`;
}

export function Channels({ state: { channels } }) {
  const { t, language } = useText();
  const until = (status) => (status.until ? t("channel.until", { time: localTime(status.until, language) }) : "");
  const line = (status) => [t(`channelState.${status.state}`), until(status), status.reason].filter(Boolean).join(", ");
  const calls = (key) => t("channel.calls", { calls: key.calls ?? 0, inFlight: key.inFlight ?? 0 });
  return html`<section class="channels"><h2>${t("channels")}</h2><ul>${channels.map((channel) => html`<li key=${channel.name} class=${`mark ${channel.state === "healthy" ? "live" : "warn"}`}>
    <b>${channel.name}</b> ${channel.provider}: ${line(channel)}
    <ul>${(channel.keys ?? []).map((key) => html`<li key=${key.id}>${key.last4 ? `…${key.last4}` : key.source || key.id}: ${line(key)} (${calls(key)})</li>`)}</ul></li>`)}</ul></section>`;
}
