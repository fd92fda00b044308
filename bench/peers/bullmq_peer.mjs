// Owns the same work on BullMQ: a Queue and a Worker, each with its own connection, in this process.
// Its packages are those of the working directory.

import { createRequire } from "node:module";
import { join } from "node:path";

const WARM_UP = 200;

async function main([url, ...numbers]) {
  const require = createRequire(join(process.cwd(), "package.json"));
  const { Queue, Worker } = require("bullmq");
  const [count, concurrency, inFlight] = numbers.map(Number);
  const { hostname: host, port } = new URL(url);
  const connection = { host, port: Number(port), maxRetriesPerRequest: null };
  const queue = new Queue("bench", { connection });
  const worker = new Worker("bench", async () => null, { connection, concurrency });
  await worker.waitUntilReady();

  let finished = 0;
  let reached = () => {};
  worker.on("completed", () => {
    finished += 1;
    reached();
  });
  worker.on("failed", (_job, error) => fail(error));

  const until = (total) =>
    new Promise((resolve) => {
      reached = () => finished >= total && resolve();
      reached();
    });

  const submitAll = async (wanted) => {
    let left = wanted;
    const submitter = async () => {
      while (left-- > 0) await queue.add("noop", {});
    };
    await Promise.all(Array.from({ length: inFlight }, submitter));
  };

  const submitted = WARM_UP + count;
  await Promise.all([submitAll(WARM_UP), until(WARM_UP)]);
  const began = performance.now();
  await Promise.all([submitAll(count), until(submitted)]);
  const seconds = (performance.now() - began) / 1000;

  const stored = await queue.getCompletedCount();
  if (stored !== submitted) throw new Error(`${stored} of ${submitted} results are stored`);
  const [own, client] = ["bullmq", "ioredis"].map((name) => require(`${name}/package.json`).version);
  const version = `${own} (ioredis ${client}, node ${process.versions.node})`;
  console.log(JSON.stringify({ seconds, submitted, version }));
  await worker.close();
  await queue.close();
}

function fail(error) {
  console.error(`Error: ${error.message}`);
  process.exit(1);
}

main(process.argv.slice(2)).catch(fail);
