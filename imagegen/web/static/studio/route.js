// Addresses of the studio's states: the part after `#` and the values that it holds.

const TASK_ID = /^[0-9a-f]{32}$/;
const INDEX = /^\d{1,2}$/;

const HOME = { page: "make" };

export function parseRoute(hash) {
  const [path, query = ""] = hash.replace(/^#/, "").split("?", 2);
  const [page, ...parts] = path.split("/").filter(Boolean);
  const values = new URLSearchParams(query);
  switch (page) {
    case "task": return taskRoute(parts);
    case "gallery": return galleryRoute(parts, values);
    case "compare": return compareRoute(parts);
    case "mask": return { page: "mask" };
    case "key": return { page: "key" };
    case "help": return { page: "help" };
    default: return values.has("prompt") ? { page: "make", prompt: values.get("prompt"), model: values.get("model") || "" } : HOME;
  }
}

export function formatRoute(route) {
  switch (route.page) {
    case "task": return `#/task/${route.id}${route.index === undefined ? "" : `/${route.index}`}`;
    case "gallery": return `#/gallery${route.id ? `/${route.id}` : ""}${queryOf({ q: route.search, all: route.all && "1" })}`;
    case "compare": return `#/compare/${route.images.map(({ id, index }) => `${id}.${index}`).join("/")}`;
    case "make": return route.prompt === undefined ? "#/" : `#/${queryOf({ prompt: route.prompt, model: route.model })}`;
    default: return `#/${route.page}`;
  }
}

function taskRoute([id, index]) {
  if (!TASK_ID.test(id || "")) return HOME;
  return INDEX.test(index || "") ? { page: "task", id, index: Number(index) } : { page: "task", id };
}

function galleryRoute([id], values) {
  const route = { page: "gallery", search: values.get("q") || "", all: values.get("all") === "1" };
  return TASK_ID.test(id || "") ? { ...route, id } : route;
}

function compareRoute(parts) {
  const images = parts.slice(0, 2).map((part) => part.split(".")).filter(([id, index]) => TASK_ID.test(id) && INDEX.test(index || ""));
  return images.length ? { page: "compare", images: images.map(([id, index]) => ({ id, index: Number(index) })) } : { page: "gallery", search: "", all: false };
}

function queryOf(values) {
  const given = Object.entries(values).filter(([, value]) => value);
  return given.length ? `?${new URLSearchParams(given)}` : "";
}
