"use strict";

/* Renders /openapi.json. Texts go in by textContent only, so nothing in the document can become markup. */

const METHODS = ["get", "post", "put", "patch", "delete"];

function made(tag, text, attributes = {}) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function resolved(api, value) {
  while (value && value.$ref) {
    value = value.$ref.slice(2).split("/").reduce((at, part) => at[part.replace(/~1/g, "/").replace(/~0/g, "~")], api);
  }
  return value;
}

function typeOf(api, schema) {
  schema = resolved(api, schema) || {};
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" | ");
  const several = schema.anyOf || schema.oneOf;
  if (several) return several.map((one) => typeOf(api, one)).join(" | ");
  if (schema.type === "array") return typeOf(api, schema.items) + "[]";
  const limits = [];
  for (const [key, sign] of [["minimum", "≥ "], ["maximum", "≤ "], ["multipleOf", "× "], ["minLength", "length ≥ "], ["maxLength", "length ≤ "]]) {
    if (schema[key] !== undefined) limits.push(sign + schema[key]);
  }
  const name = schema.title && schema.type === "object" ? schema.title : [].concat(schema.type || "any").join(" | ");
  return name + (limits.length ? " (" + limits.join(", ") + ")" : "");
}

function table(rows) {
  const element = made("table");
  for (const cells of rows) {
    const row = element.appendChild(made("tr"));
    cells.forEach((cell, at) => row.appendChild(made("td")).appendChild(made(at === 0 ? "code" : "span", cell)));
  }
  return element;
}

function fields(api, schema) {
  schema = resolved(api, schema) || {};
  const needed = schema.required || [];
  return Object.entries(schema.properties || {}).map(([name, one]) => [
    name,
    typeOf(api, one) + (needed.includes(name) ? ", required" : ""),
    (resolved(api, one) || {}).description || one.description || "",
  ]);
}

function example(content) {
  if (content.example !== undefined) return content.example;
  const first = Object.values(content.examples || {})[0];
  return first && first.value;
}

function shown(value) {
  return typeof value === "string" ? value : JSON.stringify(value, null, 2);
}

function curl(path, method, operation, api) {
  const words = ["curl -s" + (method === "get" ? "" : " -X " + method.toUpperCase()), "'" + location.origin + path + "'"];
  const body = operation.requestBody && resolved(api, operation.requestBody).content["application/json"];
  if (body) {
    const sent = example(body);
    words.push("-H 'Content-Type: application/json'");
    if (sent !== undefined) words.push("-d '" + JSON.stringify(sent).replace(/'/g, "'\\''") + "'");
  }
  return words.join(" ");
}

function described(api, path, method, operation, shared) {
  const id = method + path.replace(/[^a-z0-9]+/gi, "-");
  const section = made("section", null, { id });
  const heading = section.appendChild(made("h2"));
  heading.append(made("span", method.toUpperCase(), { class: "method " + method }), " ", made("code", path));
  if (operation.summary) section.appendChild(made("p", operation.summary));
  if (operation.description && operation.description !== operation.summary) section.appendChild(made("p", operation.description));
  section.appendChild(made("pre", curl(path, method, operation, api)));
  const parameters = [...shared, ...(operation.parameters || [])].map((one) => resolved(api, one));
  if (parameters.length) {
    section.appendChild(made("h3", "Parameters"));
    section.appendChild(table(parameters.map((one) => [one.name, one.in + ", " + typeOf(api, one.schema) + (one.required ? ", required" : ""), one.description || ""])));
  }
  const body = operation.requestBody && resolved(api, operation.requestBody).content["application/json"];
  if (body) {
    section.appendChild(made("h3", "Body"));
    section.appendChild(table(fields(api, body.schema)));
  }
  section.appendChild(made("h3", "Answers"));
  for (const [status, one] of Object.entries(operation.responses || {})) {
    const answer = resolved(api, one);
    const details = section.appendChild(made("details"));
    details.appendChild(made("summary", status + " " + (answer.description || "")));
    const headers = Object.entries(answer.headers || {}).map(([name, header]) => [name, (resolved(api, header) || {}).description || ""]);
    if (headers.length) details.appendChild(table(headers));
    for (const [kind, content] of Object.entries(answer.content || {})) {
      details.appendChild(made("code", kind));
      const rows = fields(api, content.schema);
      if (rows.length) details.appendChild(table(rows));
      const sample = example(content);
      if (sample !== undefined) details.appendChild(made("pre", shown(sample)));
    }
  }
  return [section, id];
}

async function main() {
  const api = await (await fetch("/openapi.json")).json();
  document.getElementById("about").textContent = (api.info.summary || api.info.description || "") + " OpenAPI " + api.openapi + ", version " + api.info.version + ".";
  const contents = document.getElementById("contents");
  const routes = document.getElementById("routes");
  for (const [path, item] of Object.entries(api.paths)) {
    for (const method of METHODS.filter((one) => item[one])) {
      const [section, id] = described(api, path, method, item[method], item.parameters || []);
      const link = contents.appendChild(made("a", null, { href: "#" + id }));
      link.append(made("span", method.toUpperCase(), { class: "method " + method }), " ", made("code", path));
      routes.appendChild(section);
    }
  }
}

main().catch((error) => {
  document.getElementById("about").textContent = "The document could not be read: " + error;
});
