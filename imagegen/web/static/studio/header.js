// Header of all pages: links between them, the language and the theme.

import { base } from "./base.js";
import { saveLanguage, switchTheme } from "./preferences.js";
import { html, useText } from "./ui.js";

// Addresses relative to the service's root; those of the studio are of its states.
const LINKS = [["make", "/#/"], ["gallery", "/#/gallery"], ["board", "/board"], ["docs", "/docs"], ["help", "/#/help"], ["key", "/#/key"]];

// current: name of the page that is open. hidden: names of links to leave out. onLanguage, onTheme: called with the new value.
export function Header({ current, hidden = [], onLanguage, onTheme = () => {} }) {
  const { t, language } = useText();
  const other = language === "en" ? "zh" : "en";
  const chooseLanguage = () => { saveLanguage(other); onLanguage(other); };
  return html`<a class="skip" href="#content" onClick=${skip}>${t("skip")}</a>
    <header class="top">
      <h1><a href=${`${base}/#/`}>imagegen</a></h1>
      <nav aria-label=${t("nav")}>
        ${LINKS.filter(([name]) => !hidden.includes(name)).map(([name, path]) => html`<a key=${name} href=${base + path} aria-current=${name === current ? "page" : undefined}>${t(`nav.${name}`)}</a>`)}
        <button type="button" class="plain" lang=${other} aria-label=${t("language.label")} onClick=${chooseLanguage}>${t("language")}</button>
        <button type="button" class="plain" aria-label=${t("theme")} title=${t("theme")} onClick=${() => onTheme(switchTheme())}>◐</button>
      </nav>
    </header>`;
}

// The address after `#` may be the state's, so the link moves the focus itself. Each page has a <main id="content" tabindex="-1">.
function skip(event) {
  event.preventDefault();
  document.getElementById("content").focus();
}
