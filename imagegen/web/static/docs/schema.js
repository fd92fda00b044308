// Owns the showing of schemas, as tables of fields that unfold.

import { inline, make } from "./elements.js";

const MAX_DEPTH = 4;
const LIMITS = [
  ["minimum", "≥ "], ["maximum", "≤ "], ["multipleOf", "a multiple of "], ["minLength", "length ≥ "],
  ["maxLength", "length ≤ "], ["minItems", "entries ≥ "], ["maxItems", "entries ≤ "], ["format", ""],
];

export class Schemas {
  constructor(api) {
    this.api = api;
  }

  // What a reference points at; what stands beside the reference comes on top.
  resolve(part) {
    if (!part || !part.$ref) return part || {};
    const { $ref, ...beside } = part;
    const unescape = (name) => name.replaceAll("~1", "/").replaceAll("~0", "~");
    const target = $ref.slice(2).split("/").reduce((at, name) => at[unescape(name)], this.api);
    const found = this.resolve(target);
    const properties = beside.properties ? { properties: merged(found.properties, beside.properties) } : {};
    return { ...found, ...beside, ...properties };
  }

  name(schema) {
    if (schema.$ref) return schema.$ref.split("/").pop();
    if (schema.const !== undefined) return JSON.stringify(schema.const);
    if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" | ");
    if (schema.anyOf) return schema.anyOf.map((one) => this.name(one)).join(" | ");
    if (schema.type === "array") return `${this.name(schema.items || {})}[]`;
    if (schema.contentSchema) return `JSON of ${this.name(schema.contentSchema)}`;
    return [schema.type || "any"].flat().join(" | ");
  }

  // The parts of a schema that have fields of their own.
  objects(schema) {
    const found = this.resolve(schema);
    if (found.anyOf) return found.anyOf.flatMap((one) => this.objects(one));
    if (found.items) return this.objects(found.items);
    if (found.contentSchema) return this.objects(found.contentSchema);
    return found.properties ? [[schema.$ref ? this.name(schema) : "", found]] : [];
  }

  show(schema, depth = 0) {
    const objects = this.objects(schema);
    if (!objects.length) return [make("p", {}, make("code", {}, this.name(schema)))];
    return objects.map(([name, object]) => make("div", {},
      objects.length > 1 ? make("h5", {}, name) : null,
      object.description && depth === 0 ? make("p", {}, inline(object.description)) : null,
      this.fields(object, depth)));
  }

  fields(object, depth) {
    const needed = object.required || [];
    return make("table", { class: "fields" }, Object.entries(object.properties).map(([name, schema]) => {
      const found = this.resolve(schema);
      const deeper = depth < MAX_DEPTH && this.objects(schema).length > 0;
      return make("tr", {},
        make("th", { scope: "row" }, make("code", {}, name), needed.includes(name) ? make("b", { title: "required" }, "*") : null),
        make("td", {},
          make("div", { class: "type" }, this.name(schema), limits(found)),
          found.description ? make("div", {}, inline(found.description)) : null,
          deeper ? unfolding("Fields", () => this.show(schema, depth + 1)) : null));
    }));
  }
}

// A part that is made when it is opened first.
export function unfolding(title, content, attributes = {}) {
  const details = make("details", attributes, make("summary", {}, title));
  details.addEventListener("toggle", () => { if (details.open) details.append(...content()); }, { once: true });
  return details;
}

function merged(fields, more) {
  const all = { ...fields };
  for (const [name, schema] of Object.entries(more)) all[name] = { ...all[name], ...schema };
  return all;
}

function limits(schema) {
  const said = LIMITS.filter(([key]) => schema[key] !== undefined).map(([key, sign]) => sign + amount(schema[key]));
  if (schema.default !== undefined) said.push(`default ${JSON.stringify(schema.default)}`);
  return said.length ? ` · ${said.join(" · ")}` : "";
}

function amount(value) {
  return typeof value === "number" && value > Number.MAX_SAFE_INTEGER ? "2^63 - 1" : value;
}
