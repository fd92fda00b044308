// The table of tasks: filters, cause, retry and cancel. Rows that did not change are not rendered again.

import { useEffect, useState } from "./hooks.js";
import { Component } from "./preact.js";
import { errorText, html, PromptText, useText } from "./ui.js";

const FILTERS = ["all", "pending", "processing", "failed", "completed", "cancelled"];
const COLUMNS = ["state", "prompt", "cause", "model", "key", "attempts", "created", "action"];
const FINAL = ["failed", "completed", "cancelled"];
const CHUNK = 10;
const ORDER = { processing: 0, pending: 1 };

// Returns the rows of a filter: running ones, waiting ones, then the ended ones, the latest first.
function sortedRows(rows, filter) {
  const shown = [...rows.values()].filter(({ status }) => filter === "all" || status === filter);
  const rank = ({ status }) => ORDER[status] ?? 2;
  return shown.sort((one, two) => rank(one) - rank(two) || (rank(one) < 2 ? one.createdAt.localeCompare(two.createdAt) : two.createdAt.localeCompare(one.createdAt)));
}

export function Tasks({ store, state }) {
  const { t, language } = useText();
  const { filter, cursor, busy, fault } = state;
  const rows = sortedRows(state.rows, filter);
  const count = useGrowing(rows.length, filter);
  const more = cursor ? "tasks.more" : "tasks.load";
  return html`<section class="tasks"><header><h2>${t("tasks")}</h2><div class="buttons" role="group" aria-label=${t("col.state")}>
    ${FILTERS.map((name) => html`<button key=${name} type="button" aria-pressed=${name === filter} onClick=${() => store.show(name)}>${t(`filter.${name}`)}</button>`)}</div>
    <span class="faint">${t("tasks.count", { count: rows.length })}</span></header>
    ${fault && fault.name !== "pause" && html`<p class="error" role="alert">${t("act.failed", { id: fault.name.slice(0, 8), message: errorText(t, fault.error) })}</p>`}
    <div class="scroll" tabindex="0" role="region" aria-label=${t("tasks")}><table role="table">
      <thead role="rowgroup"><tr role="row">${COLUMNS.map((name) => html`<th key=${name} scope="col" role="columnheader" class=${name}>${t(`col.${name}`)}</th>`)}</tr></thead>
      <tbody role="rowgroup">${rows.slice(0, count).map((row) => html`<${Row} key=${row.taskId} row=${row} isBusy=${busy.has(row.taskId)} store=${store} language=${language} t=${t} />`)}</tbody>
    </table></div>
    ${rows.length === 0 && html`<p class="faint">${t("tasks.none")}</p>`}
    <div class="buttons"><button type="button" disabled=${busy.has("list")} onClick=${() => store.list(cursor)}>${t(more)}</button></div></section>`;
}

// A formatter takes long to make.
const formatters = new Map();

function localTime(text, language) {
  if (!formatters.has(language)) formatters.set(language, new Intl.DateTimeFormat(language, { dateStyle: "short", timeStyle: "medium" }));
  return formatters.get(language).format(new Date(text));
}

// Returns how many rows to render: some more in each frame, until all are there.
function useGrowing(total, name) {
  const [shown, setShown] = useState({ name, count: CHUNK });
  const count = shown.name === name ? shown.count : CHUNK;
  useEffect(() => {
    if (count >= total) return undefined;
    const frame = requestAnimationFrame(() => setShown({ name, count: count + CHUNK }));
    return () => cancelAnimationFrame(frame);
  }, [count, total, name]);
  return count;
}

class Row extends Component {
  shouldComponentUpdate({ row, isBusy, language }) {
    return row !== this.props.row || isBusy !== this.props.isBusy || language !== this.props.language;
  }

  render({ row, isBusy, store, language, t }) {
    const { taskId: id, status } = row;
    const action = FINAL.includes(status) ? (status === "completed" ? null : "retry") : "cancel";
    return html`<tr role="row" id=${`task-${id}`}>
      <td role="cell" class="state"><span class=${`mark ${status}`}>${t(`filter.${status}`)}</span>${status === "processing" && html` ${row.progress} %`}</td>
      <td role="cell" class="prompt">${row.prompt === null ? html`<span class="faint">${t("prompt.unknown")}</span>` : html`<${PromptText} text=${row.prompt} />`}<code>${id.slice(0, 8)}</code>${row.instance && html`<code>${row.instance}</code>`}</td>
      <td role="cell" class="cause">${causeOf(row, language)}</td><td role="cell" class="model">${row.model}</td><td role="cell" class="key">${row.key ?? ""}</td>
      <td role="cell" class="attempts">${row.attempts} / ${row.maxAttempts}</td><td role="cell" class="created">${localTime(row.createdAt, language)}</td>
      <td role="cell" class="action">${action && html`<button type="button" aria-label=${t(`act.${action}.of`, { id: id.slice(0, 8) })} disabled=${isBusy} onClick=${() => store.change(id, action)}>${t(`act.${action}`)}</button>`}</td></tr>`;
  }
}

function causeOf(row, language) {
  if (row.error) return html`<code>${row.error}</code> <bdi>${row.errorDetail ?? ""}</bdi>`;
  if (!row.reason) return "";
  return html`<code>${row.reason}</code> ${row.retryAt ? localTime(row.retryAt, language) : ""}`;
}
