// Calls a route: its form, the programs that do the same, the response with its images, and the steps that come next.

import { base } from "./assets.js";
import { code, make, pretty } from "./elements.js";
import { LANGUAGES, snippet } from "./snippets.js";
import { language, t } from "./texts.js";

const WAITING = ["generate", "getTask"];
const WAIT_S = "30";
const SAME_ORIGIN = { credentials: "omit", referrerPolicy: "no-referrer" };

// What all calls of the page share: the key, the id of the last task, and the language of the examples.
export class Session {
  constructor(key) {
    this.key = key;
    this.taskId = "";
    this.sample = LANGUAGES[0];
    this.calls = [];
  }

  changed() {
    for (const call of this.calls) call.refresh();
  }

  carry(taskId) {
    this.taskId = taskId;
    for (const call of this.calls) call.carry();
    this.changed();
  }
}

export class Call {
  constructor(session, schemas, method, path, operation) {
    Object.assign(this, { session, operation, path, method: method.toUpperCase(), inputs: [], body: null, file: null });
    this.answerKind = kindOf(operation);
    this.program = code();
    this.answer = make("div", { class: "answer", "aria-live": "polite" });
    this.samples = LANGUAGES.map((name) => make("button", { type: "button", onclick: () => { session.sample = name; session.changed(); } }, name));
    this.form = make("form", { class: "call", onsubmit: (event) => this.send(event), oninput: () => this.refresh() });
    for (const parameter of operation.parameters || []) this.addParameter(schemas.resolve(parameter));
    if (operation.requestBody) this.addBody(operation.requestBody.content);
    this.form.append(make("div", {}, make("button", { type: "submit", class: "primary" }, t("send"))));
    session.calls.push(this);
    this.carry();
    this.refresh();
  }

  elements() {
    const samples = make("div", { class: "samples", role: "group", "aria-label": t("sample") }, this.samples);
    return [this.form, this.answer, samples, this.program];
  }

  addParameter({ name, in: place, required, example, schema }) {
    if (name === "exp" || name === "sig") return; // a link of a response has them
    const waits = name === "wait" && WAITING.includes(this.operation.operationId);
    const value = waits ? WAIT_S : required ? example ?? "" : "";
    const hint = example ?? schema.default ?? "";
    const input = make("input", { type: "text", placeholder: String(hint), required, value: String(value), autocomplete: "off", spellcheck: "false" });
    this.inputs.push({ name, place, input });
    this.form.append(make("label", {}, make("span", {}, make("code", {}, name), ` ${place}`), input));
  }

  addBody(content) {
    const json = content["application/json"];
    if (!json) {
      this.file = make("input", { type: "file", accept: "image/png,image/jpeg,image/webp", required: true });
      this.form.append(make("label", {}, make("span", {}, t("file")), this.file));
      return;
    }
    const examples = Object.entries(json.examples || {});
    this.body = make("textarea", { spellcheck: "false", "aria-label": t("body") }, pretty(examples[0]?.[1].value ?? {}));
    this.body.rows = Math.min(this.body.value.split("\n").length + 1, 14);
    if (examples.length > 1) {
      const choose = (event) => { this.body.value = pretty(json.examples[event.target.value].value); this.refresh(); };
      this.form.append(make("select", { "aria-label": t("examples"), onchange: choose }, examples.map(([name]) => make("option", { value: name }, name))));
    }
    this.form.append(this.body);
  }

  // Puts the id of the last task into the fields that take one.
  carry() {
    const { taskId } = this.session;
    if (!taskId) return;
    for (const { name, input } of this.inputs) {
      if (name === "taskId" || name === "tasks") Object.assign(input, { value: taskId, title: t("carried") });
    }
  }

  get needsKey() {
    const schemes = (this.operation.security || []).flatMap(Object.keys);
    return schemes.length > 0 && (this.session.key.value !== "" || schemes.every((name) => name === "admin"));
  }

  request() {
    const query = new URLSearchParams();
    const headers = {};
    let path = this.path;
    for (const { name, place, input } of this.inputs) {
      const value = input.value.trim();
      if (place === "path") path = path.replace(`{${name}}`, encodeURIComponent(value).replaceAll("%2F", "/"));
      else if (value && place === "query") query.set(name, value);
      else if (value) headers[name] = value;
    }
    if (this.body) headers["Content-Type"] = "application/json";
    if (this.file) headers["Content-Type"] = this.file.files[0]?.type || "image/png";
    const asked = query.toString().replaceAll("%2C", ",");
    return { url: base + path + (asked && `?${asked}`), method: this.method, headers, body: this.body?.value ?? null };
  }

