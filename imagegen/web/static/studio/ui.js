// What the components of all pages share: templates, texts in the person's language, a clock, and dialogs.

import { createContext, h } from "./preact.js";
import { useContext, useEffect, useLayoutEffect, useRef, useState } from "./hooks.js";
import htm from "./htm.js";
import { translate } from "./strings.js";

export const html = htm.bind(h);

// The language of the page: its root provides it.
export const LanguageContext = createContext("en");

// Returns the language, and `t`, which returns a text in it.
export function useText() {
  const language = useContext(LanguageContext);
  return { language, t: (name, values) => translate(language, name, values) };
}

// Renders the component again after each change of a store's state. store: {state, subscribe(listener)}.
export function useChanges(store) {
  const [, setState] = useState(store.state);
  useEffect(() => {
    setState(store.state); // it may have changed between the first rendering and this effect, which comes after the paint
    return store.subscribe(() => setState(store.state));
  }, [store]);
}

// Returns the time in milliseconds, which changes each second while `isActive`.
export function useNow(isActive) {
  const [, setNow] = useState(0);
  useEffect(() => {
    if (!isActive) return undefined;
    const timer = setInterval(() => setNow(Date.now()), 1000);
    return () => clearInterval(timer);
  }, [isActive]);
  return Date.now();
}

// A modal dialog: the browser keeps the focus in it, Esc closes it, and the focus returns to where it was.
export function Modal({ label, onClose, onKeyDown, wide = false, children }) {
  const ref = useRef(null);
  const { t } = useText();
  useLayoutEffect(() => {
    const dialog = ref.current;
    const before = document.activeElement;
    dialog.showModal();
    return () => { dialog.close(); before?.focus?.(); };
  }, []);
  const onCancel = (event) => { event.preventDefault(); onClose(); };
  return html`<dialog ref=${ref} class=${wide ? "modal wide" : "modal"} aria-label=${label} onCancel=${onCancel} onKeyDown=${onKeyDown}>
    <header><h2>${label}</h2><button type="button" class="plain close" aria-label=${t("close")} onClick=${onClose}>✕</button></header>
    ${children}
  </dialog>`;
}

// A prompt, shown as text that cannot change the direction of what is around it.
export function PromptText({ text, class: name = "prompt" }) {
  return html`<bdi class=${name} dir="auto">${text}</bdi>`;
}

export function errorText(t, error) {
  if (error.code === "no_answer") return t("error.no_answer");
  if (error.code === "rate_limited") return t("error.rate_limited");
  if (error.code === "budget_exceeded") return t("error.budget_exceeded", { time: localTime(error.resetsAt, document.documentElement.lang) });
  return error.message || t("error.other", { message: error.code });
}

export function localTime(text, language) {
  const at = new Date(text);
  return Number.isNaN(at.getTime()) ? "" : at.toLocaleString(language, { dateStyle: "medium", timeStyle: "short" });
}
