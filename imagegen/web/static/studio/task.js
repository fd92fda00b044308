// One task: its live state, its images, and what can be done next.

import { useStudio } from "./context.js";
import { useEffect, useLayoutEffect, useState } from "./hooks.js";
import { base } from "./base.js";
import { formatDollars } from "./price.js";
import { LANGUAGES, snippet } from "./snippets.js";
import { fileName, imagesOf, isFinal, servicePath } from "./tasks.js";
import { html, localTime, Modal, PromptText, useNow } from "./ui.js";

const RETRYABLE = new Set(["failed", "cancelled"]);

export function TaskPage({ route }) {
  const { studio, state, t } = useStudio();
  const record = state.records.get(route.id);
  useLayoutEffect(() => {
    scrollTo(0, 0);
    if (!document.activeElement?.closest("form")) document.getElementById("task-title")?.focus();
  }, [route.id]);
  if (!record) return html`<p class="faint">${t("state.unknown")}</p>`;
  const images = imagesOf(record);
  return html`<article class="task" aria-labelledby="task-title">
    <h2 id="task-title" tabindex="-1">${record.request ? html`<${PromptText} text=${record.request.prompt} />` : html`<code>${record.id}</code>`}</h2>
    <${Notice} />
    <${Status} record=${record} />
    <${Images} record=${record} images=${images} />
    <${Failure} record=${record} />
    <${TaskActions} record=${record} />
    <${Details} record=${record} />
    ${route.index !== undefined && html`<${Zoom} record=${record} images=${images} index=${route.index} onMove=${(index) => studio.go({ page: "task", id: record.id, index }, true)} />`}
  </article>`;
}

export function Notice() {
  const { studio, state, t } = useStudio();
  const { notice } = state;
  if (!notice) return null;
  if (notice.removed) return html`<p class="notice" role="status">${t("removed")} <button type="button" class="plain" onClick=${() => studio.restore(notice.removed)}>${t("undo")}</button></p>`;
  return html`<p class="notice" role="status">${t(notice)}</p>`;
}

export function stateName(record) {
  return record.gone ? "gone" : record.view?.status ?? "unknown";
}

function Status({ record }) {
  const { studio, state, t } = useStudio();
  const { view, request } = record;
  const isOpen = !isFinal(record) && view;
  const now = useNow(Boolean(isOpen && view.retryAt));
  const seconds = view?.retryAt ? Math.max(0, Math.ceil((Date.parse(view.retryAt) - now) / 1000)) : null;
  const total = request?.n ?? 1;
  const parts = isOpen ? [
    view.reason && view.reason !== "queued" && t(`reason.${view.reason}`),
    view.status === "pending" && view.queuePosition && t("place", { place: view.queuePosition }),
    seconds !== null && t("retry.at", { seconds }),
    seconds === null && Number.isFinite(view.etaSeconds) && t("eta", { seconds: Math.ceil(view.etaSeconds) }),
    view.attempts > 1 && t("attempt", { attempts: view.attempts, max: view.maxAttempts }),
    total > 1 && t("images.ready", { count: (view.data ?? []).length, total }),
  ].filter(Boolean) : [];
  return html`<div class=${`status ${stateName(record)}`}>
    <p><strong role="status" data-state=${stateName(record)}>${t(`state.${stateName(record)}`)}</strong>${parts.map((part) => html` <span>· ${part}</span>`)}</p>
    ${isOpen && html`<progress max="100" value=${view.progress ?? 0} aria-label=${t("state.processing")}>${view.progress}%</progress>`}
    ${isOpen && html`<${ConnectionText} />`}
    ${isOpen && (record.left ? html`<p role="status">${t("left")}</p>` : html`<button type="button" onClick=${() => studio.cancel(record)}>${t("cancel")}</button>`)}
    ${record.gone && html`<p>${t("gone")}</p>`}
  </div>`;
}

