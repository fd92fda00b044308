// State of the page and what a person can do with it. The components show the state; only this changes it.

import { ServiceError } from "./api.js";
import { bodyOf, draftOf, EMPTY, faultsOf, formField, nextVariant } from "./draft.js";
import { Follower } from "./events.js";
import { fieldsOf, fittingSize } from "./models.js";
import { formatRoute, parseRoute } from "./route.js";
import { isExpired, isFinal, merged, newRecord, ownerOf, servicePath, withEvent, withView } from "./tasks.js";

const DRAFT = "imagegen.draft";
const MODELS = "imagegen.models";
const MODELS_LIFE_MS = 300_000;
const HISTORY_WAIT_MS = 1_000;
const IMAGE_TYPES = /^image\//;

export class Studio {
  #listeners = new Set();
  #saving = null;

  // page: {hash, go(hash, replace), save(blob, name), session, now(), sleep(ms)}: what the browser does for the studio.
  // tabs: the other tabs with this page.
  constructor({ api, history, tabs, page, language }) {
    Object.assign(this, { api, history, tabs, page });
    this.follower = new Follower(api, { onEvent: (id, name, data) => this.#change(id, (record) => withEvent(record, name, data)), onState: (connection, seconds = 0) => this.#set({ connection, connectsAt: this.page.now() + seconds * 1000 }) });
    this.state = {
      language, route: parseRoute(page.hash), models: null, defaultModel: "", modelsError: null, draft: this.#savedDraft(), faults: {}, error: null,
      blockedUntil: 0, isSubmitting: false, uploading: [], records: new Map(), connection: "live", connectsAt: 0, notice: null, keyState: "unknown", listing: null, compared: null,
    };
    this.#useRoutePrompt();
  }

  subscribe(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  #set(patch) {
    this.state = { ...this.state, ...patch };
    for (const listener of this.#listeners) listener();
  }

  // ---- start, addresses, key

  // The page does not wait long for the kept records, which other tabs may block. What comes later is added then.
  async start() {
    const owner = ownerOf(this.api.key.value);
    const reading = this.history.open(owner).then((records) => this.#addKept(owner, records));
    await Promise.race([reading, this.page.sleep(HISTORY_WAIT_MS)]);
    await Promise.all([this.loadModels(), this.#openRoute()]);
  }

  #addKept(owner, kept) {
    if (owner !== ownerOf(this.api.key.value)) return;
    const records = new Map(kept.map((record) => [record.id, record]));
    for (const [id, record] of this.state.records) records.set(id, record.owner === null && records.has(id) ? merged(record, records.get(id)) : record);
    this.#set({ records });
    this.followAll();
  }

  // The list is kept in the tab for a while: a reload must not use up the requests that a client may send in a minute.
  async loadModels() {
    try {
      const { models, defaultModel = "" } = this.#keptModels() ?? this.#keepModels(await this.api.models());
      this.#set({ models, defaultModel, modelsError: null, keyState: this.api.key.value ? "accepted" : "none" });
    } catch (error) {
      this.#set({ models: [], modelsError: error });
    }
  }

  #keptModels() {
    try {
      const { owner, keptAt, list } = JSON.parse(this.page.session.getItem(MODELS));
      return owner === ownerOf(this.api.key.value) && this.page.now() - keptAt < MODELS_LIFE_MS ? list : null;
    } catch {
      return null;
    }
  }

  #keepModels(list) {
    const kept = { owner: ownerOf(this.api.key.value), keptAt: this.page.now(), list };
    try { this.page.session.setItem(MODELS, JSON.stringify(kept)); } catch { /* the list is read again */ }
    return list;
  }

  async onHash(hash) {
    this.#set({ route: parseRoute(hash), notice: null });
    this.#useRoutePrompt();
    await this.#openRoute();
  }

  go(route, replace = false) {
    this.page.go(formatRoute(route), replace);
  }

  requireKey() {
    this.#set({ keyState: this.api.key.value ? "wrong" : "missing" });
  }

  async useKey(key) {
    this.api.key.value = key.trim();
    this.follower.clear();
    this.#set({ keyState: "unknown", records: new Map(), listing: null, error: null });
    await this.start();
  }

  choose(patch) {
    this.#set(patch); // language, keyState
  }

  // ---- the form

  // The model of the form; null while it is unknown.
  get model() {
    return this.#modelOf(this.state.draft.model);
  }

  #modelOf(id) {
    const { models, defaultModel } = this.state;
    return models?.find((model) => model.id === (id || defaultModel)) ?? null;
  }

  edit(patch) {
    const draft = { ...this.state.draft, variant: 0, ...patch };
    const faults = Object.fromEntries(Object.entries(this.state.faults).filter(([field]) => !(field in patch)));
    this.#set({ draft, faults, error: null });
    this.#saveDraft();
  }

  // Another model keeps the size if it can.
  chooseModel(id) {
    const { size } = this.state.draft;
    this.edit({ model: id, size: size && fittingSize(this.#modelOf(id), size) });
  }

  clear() {
    this.edit({ ...EMPTY, model: this.state.draft.model });
  }

  async submit() {
    const { draft, isSubmitting, blockedUntil } = this.state;
    if (isSubmitting || this.page.now() < blockedUntil || this.state.uploading.length) return;
    const faults = faultsOf(draft, this.model);
    if (Object.keys(faults).length) this.#set({ faults: Object.fromEntries(Object.entries(faults).map(([field, text]) => [field, { text }])) });
    else await this.submitBody(bodyOf(draft, this.model));
  }

  // Submits a request and opens its task.
  async submitBody(body) {
    this.#set({ isSubmitting: true, faults: {}, error: null });
    try {
      const answer = await this.api.submit(body);
      const id = answer.taskId;
      const before = this.state.records.get(id);
      const record = { ...newRecord(id, body, ownerOf(this.api.key.value), this.page.now()), pinned: before?.pinned ?? false };
      this.#put(withView(record, { progress: 0, ...answer }));
      this.go({ page: "task", id });
      this.#set({ notice: answer.cached ? "cached" : answer.coalesced ? "joined" : null });
      if (!answer.data || !isFinal(this.state.records.get(id))) await this.#follow(id);
    } catch (error) {
      this.#fail(error);
    } finally {
      this.#set({ isSubmitting: false });
    }
  }

  #fail(error) {
    if (!(error instanceof ServiceError)) throw error;
    const faults = {};
    for (const { field, message } of error.details) {
      const name = formField(field);
      if (name) faults[name] = { message };
    }
    const blockedUntil = error.status === 429 || error.status === 503 ? this.page.now() + (error.retryAfterS ?? 5) * 1000 : 0;
    this.#set({ faults, error, blockedUntil });
  }

  #useRoutePrompt() {
    const { route } = this.state;
    if (route.page === "make" && route.prompt !== undefined) this.edit({ ...EMPTY, prompt: route.prompt, model: route.model });
  }

  #savedDraft() {
    try {
      return { ...EMPTY, ...JSON.parse(this.page.session.getItem(DRAFT)) };
    } catch {
      return { ...EMPTY };
    }
  }

  // Previews live as long as the page, so they are not saved.
  #saveDraft() {
    clearTimeout(this.#saving);
    this.#saving = setTimeout(() => {
      const { draft } = this.state;
      const inputs = draft.inputs.map(({ preview: _, ...input }) => input);
      const mask = draft.mask && { id: draft.mask.id, name: draft.mask.name };
      try { this.page.session.setItem(DRAFT, JSON.stringify({ ...draft, inputs, mask })); } catch { /* the form is not kept */ }
    }, 300);
  }

