// Makes elements. Texts become text nodes only, so nothing in the document or in a response can become markup.

import { t } from "./texts.js";

export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// The Markdown that the document uses: paragraphs, fenced code, `code` and **bold**.
export function prose(text) {
  return text.trim().split(/\n{2,}/).map((part) => {
    const fence = part.match(/^```\w*\n([\s\S]*?)\n```$/);
    return fence ? code(fence[1]) : make("p", {}, inline(part));
  });
}

export function inline(text) {
  return text.split(/(`[^`]+`|\*\*[^*]+\*\*)/).filter(Boolean).map((part) => {
    if (part.startsWith("`")) return make("code", {}, part.slice(1, -1));
    return part.startsWith("**") ? make("strong", {}, part.slice(2, -2)) : part;
  });
}

// A block of code with a button that copies it; `write` changes what it shows.
export function code(text = "") {
  const shown = make("code", {}, text);
  const button = make("button", { type: "button", class: "copy", onclick: copy }, t("copy"));
  const block = make("div", { class: "code" }, make("pre", { tabindex: "0" }, shown), button);
  block.write = (changed) => { shown.textContent = changed; };

  async function copy() {
    try {
      await navigator.clipboard.writeText(shown.textContent);
      button.textContent = t("copied");
    } catch {
      getSelection().selectAllChildren(shown);
      button.textContent = t("selected");
    }
    setTimeout(() => { button.textContent = t("copy"); }, 1500);
  }
  return block;
}

// A part that is made when it is opened first.
export function unfolding(title, content, attributes = {}) {
  const details = make("details", attributes, make("summary", {}, title));
  details.addEventListener("toggle", () => { if (details.open) details.append(...content()); }, { once: true });
  return details;
}

export function pretty(value) {
  return typeof value === "string" ? value : JSON.stringify(value, null, 2);
}
