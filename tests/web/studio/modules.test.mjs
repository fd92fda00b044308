// Tests of the studio's modules that need no page. Run by tests/web/test_studio.py, or by `node --test`.

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import test from "node:test";

const FOLDER = new URL("../../../imagegen/web/static/studio/", import.meta.url);
const load = (name) => import(new URL(`${name}.js`, FOLDER));

const { Api, secondsOf, ServiceError, SessionKey } = await load("api");
const { bodyOf, draftOf, EMPTY, faultsOf, formField, nextVariant } = await load("draft");
const { EventParser, Follower } = await load("events");
const { fieldsOf, fittingSize, sizeChoices } = await load("models");
const { formatDollars } = await load("price");
const { formatRoute, parseRoute } = await load("route");
const { snippet } = await load("snippets");
const { addStrings, initialLanguage, STRINGS, translate } = await load("strings");
const { BOARD_STRINGS } = await load("board-strings");
const board = await load("board-series");
const { changeSteps } = await load("strokes");
const { Studio } = await load("studio");
const tasks = await load("tasks");

addStrings(BOARD_STRINGS);

const ID = "0123456789abcdef0123456789abcdef";
const OTHER = "f".repeat(32);
const HOSTILE = "<img src=x onerror=alert(1)> \u202etxt '; rm -rf / #` $(id) \"\\ 猫🐈\n";

function model(capabilities = {}) {
  return { id: "m", capabilities };
}

function storage() {
  const values = new Map();
  return { getItem: (name) => values.get(name) ?? null, setItem: (name, value) => values.set(name, String(value)), removeItem: (name) => values.delete(name) };
}

function answer(body, { status = 200, headers = {} } = {}) {
  return new Response(status === 204 ? null : typeof body === "string" ? body : JSON.stringify(body), { status, headers });
}

// ---- addresses

test("every state has an address that leads back to it", () => {
  const routes = [
    { page: "make" }, { page: "make", prompt: "a & b", model: "x/y" }, { page: "task", id: ID }, { page: "task", id: ID, index: 3 },
    { page: "gallery", search: "猫 & dog", all: true }, { page: "gallery", search: "", all: false, id: ID },
    { page: "compare", images: [{ id: ID, index: 0 }, { id: OTHER, index: 12 }] }, { page: "mask" }, { page: "key" }, { page: "help" },
  ];
  for (const route of routes) assert.deepEqual(parseRoute(formatRoute(route)), route);
});

test("a malformed address is the first page", () => {
  for (const hash of ["", "#", "#/task/../../x", "#/task/javascript:alert(1)", "#/nothing", `#/task/${ID.toUpperCase()}`]) assert.equal(parseRoute(hash).page, "make");
  assert.equal(parseRoute("#/compare/x/y").page, "gallery");
});

// ---- the form

test("a body has only what was given and what the model can", () => {
  const draft = { ...EMPTY, prompt: "  a cat ", n: 2, seed: "7", steps: "4", quality: "high", background: "transparent", size: "1024x1024" };
  assert.deepEqual(bodyOf(draft, model({ seed: false, steps: { default: null, max: 0 }, transparent: false, qualities: ["low"] })), { prompt: "a cat", width: 1024, height: 1024, n: 2 });
  assert.deepEqual(bodyOf(draft, model({ qualities: ["high"] })), { prompt: "a cat", width: 1024, height: 1024, n: 2, seed: 7, steps: 4, quality: "high", background: "transparent" });
});

test("a seed beyond the whole numbers of JavaScript keeps its digits", () => {
  assert.equal(bodyOf({ ...EMPTY, prompt: "a", seed: "9223372036854775807" }, null).seed, "9223372036854775807");
});

test("input images beyond the model's number and a mask that it does not take are not sent", () => {
  const draft = { ...EMPTY, prompt: "a", inputs: [{ id: "upload:1" }, { id: "upload:2" }], mask: { id: "upload:3" } };
  const sent = ({ imageUrl, referenceImages, mask }) => [imageUrl, referenceImages, mask];
  assert.deepEqual(sent(bodyOf(draft, model({ maxInputImages: 1, mask: false }))), ["upload:1", undefined, undefined]);
  assert.deepEqual(sent(bodyOf(draft, model())), ["upload:1", ["upload:2"], "upload:3"]);
  assert.deepEqual(sent(bodyOf(draft, model({ edit: false }))), [undefined, undefined, undefined]);
});