  // ---- input images

  async addFiles(files) {
    const { maxInputs } = fieldsOf(this.model);
    const images = [...files].filter(({ type }) => IMAGE_TYPES.test(type));
    for (const file of images) {
      if (this.state.draft.inputs.length >= maxInputs) {
        this.#set({ faults: { ...this.state.faults, inputs: maxInputs ? { text: "inputs.limit", values: { count: maxInputs } } : { text: "inputs.none" } } });
        return;
      }
      await this.addImage(file, file.name || "image");
    }
  }

  async addImage(blob, name) {
    this.#set({ uploading: [...this.state.uploading, name], error: null });
    try {
      const { uploadId, width, height } = await this.api.upload(blob);
      const { inputs } = this.state.draft;
      if (!inputs.some(({ id }) => id === uploadId)) {
        const input = { id: uploadId, name, width, height, preview: URL.createObjectURL(blob) };
        this.edit({ inputs: [...inputs, input] });
      }
    } catch (error) {
      this.#fail(error);
      this.#set({ faults: { ...this.state.faults, inputs: { error, name } } });
    } finally {
      const at = this.state.uploading.indexOf(name);
      this.#set({ uploading: this.state.uploading.filter((_, index) => index !== at) });
    }
  }

  removeInput(id) {
    const inputs = this.state.draft.inputs.filter((input) => input.id !== id);
    const isFirst = this.state.draft.inputs[0]?.id === id;
    this.edit({ inputs, ...(isFirst ? { mask: null } : {}) });
  }

