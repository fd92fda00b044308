// The history's minutes as columns of plots, and numbers of the last hour; all pure.

const MINUTE_S = 60;
const HOUR_MINUTES = 60;
const MAX_CODES = 6;

// Adds newer minutes to those that are known, by their time; returns a new Map without those older than a day.
export function mergeMinutes(known, minutes, nowS) {
  const merged = new Map(known);
  for (const minute of minutes) merged.set(minute.at, minute);
  for (const at of merged.keys()) if (at < nowS - 86400) merged.delete(at);
  return merged;
}

// Returns the times of the last hours' minutes: plots have one point for each, also where nothing happened.
export function timesOf(hours, nowS) {
  const last = Math.floor(nowS / MINUTE_S) * MINUTE_S;
  return Array.from({ length: hours * HOUR_MINUTES }, (_, number) => last - (hours * HOUR_MINUTES - 1 - number) * MINUTE_S);
}

// The plots: their names, and their series by name with a function from a minute to its value. A missing minute counts as zero, but has no percentile.
const count = (read) => (minute) => (minute ? read(minute) ?? 0 : 0);
const span = (name, part) => (minute) => minute?.[name][part] ?? null;

const PLOTS = [
  ["tasks", [["completed", count(({ tasks }) => tasks.completed)], ["failed", count(({ tasks }) => tasks.failed)], ["cancelled", count(({ tasks }) => tasks.cancelled)]]],
  ["depth", [["depth", count(({ depth }) => depth)], ["inFlight", count(({ inFlight }) => inFlight)]]],
  ["oldest", [["oldest", count(({ oldestAgeSeconds }) => oldestAgeSeconds)]]],
  ["wait", [["p50", span("waitSeconds", "p50")], ["p95", span("waitSeconds", "p95")]]],
  ["run", [["p50", span("runSeconds", "p50")], ["p95", span("runSeconds", "p95")]]],
  ["cache", [["miss", count(({ submits }) => submits.miss)], ["hit", count(({ submits }) => submits.hit)], ["coalesced", count(({ submits }) => submits.coalesced)]]],
  ["money", [["spent", count(({ spent }) => spent)], ["saved", count(({ saved }) => saved)]]],
];

// Returns the plots as {name, series: [{name, values}]} over these times. monthPlan: Redis commands a month.
export function plotsOf(minutes, times, monthPlan) {
  const rows = times.map((at) => minutes.get(at));
  const plots = PLOTS.map(([name, series]) => ({ name, series: series.map(([label, read]) => ({ name: label, values: rows.map(read) })) }));
  const codes = codesOf(rows);
  plots.push({ name: "upstream", series: codes.map((code) => ({ name: code, isCode: true, values: rows.map(count(({ upstream }) => upstream[code])) })) });
  plots.push({ name: "redis", series: [{ name: "commands", values: commandsAnHour(minutes, times) }, { name: "plan", values: times.map(() => hourOf(monthPlan)) }] });
  return plots;
}

// Returns the codes of calls, the most frequent first.
function codesOf(rows) {
  const totals = new Map([["ok", 0]]);
  for (const row of rows) for (const [code, calls] of Object.entries(row?.upstream ?? {})) totals.set(code, (totals.get(code) ?? 0) + calls);
  return [...totals].sort(([, one], [, two]) => two - one).slice(0, MAX_CODES).map(([code]) => code);
}

function commandsAnHour(minutes, times) {
  let total = 0;
  const commandsAt = (at) => minutes.get(at)?.commands ?? 0;
  for (let number = 1; number < HOUR_MINUTES; number += 1) total += commandsAt(times[0] - number * MINUTE_S);
  return times.map((at) => {
    total += commandsAt(at);
    const value = total;
    total -= commandsAt(at - (HOUR_MINUTES - 1) * MINUTE_S);
    return value;
  });
}

export function hourOf(monthPlan) {
  return Math.round(monthPlan / (30 * 24));
}

// Returns {commands, hits, submits} of the last hour.
export function lastHour(minutes, nowS) {
  const sums = { commands: 0, hits: 0, submits: 0 };
  for (const minute of minutes.values()) {
    if (minute.at <= nowS - 3600) continue;
    sums.commands += minute.commands;
    sums.hits += (minute.submits.hit ?? 0) + (minute.submits.coalesced ?? 0);
    sums.submits += Object.values(minute.submits).reduce((one, two) => one + two, 0);
  }
  return sums;
}

// Returns seconds as a short text.
export function shortTime(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 100) return `${seconds.toFixed(1)} s`;
  return seconds < 6000 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

// Returns the row of a task in the service's list as the board shows it.
export function rowOf(task) {
  return {
    taskId: task.taskId, sequence: task.sequence, status: task.status, prompt: task.request ? [...task.request.prompt].slice(0, 300).join("") : null, model: task.model, key: task.key, instance: null,
    progress: task.progress, attempts: task.attempts, maxAttempts: task.maxAttempts, reason: task.reason ?? null, retryAt: task.retryAt ?? null, error: task.error?.code ?? null, errorDetail: task.message ?? null, createdAt: task.createdAt,
  };
}

// Joins the live rows and those read from Redis: of one task the later state counts. Unchanged rows stay the same objects, so that they need no new rendering.
export function joinRows(before, live, listed) {
  const rows = new Map();
  for (const row of [...live, ...listed]) {
    const other = rows.get(row.taskId);
    if (!other || other.sequence < row.sequence) rows.set(row.taskId, { ...other, ...row, prompt: row.prompt ?? other?.prompt ?? null });
  }
  for (const [id, row] of rows) {
    const known = before.get(id);
    if (known && sameRow(known, row)) rows.set(id, known);
  }
  return rows;
}

const COMPARED = ["sequence", "status", "progress", "reason", "retryAt", "error", "attempts", "instance", "prompt"];

function sameRow(one, two) {
  return COMPARED.every((name) => one[name] === two[name]);
}
