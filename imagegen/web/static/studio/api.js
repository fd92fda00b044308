// Client of the service's API: the key, errors as exceptions, and repeats that pay nothing.

const REPEATED = new Set([502, 504]);
const REPEAT_DELAY_MS = 1000;

// An answer that is an error, or no answer at all (status 0).
export class ServiceError extends Error {
  constructor(status, { code = "no_answer", message = "", details = [], resetsAt = null, requestId = "" } = {}, retryAfterS = null) {
    super(message);
    Object.assign(this, { status, code, details, resetsAt, requestId, retryAfterS });
  }
}

// The key of this tab: it is never in an address, and ends with the tab.
export class SessionKey {
  static NAME = "imagegen.key";

  constructor(storage, name = SessionKey.NAME) {
    Object.assign(this, { storage, name });
  }

  get value() {
    try { return this.storage.getItem(this.name) || ""; } catch { return ""; }
  }

  set value(key) {
    try { this.storage[key ? "setItem" : "removeItem"](this.name, key); } catch { /* the key lives as long as the page */ }
  }
}

export class Api {
  // language: returns the language of the answers' texts. onUnauthorized: called when a key is missing or refused.
  constructor(base, { key, language, onUnauthorized = () => {}, fetch = (...given) => globalThis.fetch(...given) }) {
    Object.assign(this, { base, key, language, onUnauthorized, fetch });
  }

  // Returns the response if its status is no error. Throws ServiceError, or AbortError if the signal aborts.
  // needsAdmin: a refusal is no reason to ask for a client's key.
  async send(path, { headers = {}, needsAdmin = false, ...options } = {}) {
    const sent = { "Accept-Language": this.language(), ...headers };
    if (this.key.value) sent.Authorization = `Bearer ${this.key.value}`;
    let response;
    try {
      response = await this.fetch(this.base + path, { ...options, headers: sent, credentials: "omit", referrerPolicy: "no-referrer" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServiceError(0);
    }
    if (response.ok) return response;
    if (response.status === 401 && !needsAdmin) this.onUnauthorized();
    throw await errorOf(response);
  }

  async json(path, options) {
    return (await this.send(path, options)).json();
  }

  models() {
    return this.json("/api/models");
  }

  // A task that is unknown or has expired is a view too, with the status `not_found`.
  async task(id) {
    try {
      return await this.json(`/api/images/${id}`);
    } catch (error) {
      if (error.status === 404) return { taskId: id, status: "not_found" };
      throw error;
    }
  }

  // Submits a request. A lost answer is asked for again under the same Idempotency-Key, which pays nothing.
  async submit(body) {
    const headers = { "Content-Type": "application/json", "Idempotency-Key": randomName() };
    const options = { method: "POST", headers, body: JSON.stringify(body) };
    try {
      return await this.json("/api/images/generate", options);
    } catch (error) {
      if (error.status !== 0 && !REPEATED.has(error.status)) throw error;
      await new Promise((resolve) => { setTimeout(resolve, REPEAT_DELAY_MS); });
      return this.json("/api/images/generate", options);
    }
  }

  cancel(id) {
    return this.json(`/api/images/${id}/cancel`, { method: "POST" });
  }

  retry(id) {
    return this.json(`/api/images/${id}/retry`, { method: "POST" });
  }

  upload(blob) {
    return this.json("/api/uploads", { method: "POST", headers: { "Content-Type": blob.type || "application/octet-stream" }, body: blob });
  }

  // A page of all clients' tasks, for the admin token.
  list(cursor, limit = 40) {
    return this.json(`/api/images?limit=${limit}${cursor ? `&cursor=${encodeURIComponent(cursor)}` : ""}`, { needsAdmin: true });
  }

  async image(path) {
    return (await this.send(path)).blob();
  }
}

async function errorOf(response) {
  const retryAfterS = secondsOf(response.headers.get("Retry-After"));
  try {
    return new ServiceError(response.status, await response.json(), retryAfterS);
  } catch {
    return new ServiceError(response.status, { code: `http_${response.status}` }, retryAfterS);
  }
}

// Returns the seconds of a Retry-After header, which is a number or a date; null without one.
export function secondsOf(header, now = Date.now()) {
  if (!header) return null;
  if (/^\d+$/.test(header.trim())) return Number(header);
  const at = Date.parse(header);
  return Number.isNaN(at) ? null : Math.max(0, Math.ceil((at - now) / 1000));
}

// crypto.randomUUID is missing on plain http pages.
function randomName() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
