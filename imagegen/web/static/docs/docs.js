// Renders /openapi.json: the introduction first, then the routes by tag.

import { base, Header, html, LanguageContext, render, SessionKey, sessionStore } from "./assets.js";
import { Call, Session } from "./call.js";
import { code, inline, make, pretty, prose, unfolding } from "./elements.js";
import { fieldRow, limits, Schemas } from "./schema.js";
import { Search } from "./search.js";
import { language, t } from "./texts.js";

const METHODS = ["get", "post", "put", "patch", "delete"];
const byId = (id) => document.getElementById(id);

function badge(method) {
  return make("span", { class: `method ${method}` }, method.toUpperCase());
}

function routesOf(api) {
  const all = [];
  for (const [group, isWebhook] of [["paths", false], ["webhooks", true]]) {
    for (const [path, item] of Object.entries(api[group] || {})) {
      for (const method of METHODS) if (item[method]) all.push({ path, method, operation: item[method], isWebhook });
    }
  }
  return all;
}

function parametersOf(schemas, parameters) {
  return make("dl", { class: "fields" }, parameters.map((each) => schemas.resolve(each)).map(({ name, in: place, required, schema, description }) =>
    fieldRow(name, required, `${place} · ${schemas.name(schema)}${limits(schema)}`, description)));
}

function asText(kind, value) {
  if (kind !== "text/event-stream") return pretty(value);
  return ["event", "id", "data"].filter((name) => value[name]).map((name) => `${name}: ${value[name]}`).join("\n");
}

// isOpen: whether the fields are shown at once.
function contentOf(schemas, content, isOpen) {
  const same = new Map();
  for (const [kind, each] of Object.entries(content || {})) {
    const key = JSON.stringify(each);
    same.set(key, { kinds: [...(same.get(key)?.kinds || []), kind], each });
  }
  return [...same.values()].flatMap(({ kinds, each }) => {
    const title = schemas.name(each.schema || {});
    return [
      make("p", { class: "type" }, kinds.join(", ")),
      ...(!each.schema ? [] : isOpen ? schemas.show(each.schema) : [unfolding(title.length < 60 ? title : t("fields"), () => schemas.show(each.schema))]),
      ...Object.entries(each.examples || {}).map(([name, { value }]) => unfolding(t("example", { name }), () => [code(asText(kinds[0], value))])),
    ];
  });
}

function answersOf(schemas, responses) {
  return Object.entries(responses).map(([status, each]) => {
    const answer = schemas.resolve(each);
    const title = make("span", {}, make("span", { class: `status s${status[0]}` }, status), " ", inline(answer.description));
    const headers = Object.entries(answer.headers || {});
    return unfolding(title, () => [
      ...contentOf(schemas, answer.content, false),
      ...(headers.length ? [unfolding(t("headers"), () => [make("dl", { class: "fields" }, headers.map(([name, header]) => fieldRow(name, false, "", schemas.resolve(header).description)))])] : []),
    ], { class: "response" });
  });
}

function routeOf(session, schemas, { path, method, operation, isWebhook }) {
  const content = () => [
    ...prose(operation.description || ""),
    ...(isWebhook ? [] : new Call(session, schemas, method, path, operation).elements()),
    ...(operation.requestBody ? [make("h4", {}, t("body")), ...contentOf(schemas, operation.requestBody.content, true)] : []),
    ...(operation.parameters ? [make("h4", {}, isWebhook ? t("headers") : t("parameters")), parametersOf(schemas, operation.parameters)] : []),
    make("h4", {}, t("answers")),
    ...answersOf(schemas, operation.responses),
  ];
  const title = make("span", { class: "title" }, badge(method), " ", make("code", {}, path), " ", make("span", { class: "summary" }, operation.summary));
  return unfolding(title, content, { class: "route", id: operation.operationId });
}

// Returns name and description of each field of a route.
function fieldsOf(schemas, { operation }) {
  const parameters = (operation.parameters || []).map((each) => schemas.resolve(each)).map(({ name, description }) => ({ name, text: description || "" }));
  const contents = [operation.requestBody, ...Object.entries(operation.responses).filter(([status]) => status < 300).map(([, each]) => schemas.resolve(each))];
  const media = contents.flatMap((each) => Object.values(each?.content || {}));
  return [...media.flatMap(({ schema }) => (schema ? schemas.texts(schema) : [])), ...parameters];
}

function openRoute(section, field) {
  const show = () => {
    for (const row of document.querySelectorAll(".marked")) row.classList.remove("marked");
    const row = field ? section.querySelector(`[data-field="${CSS.escape(field)}"]`) : null;
    row?.classList.add("marked");
    (row ?? section).scrollIntoView({ block: row ? "center" : "start" });
  };
  if (section.open) return show();
  section.addEventListener("toggle", show, { once: true }); // after the listener that makes its content
  section.open = true;
  return undefined;
}

function openNamed() {
  const named = byId(decodeURIComponent(location.hash.slice(1)));
  if (named?.matches("details.route")) openRoute(named);
}

function addKeyField(session) {
  const input = byId("key");
  input.value = session.key.value;
  byId("key-label").textContent = t("key");
  byId("key-text").textContent = t("key.text");
  input.addEventListener("input", () => { session.key.value = input.value.trim(); session.changed(); });
}

function addHeader() {
  const header = html`<${LanguageContext.Provider} value=${language}><${Header} current="docs" hidden=${["help", "key"]} onLanguage=${() => location.reload()} /><//>`;
  render(header, byId("header"));
}

function addRoutes(api, session) {
  const schemas = new Schemas(api);
  const routes = routesOf(api);
  const entries = [], headings = [];
  for (const tag of api.tags) {
    const among = routes.filter(({ operation }) => operation.tags.includes(tag.name)).map((route) => {
      const { method, path, operation } = route;
      const section = routeOf(session, schemas, route);
      const link = make("a", { href: `#${section.id}`, title: operation.summary }, badge(method), " ", path);
      const title = `${method} ${path} ${operation.summary} ${operation.description}`.toLowerCase();
      return { item: make("div", {}, link), link, section, title, fields: () => fieldsOf(schemas, route) };
    });
    const named = make("h2", {}, tag.name), part = make("section", {}, make("h2", {}, tag.name), make("p", { class: "faint" }, inline(tag.description)), among.map(({ section }) => section));
    byId("contents").append(named, ...among.map(({ item }) => item));
    byId("routes").append(part);
    headings.push({ heading: named, among }, { heading: part, among });
    entries.push(...among);
  }
  const search = new Search(entries, headings, openRoute);
  byId("contents").before(search.none);
  const input = byId("search");
  input.addEventListener("input", () => search.filter(input.value));
  if (input.value) search.filter(input.value); // typed while the document was loading
}

async function main() {
  addHeader();
  const session = new Session(new SessionKey(sessionStore()));
  addKeyField(session);
  byId("search-label").textContent = t("search");
  byId("search").placeholder = t("search.hint");
  byId("side").setAttribute("aria-label", t("contents"));
  const api = await (await fetch("openapi.json")).json();
  byId("version").replaceChildren(`${api.info.summary} Version ${api.info.version}, OpenAPI ${api.openapi}: `, make("a", { href: "openapi.json" }, "/openapi.json"));
  byId("introduction").append(...prose(api.info.description.replaceAll("$BASE", base)));
  addRoutes(api, session);
  addEventListener("hashchange", openNamed);
  openNamed();
}

main().catch((error) => {
  byId("version").textContent = t("failed", { reason: error.message });
});