test("a body and its draft are one request, with fields that the form does not show", () => {
  const body = { prompt: "a", model: "m", width: 640, height: 512, n: 3, seed: 0, variant: 2, guidanceScale: 3.5, extra: { strength: 0.4 }, imageUrl: "upload:1", mask: "upload:2" };
  assert.deepEqual(bodyOf(draftOf(body), model()), body);
});

test("the next variant changes nothing else", () => {
  assert.deepEqual(nextVariant({ prompt: "a", n: 2 }), { prompt: "a", n: 2, variant: 1 });
  assert.deepEqual(nextVariant({ prompt: "a", variant: 4 }), { prompt: "a", variant: 5 });
});

test("faults stand at their fields, also those that the server names", () => {
  assert.deepEqual(faultsOf({ ...EMPTY, prompt: " ", seed: "-2" }, null), { prompt: "fault.prompt.empty", seed: "fault.seed" });
  assert.deepEqual(faultsOf({ ...EMPTY, prompt: "🐈".repeat(11) }, model({ promptMax: 10 })), { prompt: "fault.prompt.long" });
  assert.deepEqual(faultsOf({ ...EMPTY, prompt: "🐈".repeat(10) }, model({ promptMax: 10 })), {});
  const fields = ["width", "aspect_ratio", "image_url", "referenceImages[1]", "negative_prompt", "n", "webhook.url"];
  assert.deepEqual(fields.map(formField), ["size", "size", "inputs", "inputs", "negativePrompt", "n", ""]);
});

test("a size that was typed is sent as it is, and another model fits it", async () => {
  const free = model({ multipleOf: 16, maxPixels: 1024 * 1024 });
  assert.equal(bodyOf({ ...EMPTY, prompt: "a", size: "8000x1000" }, free).width, 8000);
  assert.equal(bodyOf({ ...EMPTY, prompt: "a", size: "8000x1000" }, model({ sizes: ["1536x1024", "1024x1024"] })).width, 1536);
  const { made } = studio({ api: { models: async () => ({ models: [free, { id: "listed", capabilities: { sizes: ["1024x1024", "1024x1536"] } }], defaultModel: "m" }) } });
  await made.start();
  made.edit({ size: "640x960" });
  made.chooseModel("listed");
  assert.equal(made.state.draft.size, "1024x1536");
});

test("no more input images are added than the model takes", async () => {
  const { made, named } = studio({ api: { models: async () => ({ models: [model({ edit: false })], defaultModel: "m" }) } });
  await made.start();
  await made.addFiles([{ type: "image/png", name: "a.png" }]);
  assert.deepEqual([named("upload").length, made.state.faults.inputs], [0, { text: "inputs.none" }]);
});

// ---- models

test("the sizes to choose from are the model's own", () => {
  assert.deepEqual(sizeChoices(model({ sizes: ["1024x1024"] })), { sizes: ["1024x1024"], free: false });
  const { sizes, free } = sizeChoices(model({ multipleOf: 32, maxPixels: 1024 * 1024 }));
  assert.equal(free, true);
  assert.ok(sizes.length && sizes.every((size) => size.split("x").every((side) => side % 32 === 0) && size !== "2048x2048"));
});

test("another model keeps the size if it can, else the nearest shape", () => {
  const listed = model({ sizes: ["1024x1024", "1536x1024", "1024x1536"] });
  assert.equal(fittingSize(listed, "1344x768"), "1536x1024");
  assert.equal(fittingSize(listed, "512x768"), "1024x1536");
  assert.equal(fittingSize(listed, ""), "1024x1024");
  assert.equal(fittingSize(model({ multipleOf: 16 }), "640x512"), "640x512");
});

test("what is not known about a model is offered", () => {
  assert.deepEqual(fieldsOf(model()), { steps: true, maxSteps: 100, defaultSteps: null, seed: true, maxInputs: 16, mask: true, transparent: true, qualities: [], promptMax: 32000 });
  assert.equal(fieldsOf(model({ edit: false, mask: true })).mask, false);
});