  // The mask belongs to the first image.
  makeFirst(id) {
    const { inputs } = this.state.draft;
    this.edit({ inputs: [...inputs.filter((input) => input.id === id), ...inputs.filter((input) => input.id !== id)], mask: null });
  }

  async useMask(blob) {
    try {
      const { uploadId } = await this.api.upload(blob);
      this.edit({ mask: { id: uploadId, name: "mask", preview: URL.createObjectURL(blob) } });
      return true;
    } catch (error) {
      this.#fail(error);
      return false;
    }
  }

  // ---- tasks

  async variant(record) {
    const variants = [...this.state.records.values()].filter(({ request }) => request && sameBut(request, record.request)).map(({ request }) => request.variant ?? 0);
    await this.submitBody(nextVariant(record.request, Math.max(...variants, record.request.variant ?? 0) + 1));
  }

  // Fills the form with a task's request, to change it.
  again(record) {
    this.edit(draftOf(record.request, this.#knownInputs()));
    this.go({ page: "make" });
  }

  // Fills the form with one of a task's images as its input image.
  async editImage(record, entry) {
    const path = servicePath(entry.url);
    const request = record.request ?? { prompt: "" };
    const draft = { ...draftOf(request), inputs: [], mask: null, seed: "", variant: 0, model: this.#editingModel(request.model) };
    this.edit(draft);
    this.go({ page: "make" });
    try {
      await this.addImage(await this.api.image(path), `${record.id.slice(0, 8)}-${entry.index + 1}`);
    } catch (error) {
      this.#fail(error);
    }
  }

  // Saves an image as a file. A plain link would get the service's name of the file, which has no words of the prompt.
  async download(path, name) {
    try {
      this.page.save(await this.api.image(path), name);
    } catch (error) {
      this.#fail(error);
    }
  }

  #editingModel(id = "") {
    const models = this.state.models ?? [];
    const canEdit = (model) => fieldsOf(model).maxInputs > 0;
    const same = this.#modelOf(id);
    return !same || canEdit(same) ? id : (models.find(({ capabilities }) => capabilities.edit) ?? models.find(canEdit))?.id ?? id;
  }

  #knownInputs() {
    return new Map(this.state.draft.inputs.map((input) => [input.id, input]));
  }

  async cancel(record) {
    await this.#act(record, () => this.api.cancel(record.id));
  }

  async retry(record) {
    await this.#act(record, () => this.api.retry(record.id));
    await this.#follow(record.id);
  }

  async #act(record, action) {
    try {
      const view = await action();
      this.#change(record.id, (current) => ({ ...withView(current, { progress: 0, ...view }), left: view.left ?? false }));
    } catch (error) {
      if (error.code === "already_finished" || error.code === "not_retryable" || error.status === 404) await this.#read(record.id);
      else this.#fail(error);
    }
  }

  pin(record) {
    this.#change(record.id, (current) => ({ ...current, pinned: !current.pinned }));
  }

  // Removes a task from this browser's gallery; `restore` puts it back.
  remove(record) {
    const records = new Map(this.state.records);
    records.delete(record.id);
    this.follower.leave(record.id);
    this.#set({ records, notice: { removed: record } });
    this.history.remove(record);
    this.tabs.remove(record);
  }

