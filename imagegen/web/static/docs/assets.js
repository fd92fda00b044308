// What this page shares with the studio. The page names the address of those modules, which changes with their content.

const icon = document.querySelector("link[rel=icon]").href;
const load = (name) => import(new URL(name, icon).href);

export const [{ base }, { render }, { html, LanguageContext }, { Header }, { applySaved, sessionStore }, { SessionKey }] = await Promise.all(
  ["base.js", "preact.js", "ui.js", "header.js", "preferences.js", "api.js"].map(load));