test("small amounts of money keep two digits that count", () => {
  assert.deepEqual([0, 0.0027, 0.04, 0.211, 12.5].map((dollars) => formatDollars(dollars, "en")), ["$0", "$0.0027", "$0.04", "$0.21", "$12.50"]);
});

// ---- tasks

test("an older state never replaces a newer one, and the same event twice changes nothing", () => {
  const record = tasks.withView(tasks.newRecord(ID, { prompt: "a" }, "", 0), { status: "processing", sequence: 5, progress: 40 });
  assert.equal(tasks.withView(record, { status: "pending", sequence: 4 }), record);
  assert.equal(tasks.withView(record, { status: "completed", sequence: 6 }).view.status, "completed");
});

test("images come one by one, each once, in their order", () => {
  let record = tasks.withView(tasks.newRecord(ID, null, "", 0), { status: "processing", sequence: 5 });
  for (const index of [1, 0, 1]) record = tasks.withEvent(record, "image", { index, url: `u${index}` });
  assert.deepEqual(tasks.imagesOf(record).map(({ index }) => index), [0, 1]);
});

test("a task that is gone shows no image and is finished", () => {
  const record = tasks.withView(tasks.withView(tasks.newRecord(ID, null, "", 0), { status: "completed", sequence: 1, data: [{ index: 0 }] }), { status: "not_found" });
  assert.deepEqual([tasks.isFinal(record), tasks.imagesOf(record).length], [true, 0]);
});

test("a search finds every word, pinned tasks first, then the newest", () => {
  const record = (id, prompt, createdAt, pinned = false) => ({ ...tasks.newRecord(id, { prompt }, "", createdAt), pinned });
  const all = [record("a", "red cat", 1, true), record("b", "blue cat", 3), record("c", "red dog", 2), record("d", "red cat", 4)];
  assert.deepEqual(tasks.found(all, "CAT red").map(({ id }) => id), ["a", "d"]);
  assert.deepEqual(tasks.found(all, "").map(({ id }) => id), ["a", "d", "b", "c"]);
});

test("only images of this service are loaded", () => {
  assert.equal(tasks.servicePath(`https://h/x/api/images/${ID}/0?v=1&sig=2`), `/api/images/${ID}/0?v=1&sig=2`);
  assert.equal(tasks.servicePath("https://cdn.example/out.png"), null);
  assert.equal(tasks.servicePath(`https://cdn.example/api/images/${ID}/0.png`), null);
  assert.equal(tasks.thumbnailPath("/p?v=1", 256), "/p?v=1&size=256");
});

test("a file name has no character that a system refuses", () => {
  assert.equal(tasks.fileName("../A <cat>: \u202e猫!", 0, "image/jpeg"), "a-cat-猫-1.jpg");
  assert.equal(tasks.fileName("???", 1, "image/png"), "image-2.png");
  assert.ok([...tasks.fileName("🐈a".repeat(500), 0, "image/webp")].length < 80);
});

test("whose tasks these are tells nothing of the key", () => {
  assert.equal(tasks.ownerOf(""), "");
  assert.match(tasks.ownerOf("ig_secret"), /^[0-9a-f]{8}$/);
  assert.notEqual(tasks.ownerOf("ig_a"), tasks.ownerOf("ig_b"));
});

// ---- snippets

test("snippets hold any prompt as data, and never the key", () => {
  for (const language of ["curl", "Python", "JavaScript"]) {
    const text = snippet(language, "http://h", { prompt: HOSTILE, promptUpsampling: true, extra: { a: null } }, true);
    assert.match(text, /IMAGEGEN_KEY/);
    assert.doesNotMatch(text, /\u202e/);
  }
  assert.match(snippet("Python", "http://h", { promptUpsampling: true, extra: { a: null } }, false), /json=\{"promptUpsampling": True, "extra": \{"a": None\}\}/);
});

// ---- events

