// A request as curl, Python and JavaScript. All text is ASCII or harmless: controls and bidirectional marks are escaped.

const UNSAFE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;

export const LANGUAGES = ["curl", "Python", "JavaScript"];

// with_key: whether clients of this service need a key; the text has a variable for it, never the key.
export function snippet(language, base, body, withKey) {
  return { curl, Python: python, JavaScript: javaScript }[language](`${base}/api/images/generate?wait=60`, body, withKey);
}

function curl(url, body, withKey) {
  const key = withKey ? ` \\\n  -H "Authorization: Bearer $IMAGEGEN_KEY"` : "";
  return `curl -s ${shellQuoted(url)}${key} \\\n  -H 'Content-Type: application/json' \\\n  -d ${shellQuoted(json(body))}`;
}

function python(url, body, withKey) {
  const key = withKey ? `\n    headers={"Authorization": "Bearer " + os.environ["IMAGEGEN_KEY"]},` : "";
  return `${withKey ? "import os\n\n" : ""}import httpx\n\nanswer = httpx.post(\n    ${json(url)},${key}\n    json=${pythonLiteral(body)},\n    timeout=70,\n)\n`
    + `answer.raise_for_status()\nfor image in answer.json().get("data", []):\n    print(image["url"])`;
}

function javaScript(url, body, withKey) {
  const key = withKey ? `, "Authorization": \`Bearer \${process.env.IMAGEGEN_KEY}\`` : "";
  return `const answer = await fetch(${json(url)}, {\n  method: "POST",\n  headers: { "Content-Type": "application/json"${key} },\n`
    + `  body: JSON.stringify(${json(body, 2).replaceAll("\n", "\n  ")}),\n});\nconst { data = [] } = await answer.json();\nfor (const { url } of data) console.log(url);`;
}

export function json(value, indent) {
  return JSON.stringify(value, null, indent).replace(UNSAFE, (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

function shellQuoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function pythonLiteral(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(pythonLiteral).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, part]) => `${json(name)}: ${pythonLiteral(part)}`).join(", ")}}`;
  return json(value);
}