  refresh() {
    const { sample } = this.session;
    for (const button of this.samples) button.setAttribute("aria-pressed", String(button.textContent === sample));
    const call = { ...this.request(), sendsFile: this.file !== null, needsKey: this.needsKey, answer: this.answerKind };
    this.program.write(snippet(sample, call));
  }

  async send(event) {
    event.preventDefault();
    const { url, method, headers, body } = this.request();
    const sent = { "Accept-Language": language, ...headers };
    if (this.session.key.value) sent.Authorization = `Bearer ${this.session.key.value}`;
    this.stop?.abort();
    const { signal } = this.stop = new AbortController();
    this.answer.replaceChildren(make("p", {}, t("waiting")));
    try {
      await this.show(await fetch(url, { ...SAME_ORIGIN, method, headers: sent, body: this.file?.files[0] ?? body, signal }));
    } catch (error) {
      if (!signal.aborted) this.answer.append(make("p", { class: "fault" }, t("unanswered", { reason: error.message })));
    }
  }

  async show(response) {
    const kind = response.headers.get("Content-Type") || "";
    const headers = [...response.headers].map(([name, value]) => `${name}: ${value}`).join("\n");
    this.answer.replaceChildren(
      make("p", {}, make("span", { class: `status s${Math.floor(response.status / 100)}` }, response.status), " ", response.statusText),
      make("details", {}, make("summary", {}, t("headers")), code(headers)));
    if (kind.startsWith("image/")) return this.answer.append(shownImage(URL.createObjectURL(await response.blob()), 1));
    if (kind.startsWith("text/event-stream")) return this.follow(response);
    const text = await response.text();
    const json = kind.startsWith("application/json") ? parsed(text) : null;
    if (text) this.answer.append(code(json ? pretty(json) : text));
    if (json && response.ok) await this.use(json, response.status);
    return undefined;
  }

  // Shows the images of a response, keeps the id of its task, and names the next steps with it.
  async use(json, status) {
    const links = imageLinks(json);
    for (const [at, link] of links.entries()) this.answer.append(await this.image(link, at + 1));
    const taskId = json.taskId ?? json.task_id ?? json.results?.find((entry) => entry.taskId)?.taskId;
    if (typeof taskId !== "string") return;
    this.session.carry(taskId);
    const next = Object.values(this.operation.responses[status]?.links || {});
    if (next.length) this.answer.append(make("p", { class: "next" }, t("next"), next.map(({ operationId }) => make("a", { href: `#${operationId}` }, operationId))));
  }

  // An image of this service is fetched with the key; one elsewhere is only a link, since this page loads from no other host.
  async image(link, number) {
    const path = new URL(link, base).pathname.match(/\/api\/images\/.*/)?.[0];
    if (!path || link.startsWith("data:")) {
      return link.startsWith("data:") ? shownImage(link, number) : make("p", {}, make("a", { href: link, rel: "noreferrer" }, t("elsewhere", { number })));
    }
    const key = this.session.key.value;
    const response = await fetch(base + path + new URL(link, base).search, { ...SAME_ORIGIN, headers: key ? { Authorization: `Bearer ${key}` } : {} });
    if (!response.ok) return make("p", { class: "fault" }, `${t("image", { number })}: ${response.status}`);
    return shownImage(URL.createObjectURL(await response.blob()), number);
  }

  async follow(response) {
    const block = this.answer.appendChild(code());
    const decoder = new TextDecoder();
    let text = "";
    for (const reader = response.body.getReader(); ;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += decoder.decode(value, { stream: true });
      block.write(text);
    }
  }
}

function shownImage(source, number) {
  return make("img", { alt: t("image", { number }), src: source });
}

// Returns the addresses of the images in a response of `/api` or `/v1`.
function imageLinks(json) {
  const entries = [json.data, json.result?.data].flat().filter((entry) => entry && typeof entry === "object");
  return entries.map((entry) => entry.url ?? (entry.b64_json ? `data:image/png;base64,${entry.b64_json}` : null)).filter((link) => typeof link === "string");
}

// Returns what a response is, by the content of the successful ones.
function kindOf(operation) {
  const kinds = Object.keys(operation.responses[200]?.content || {});
  if (kinds.some((kind) => kind.startsWith("image/"))) return "image";
  if (kinds.length === 1 && kinds[0] === "text/event-stream") return "events";
  return kinds.some((kind) => kind.includes("json")) || !kinds.length ? "json" : "text";
}

function parsed(text) {
  try { return JSON.parse(text); } catch { return null; }
}
