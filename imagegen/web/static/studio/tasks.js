// Records of tasks in this browser, and how answers and events change them.

const FINAL = new Set(["completed", "failed", "cancelled"]);

// A record. request: the submitted body, null for a task that was opened by its link. view: the last GET body. left: it
// was cancelled here, and goes on for others.
export function newRecord(id, request, owner, now) {
  return { id, request, owner, createdAt: now, pinned: false, gone: false, view: null };
}

export function isFinal(record) {
  return record.gone || FINAL.has(record.view?.status);
}

// Returns the record after a GET body or an event with one; an older state never replaces a newer one.
export function withView(record, view) {
  if (view.status === "not_found") return record.gone ? record : { ...record, gone: true };
  if (record.view && view.sequence < record.view.sequence) return record;
  const createdAt = Date.parse(view.createdAt) || record.createdAt;
  return { ...record, gone: false, createdAt, view };
}

// Returns the record after an `image` event, which has the entry of one image.
function withImage(record, entry) {
  if (!record.view || FINAL.has(record.view.status)) return record;
  const others = (record.view.data || []).filter(({ index }) => index !== entry.index);
  const data = [...others, entry].sort((one, other) => one.index - other.index);
  return { ...record, view: { ...record.view, data } };
}

// Returns what another tab knows of a record, with the newer state of both.
export function merged(record, other) {
  const isNewer = record?.view && other.view && record.view.sequence > other.view.sequence;
  return isNewer ? { ...other, view: record.view, gone: record.gone } : other;
}

export function withEvent(record, name, data) {
  return name === "image" ? withImage(record, data) : withView(record, data);
}

// Returns the records of a search: newest first, the pinned ones before all others.
export function found(records, text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const matches = ({ id, request, view }) => {
    const place = `${request?.prompt ?? ""} ${request?.model ?? view?.model ?? ""}`.toLowerCase();
    return words.every((word) => place.includes(word) || id === word);
  };
  return records.filter(matches).sort((one, other) => other.pinned - one.pinned || other.createdAt - one.createdAt || one.id.localeCompare(other.id));
}

export function imagesOf(record) {
  return record.gone ? [] : record.view?.data || [];
}

// Returns the path of an image on this service with its query, null for one that the provider serves.
export function servicePath(url) {
  const { pathname, search } = new URL(url);
  const match = /\/api\/images\/[0-9a-f]{32}\/\d{1,2}$/.exec(pathname);
  return match ? match[0] + search : null;
}

export function thumbnailPath(path, size) {
  return `${path}${path.includes("?") ? "&" : "?"}size=${size}`;
}

// Returns a file name from the prompt and the image's index that every system takes.
export function fileName(prompt, index, contentType) {
  const EXTENSIONS = { "image/jpeg": "jpg", "image/png": "png", "image/webp": "webp" };
  const words = prompt.normalize("NFKC").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "");
  const stem = [...words].slice(0, 60).join("").replace(/-+$/, "").toLowerCase() || "image";
  return `${stem}-${index + 1}.${EXTENSIONS[contentType] || "png"}`;
}

// A name of whose tasks these are, which tells nothing about the key: 32 bits of 256.
export function ownerOf(key) {
  if (!key) return "";
  let hash = 0x811c9dc5;
  for (const character of key) hash = Math.imul(hash ^ character.codePointAt(0), 0x01000193) >>> 0;
  return hash.toString(16).padStart(8, "0");
}

// Returns whether the images of a finished task are past their end.
export function isExpired(record, now) {
  const [image] = record.view?.data || [];
  return Boolean(image?.expiresAt) && Date.parse(image.expiresAt) <= now;
}