  restore(record) {
    this.#put(record);
    this.#set({ notice: null });
    if (!isFinal(record)) this.follower.follow(record.id);
  }

  compare(image) {
    const { compared } = this.state;
    if (!compared || (compared.id === image.id && compared.index === image.index)) {
      this.#set({ compared: compared ? null : image });
      if (!compared) this.go({ page: "gallery", search: "", all: false });
      return;
    }
    this.#set({ compared: null });
    this.go({ page: "compare", images: [compared, image] });
  }

  // Reads the next page of all clients' tasks, for the admin token.
  async listMore() {
    const listing = this.state.listing ?? { records: [], cursor: "", done: false, isLoading: false, error: null };
    if (listing.isLoading || listing.done) return;
    const loading = { ...listing, isLoading: true, error: null };
    this.#set({ listing: loading });
    const set = (loaded) => { if (this.state.listing === loading) this.#set({ listing: { ...loading, isLoading: false, ...loaded } }); }; // not after a change of the key
    try {
      const { tasks, nextCursor } = await this.api.list(listing.cursor);
      const known = new Set(listing.records.map(({ id }) => id));
      const fresh = tasks.filter(({ taskId }) => !known.has(taskId)).map((view) => withView(this.#recordFor(view.taskId), view));
      set({ records: [...listing.records, ...fresh], cursor: nextCursor, done: !nextCursor });
    } catch (error) {
      set({ error });
    }
  }

  #recordFor(id) {
    return this.state.records.get(id) ?? newRecord(id, null, null, this.page.now());
  }

  async #openRoute() {
    const { route, records } = this.state;
    const ids = route.page === "task" || route.id ? [route.id] : route.page === "compare" ? route.images.map(({ id }) => id) : [];
    for (const id of ids) {
      const record = records.get(id);
      if (!record) this.#set({ records: new Map(this.state.records).set(id, newRecord(id, null, null, this.page.now())) });
      if (!record?.view || isExpired(record, this.page.now())) await this.#follow(id);
    }
  }

  // Reads a finished task once; an unfinished one comes by its events.
  async #follow(id) {
    const record = this.state.records.get(id);
    if (!record?.view || isFinal(record)) await this.#read(id);
    if (!isFinal(this.state.records.get(id) ?? {})) this.follower.follow(id);
  }

  async #read(id) {
    try {
      const view = await this.api.task(id);
      this.#change(id, (current) => withView(current, view));
    } catch (error) {
      this.#fail(error);
    }
  }

  #change(id, change) {
    const record = this.state.records.get(id);
    if (!record) return;
    const changed = change(record);
    if (changed !== record) this.#put(changed);
  }

  // Tasks that were opened by a link are not kept: they have no owner.
  #put(record) {
    this.#set({ records: new Map(this.state.records).set(record.id, record) });
    if (record.owner === null) return;
    this.history.put(record);
    this.tabs.put(record);
  }

  // ---- other tabs

  // Shows a task of another tab, which follows it.
  receive(record) {
    if (record.owner !== ownerOf(this.api.key.value)) return;
    this.#set({ records: new Map(this.state.records).set(record.id, merged(this.state.records.get(record.id), record)) });
  }

  // Forgets a task that was removed in another tab; the one that is open here stays, as if it was opened by its link.
  drop({ owner, id }) {
    const record = this.state.records.get(id);
    if (record?.owner !== owner) return;
    const records = new Map(this.state.records);
    if (this.state.route.id === id) records.set(id, { ...record, owner: null });
    else records.delete(id);
    this.#set({ records });
  }

  // Follows the unfinished tasks of this browser here, for example because their tab is closed.
  followAll() {
    for (const record of this.state.records.values()) if (record.owner !== null && !isFinal(record)) this.follower.follow(record.id);
  }
}

function sameBut(request, other) {
  const plain = ({ variant: _, ...rest }) => JSON.stringify(Object.entries(rest).sort());
  return plain(request) === plain(other);
}
