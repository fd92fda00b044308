// The form's values: a draft becomes the body of a submit, and a body becomes a draft again.

import { fieldsOf, fittingSize, sizeChoices } from "./models.js";

// Fields of the form. `inputs`: {id, name, width, height, preview}; `rest`: fields of a body that the form does not show.
export const EMPTY = Object.freeze({
  prompt: "", model: "", size: "", ownSize: false, n: 1, seed: "", steps: "", quality: "", background: "", negativePrompt: "", outputFormat: "",
  inputs: [], mask: null, variant: 0, rest: {},
});

const SHOWN = new Set([
  "prompt", "model", "width", "height", "n", "seed", "steps", "quality", "background", "negativePrompt", "outputFormat",
  "imageUrl", "referenceImages", "mask", "variant",
]);
const TEXTS = ["quality", "background", "negativePrompt", "outputFormat"];

// Returns the body of a submit with what the model can; empty fields are absent.
export function bodyOf(draft, model) {
  const fields = fieldsOf(model);
  const body = { ...draft.rest, prompt: draft.prompt.trim() };
  if (draft.model) body.model = draft.model;
  [body.width, body.height] = sizeOf(draft, model).split("x").map(Number);
  if (draft.n > 1) body.n = draft.n;
  if (draft.seed !== "" && fields.seed) body.seed = wholeNumber(draft.seed);
  if (draft.steps !== "" && fields.steps) body.steps = wholeNumber(draft.steps);
  for (const name of TEXTS) if (isOffered(name, draft[name], fields)) body[name] = draft[name];
  if (draft.variant > 0) body.variant = draft.variant;
  return { ...body, ...inputsOf(draft, fields) };
}

// Returns the size that is sent: one that was typed is left to the server, which names the fault at its field.
export function sizeOf(draft, model) {
  return draft.size && sizeChoices(model).free ? draft.size : fittingSize(model, draft.size);
}

// Returns the draft that gives this body. known: input images of the body by their id, to show them.
export function draftOf(body, known = new Map()) {
  const given = [body.imageUrl, ...(body.referenceImages || [])].filter(Boolean);
  const inputs = given.map((id) => known.get(id) || { id, name: shortName(id) });
  const texts = Object.fromEntries(TEXTS.map((name) => [name, body[name] ?? ""]));
  return {
    ...EMPTY, ...texts, inputs,
    prompt: body.prompt ?? "",
    model: body.model ?? "",
    size: body.width && body.height ? `${body.width}x${body.height}` : "",
    n: body.n ?? 1,
    seed: body.seed === undefined ? "" : String(body.seed),
    steps: body.steps === undefined ? "" : String(body.steps),
    mask: body.mask ? known.get(body.mask) || { id: body.mask, name: shortName(body.mask) } : null,
    variant: body.variant ?? 0,
    rest: Object.fromEntries(Object.entries(body).filter(([name]) => !SHOWN.has(name))),
  };
}

// Returns the body of the next variant of a request.
export function nextVariant(body, variant = (body.variant ?? 0) + 1) {
  return { ...body, variant };
}

// Returns keys of texts by field, for what the server need not be asked about.
export function faultsOf(draft, model) {
  const faults = {};
  const length = [...draft.prompt.trim()].length;
  if (length === 0) faults.prompt = "fault.prompt.empty";
  else if (length > fieldsOf(model).promptMax) faults.prompt = "fault.prompt.long";
  if (draft.seed !== "" && !/^\d{1,19}$/.test(draft.seed.trim())) faults.seed = "fault.seed";
  if (draft.mask && draft.inputs.length === 0) faults.mask = "fault.mask";
  return faults;
}

// Returns the field of the form that a field of an error's details belongs to.
export function formField(field) {
  const name = field.replace(/[.[].*$/, "").replace(/_([a-z])/g, (_, letter) => letter.toUpperCase());
  if (["width", "height", "size", "aspectRatio", "resolution"].includes(name)) return "size";
  if (["imageUrl", "referenceImages"].includes(name)) return "inputs";
  return name in EMPTY ? name : "";
}

function isOffered(name, value, fields) {
  if (!value) return false;
  if (name === "quality") return fields.qualities.includes(value);
  return name !== "background" || fields.transparent;
}

function inputsOf(draft, fields) {
  const ids = draft.inputs.map(({ id }) => id).slice(0, fields.maxInputs);
  if (!ids.length) return {};
  const [imageUrl, ...referenceImages] = ids;
  const mask = draft.mask && fields.mask ? { mask: draft.mask.id } : {};
  return { imageUrl, ...(referenceImages.length ? { referenceImages } : {}), ...mask };
}

// A seed above 2^53 would lose digits as a number; the server reads it from a text too.
function wholeNumber(text) {
  const number = Number(text);
  return Number.isSafeInteger(number) ? number : text.trim();
}

function shortName(id) {
  return id.startsWith("upload:") ? id.slice(0, 15) : id.slice(0, 40);
}
