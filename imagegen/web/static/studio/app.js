// Composition root of the studio: builds its parts, and renders the page of the address.

import { Api, SessionKey } from "./api.js";
import { base } from "./base.js";
import { HelpDialog, KeyDialog } from "./dialogs.js";
import { Form } from "./form.js";
import { Compare, Gallery, Recent } from "./gallery.js";
import { History } from "./history.js";
import { MaskEditor } from "./mask.js";
import { useEffect } from "./hooks.js";
import { render } from "./preact.js";
import { initialLanguage } from "./strings.js";
import { Studio } from "./studio.js";
import { stateName, TaskPage } from "./task.js";
import { html, StudioContext, useChanges, useStudio } from "./ui.js";

const LANGUAGE = "imagegen.language";
const THEME = "imagegen.theme";

function App({ studio }) {
  useChanges(studio);
  return html`<${StudioContext.Provider} value=${studio}><${Page} key=${studio.state.language} /><//>`;
}

function Page() {
  const { studio, state, t } = useStudio();
  const { route, keyState } = state;
  const withForm = ["make", "task", "mask", "key", "help"].includes(route.page);
  const needsKey = keyState === "missing" || keyState === "wrong";
  const home = () => studio.go({ page: "make" });
  const open = route.page === "task" && state.records.get(route.id);
  const title = open ? t(`state.${stateName(open)}`) : t(route.page === "gallery" || route.page === "compare" ? "nav.gallery" : "nav.make");
  useEffect(() => { document.title = `${title} · imagegen`; }, [title]);
  return html`<a class="skip" href="#content" onClick=${skip}>${t("skip")}</a>
    <${Header} />
    <main id="content" tabindex="-1" class=${withForm ? `two ${route.page}` : ""}>
      ${withForm && html`<${Form} />`}
      <div class="content">
        ${route.page === "task" ? html`<${TaskPage} key=${route.id} route=${route} />` : route.page === "gallery" ? html`<${Gallery} route=${route} />` : route.page === "compare" ? html`<${Compare} route=${route} />` : html`<${Recent} />`}
      </div>
    </main>
    ${route.page === "mask" && html`<${MaskEditor} />`}
    ${route.page === "help" && html`<${HelpDialog} onClose=${home} />`}
    ${(route.page === "key" || needsKey) && html`<${KeyDialog} onClose=${() => (route.page === "key" ? home() : studio.choose({ keyState: "unknown" }))} />`}`;
}

function Header() {
  const { studio, state, t } = useStudio();
  const { route, language } = state;
  const link = (page, name) => html`<a href=${`#/${page}`} aria-current=${(page || "make") === route.page ? "page" : undefined}>${t(name)}</a>`;
  return html`<header class="top">
    <h1><a href="#/">imagegen</a></h1>
    <nav aria-label=${t("nav")}>
      ${link("", "nav.make")}${link("gallery", "nav.gallery")}<a href="docs">${t("nav.docs")}</a>${link("help", "nav.help")}${link("key", "nav.key")}
      <button type="button" class="plain" lang=${language === "en" ? "zh" : "en"} aria-label=${t("language.label")} onClick=${() => chooseLanguage(studio, language === "en" ? "zh" : "en")}>${t("language")}</button>
      <button type="button" class="plain" aria-label=${t("theme")} title=${t("theme")} onClick=${() => chooseTheme(studio)}>◐</button>
    </nav>
  </header>`;
}

// The address after `#` is the state's, so the link moves the focus itself.
function skip(event) {
  event.preventDefault();
  document.getElementById("content").focus();
}

function chooseLanguage(studio, language) {
  save(LANGUAGE, language);
  document.documentElement.lang = language;
  studio.choose({ language });
}

function chooseTheme(studio) {
  const isDark = studio.state.theme ? studio.state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const theme = isDark ? "light" : "dark";
  save(THEME, theme);
  document.documentElement.dataset.theme = theme;
  studio.choose({ theme });
}

function saved(name) {
  try { return localStorage.getItem(name); } catch { return null; }
}

function save(name, value) {
  try { localStorage.setItem(name, value); } catch { /* the choice lives as long as the page */ }
}

// The session storage, or a stand-in as long-lived as the page where the browser refuses it.
function sessionStore() {
  try {
    return globalThis.sessionStorage;
  } catch {
    const values = new Map();
    return { getItem: (name) => values.get(name) ?? null, setItem: (name, value) => values.set(name, value), removeItem: (name) => values.delete(name) };
  }
}

function start() {
  const language = initialLanguage(saved(LANGUAGE), navigator.languages ?? []);
  const theme = saved(THEME);
  document.documentElement.lang = language;
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  const session = sessionStore();
  const api = new Api(base, { key: new SessionKey(session), language: () => studio.state.language, onUnauthorized: () => studio.requireKey() });
  const page = {
    hash: location.hash,
    session,
    now: () => Date.now(),
    go(hash, replace) {
      history[replace ? "replaceState" : "pushState"](null, "", hash);
      studio.onHash(hash);
    },
  };
  const studio = new Studio({ api, history: new History(), page, language, theme });
  addEventListener("hashchange", () => studio.onHash(location.hash));
  addEventListener("online", () => studio.follower.reconnect());
  addEventListener("keydown", (event) => {
    const { route } = studio.state;
    const isFree = event.key === "Escape" && !event.defaultPrevented && !document.querySelector("dialog[open]");
    if (isFree && ["task", "compare"].includes(route.page)) history.back();
  });
  render(html`<${App} studio=${studio} />`, document.getElementById("app"));
  studio.start();
}

start();