test("a stream is read in any pieces", () => {
  const text = `: hello\r\n\r\nevent: snapshot\r\nid: ${ID}:5\r\ndata: {"a":1}\r\n\r\nevent: image\ndata: x\ndata: y\n\nid: 9\n\ndata: rest`;
  for (const size of [1, 2, 3, 7, text.length]) {
    const parser = new EventParser();
    const events = [];
    for (let at = 0; at < text.length; at += size) events.push(...parser.feed(text.slice(at, at + size)));
    assert.deepEqual(events, [{ name: "snapshot", id: `${ID}:5`, data: '{"a":1}' }, { name: "image", id: null, data: "x\ny" }], `pieces of ${size}`);
  }
});

function stream(events) {
  return answer(events.map(([name, sequence, data]) => `event: ${name}\nid: ${ID}:${sequence}\ndata: ${JSON.stringify({ taskId: ID, sequence, ...data })}\n\n`).join(""));
}

// Follows ID over scripted responses; returns the requests and the events until the task has ended.
function followed(responses, { task = () => ({}) } = {}) {
  return new Promise((resolve) => {
    const requests = [];
    const events = [];
    const send = async (path, { headers }) => {
      requests.push([path, headers["Last-Event-ID"]]);
      const next = responses.shift();
      if (next instanceof Error) throw next;
      return next;
    };
    const onEvent = (id, name, { status }) => {
      events.push([name, status]);
      if (["completed", "not_found"].includes(status)) resolve({ requests, events });
    };
    new Follower({ send, task }, { onEvent, random: () => -1.5 }).follow(ID);
  });
}

test("a stream that broke is resumed where it ended", async () => {
  const { requests, events } = await followed([
    stream([["snapshot", 5, { status: "pending" }], ["status", 6, { status: "processing" }]]),
    new ServiceError(0),
    new ServiceError(503, {}, 0),
    stream([["completed", 7, { status: "completed" }]]),
  ]);
  assert.deepEqual(requests.map(([, last]) => last), [undefined, `${ID}:6`, `${ID}:6`, `${ID}:6`]);
  assert.deepEqual(events, [["snapshot", "pending"], ["status", "processing"], ["completed", "completed"]]);
});

test("a task that ended while nobody listened is read", async () => {
  const { events } = await followed([stream([["snapshot", 5, { status: "pending" }]]), answer(null, { status: 204 })], { task: async () => ({ taskId: ID, status: "completed" }) });
  assert.deepEqual(events.at(-1), ["snapshot", "completed"]);
});

test("a task that is unknown is gone", async () => {
  assert.deepEqual((await followed([new ServiceError(404)])).events, [["snapshot", "not_found"]]);
});

// ---- the service's client

function client(responses, key = "") {
  const calls = [];
  const session = storage();
  const sessionKey = new SessionKey(session);
  sessionKey.value = key;
  let refused = 0;
  const fetch = async (url, options) => {
    calls.push({ url, ...options });
    const next = responses.shift();
    if (next instanceof Error) throw next;
    return next;
  };
  const api = new Api("http://h", { key: sessionKey, language: () => "zh", onUnauthorized: () => { refused += 1; }, fetch });
  return { api, calls, refusals: () => refused };
}

test("the key goes in a header, never into the address", async () => {
  const { api, calls } = client([answer({ models: [] })], "ig_secret");
  await api.models();
  assert.deepEqual([calls[0].headers.Authorization, calls[0].headers["Accept-Language"]], ["Bearer ig_secret", "zh"]);
  assert.doesNotMatch(calls[0].url, /secret/);
});

test("a submit without an answer is sent again under the same Idempotency-Key", async () => {
  const { api, calls } = client([new TypeError("network"), answer({ taskId: ID })]);
  assert.equal((await api.submit({ prompt: "a" })).taskId, ID);
  assert.equal(calls.length, 2);
  assert.equal(calls[0].headers["Idempotency-Key"], calls[1].headers["Idempotency-Key"]);
  assert.match(calls[0].headers["Idempotency-Key"], /^[0-9a-f]{32}$/);
});

test("a refusal is an error with its code, fields and time to wait, and is not sent again", async () => {
  const body = { code: "rate_limited", message: "slow", details: [{ field: "n", message: "x" }], requestId: "r" };
  const { api, calls } = client([answer(body, { status: 429, headers: { "Retry-After": "12" } })]);
  await assert.rejects(api.submit({}), (error) => error instanceof ServiceError && error.status === 429 && error.retryAfterS === 12 && error.details[0].field === "n" && error.requestId === "r");
  assert.equal(calls.length, 1);
});

