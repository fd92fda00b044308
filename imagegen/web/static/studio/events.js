// Live changes of tasks: one event stream for all unfinished tasks of the page, resumed where it ended.
//
// EventSource can send no key and no Last-Event-ID of ours, so the stream is read with fetch.
// https://html.spec.whatwg.org/multipage/server-sent-events.html

const MAX_TASKS = 50;
const MIN_DELAY_MS = 500;
const MAX_DELAY_MS = 10_000;
const SILENCE_MS = 40_000; // the service sends a comment every 15 s

// Parser of a stream's text. `feed` returns the events that are complete.
export class EventParser {
  #rest = "";
  #event = { name: "", id: null, data: [] };

  feed(text) {
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop();
    return lines.map((line) => this.#line(line)).filter(Boolean);
  }

  #line(line) {
    if (line === "") return this.#end();
    const [, field, value = ""] = /^([^:]*)(?:: ?(.*))?$/s.exec(line);
    if (field === "event") this.#event.name = value;
    else if (field === "data") this.#event.data.push(value);
    else if (field === "id") this.#event.id = value;
    return null;
  }

  #end() {
    const { name, id, data } = this.#event;
    this.#event = { name: "", id: null, data: [] };
    return data.length ? { name: name || "message", id, data: data.join("\n") } : null;
  }
}

// Follows tasks until each is finished.
export class Follower {
  #known = new Map(); // task id -> last sequence, of all tasks that are followed
  #stop = null;
  #isRunning = false;
  #timer = null;
  #wake = () => {};

  // api: `send` and `task` are used. onEvent(id, name, data); onState("live" | "connecting" | "away" | "limited", seconds until the next try).
  constructor(api, { onEvent, onState = () => {}, random = Math.random }) {
    Object.assign(this, { api, onEvent, onState, random });
  }

  follow(id, sequence = null) {
    if (this.#known.has(id)) return;
    this.#known.set(id, sequence);
    if (this.#isRunning) this.#restart();
    else this.#run();
  }

  leave(id) {
    if (this.#known.delete(id) && this.#isRunning) this.#restart();
  }

  clear() {
    this.#known.clear();
    this.#restart();
  }

  // Connects at once, for example when the browser is online again or has another key.
  reconnect() {
    if (this.#isRunning) this.#restart();
    else if (this.#known.size) this.#run();
  }

  #restart() {
    this.#stop?.abort();
    this.#wake();
  }

  async #run() {
    this.#isRunning = true;
    let failures = 0;
    while (this.#known.size) {
      const ids = [...this.#known.keys()].slice(-MAX_TASKS);
      const stop = this.#stop = new AbortController();
      let limitedS = 0;
      try {
        if (await this.#stream(ids, stop)) failures = 0;
      } catch (error) {
        if (error.name === "AbortError" && !stop.isSilent) continue;
        if (error.status === 404) ids.forEach((id) => this.#finish(id, { taskId: id, status: "not_found" }));
        if (error.status === 401) break;
        if (error.status === 429) limitedS = error.retryAfterS || 1;
      } finally {
        clearTimeout(this.#timer);
      }
      if (!ids.some((id) => this.#known.has(id))) continue;
      if (limitedS) await this.#wait("limited", (limitedS + this.random()) * 1000);
      else await this.#wait("away", Math.min(MAX_DELAY_MS, MIN_DELAY_MS * 2 ** failures++) * (0.75 + this.random() / 2));
    }
    this.#isRunning = false;
    this.onState("live");
  }

  async #wait(state, ms) {
    this.onState(state, Math.ceil(ms / 1000));
    await this.#pause(ms);
  }

  // Reads one stream to its end; returns whether it sent anything.
  async #stream(ids, stop) {
    this.onState("connecting");
    const response = await this.api.send(`/api/events?tasks=${ids.join(",")}`, { headers: this.#lastEventId(ids), signal: stop.signal, cache: "no-store" });
    if (response.status === 204) return this.#readAll(ids);
    this.onState("live");
    const parser = new EventParser();
    const decoder = new TextDecoder();
    let any = false;
    for (const reader = response.body.getReader(); ;) {
      clearTimeout(this.#timer);
      this.#timer = setTimeout(() => { stop.isSilent = true; stop.abort(); }, SILENCE_MS);
      const { done, value } = await reader.read();
      if (done) return any;
      for (const event of parser.feed(decoder.decode(value, { stream: true }))) {
        any = true;
        this.#receive(event);
      }
    }
  }

  #receive({ name, id, data }) {
    const body = JSON.parse(data);
    if (!this.#known.has(body.taskId)) return;
    const sequence = /:(\d+)$/.exec(id || "");
    if (sequence) this.#known.set(body.taskId, Number(sequence[1]));
    const ended = ["completed", "failed", "cancelled", "not_found"].includes(body.status);
    if (ended) this.#finish(body.taskId, body, name);
    else this.onEvent(body.taskId, name, body);
  }

  #finish(id, body, name = "snapshot") {
    this.#known.delete(id);
    this.onEvent(id, name, body);
  }

  // Every task had ended with the sequence that is known; read them, since the page may not have them.
  async #readAll(ids) {
    for (const id of ids) this.#finish(id, await this.api.task(id));
    return true;
  }

  #lastEventId(ids) {
    const known = ids.filter((id) => this.#known.get(id) !== null).map((id) => `${id}:${this.#known.get(id)}`);
    return known.length ? { "Last-Event-ID": known.join(",") } : {};
  }

  #pause(ms) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      this.#wake = () => { clearTimeout(timer); resolve(); };
    });
  }
}
