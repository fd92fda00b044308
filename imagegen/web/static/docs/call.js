// Owns the calling of a route: its form, the curl command that does the same, and the answer.

import { base, code, make, pretty } from "./elements.js";

export class Call {
  // schemas: to resolve references; examples: names and values of bodies.
  constructor(schemas, method, path, operation) {
    this.method = method.toUpperCase();
    this.path = path;
    this.inputs = [];
    this.body = null;
    this.command = code();
    this.answer = make("div", { class: "answer", "aria-live": "polite" });
    this.form = make("form", { onsubmit: (event) => this.send(event), oninput: () => this.refresh() });
    for (const parameter of operation.parameters || []) this.addParameter(schemas.resolve(parameter));
    if (operation.security) this.addField("Authorization", "header", "Bearer and the admin token", false, "password");
    if (operation.requestBody) this.addBody(operation.requestBody.content["application/json"]);
    this.button = make("button", { type: "submit" }, "Send");
    this.form.append(make("div", { class: "send" }, this.button));
    this.refresh();
  }

  elements() {
    return [this.command, this.form, this.answer];
  }

  addParameter(parameter) {
    const given = parameter.required ? parameter.example ?? "" : "";
    const hint = parameter.example ?? parameter.schema.default ?? "";
    this.addField(parameter.name, parameter.in, hint, parameter.required, "text", given);
  }

  addField(name, place, hint, required, type, value = "") {
    const input = make("input", { type, placeholder: hint, required, value, autocomplete: "off", spellcheck: "false" });
    this.inputs.push({ name, place, input });
    this.form.append(make("label", {}, make("span", {}, make("code", {}, name), ` ${place}`), input));
  }

  addBody(content) {
    const examples = Object.entries(content.examples || {});
    this.body = make("textarea", { spellcheck: "false", "aria-label": "Body" }, pretty(examples[0]?.[1].value ?? {}));
    this.body.rows = Math.min(this.body.value.split("\n").length + 1, 14);
    if (examples.length > 1) {
      const choose = (event) => { this.body.value = pretty(content.examples[event.target.value].value); };
      this.form.append(make("select", { "aria-label": "Example", onchange: (event) => { choose(event); this.refresh(); } },
        examples.map(([name]) => make("option", { value: name }, name))));
    }
    this.form.append(this.body);
  }

  request() {
    const query = new URLSearchParams();
    const headers = {};
    let path = this.path;
    for (const { name, place, input } of this.inputs) {
      const value = input.value.trim();
      if (place === "path") path = path.replace(`{${name}}`, encodeURIComponent(value));
      else if (value && place === "query") query.set(name, value);
      else if (value && name === "Authorization") headers[name] = `Bearer ${value}`;
      else if (value) headers[name] = value;
    }
    if (this.body) headers["Content-Type"] = "application/json";
    const asked = query.toString();
    const url = base + path + (asked && `?${asked}`);
    return { url, method: this.method, headers, body: this.body?.value };
  }

  refresh() {
    const { url, method, headers, body } = this.request();
    const words = ["curl -si", ...(method === "GET" || body ? [] : ["-X", method]), quoted(url)];
    for (const [name, value] of Object.entries(headers)) words.push("-H", quoted(`${name}: ${value}`));
    if (body) words.push("-d", quoted(compact(body)));
    this.command.write(words.join(" "));
  }

  async send(event) {
    event.preventDefault();
    const { url, ...options } = this.request();
    this.stop?.abort();
    this.stop = new AbortController();
    this.answer.replaceChildren(make("p", {}, "Waiting …"));
    try {
      await this.show(await fetch(url, { ...options, signal: this.stop.signal }));
    } catch (error) {
      if (error.name !== "AbortError") this.answer.replaceChildren(make("p", {}, `No answer: ${error.message}`));
    }
  }

  async show(response) {
    const kind = response.headers.get("Content-Type") || "";
    const headers = [...response.headers].map(([name, value]) => `${name}: ${value}`).join("\n");
    this.answer.replaceChildren(
      make("p", {}, make("span", { class: `status s${Math.floor(response.status / 100)}` }, response.status), " ", response.statusText),
      make("details", {}, make("summary", {}, "Headers"), code(headers)));
    if (kind.startsWith("image/")) {
      this.answer.append(make("img", { alt: "The picture", src: URL.createObjectURL(await response.blob()) }));
    } else if (kind.startsWith("text/event-stream")) {
      await this.follow(response);
    } else {
      const text = await response.text();
      if (text) this.answer.append(code(kind.startsWith("application/json") ? spread(text) : text));
    }
  }

  async follow(response) {
    const block = this.answer.appendChild(code());
    const decoder = new TextDecoder();
    let seen = "";
    for (const reader = response.body.getReader(); ;) {
      const { done, value } = await reader.read();
      if (done) return;
      seen += decoder.decode(value, { stream: true });
      block.write(seen);
    }
  }
}

function quoted(text) {
  return /^[\w\-./:=]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

function compact(text) {
  try { return JSON.stringify(JSON.parse(text)); } catch { return text; }
}

function spread(text) {
  try { return JSON.stringify(JSON.parse(text), null, 2); } catch { return text; }
}
