// Composition root of the board: the token, the store, and what it shows.

import { Api, SessionKey } from "./api.js";
import { base } from "./base.js";
import { BoardStore } from "./board-store.js";
import { BOARD_STRINGS } from "./board-strings.js";
import { Plots } from "./board-plots.js";
import { Tasks } from "./board-tasks.js";
import { Badges, Channels, Tiles } from "./board-tiles.js";
import { Header } from "./header.js";
import { useEffect, useState } from "./hooks.js";
import { Component, render } from "./preact.js";
import { applySaved, sessionStore } from "./preferences.js";
import { addStrings } from "./strings.js";
import { errorText, html, LanguageContext, useChanges, useText } from "./ui.js";

const IN_ADDRESS = /^#token=(.+)$/;
const TOKEN_NAME = "imagegen.admin";

// Returns a component that is rendered again only if one of these values of the state changed.
function partOf(Part, names) {
  return class extends Component {
    shouldComponentUpdate({ state }) {
      return names.some((name) => state[name] !== this.props.state[name]);
    }

    render(props) {
      return html`<${Part} ...${props} />`;
    }
  };
}

const NowPart = partOf(Now, ["snapshot", "minutes", "isLive", "busy", "fault"]);
const ChannelsPart = partOf(Channels, ["channels"]);
const TasksPart = partOf(Tasks, ["rows", "filter", "cursor", "busy", "fault"]);
const PlotsPart = partOf(Plots, ["minutes", "hours", "theme"]);

function App({ store }) {
  useChanges(store);
  return html`<${LanguageContext.Provider} value=${store.state.language}><${Page} key=${store.state.language} store=${store} /><//>`;
}

function Page({ store }) {
  const { t } = useText();
  const { state } = store;
  useEffect(() => { document.title = `${t("board")} · imagegen`; }, []);
  return html`<${Header} current="board" hidden=${["help", "key"]} onLanguage=${(language) => store.set({ language })} onTheme=${(theme) => store.set({ theme })} />
    <main id="content" tabindex="-1" class="board">
      ${state.tokenState === "missing" || state.tokenState === "wrong" ? html`<${Token} store=${store} />` : html`<${Board} store=${store} state=${state} />`}
    </main>`;
}

function Board({ store, state }) {
  return html`<${NowPart} store=${store} state=${state} />
    ${state.channels && html`<${ChannelsPart} state=${state} />`}
    ${state.snapshot && html`<${TasksPart} store=${store} state=${state} /><${PlotsPart} store=${store} state=${state} />`}`;
}

function Now({ store, state }) {
  const { t } = useText();
  const { snapshot, busy, fault } = state;
  const isPaused = Boolean(snapshot?.queue.pausedSince);
  return html`<section class=${state.isLive ? "now" : "now stale"}><header><h2>${t("board")}</h2><${Badges} state=${state} />
      ${snapshot && html`<div class="buttons"><button type="button" class=${isPaused ? "primary" : ""} disabled=${busy.has("pause")} title=${t("pause.hint")} onClick=${() => store.pause(!isPaused)}>${t(isPaused ? "resume" : "pause")}</button>
        <button type="button" class="plain" onClick=${() => store.useToken("")}>${t("token.forget")}</button></div>`}</header>
      ${fault?.name === "pause" && html`<p class="error" role="alert">${t("pause.failed", { message: errorText(t, fault.error) })}</p>`}
      ${snapshot && html`<${Tiles} state=${state} />`}</section>`;
}

function Token({ store }) {
  const { t } = useText();
  const [token, setToken] = useState("");
  const isWrong = store.state.tokenState === "wrong";
  const use = (event) => { event.preventDefault(); store.useToken(token.trim()); };
  return html`<section class="token"><h2>${t("token.title")}</h2><form onSubmit=${use}><p>${t("token.text")}</p>
    <div class="field"><label for="token">${t("token.label")}</label>
      <input id="token" type="password" autocomplete="off" spellcheck="false" value=${token} onInput=${({ target }) => setToken(target.value)} aria-invalid=${isWrong ? "true" : undefined} aria-describedby=${isWrong ? "token-fault" : undefined} />
      ${isWrong && html`<p id="token-fault" class="fault" role="alert">${t("token.wrong")}</p>`}</div>
    <button type="submit" class="primary" disabled=${!token.trim()}>${t("token.use")}</button></form></section>`;
}

// Takes the token out of the address, where the log's link has it, so that it is in no history and no copied link.
function takeToken(token) {
  const match = IN_ADDRESS.exec(location.hash);
  if (!match) return;
  token.value = decodeURIComponent(match[1]);
  history.replaceState(null, "", location.pathname + location.search);
}

function start() {
  addStrings(BOARD_STRINGS);
  const language = applySaved();
  const token = new SessionKey(sessionStore(), TOKEN_NAME);
  takeToken(token);
  const api = new Api(base, { key: token, language: () => store.state.language });
  const store = new BoardStore(api, token, language);
  globalThis.addEventListener("hashchange", () => { takeToken(token); store.useToken(token.value); });
  render(html`<${App} store=${store} />`, document.getElementById("app"));
  store.pollSoon();
}

start();