test("an answer that is no JSON is an error with its status", async () => {
  const { api } = client([answer("<html>Bad gateway</html>", { status: 500 })]);
  await assert.rejects(api.models(), { status: 500, code: "http_500" });
});

test("a refused key is asked for once more", async () => {
  const { api, refusals } = client([answer({ code: "unauthorized" }, { status: 401 })]);
  await assert.rejects(api.models(), { status: 401 });
  assert.equal(refusals(), 1);
});

test("a time to wait is a number or a date", () => {
  assert.deepEqual([secondsOf("7"), secondsOf(null), secondsOf("x"), secondsOf("Thu, 01 Jan 1970 00:00:10 GMT", 4000)], [7, null, null, 6]);
});

// ---- texts, masks

test("both languages have the same texts with the same parts", () => {
  const parts = (text) => [...text.matchAll(/\{\w+\}/g)].map(([part]) => part).sort();
  assert.deepEqual(Object.keys(STRINGS.en), Object.keys(STRINGS.zh));
  for (const name of Object.keys(STRINGS.en)) assert.deepEqual(parts(STRINGS.zh[name]), parts(STRINGS.en[name]), name);
});

test("every text that the components name is there, and none is left over", () => {
  const sources = readdirSync(FOLDER).filter((name) => name.endsWith(".js") && !["strings.js", "board-strings.js", "preact.js", "hooks.js", "htm.js", "uplot.js"].includes(name));
  const source = sources.map((name) => readFileSync(new URL(name, FOLDER), "utf8")).join("\n");
  const named = [...source.matchAll(/\bt\("([\w.]+)"/g)].map(([, name]) => name);
  assert.ok(named.length > 60);
  for (const name of named) assert.ok(name in STRINGS.en, name);
  const composed = [...source.matchAll(/`(\w+)\.\$\{/g)].map(([, start]) => `${start}.`);
  for (const name of Object.keys(STRINGS.en)) assert.ok(source.includes(`"${name}"`) || composed.some((start) => name.startsWith(start)), `${name} is not used`);
});

test("the language is the chosen one, else the browser's", () => {
  assert.equal(initialLanguage(null, ["fr-FR", "zh-Hans-CN", "en"]), "zh");
  assert.equal(initialLanguage("en", ["zh"]), "en");
  assert.equal(initialLanguage("xx", []), "en");
  assert.equal(translate("zh", "place", { place: 3 }), "队列第 3 位");
});

test("each step of a mask can be undone", () => {
  const begin = { kind: "begin", point: [0, 0], size: 0.1, erase: false };
  const steps = [begin, { kind: "extend", point: [1, 1] }, { kind: "invert" }, { kind: "clear" }].reduce(changeSteps, []);
  assert.equal(steps.length, 3);
  assert.deepEqual(steps[0].points, [[0, 0], [1, 1]]);
  assert.equal(changeSteps(steps, { kind: "undo" }).length, 2);
  assert.deepEqual(changeSteps([], { kind: "clear" }), []);
});

test("a stream over the limit says so, and when the next comes", async () => {
  const states = [];
  const send = async () => { throw new ServiceError(429, {}, 7); };
  const follower = new Follower({ send }, { onEvent: () => {}, onState: (...state) => states.push(state), random: () => 0 });
  follower.follow(ID);
  await new Promise((resolve) => { setTimeout(resolve, 5); });
  follower.clear();
  assert.deepEqual(states.slice(0, 2), [["connecting"], ["limited", 7]]);
});

// ---- what a person does

function studio(given = {}) {
  const calls = [];
  const saved = new Map();
  const note = (name, result) => async (...values) => { calls.push([name, ...values]); return typeof result === "function" ? result(...values) : result; };
  const api = {
    key: { value: "" }, models: note("models", { models: [model({ edit: true })], defaultModel: "m" }), task: note("task", (id) => ({ taskId: id, status: "completed", sequence: 9, data: [{ index: 0, url: `http://h/api/images/${id}/0` }] })),
    submit: note("submit", { taskId: ID, status: "pending", sequence: 1 }), cancel: note("cancel", { status: "cancelled", sequence: 4 }), retry: note("retry", { status: "pending", sequence: 8 }),
    upload: note("upload", { uploadId: "upload:1", width: 8, height: 8 }), image: note("image", new Blob(["x"])), send: () => new Promise(() => {}), ...given.api,
  };
  const history = { open: async () => given.reading ?? given.records ?? [], put: async (record) => saved.set(record.id, record), remove: async ({ id }) => saved.delete(id) };
  let now = 1000;
  const page = { hash: given.hash ?? "", session: storage(), now: () => now, sleep: () => new Promise((resolve) => { setTimeout(resolve, 0); }), go: (hash) => { calls.push(["go", hash]); made.onHash(hash); } };
  const tabs = { put: (record) => calls.push(["tab put", record]), remove: (record) => calls.push(["tab remove", record]) };
  const made = new Studio({ api, history, tabs, page, language: "en" });
  return { made, calls, saved, wait: (ms) => { now += ms; }, named: (name) => calls.filter(([called]) => called === name) };
}

test("a submit opens its task and keeps it with its request", async () => {
  const { made, calls, saved } = studio();
  made.edit({ prompt: "a cat" });
  await made.submit();
  assert.deepEqual(calls.find(([name]) => name === "go"), ["go", `#/task/${ID}`]);
  assert.deepEqual([saved.get(ID).request.prompt, saved.get(ID).view.status], ["a cat", "pending"]);
});

test("a submit that is answered with its images reads them no second time", async () => {
  const cached = { taskId: ID, status: "completed", sequence: 7, cached: true, data: [{ index: 0, url: `http://h/api/images/${ID}/0` }] };
  const { made, named } = studio({ api: { submit: async () => cached } });
  made.edit({ prompt: "a cat" });
  await made.submit();
  assert.deepEqual([named("task").length, made.state.records.get(ID).view.data.length, made.state.notice], [0, 1, "cached"]);
});

test("the list of models is read once for a tab, and again for another key", async () => {
  const { made, named, wait } = studio();
  await made.loadModels();
  await made.loadModels();
  assert.equal(named("models").length, 1);
  made.api.key.value = "ig_other";
  await made.loadModels();
  wait(400_000);
  await made.loadModels();
  assert.equal(named("models").length, 3);
});

test("a submit without a prompt is refused in the page", async () => {
  const { made, named } = studio();
  await made.submit();
  assert.deepEqual([named("submit").length, made.state.faults.prompt], [0, { text: "fault.prompt.empty" }]);
});

test("a 429 closes the form until its time is over", async () => {
  const { made, named, wait } = studio({ api: { submit: async () => { throw new ServiceError(429, { code: "rate_limited" }, 12); } } });
  made.edit({ prompt: "a" });
  await made.submit();
  assert.equal(made.state.blockedUntil, 13_000);
  made.api.submit = async (body) => { made.sent = body; return { taskId: ID, status: "pending", sequence: 1 }; };
  await made.submit();
  assert.equal(made.sent, undefined);
  wait(12_000);
  await made.submit();
  assert.equal(made.sent.prompt, "a");
  assert.equal(named("submit").length, 0);
});

test("a fault of the server stands at its field until the field is changed", async () => {
  const details = [{ field: "width", message: "must be 1024" }, { field: "webhook", message: "no" }];
  const { made } = studio({ api: { submit: async () => { throw new ServiceError(400, { code: "invalid_request", message: "m", details }); } } });
  made.edit({ prompt: "a" });
  await made.submit();
  assert.deepEqual(made.state.faults, { size: { message: "must be 1024" } });
  made.edit({ size: "1024x1024" });
  assert.deepEqual([made.state.faults, made.state.error], [{}, null]);
});

test("another variant is one that this browser has not made", async () => {
  const request = { prompt: "a", width: 512, height: 512 };
  const records = [{ ...tasks.newRecord(ID, request, "", 1), gone: true }, { ...tasks.newRecord(OTHER, { ...request, variant: 3 }, "", 2), gone: true }];
  const { made, named } = studio({ records });
  await made.start();
  await made.variant(made.state.records.get(ID));
  assert.equal(named("submit")[0][1].variant, 4);
});

test("a changed form is no longer a variant", () => {
  const { made } = studio();
  made.again({ ...tasks.newRecord(ID, { prompt: "a", variant: 3 }, "", 1) });
  assert.equal(made.state.draft.variant, 3);
  made.edit({ prompt: "b" });
  assert.equal(made.state.draft.variant, 0);
});

test("an image becomes the input of the form, on a model that takes it", async () => {
  globalThis.URL.createObjectURL ??= () => "blob:x";
  const models = [{ id: "draws", capabilities: { edit: false } }, { id: "edits", capabilities: { edit: true } }];
  const { made, named } = studio({ api: { models: async () => ({ models, defaultModel: "draws" }) } });
  await made.start();
  const record = tasks.newRecord(ID, { prompt: "a", model: "draws", seed: 5 }, "", 1);
  await made.editImage(record, { index: 0, url: `http://h/api/images/${ID}/0?v=1` });
  assert.deepEqual(named("image")[0], ["image", `/api/images/${ID}/0?v=1`]);
  assert.deepEqual([made.state.draft.model, made.state.draft.inputs[0].id, made.state.draft.seed], ["edits", "upload:1", ""]);
});

test("a removed task comes back by undo", async () => {
  const { made, saved } = studio({ records: [{ ...tasks.newRecord(ID, { prompt: "a" }, "", 1), gone: true }] });
  await made.start();
  const record = made.state.records.get(ID);
  made.remove(record);
  assert.equal(made.state.records.size, 0);
  made.restore(made.state.notice.removed);
  assert.deepEqual([made.state.records.get(ID), saved.has(ID)], [record, true]);
});

test("a task that was opened by its link is shown and not kept", async () => {
  const { made, saved } = studio({ hash: `#/task/${OTHER}` });
  await made.start();
  assert.equal(made.state.records.get(OTHER).view.status, "completed");
  assert.equal(saved.size, 0);
});

test("a page that is opened again reads no task that has ended, since each read counts against the limit", async () => {
  const ended = tasks.withView(tasks.newRecord(ID, { prompt: "a" }, "", 1), { status: "completed", sequence: 3, data: [{ index: 0, expiresAt: "2099-01-01T00:00:00Z" }] });
  const { made, named } = studio({ records: [ended], hash: `#/task/${ID}` });
  await made.start();
  assert.equal(named("task").length, 0);
});

test("a page shows its task though the browser's database does not open, and adds the records when it does", async () => {
  let open;
  const { made } = studio({ reading: new Promise((resolve) => { open = resolve; }), hash: `#/task/${ID}` });
  await made.start();
  assert.equal(made.state.records.get(ID).view.status, "completed");
  assert.equal(made.state.models.length, 1);
  const older = tasks.withView(tasks.newRecord(ID, { prompt: "a" }, "", 1), { status: "processing", sequence: 3 });
  open([older, tasks.newRecord(OTHER, { prompt: "b" }, "", 1)]);
  await new Promise((resolve) => { setTimeout(resolve, 0); });
  assert.deepEqual([...made.state.records.keys()].sort(), [ID, OTHER].sort());
  const { owner, request, view } = made.state.records.get(ID);
  assert.deepEqual([owner, request.prompt, view.status], ["", "a", "completed"]);
});

test("a prompt in the address fills the form", () => {
  assert.equal(studio({ hash: "#/?prompt=a%20cat&model=m" }).made.state.draft.prompt, "a cat");
});

// ---- the board

function minute(at, changes = {}) {
  return { at, depth: 0, oldestAgeSeconds: 0, inFlight: 0, submits: {}, tasks: {}, upstream: {}, waitSeconds: { p50: null, p95: null }, runSeconds: { p50: null, p95: null }, spent: 0, saved: 0, commands: 0, ...changes };
}

test("a later state of a minute replaces the earlier one, and minutes of yesterday go", () => {
  const now = 200_040;
  const known = board.mergeMinutes(new Map(), [minute(now - 86_460), minute(now - 60, { commands: 1 })], now);
  const merged = board.mergeMinutes(known, [minute(now - 60, { commands: 5 })], now);
  assert.deepEqual([...merged.values()].map(({ commands }) => commands), [5]);
});

test("a plot has a value for each minute: zero for a count without one, nothing for a percentile", () => {
  const now = 7_200;
  const times = board.timesOf(1, now);
  assert.deepEqual([times.length, times[0], times.at(-1)], [60, now - 59 * 60, now]);
  const minutes = new Map([[now, minute(now, { tasks: { completed: 2 }, waitSeconds: { p50: 1.5, p95: 2 }, upstream: { ok: 1, upstream_error: 3 }, commands: 7 })]]);
  const plots = Object.fromEntries(board.plotsOf(minutes, times, 720).map(({ name, series }) => [name, series]));
  assert.deepEqual(plots.tasks[0].values.slice(-2), [0, 2]);
  assert.deepEqual(plots.wait[0].values.slice(-2), [null, 1.5]);
  assert.deepEqual(plots.upstream.map(({ name }) => name), ["upstream_error", "ok"]);
  assert.deepEqual([plots.redis[0].values.at(-1), plots.redis[1].values.at(-1)], [7, 1]);
});

test("commands an hour are the sum of the sixty minutes before, also of those outside the plot", () => {
  const now = 36_000;
  const minutes = new Map(Array.from({ length: 120 }, (_, number) => [now - number * 60, minute(now - number * 60, { commands: 2 })]));
  const redis = board.plotsOf(minutes, board.timesOf(1, now), 0).find(({ name }) => name === "redis");
  assert.ok(redis.series[0].values.every((value) => value === 120));
  assert.deepEqual(board.lastHour(minutes, now), { commands: 120, hits: 0, submits: 0 });
});

test("of a task in both lists the later state counts, and an unchanged row stays the same object", () => {
  const row = (changes) => ({ taskId: ID, sequence: 1, status: "pending", prompt: "a cat", progress: 0, reason: null, retryAt: null, error: null, attempts: 0, instance: null, ...changes });
  const before = board.joinRows(new Map(), [row()], []);
  const same = board.joinRows(before, [row()], [row({ sequence: 0, status: "failed" })]);
  assert.equal(same.get(ID), before.get(ID));
  const ended = board.joinRows(before, [row()], [row({ sequence: 2, status: "failed", prompt: null })]);
  assert.deepEqual([ended.get(ID).status, ended.get(ID).prompt], ["failed", "a cat"]);
});

test("a cancel that only left says so until the task is tried again", async () => {
  const { made, saved } = studio({ api: { cancel: async () => ({ status: "processing", sequence: 4, left: true }) } });
  made.edit({ prompt: "a cat" });
  await made.submit();
  await made.cancel(made.state.records.get(ID));
  made.follower.onEvent(ID, "progress", { status: "processing", sequence: 5 });
  assert.deepEqual([saved.get(ID).left, saved.get(ID).view.sequence], [true, 5]);
  await made.retry(made.state.records.get(ID));
  assert.equal(saved.get(ID).left, false);
});

test("a tab shows the tasks of another one, and never an older state", async () => {
  const one = studio();
  const two = studio();
  one.made.edit({ prompt: "a cat" });
  await one.made.submit();
  const record = one.named("tab put").at(-1)[1];
  two.made.receive(record);
  assert.equal(two.made.state.records.get(ID).request.prompt, "a cat");
  assert.deepEqual(two.named("tab put"), [], "what was received is not sent back");
  two.made.receive({ ...record, view: { status: "completed", sequence: 9, data: [] } });
  two.made.receive({ ...record, pinned: true });
  const shown = two.made.state.records.get(ID);
  assert.deepEqual([shown.pinned, shown.view.status], [true, "completed"]);
  two.made.receive({ ...record, id: "b".repeat(32), owner: "another key" });
  assert.equal(two.made.state.records.size, 1);
  one.made.remove(record);
  two.made.drop(one.named("tab remove")[0][1]);
  assert.equal(two.made.state.records.size, 0);
});

test("a task that another tab removed stays where it is open, and is not kept", async () => {
  const { made } = studio();
  made.edit({ prompt: "a cat" });
  await made.submit();
  made.drop({ owner: "", id: ID });
  assert.equal(made.state.records.get(ID).owner, null);
});
