// Search over routes, fields and their descriptions: a route is found by all words of the query together.

import { inline, make } from "./elements.js";
import { t } from "./texts.js";

const MAX_FIELDS = 6;

export class Search {
  // entries: {item: element of the contents, link, section, title, fields: () => [{name, text}]}; open: shows a field of a route.
  constructor(entries, headings, open) {
    Object.assign(this, { entries, headings, open });
    this.none = make("p", { class: "faint", role: "status" });
  }

  filter(query) {
    const words = query.trim().toLowerCase().split(/\s+/).filter(Boolean);
    for (const entry of this.entries) this.show(entry, words);
    for (const { heading, among } of this.headings) heading.hidden = among.every((entry) => entry.item.hidden);
    this.none.textContent = this.entries.some((entry) => !entry.item.hidden) ? "" : t("search.none");
  }

  show(entry, words) {
    entry.fields = entry.fields instanceof Function ? entry.fields() : entry.fields;
    const has = (text) => words.every((word) => text.includes(word));
    const fields = words.length ? entry.fields.filter(({ name, text }) => has(`${name} ${text}`.toLowerCase())) : [];
    const isShown = has(entry.title) || fields.length > 0;
    entry.item.hidden = entry.section.hidden = !isShown;
    entry.item.replaceChildren(entry.link, ...unique(fields).slice(0, MAX_FIELDS).map((field) => this.hit(entry, field)));
  }

  hit(entry, { name, text }) {
    const open = (event) => { event.preventDefault(); this.open(entry.section, name); };
    return make("a", { class: "hit", href: `#${entry.section.id}`, onclick: open }, make("code", {}, name), " ", text ? inline(text) : null);
  }
}

function unique(fields) {
  return [...new Map(fields.map((field) => [field.name, field])).values()];
}
