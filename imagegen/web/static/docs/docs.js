// Renders /openapi.json: what is said first, and the routes by tag.

import { Call } from "./call.js";
import { base, code, inline, make, pretty, prose } from "./elements.js";
import { Schemas, unfolding } from "./schema.js";

const METHODS = ["get", "post", "put", "patch", "delete"];

function badge(method) {
  return make("span", { class: `method ${method}` }, method.toUpperCase());
}

function routesOf(api) {
  const all = [];
  for (const [group, sent] of [["paths", false], ["webhooks", true]]) {
    for (const [path, item] of Object.entries(api[group] || {})) {
      for (const method of METHODS) if (item[method]) all.push({ path, method, operation: item[method], sent });
    }
  }
  return all;
}

function parameterTable(schemas, parameters) {
  return make("table", { class: "fields" }, parameters.map((one) => schemas.resolve(one)).map((one) => make("tr", {},
    make("th", { scope: "row" }, make("code", {}, one.name), one.required ? make("b", { title: "required" }, "*") : null),
    make("td", {}, make("div", { class: "type" }, `${one.in} · ${schemas.name(one.schema)}`), make("div", {}, inline(one.description || ""))))));
}

function asText(kind, value) {
  if (kind !== "text/event-stream") return pretty(value);
  return ["event", "id", "data"].filter((name) => value[name]).map((name) => `${name}: ${value[name]}`).join("\n");
}

function examplesOf(kind, content) {
  return Object.entries(content.examples || {}).map(([name, one]) =>
    unfolding(`Example: ${name}`, () => [code(asText(kind, one.value))]));
}

function contentOf(schemas, content) {
  const same = new Map();
  for (const [kind, one] of Object.entries(content || {})) {
    const key = JSON.stringify(one);
    same.set(key, { kinds: [...(same.get(key)?.kinds || []), kind], one });
  }
  return [...same.values()].flatMap(({ kinds, one }) => [
    make("p", { class: "type" }, kinds.join(", ")),
    one.schema ? unfolding(schemas.name(one.schema).length < 60 ? schemas.name(one.schema) : "Fields", () => schemas.show(one.schema)) : null,
    ...examplesOf(kinds[0], one),
  ]);
}

function answersOf(schemas, responses) {
  return Object.entries(responses).map(([status, one]) => {
    const answer = schemas.resolve(one);
    const title = make("span", {}, make("span", { class: `status s${status[0]}` }, status), " ", inline(answer.description));
    return unfolding(title, () => [
      ...contentOf(schemas, answer.content),
      unfolding("Headers", () => [make("table", { class: "fields" }, Object.entries(answer.headers || {}).map(([name, header]) =>
        make("tr", {}, make("th", { scope: "row" }, make("code", {}, name)), make("td", {}, inline(schemas.resolve(header).description)))))]),
    ], { class: "response" });
  });
}

function route(schemas, { path, method, operation, sent }) {
  const content = () => [
    ...prose(operation.description || ""),
    ...(sent ? [] : new Call(schemas, method, path, operation).elements()),
    ...(operation.parameters ? [make("h4", {}, sent ? "Headers" : "Parameters"), parameterTable(schemas, operation.parameters)] : []),
    ...(operation.requestBody ? [make("h4", {}, "Body"), ...contentOf(schemas, operation.requestBody.content)] : []),
    make("h4", {}, "Answers"),
    ...answersOf(schemas, operation.responses),
  ];
  const title = make("span", { class: "title" }, badge(method), " ", make("code", {}, path), " ", make("span", { class: "summary" }, operation.summary));
  return unfolding(title, content, { class: "route", id: operation.operationId });
}

function filterBy(entries, text) {
  const wanted = text.trim().toLowerCase();
  for (const { link, section, words } of entries) {
    link.hidden = section.hidden = !words.includes(wanted);
  }
}

function openNamed() {
  const named = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (named?.matches("details")) {
    named.open = true;
    named.scrollIntoView();
  }
}

async function main() {
  const api = await (await fetch("openapi.json")).json();
  const schemas = new Schemas(api);
  const byId = (id) => document.getElementById(id);
  byId("version").replaceChildren(`${api.info.summary} Version ${api.info.version}, OpenAPI ${api.openapi}: `, make("a", { href: "openapi.json" }, "/openapi.json"));
  byId("introduction").append(...prose(api.info.description.replaceAll("$BASE", base)));
  const entries = [];
  const routes = routesOf(api);
  for (const tag of api.tags) {
    const tagged = routes.filter(({ operation }) => operation.tags.includes(tag.name));
    byId("contents").append(make("h2", {}, tag.name));
    byId("routes").append(make("h2", {}, tag.name), make("p", {}, inline(tag.description)));
    for (const one of tagged) {
      const section = route(schemas, one);
      const link = make("a", { href: `#${section.id}`, title: one.operation.summary }, badge(one.method), " ", one.path);
      entries.push({ link, section, words: `${one.method} ${one.path} ${one.operation.summary}`.toLowerCase() });
      byId("contents").append(link);
      byId("routes").append(section);
    }
  }
  byId("filter").addEventListener("input", (event) => filterBy(entries, event.target.value));
  addEventListener("hashchange", openNamed);
  openNamed();
}

main().catch((error) => {
  document.getElementById("version").textContent = `The document could not be shown: ${error.message}`;
});
