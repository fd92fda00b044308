// Composition root of the studio: builds its parts, and renders the page of the address.

import { Api, SessionKey } from "./api.js";
import { base } from "./base.js";
import { StudioContext, useStudio } from "./context.js";
import { HelpDialog, KeyDialog } from "./dialogs.js";
import { Form } from "./form.js";
import { Compare, Gallery, Recent } from "./gallery.js";
import { Header } from "./header.js";
import { History } from "./history.js";
import { MaskEditor } from "./mask.js";
import { useEffect } from "./hooks.js";
import { render } from "./preact.js";
import { applySaved, sessionStore } from "./preferences.js";
import { parseRoute } from "./route.js";
import { Studio } from "./studio.js";
import { Tabs } from "./tabs.js";
import { stateName, TaskPage } from "./task.js";
import { html, LanguageContext, useChanges } from "./ui.js";

function App({ studio }) {
  useChanges(studio);
  return html`<${LanguageContext.Provider} value=${studio.state.language}><${StudioContext.Provider} value=${studio}><${Page} key=${studio.state.language} /><//><//>`;
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
  return html`<${Header} current=${route.page} onLanguage=${(language) => studio.choose({ language })} />
    <main id="content" tabindex="-1" class=${withForm ? `two ${route.page}` : ""}>
      ${withForm && html`<${Form} />`}
      <div class="content">
        ${route.page === "task" ? html`<${TaskPage} key=${route.id} route=${route} />` : route.page === "gallery" ? html`<${Gallery} route=${route} />` : route.page === "compare" ? html`<${Compare} route=${route} />` : html`<${Recent} />`}
      </div>
    </main>
    ${route.page === "mask" && html`<${MaskEditor} />`}
    ${route.page === "help" && html`<${HelpDialog} onClose=${home} />`}
    ${(route.page === "key" || needsKey) && html`<${Key} isOpened=${route.page === "key"} onClose=${home} />`}`;
}

// Dialog of the key: at its own address, and where the service refuses the requests of this tab.
function Key({ isOpened, onClose }) {
  const { studio, state } = useStudio();
  const use = async (key) => {
    await studio.useKey(key);
    const isShown = parseRoute(location.hash).page === "key"; // the event of a new address comes after it
    if (!["wrong", "missing"].includes(studio.state.keyState) && isShown) onClose();
  };
  const forget = state.keyState === "accepted" ? () => studio.useKey("") : undefined;
  return html`<${KeyDialog} isWrong=${state.keyState === "wrong"} onUse=${use} onForget=${forget} onClose=${() => (isOpened ? onClose() : studio.choose({ keyState: "unknown" }))} />`;
}

function start() {
  const language = applySaved();
  const session = sessionStore();
  const api = new Api(base, { key: new SessionKey(session), language: () => studio.state.language, onUnauthorized: () => studio.requireKey() });
  const page = {
    hash: location.hash,
    session,
    now: () => Date.now(),
    sleep: (ms) => new Promise((resolve) => setTimeout(resolve, ms)),
    go(hash, replace) {
      history[replace ? "replaceState" : "pushState"](null, "", hash);
      studio.onHash(hash);
    },
    save(blob, name) {
      const href = URL.createObjectURL(blob);
      Object.assign(document.createElement("a"), { href, download: name }).click();
      setTimeout(() => URL.revokeObjectURL(href), 60_000);
    },
  };
  const tabs = new Tabs();
  const studio = new Studio({ api, history: new History(), tabs, page, language });
  tabs.open(studio);
  addEventListener("pagehide", () => tabs.close());
  addEventListener("visibilitychange", () => { if (!document.hidden) studio.followAll(); });
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
