// Shows schemas as tables of fields, and finds the texts of all fields.

import { inline, make, unfolding } from "./elements.js";
import { t } from "./texts.js";

const MAX_DEPTH = 4;
const LIMITS = [
  ["minimum", "≥ "], ["maximum", "≤ "], ["multipleOf", "a multiple of "], ["minLength", "length ≥ "],
  ["maxLength", "length ≤ "], ["minItems", "entries ≥ "], ["maxItems", "entries ≤ "], ["format", ""],
];

export class Schemas {
  constructor(api) {
    this.api = api;
  }

  // Returns what a reference points at; what stands beside the reference comes on top.
  resolve(part) {
    if (!part || !part.$ref) return part || {};
    const { $ref, ...beside } = part;
    const unescape = (name) => name.replaceAll("~1", "/").replaceAll("~0", "~");
    const target = $ref.slice(2).split("/").reduce((at, name) => at[unescape(name)], this.api);
    const resolved = this.resolve(target);
    const properties = beside.properties ? { properties: merged(resolved.properties, beside.properties) } : {};
    return { ...resolved, ...beside, ...properties };
  }

  name(schema) {
    if (schema.$ref) return schema.$ref.split("/").pop();
    if (schema.const !== undefined) return JSON.stringify(schema.const);
    if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
    if (schema.anyOf) return schema.anyOf.map((choice) => this.name(choice)).join(" | ");
    if (schema.type === "array") return `${this.name(schema.items || {})}[]`;
    if (schema.contentSchema) return `JSON of ${this.name(schema.contentSchema)}`;
    return [schema.type || "any"].flat().join(" | ");
  }

  // Returns the parts of a schema that have fields of their own, each with its name.
  objects(schema) {
    const resolved = this.resolve(schema);
    if (resolved.anyOf) return resolved.anyOf.flatMap((choice) => this.objects(choice));
    if (resolved.items) return this.objects(resolved.items);
    if (resolved.contentSchema) return this.objects(resolved.contentSchema);
    return resolved.properties ? [[schema.$ref ? this.name(schema) : "", resolved]] : [];
  }

  // Returns name and description of every field, also of those inside of others.
  texts(schema, seen = new Set()) {
    return this.objects(schema).flatMap(([name, object]) => {
      if (seen.has(name)) return [];
      if (name) seen.add(name);
      return Object.entries(object.properties).flatMap(([field, part]) =>
        [{ name: field, text: this.resolve(part).description || "" }, ...this.texts(part, seen)]);
    });
  }

  show(schema, depth = 0) {
    const objects = this.objects(schema);
    if (!objects.length) return [make("p", {}, make("code", {}, this.name(schema)))];
    return objects.map(([name, object]) => make("div", {},
      objects.length > 1 && name ? make("p", { class: "choice" }, name) : null,
      object.description && depth === 0 ? make("p", {}, inline(object.description)) : null,
      this.fields(object, depth)));
  }

  fields(object, depth) {
    const needed = object.required || [];
    return make("dl", { class: "fields" }, Object.entries(object.properties).map(([name, schema]) => {
      const resolved = this.resolve(schema);
      const deeper = depth < MAX_DEPTH && this.objects(schema).length > 0;
      return fieldRow(name, needed.includes(name), `${this.name(schema)}${limits(resolved)}`, resolved.description, [
        example(resolved),
        deeper ? unfolding(t("deeper", { name }), () => this.show(schema, depth + 1)) : null,
      ]);
    }));
  }
}

// A field of a table: its name and type, and what is said about it.
export function fieldRow(name, required, type, text, more = []) {
  return make("div", { "data-field": name },
    make("dt", {}, make("code", {}, name), required ? make("span", { class: "required" }, ` ${t("required")}`) : null),
    make("dd", {}, text ? make("div", {}, inline(text)) : null, make("div", { class: "type" }, type), ...more));
}

function example(schema) {
  const [value] = schema.examples || [];
  if (value === undefined || value === null || schema.const !== undefined) return null;
  const text = JSON.stringify(value);
  return text.length > 90 ? null : make("div", { class: "type" }, `e.g. ${text}`);
}

function merged(fields, more) {
  const all = { ...fields };
  for (const [name, schema] of Object.entries(more)) all[name] = { ...all[name], ...schema };
  return all;
}

export function limits(schema) {
  const shown = LIMITS.filter(([key]) => schema[key] !== undefined).map(([key, sign]) => sign + amount(schema[key]));
  if (schema.default !== undefined) shown.push(`default ${JSON.stringify(schema.default)}`);
  return shown.length ? ` · ${shown.join(" · ")}` : "";
}

function amount(value) {
  return typeof value === "number" && value > Number.MAX_SAFE_INTEGER ? "2^63 - 1" : value;
}
