// Gallery: this browser's tasks or, with the admin token, all; and two images side by side.

import { useStudio } from "./context.js";
import { useEffect, useLayoutEffect, useRef, useState } from "./hooks.js";
import { Notice, stateName, TaskImage, Details } from "./task.js";
import { found, imagesOf, thumbnailPath } from "./tasks.js";
import { errorText, html, PromptText } from "./ui.js";

const STEP = 48;
const THUMBNAIL = 256;

export function Gallery({ route }) {
  const { studio, state, t } = useStudio();
  const own = [...state.records.values()].filter(({ owner }) => owner !== null);
  const records = found(route.all ? state.listing?.records ?? [] : own, route.search);
  const [count, setCount] = useState(STEP);
  const showMore = () => {
    if (count < records.length) setCount(count + STEP);
    else if (route.all) studio.listMore();
  };
  useEffect(() => { setCount(STEP); }, [route.search, route.all]);
  useEffect(() => { if (route.all && !state.listing) studio.listMore(); }, [route.all, state.listing]);
  const hasMore = count < records.length || (route.all && !state.listing?.done && !state.listing?.error);
  return html`<section class="gallery" aria-labelledby="gallery-title">
    <h2 id="gallery-title">${t("gallery")}</h2>
    <div class="row">
      <input type="search" aria-label=${t("gallery.search")} placeholder=${t("gallery.search")} value=${route.search} onInput=${({ target }) => studio.go({ ...route, id: undefined, search: target.value }, true)} />
      <label class="check"><input type="checkbox" checked=${route.all} onChange=${({ target }) => studio.go({ page: "gallery", search: route.search, all: target.checked })} /> ${t("gallery.all")}</label>
    </div>
    <${Notice} />
    ${state.compared && html`<p class="notice" role="status">${t("compare.choose")}</p>`}
    <p class="faint" role="status">${records.length ? t("gallery.count", { count: records.length }) : t("gallery.none")} <span class="keys">${t("gallery.keys")}</span></p>
    <${Grid} records=${records.slice(0, count)} route=${route} />
    ${route.all && state.listing?.error && html`<${ListingError} error=${state.listing.error} />`}
    ${hasMore && html`<${More} onVisible=${showMore} mark=${`${count} ${state.listing?.records.length}`} />`}
  </section>`;
}

// Why the next page of the list is missing, where it would be.
function ListingError({ error }) {
  const { studio, t } = useStudio();
  if (error.status === 401) return html`<p class="error" role="alert">${t("gallery.admin")} <a href="#/key">${t("nav.key")}</a></p>`;
  return html`<p class="error" role="alert">${errorText(t, error)} <button type="button" onClick=${() => studio.listMore()}>${t("retry")}</button></p>`;
}

// Recent tasks beside the form.
export function Recent() {
  const { state, t } = useStudio();
  const records = found([...state.records.values()].filter(({ owner }) => owner !== null), "").sort((one, other) => other.createdAt - one.createdAt).slice(0, 12);
  return html`<section aria-labelledby="recent-title"><h2 id="recent-title">${t("recent")}</h2><${Notice} />
    ${records.length ? html`<${Grid} records=${records} route=${null} />` : html`<p class="faint">${t("recent.none")}</p>`}
  </section>`;
}

// Grid of cards with one stop of the Tab key: the arrow keys move between the cards.
function Grid({ records, route }) {
  const { studio, t } = useStudio();
  const grid = useRef(null);
  const [current, setCurrent] = useState(null);
  const stop = records.some(({ id }) => id === current) ? current : records[0]?.id;
  const focusAfter = useRef(null);
  useLayoutEffect(() => {
    if (focusAfter.current === null) return;
    const cards = [...grid.current.querySelectorAll("a.card")];
    cards[Math.min(focusAfter.current, cards.length - 1)]?.focus();
    focusAfter.current = null;
  });
  const onKeyDown = (event) => {
    const cards = [...grid.current.querySelectorAll("a.card")];
    const at = cards.indexOf(document.activeElement);
    if (at < 0) return;
    const record = records[at];
    const target = cards[at + stepOf(event.key, cards, at)];
    if (target && target !== cards[at]) { event.preventDefault(); target.focus(); }
    else if (event.key.toLowerCase() === "p" && !event.ctrlKey && !event.metaKey && record.owner !== null) studio.pin(record);
    else if (event.key === "Delete" && record.owner !== null) { focusAfter.current = at; studio.remove(record); }
  };
  return html`<ul class="grid" ref=${grid} onKeyDown=${onKeyDown}>
    ${records.map((record) => html`<${Card} key=${record.id} record=${record} isStop=${record.id === stop} onFocus=${() => setCurrent(record.id)} isOpen=${route?.id === record.id} route=${route} t=${t} studio=${studio} />`)}
  </ul>`;
}

