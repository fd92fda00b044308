// State of the board: the snapshot, polled each second while the page is seen, the history, and the actions on tasks.

import { joinRows, mergeMinutes, rowOf } from "./board-series.js";

const POLL_MS = 1000;
const HIDDEN_MS = 15000;
const MAX_WAIT_MS = 10000;
const HISTORY_MS = 30000;
const CHANNELS_MS = 10000;
const OVERLAP_S = 300;
const ROWS_PER_FRAME = 8;
const PAGE = 50;
const MAX_LISTED = 500;

export class BoardStore {
  // api: client with the admin token. page: the document, which may be hidden.
  constructor(api, token, language, page = document) {
    Object.assign(this, { api, token, page });
    this.listeners = new Set();
    this.state = {
      language, theme: "", tokenState: token.value ? "unknown" : "missing", snapshot: null, rows: new Map(), listed: [], cursor: null, filter: "all", hours: 6,
      minutes: new Map(), channels: null, isLive: false, busy: new Set(), fault: null,
    };
    this.failures = 0;
    this.historyAt = this.channelsAt = -Infinity;
    this.timer = null;
    page.addEventListener("visibilitychange", () => { if (!page.hidden) this.pollSoon(); });
  }

  subscribe(listener) {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  set(changes) {
    this.state = { ...this.state, ...changes };
    for (const listener of this.listeners) listener();
  }

  useToken(token) {
    this.token.value = token;
    this.historyAt = this.channelsAt = -Infinity;
    this.set({ tokenState: token ? "unknown" : "missing", ...(token ? {} : { snapshot: null, rows: new Map(), listed: [], cursor: null, minutes: new Map(), channels: null }) });
    if (token) this.pollSoon();
  }

  pollSoon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.poll(), 0);
  }

  // Reads what is due. One poll runs at a time, and the next begins a while after its end.
  async poll() {
    if (this.isPolling || !this.token.value || this.state.tokenState === "wrong") return;
    this.isPolling = true;
    try {
      await this.readSnapshot();
      await this.readHistory();
      await this.readChannels();
      this.failures = 0;
    } catch (error) {
      this.failures += 1;
      if (error.status === 401) this.set({ tokenState: "wrong", isLive: false });
      else this.set({ isLive: false });
    } finally {
      this.isPolling = false;
    }
    const wait = this.page.hidden ? HIDDEN_MS : Math.min(POLL_MS * 2 ** this.failures, MAX_WAIT_MS);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.poll(), wait);
  }

  async readSnapshot() {
    const snapshot = await this.api.json("/api/admin/board", { needsAdmin: true });
    this.set({ snapshot, isLive: true, tokenState: "accepted" });
    await this.useRows(joinRows(this.state.rows, snapshot.tasks, this.state.listed));
  }

  // Shows changed rows, some in each frame, so that no task of the browser is long.
  async useRows(rows) {
    const changed = [...rows.values()].filter((row) => this.state.rows.get(row.taskId) !== row);
    for (let first = 0; first < changed.length; first += ROWS_PER_FRAME) {
      const part = new Map(this.state.rows);
      for (const row of changed.slice(first, first + ROWS_PER_FRAME)) part.set(row.taskId, row);
      this.set({ rows: part });
      await this.frame();
    }
    if (this.state.rows.size > rows.size) this.set({ rows: new Map([...this.state.rows].filter(([id]) => rows.has(id))) });
  }

  // A page that is not seen has no frames.
  frame() {
    return new Promise((resolve) => { (this.page.hidden ? setTimeout : requestAnimationFrame)(resolve); });
  }

  async readHistory() {
    if (Date.now() - this.historyAt < HISTORY_MS) return;
    const known = [...this.state.minutes.keys()];
    const since = known.length ? Math.max(...known) - OVERLAP_S : 0;
    const { minutes } = await this.api.json(`/api/admin/board/history?since=${Math.max(since, 0)}`, { needsAdmin: true });
    this.historyAt = Date.now();
    this.set({ minutes: mergeMinutes(this.state.minutes, minutes, Date.now() / 1000) });
  }

  // A service without channels has no such route.
  async readChannels() {
    if (Date.now() - this.channelsAt < CHANNELS_MS) return;
    this.channelsAt = Date.now();
    try {
      this.set({ channels: (await this.api.json("/api/channels", { needsAdmin: true })).channels ?? null });
    } catch (error) {
      if (error.status !== 404) throw error;
      this.channelsAt = Infinity;
    }
  }

  // Reads the first or the next page of tasks from Redis, where this instance does not have all.
  async list(cursor = null) {
    const { filter } = this.state;
    const status = filter === "all" ? "" : `&status=${filter}`;
    await this.act("list", async () => {
      const page = await this.api.json(`/api/images?limit=${PAGE}${status}${cursor ? `&cursor=${encodeURIComponent(cursor)}` : ""}`, { needsAdmin: true });
      if (filter !== this.state.filter) return;
      const listed = [...(cursor ? this.state.listed : []), ...page.tasks.map(rowOf)].slice(0, MAX_LISTED);
      this.set({ listed, cursor: page.nextCursor });
      await this.useRows(joinRows(this.state.rows, this.state.snapshot?.tasks ?? [], listed));
    });
  }

  show(filter) {
    this.set({ filter, listed: [], cursor: null });
    if (["failed", "completed", "cancelled"].includes(filter)) this.list();
  }

  pause(isPaused) {
    return this.act("pause", () => this.api.json(`/api/admin/${isPaused ? "pause" : "resume"}`, { method: "POST", needsAdmin: true }));
  }

  // action: `retry` or `cancel`. The operator cancels for all clients of the task.
  change(id, action) {
    const query = action === "cancel" ? "?force=true" : "";
    return this.act(id, async () => {
      const task = await this.api.json(`/api/images/${id}/${action}${query}`, { method: "POST", needsAdmin: true });
      const row = this.state.rows.get(id);
      if (row) this.set({ rows: new Map(this.state.rows).set(id, { ...row, status: task.status, sequence: task.sequence, error: null, errorDetail: null }) });
    });
  }

  async act(name, run) {
    if (this.state.busy.has(name)) return;
    this.set({ busy: new Set([...this.state.busy, name]), fault: null });
    try {
      await run();
    } catch (error) {
      this.set({ fault: { name, error } });
    }
    this.set({ busy: new Set([...this.state.busy].filter((other) => other !== name)) });
    if (name !== "list") this.pollSoon();
  }
}
