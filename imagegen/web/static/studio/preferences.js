// What a person chose for all pages of this browser: the language and the theme; and the key of this tab.

import { initialLanguage } from "./strings.js";

const LANGUAGE = "imagegen.language";
const THEME = "imagegen.theme";
const THEMES = ["light", "dark"];

// Applies the saved language and theme to the document; returns the language. Without a theme, the system's is used.
export function applySaved() {
  const language = initialLanguage(saved(LANGUAGE), navigator.languages ?? []);
  const theme = saved(THEME);
  document.documentElement.lang = language;
  if (THEMES.includes(theme)) document.documentElement.dataset.theme = theme;
  return language;
}

export function saveLanguage(language) {
  save(LANGUAGE, language);
  document.documentElement.lang = language;
}

// Returns the theme after a change to the other one.
export function switchTheme() {
  const chosen = document.documentElement.dataset.theme;
  const isDark = chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const theme = isDark ? "light" : "dark";
  save(THEME, theme);
  document.documentElement.dataset.theme = theme;
  return theme;
}

// Returns the session storage, or a replacement as long-lived as the page where the browser refuses it.
export function sessionStore() {
  try {
    return globalThis.sessionStorage;
  } catch {
    const values = new Map();
    return { getItem: (name) => values.get(name) ?? null, setItem: (name, value) => values.set(name, value), removeItem: (name) => values.delete(name) };
  }
}

function saved(name) {
  try { return localStorage.getItem(name); } catch { return null; }
}

function save(name, value) {
  try { localStorage.setItem(name, value); } catch { /* the choice lives as long as the page */ }
}
