// A call as curl, Python and JavaScript: programs that run as they are. The key is in none of them, but a variable for it.

export const LANGUAGES = ["curl", "Python", "JavaScript"];

const UNSAFE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;

// call: {method, url, headers, body (text of JSON or null), sendsFile, needsKey, answer ("json", "image", "events" or "text")}.
export function snippet(language, call) {
  return { curl, Python: python, JavaScript: javaScript }[language](call);
}

function curl({ method, url, headers, body, sendsFile, needsKey, answer }) {
  const parts = [`curl -s${answer === "events" ? "N" : ""}`];
  if (method !== (body || sendsFile ? "POST" : "GET")) parts.push(`-X ${method}`);
  parts[0] = `${parts.join(" ")} ${shellQuoted(url)}`;
  const lines = [parts[0]];
  if (needsKey) lines.push(`-H "Authorization: Bearer $IMAGEGEN_KEY"`);
  for (const [name, value] of Object.entries(headers)) lines.push(`-H ${shellQuoted(`${name}: ${value}`)}`);
  if (body) lines.push(`-d ${shellQuoted(compact(body))}`);
  if (sendsFile) lines.push("--data-binary @image.png");
  if (answer === "image") lines.push("-o image.png");
  return lines.join(" \\\n  ");
}

function python({ method, url, headers, body, sendsFile, needsKey, answer }) {
  const fields = Object.entries(headers).map(([name, value]) => `${literal(name)}: ${literal(value)}`);
  if (needsKey) fields.unshift(`"Authorization": "Bearer " + os.environ["IMAGEGEN_KEY"]`);
  const json = parsed(body);
  const given = [`"${method}"`, literal(url)];
  if (fields.length) given.push(`headers={${fields.join(", ")}}`);
  if (body) given.push(json === undefined ? `content=${literal(body)}` : `json=${pythonLiteral(json)}`);
  if (sendsFile) given.push(`content=open("image.png", "rb").read()`);
  given.push("timeout=70");
  const call = given.map((each) => `    ${each},\n`).join("");
  const imports = `${needsKey ? "import os\n\n" : ""}import httpx\n\n`;
  if (answer === "events") {
    return `${imports}with httpx.stream(\n${call}) as answer:\n    answer.raise_for_status()\n    for line in answer.iter_lines():\n        print(line)`;
  }
  const use = { json: "print(answer.json())", text: "print(answer.text)", image: `with open("image.png", "wb") as file:\n    file.write(answer.content)` }[answer];
  return `${imports}answer = httpx.request(\n${call})\nanswer.raise_for_status()\n${use}`;
}

function javaScript({ method, url, headers, body, sendsFile, needsKey, answer }) {
  const fields = Object.entries(headers).map(([name, value]) => `${literal(name)}: ${literal(value)}`);
  if (needsKey) fields.unshift("Authorization: `Bearer ${process.env.IMAGEGEN_KEY}`");
  const json = parsed(body);
  const options = [];
  if (method !== "GET") options.push(`method: "${method}"`);
  if (fields.length) options.push(`headers: { ${fields.join(", ")} }`);
  if (body) options.push(json === undefined ? `body: ${literal(body)}` : `body: JSON.stringify(${escaped(JSON.stringify(json, null, 2)).replaceAll("\n", "\n  ")})`);
  if (sendsFile) options.push(`body: await readFile("image.png")`);
  const files = [sendsFile ? "readFile" : "", answer === "image" ? "writeFile" : ""].filter(Boolean);
  const imports = files.length ? `import { ${files.join(", ")} } from "node:fs/promises";\n\n` : "";
  const given = options.length ? `, {\n${options.map((each) => `  ${each},\n`).join("")}}` : "";
  const use = {
    json: "console.log(await answer.json());", text: "console.log(await answer.text());",
    image: `await writeFile("image.png", Buffer.from(await answer.arrayBuffer()));`,
    events: `for await (const part of answer.body.pipeThrough(new TextDecoderStream())) console.log(part);`,
  }[answer];
  return `${imports}const answer = await fetch(${literal(url)}${given});\nif (!answer.ok) throw new Error(await answer.text());\n${use}`;
}

function parsed(text) {
  try { return JSON.parse(text); } catch { return undefined; }
}

function compact(text) {
  const json = parsed(text);
  return json === undefined ? text : escaped(JSON.stringify(json));
}

// Controls and bidirectional marks are escaped, so that a text shows what it is.
function escaped(text) {
  return text.replace(UNSAFE, (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

function literal(text) {
  return escaped(JSON.stringify(text));
}

function shellQuoted(text) {
  return /^[\w\-./:]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

function pythonLiteral(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(pythonLiteral).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, part]) => `${literal(name)}: ${pythonLiteral(part)}`).join(", ")}}`;
  return typeof value === "string" ? literal(value) : JSON.stringify(value);
}
