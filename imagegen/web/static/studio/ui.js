// What all components share: templates, the studio in the context, texts in the person's language, and a clock.

import { createContext, h } from "./preact.js";
import { useContext, useEffect, useLayoutEffect, useRef, useState } from "./hooks.js";
import htm from "./htm.js";
import { translate } from "./strings.js";

export const html = htm.bind(h);

export const StudioContext = createContext(null);

export function useStudio() {
  const studio = useContext(StudioContext);
  const { language } = studio.state;
  return { studio, state: studio.state, t: (name, values) => translate(language, name, values) };
}

// Renders the component again after each change of the studio's state.
export function useChanges(studio) {
  const [, setState] = useState(studio.state);
  useEffect(() => studio.subscribe(() => setState(studio.state)), [studio]);
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
export function Modal({ label, onClose, wide = false, children }) {
  const ref = useRef(null);
  const { t } = useStudio();
  useLayoutEffect(() => {
    const dialog = ref.current;
    const before = document.activeElement;
    dialog.showModal();
    return () => { dialog.close(); before?.focus?.(); };
  }, []);
  const onCancel = (event) => { event.preventDefault(); onClose(); };
  return html`<dialog ref=${ref} class=${wide ? "modal wide" : "modal"} aria-label=${label} onCancel=${onCancel}>
    <header><h2>${label}</h2><button type="button" class="plain close" aria-label=${t("close")} onClick=${onClose}>✕</button></header>
    ${children}
  </dialog>`;
}

// A prompt, shown as text that cannot change the direction of what is around it.
export function PromptText({ text, class: name = "prompt" }) {
  return html`<bdi class=${name} dir="auto">${text}</bdi>`;
}

// Returns the text of a field's fault: ours, or the server's message.
export function faultText(t, fault) {
  if (fault.text) return t(fault.text, fault.values);
  return fault.error ? t("inputs.failed", { name: fault.name, reason: errorText(t, fault.error) }) : fault.message;
}

export function errorText(t, error) {
  if (error.code === "no_answer") return t("error.no_answer");
  if (error.code === "rate_limited") return t("error.rate_limited");
  if (error.code === "budget_exceeded") return t("error.budget_exceeded", { time: localTime(error.resetsAt) });
  return error.message || t("error.other", { message: error.code });
}

export function localTime(text, language) {
  const at = new Date(text);
  return Number.isNaN(at.getTime()) ? "" : at.toLocaleString(language, { dateStyle: "medium", timeStyle: "short" });
}
