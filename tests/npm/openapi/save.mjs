// Saves the image that the compiled client.ts makes. Arguments: address of the service, file.

import { writeFile } from "node:fs/promises";
import { makeImage } from "./made/client.js";

const [base, file] = process.argv.slice(2);
await writeFile(file, Buffer.from(await makeImage(base)));
