// Runs calls of client packages for Node. Reads lines {"calls": [{"client", "base", "options", "fields", ...}],
// "atOnce"}, answers each with a JSON list of {"ids", "images", "events", "task"} or {"error", "status", "code"}.
// Images are the SHA-256 of their bytes, or links.
import { createHash } from "node:crypto";
import { createInterface } from "node:readline";
import { createOpenAI } from "@ai-sdk/openai";
import { createTogetherAI } from "@ai-sdk/togetherai";
import { generateImage } from "ai";
import OpenAI, { toFile } from "openai";

const bytes = (text) => Buffer.from(text, "base64");
const digest = (data) => createHash("sha256").update(data).digest("hex");
const shown = (image) => (image.b64_json ? digest(bytes(image.b64_json)) : image.url);
const file = (text, name) => toFile(bytes(text), `${name}.png`, { type: "image/png" });

async function openai({ base, options, fields, images, mask, path }) {
  const client = new OpenAI({ baseURL: base, apiKey: "any", ...options });
  if (path) return { task: await poll(client, await client.post(path, { body: fields })) };
  if (images) {
    const files = await Promise.all(images.map(file));
    const body = { ...fields, image: files.length === 1 ? files[0] : files };
    if (mask) body.mask = await file(mask, "mask");
    return answer(await client.images.edit(body));
  }
  const result = await client.images.generate(fields);
  if (!fields.stream) return answer(result);
  const events = [];
  for await (const event of result) events.push({ type: event.type, image: shown(event) });
  return { events };
}

async function poll(client, accepted) {
  let task = accepted;
  while (task.status === "processing") {
    await new Promise((resolve) => setTimeout(resolve, 50));
    task = await client.get(`/images/tasks/${accepted.id}`);
  }
  return task;
}

const answer = (result) => ({ ids: [result.id], images: result.data.map(shown) });

async function vercel({ client, base, options, fields, images, mask }) {
  const create = client === "togetherai" ? createTogetherAI : createOpenAI;
  const { model, prompt, ...more } = fields;
  const input = images ? { text: prompt, images: images.map(bytes), ...(mask ? { mask: bytes(mask) } : {}) } : prompt;
  const provider = create({ baseURL: base, apiKey: "any" });
  const result = await generateImage({ model: provider.image(model), prompt: input, ...more, ...options });
  return { images: result.images.map((image) => digest(image.uint8Array)) };
}

async function run(call) {
  try {
    return await (call.client === "openai" ? openai(call) : vercel(call));
  } catch (error) {
    const cause = error.lastError ?? error;
    return { error: cause.name ?? String(cause), text: String(cause), status: cause.status ?? cause.statusCode, code: cause.code };
  }
}

globalThis.AI_SDK_LOG_WARNINGS = false;
for await (const line of createInterface({ input: process.stdin })) {
  const { calls, atOnce } = JSON.parse(line);
  const results = [];
  if (atOnce) results.push(...(await Promise.all(calls.map(run))));
  else for (const call of calls) results.push(await run(call));
  process.stdout.write(`${JSON.stringify(results)}\n`);
}