// Says why a task does not change, if its events do not come.
function ConnectionText() {
  const { state, t } = useStudio();
  const { connection, connectsAt } = state;
  const now = useNow(connection === "limited");
  if (connection === "away") return html`<p class="warn" role="status">${t("live.away")}</p>`;
  if (connection === "limited") return html`<p class="warn">${t("live.limited", { seconds: Math.max(1, Math.ceil((connectsAt - now) / 1000)) })}</p>`;
  return null;
}

function Images({ record, images }) {
  const { studio, t } = useStudio();
  const waiting = isFinal(record) ? 0 : Math.max(0, (record.request?.n ?? 1) - images.length);
  if (!images.length && !waiting) return null;
  const shape = record.request?.width ? { aspectRatio: `${record.request.width} / ${record.request.height}` } : {};
  return html`<ul class="images">
    ${images.map((entry) => html`<li key=${entry.index}>
      <a href=${`#/task/${record.id}/${entry.index}`} aria-label=${t("open.image", { number: entry.index + 1 })}><${TaskImage} record=${record} entry=${entry} /></a>
      ${entry.stale && html`<p class="warn">${t("image.stale")}</p>`}
      <${ImageActions} record=${record} entry=${entry} studio=${studio} />
    </li>`)}
    ${Array.from({ length: waiting }, (_, number) => html`<li key=${`waiting-${number}`} class="waiting" style=${shape} aria-hidden="true"></li>`)}
  </ul>`;
}

// One image of a task. path: turns the image's path into that of another form, for example a thumbnail.
export function TaskImage({ record, entry, path = (own) => own, lazy = false }) {
  const { t } = useStudio();
  const [isMissing, setIsMissing] = useState(false);
  const own = servicePath(entry.url);
  useEffect(() => setIsMissing(false), [entry.url]);
  if (own === null) return html`<span class="missing">${t("image.provider")}</span>`;
  if (isMissing) return html`<span class="missing">${t("image.missing")}</span>`;
  const prompt = record.request?.prompt;
  const alt = prompt ? t("image.alt", { number: entry.index + 1, prompt: [...prompt].slice(0, 200).join("") }) : t("image.alt.unknown", { number: entry.index + 1 });
  return html`<img src=${base + path(own)} alt=${alt} width=${entry.width} height=${entry.height} loading=${lazy ? "lazy" : "eager"} decoding="async" onError=${() => setIsMissing(true)} />`;
}

function ImageActions({ record, entry, studio }) {
  const { state, t } = useStudio();
  const own = servicePath(entry.url);
  const { compared } = state;
  if (own === null) return html`<div class="buttons"><a href=${entry.url} target="_blank" rel="noopener noreferrer">${t("image.provider")}</a></div>`;
  const name = fileName(record.request?.prompt ?? "", entry.index, entry.contentType);
  const onDownload = (event) => { event.preventDefault(); studio.download(own, name); };
  return html`<div class="buttons">
    <a class="button" href=${base + own} download=${name} onClick=${onDownload}>${t("download")}</a>
    <button type="button" onClick=${() => studio.editImage(record, entry)}>${t("edit")}</button>
    <button type="button" class="plain" aria-pressed=${compared?.id === record.id && compared?.index === entry.index} onClick=${() => studio.compare({ id: record.id, index: entry.index })}>${t(compared ? "compare.with" : "compare")}</button>
  </div>`;
}

function Failure({ record }) {
  const { t } = useStudio();
  const { view, gone } = record;
  if (gone || view?.status !== "failed") return null;
  const own = `advice.${view.error?.code}`;
  const advice = t(own) === own ? t(view.error?.retryable ? "advice.retry" : "advice.other") : t(own);
  return html`<div class="error" role="alert"><p>${view.message}</p><p>${advice}</p></div>`;
}

