// Dialogs of the whole page: the key, and the help about the keyboard.

import { useState } from "./hooks.js";
import { html, Modal, useText } from "./ui.js";

const HELP = [["Ctrl + Enter", "help.submit"], ["Esc", "help.escape"], ["← → ↑ ↓", "help.arrows"], ["Enter", "help.enter"], ["P", "help.pin"], ["Delete", "help.delete"], ["Ctrl + V", "help.paste"]];

// onUse: called with the key that was typed. onForget: called to forget the key; without it there is none.
export function KeyDialog({ isWrong, onUse, onForget, onClose }) {
  const { t } = useText();
  const [key, setKey] = useState("");
  const use = (event) => { event.preventDefault(); onUse(key.trim()); };
  return html`<${Modal} label=${t("key.title")} onClose=${onClose}><form onSubmit=${use}>
    <p>${t("key.text")}</p>
    <div class="field"><label for="key">${t("key.label")}</label>
      <input id="key" type="password" autocomplete="off" autofocus spellcheck="false" value=${key} onInput=${({ target }) => setKey(target.value)} aria-invalid=${isWrong ? "true" : undefined} aria-describedby=${isWrong ? "key-fault" : undefined} />
      ${isWrong && html`<p id="key-fault" class="fault" role="alert">${t("key.wrong")}</p>`}</div>
    <div class="buttons"><button type="submit" class="primary" disabled=${!key.trim()}>${t("key.use")}</button>
      ${onForget && html`<button type="button" class="plain" onClick=${onForget}>${t("key.forget")}</button>`}</div>
  </form><//>`;
}

export function HelpDialog({ onClose }) {
  const { t } = useText();
  return html`<${Modal} label=${t("help.title")} onClose=${onClose}>
    <dl class="help">${HELP.map(([keys, text]) => html`<div key=${keys}><dt><kbd>${keys}</kbd></dt><dd>${t(text)}</dd></div>`)}</dl>
  <//>`;
}
