// What a model can, by its published capabilities. What is not known (null) is offered: the server decides.

const NO_LIMITS = {
  sizes: null, maxPixels: null, multipleOf: null, maxN: null, steps: { default: null, max: null }, seed: null, edit: null,
  maxInputImages: null, mask: null, transparent: null, qualities: null, promptMax: null,
};
const PRESETS = ["1024x1024", "1152x896", "896x1152", "1344x768", "768x1344", "512x512", "1536x1024", "1024x1536", "2048x2048"];

export const MAX_IMAGES = 16;
const MAX_INPUT_IMAGES = 16;
const MAX_PROMPT = 32000;
export const MAX_SIDE = 8192;
export const MIN_SIDE = 64;
const MAX_STEPS = 100;

function capabilitiesOf(model) {
  return { ...NO_LIMITS, ...model?.capabilities };
}

// Returns the sizes to choose from, as `1024x768`, the usual one first. `free`: whether others may be typed.
export function sizeChoices(model) {
  const { sizes, maxPixels, multipleOf } = capabilitiesOf(model);
  if (sizes) return { sizes, free: false };
  const fits = (size) => size.split("x").every((side) => side % (multipleOf || 8) === 0) && areaOf(size) <= (maxPixels || Infinity);
  return { sizes: PRESETS.filter(fits), free: true };
}

export function stepOfSide(model) {
  return Math.max(8, capabilitiesOf(model).multipleOf || 8);
}

// Returns which fields the form shows for a model.
export function fieldsOf(model) {
  const { steps, seed, edit, maxInputImages, mask, transparent, qualities, promptMax } = capabilitiesOf(model);
  const maxInputs = edit === false ? 0 : maxInputImages ?? MAX_INPUT_IMAGES;
  return {
    steps: steps.max !== 0,
    maxSteps: steps.max || MAX_STEPS,
    defaultSteps: steps.default,
    seed: seed !== false,
    maxInputs,
    mask: mask !== false && maxInputs > 0,
    transparent: transparent !== false,
    qualities: qualities || [],
    promptMax: promptMax || MAX_PROMPT,
  };
}

// Returns a size that the model takes: the same one, else the choice of the nearest shape, then area.
export function fittingSize(model, size) {
  const { sizes, free } = sizeChoices(model);
  if (size && (sizes.includes(size) || (free && isAllowed(model, size)))) return size;
  if (!size || !sizes.length) return sizes[0] || PRESETS[0];
  const distance = (other) => Math.abs(Math.log(ratioOf(other) / ratioOf(size))) * 10 + Math.abs(Math.log(areaOf(other) / areaOf(size)));
  return sizes.reduce((best, other) => distance(other) < distance(best) ? other : best);
}

export function endsSoon(model, now) {
  const DAYS_30 = 30 * 86_400_000;
  return Boolean(model?.endsAt) && Date.parse(model.endsAt) - now < DAYS_30;
}

export function hasEnded(model, now) {
  return Boolean(model?.endsAt) && Date.parse(model.endsAt) <= now;
}

function isAllowed(model, size) {
  const { maxPixels } = capabilitiesOf(model);
  const sides = size.split("x").map(Number);
  return sides.every((side) => side >= MIN_SIDE && side <= MAX_SIDE && side % stepOfSide(model) === 0) && areaOf(size) <= (maxPixels || Infinity);
}

function areaOf(size) {
  const [width, height] = size.split("x").map(Number);
  return width * height;
}

function ratioOf(size) {
  const [width, height] = size.split("x").map(Number);
  return width / height;
}