function TaskActions({ record }) {
  const { studio, state, t } = useStudio();
  const [copied, setCopied] = useState(null);
  const { request, view, gone } = record;
  const withKey = state.keyState === "accepted";
  const copy = async (language) => {
    const text = snippet(language, base, request, withKey);
    setCopied({ language, text, isCopied: await copyText(text) });
  };
  return html`<div class="actions">
    <div class="buttons">
      ${RETRYABLE.has(view?.status) && !gone && html`<button type="button" class="primary" onClick=${() => studio.retry(record)}>${t("retry")}</button>`}
      ${request && gone && html`<button type="button" class="primary" onClick=${() => studio.submitBody(request)}>${t("gone.again")}</button>`}
      ${request && isFinal(record) && !gone && html`<button type="button" disabled=${state.isSubmitting} onClick=${() => studio.variant(record)}>${t("variant")}</button>`}
      ${request && html`<button type="button" onClick=${() => studio.again(record)}>${t("again")}</button>`}
    </div>
    ${request && html`<div class="buttons" role="group" aria-label=${t("copy")}><span class="faint">${t("copy")}</span>
      ${LANGUAGES.map((language) => html`<button key=${language} type="button" class="plain" onClick=${() => copy(language)}>${language}</button>`)}</div>`}
    ${copied && html`<div><p role="status" class="faint">${t(copied.isCopied ? "copied" : "copy.failed")}: ${copied.language}</p><pre tabindex="0" dir="ltr">${copied.text}</pre></div>`}
  </div>`;
}

// The clipboard is closed to plain http pages of other hosts than loopback: then the text is there to be selected.
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

export function Details({ record, isOpen = false }) {
  const { state, t } = useStudio();
  const { request, view } = record;
  const took = view?.finishedAt && view?.startedAt ? (Date.parse(view.finishedAt) - Date.parse(view.startedAt)) / 1000 : null;
  const cost = view?.cost;
  const dollars = (amount) => formatDollars(amount, state.language);
  const paid = cost?.charged ?? cost?.estimated;
  const rows = [
    [t("detail.id"), record.id],
    [t("model"), view?.model ?? request?.model],
    [t("detail.created"), localTime(record.createdAt, state.language)],
    [t("detail.took"), took === null ? null : t("seconds", { seconds: took.toFixed(1) })],
    [t("detail.cost"), Number.isFinite(paid) ? `${dollars(paid)}${cost.saved ? ` (${t("detail.saved")} ${dollars(cost.saved)})` : ""}` : null],
    [t("detail.seed"), imagesOf(record).map(({ seed }) => seed).filter((seed) => seed !== null && seed !== undefined).join(", ")],
    ...Object.entries(request ?? {}).filter(([name]) => !["model", "seed"].includes(name)).map(([name, value]) => [name, typeof value === "string" ? value : JSON.stringify(value)]),
  ].filter(([, value]) => value);
  return html`<details class="details" open=${isOpen}><summary>${t("details")}</summary>
    <dl>${rows.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd><bdi dir="auto">${value}</bdi></dd></div>`)}</dl>
    ${view?.warnings?.length > 0 && html`<h3>${t("warnings")}</h3><ul>${view.warnings.map((text) => html`<li>${text}</li>`)}</ul>`}
  </details>`;
}

// One image as large as the window, with the arrow keys between the images.
function Zoom({ record, images, index, onMove }) {
  const { studio, t } = useStudio();
  const at = images.findIndex((entry) => entry.index === index);
  const move = (step) => { if (images[at + step]) onMove(images[at + step].index); };
  const onKeyDown = ({ key }) => {
    if (key === "ArrowLeft") move(-1);
    if (key === "ArrowRight") move(1);
  };
  return html`<${Modal} label=${t("image.alt.unknown", { number: index + 1 })} wide onClose=${() => studio.go({ page: "task", id: record.id }, true)} onKeyDown=${onKeyDown}>
    <div class="zoom">
      ${at < 0 ? html`<p>${t("image.missing")}</p>` : html`<${TaskImage} record=${record} entry=${images[at]} />`}
      <div class="buttons">
        <button type="button" disabled=${at <= 0} onClick=${() => move(-1)}>← ${t("image.previous")}</button>
        <button type="button" disabled=${at < 0 || at === images.length - 1} onClick=${() => move(1)}>${t("image.next")} →</button>
        ${at >= 0 && html`<${ImageActions} record=${record} entry=${images[at]} studio=${studio} />`}
      </div>
    </div>
  <//>`;
}