function Card({ record, isStop, onFocus, isOpen, route, t, studio }) {
  const [entry] = imagesOf(record);
  const isOwn = record.owner !== null;
  return html`<li class=${record.pinned ? "pinned" : ""}>
    <a class="card" href=${`#/task/${record.id}`} tabindex=${isStop ? 0 : -1} onFocus=${onFocus}>
      <span class="frame">${entry ? html`<${TaskImage} record=${record} entry=${entry} lazy path=${(path) => thumbnailPath(path, THUMBNAIL)} />` : html`<span class="missing">${t(`state.${stateName(record)}`)}</span>`}</span>
      ${record.pinned && html`<span class="badge">${t("pinned")}</span>`}
      ${imagesOf(record).length > 1 && html`<span class="badge count">${imagesOf(record).length}</span>`}
      ${record.request ? html`<${PromptText} class="caption" text=${record.request.prompt} />` : html`<code class="caption">${record.id.slice(0, 12)}</code>`}
    </a>
    ${route && html`<div class="buttons">
      ${isOwn && html`<button type="button" class="plain" tabindex=${isStop ? 0 : -1} aria-pressed=${record.pinned} onClick=${() => studio.pin(record)}>${t(record.pinned ? "unpin" : "pin")}</button>
        <button type="button" class="plain" tabindex=${isStop ? 0 : -1} aria-label=${t("remove")} onClick=${() => studio.remove(record)}>✕</button>`}
      <button type="button" class="plain" tabindex=${isStop ? 0 : -1} aria-expanded=${isOpen} onClick=${() => studio.go({ ...route, id: isOpen ? undefined : record.id }, isOpen)}>${t("parameters")}</button>
      ${studio.state.compared && entry && html`<button type="button" tabindex=${isStop ? 0 : -1} onClick=${() => studio.compare({ id: record.id, index: entry.index })}>${t("compare.with")}</button>`}
    </div>`}
    ${isOpen && html`<${Details} record=${record} isOpen />`}
  </li>`;
}

// Calls onVisible when the end of the list comes near; the last of several entries is the present state. mark: changes when the list has grown.
function More({ onVisible, mark }) {
  const { t } = useStudio();
  const ref = useRef(null);
  useEffect(() => {
    const observer = new IntersectionObserver((entries) => { if (entries.at(-1).isIntersecting) onVisible(); }, { rootMargin: "600px" });
    observer.observe(ref.current);
    return () => observer.disconnect();
  }, [mark]);
  return html`<p ref=${ref} class="faint more-mark">${t("gallery.more")}</p>`;
}

export function Compare({ route }) {
  const { studio, state, t } = useStudio();
  return html`<section aria-labelledby="compare-title"><h2 id="compare-title">${t("compare.title")}</h2>
    <div class="compare">${route.images.map(({ id, index }) => {
      const record = state.records.get(id);
      const entry = record && imagesOf(record).find((one) => one.index === index);
      return html`<figure key=${`${id}.${index}`}>
        ${entry ? html`<a href=${`#/task/${id}/${index}`}><${TaskImage} record=${record} entry=${entry} /></a>` : html`<p class="missing">${t(record?.view || record?.gone ? "image.missing" : "state.unknown")}</p>`}
        <figcaption>${record?.request && html`<${PromptText} text=${record.request.prompt} />`}${record && html`<${Details} record=${record} />`}</figcaption>
      </figure>`;
    })}</div>
    ${route.images.length < 2 && html`<button type="button" onClick=${() => studio.go({ page: "gallery", search: "", all: false })}>${t("compare.choose")}</button>`}
  </section>`;
}

// Returns how many cards an arrow key moves: a row is as long as the cards with one upper edge.
function stepOf(key, cards, at) {
  const top = cards[0].getBoundingClientRect().top;
  const row = cards.findIndex((card) => card.getBoundingClientRect().top > top + 4);
  const columns = row < 0 ? cards.length : row;
  return { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -at, End: cards.length - 1 - at }[key] ?? 0;
}
