// Estimate of a request's price by the rules that GET /api/models publishes. The server decides; this is shown beside a model.

const MEGAPIXEL = 1e6;
const RESOLUTIONS = { "0.5K": 512, 512: 512, "1K": 1024, "2K": 2048, "4K": 4096 };
const SLACK = 1.1;

// Returns the dollars of all images, null if the price is unknown. request: as the body of a submit.
export function estimate(price, request) {
  if (!price || !request.width || !request.height) return null;
  const each = [byQualityAndSize, byResolution, byArea, (rules) => rules.perImage].map((rule) => rule(price, request)).find(isKnown);
  if (!isKnown(each)) return null;
  const inputs = (request.imageUrl ? 1 : 0) + (request.referenceImages || []).length;
  const dollars = (each + (price.perInputImage || 0) * inputs) * (request.n || 1);
  return Math.ceil(Number((dollars * 1e6).toFixed(6))) / 1e6;
}

export function formatDollars(dollars, language) {
  const digits = dollars === 0 ? 0 : Math.min(6, Math.max(2, 2 - Math.floor(Math.log10(dollars)) - 1));
  return new Intl.NumberFormat(language, { style: "currency", currency: "USD", minimumFractionDigits: Math.min(2, digits), maximumFractionDigits: digits }).format(dollars);
}

function byQualityAndSize({ byQualitySize }, { quality, width, height }) {
  const sizes = byQualitySize?.[quality && quality !== "auto" ? quality : "high"] || {};
  const exact = sizes[`${width}x${height}`] ?? sizes[`${height}x${width}`];
  if (isKnown(exact)) return exact;
  const byArea = Object.entries(sizes).map(([size, cost]) => [areaOf(size), cost]).sort(([area, cost], [otherArea, other]) => area - otherArea || cost - other);
  const larger = byArea.find(([area]) => area >= width * height);
  if (!larger) return null;
  return Math.max(larger[1], ...byArea.filter(([area]) => area < width * height).map(([, cost]) => cost));
}

function byResolution({ byResolution: prices }, { width, height, resolution }) {
  const fitting = Object.entries(prices || {})
    .map(([name, cost]) => [RESOLUTIONS[name], cost])
    .filter(([side]) => side ** 2 * SLACK >= width * height && side >= (RESOLUTIONS[resolution] || 0))
    .sort(([side, cost], [otherSide, other]) => side - otherSide || cost - other);
  return fitting.length ? fitting[0][1] : null;
}

function byArea({ perMegapixel: rule, defaultSteps }, { width, height, steps }) {
  if (!rule) return null;
  let megapixels = width * height / MEGAPIXEL;
  if (rule.roundUp) megapixels = Math.ceil(megapixels);
  const further = megapixels - 1;
  if (further > 0 && !isKnown(rule.more)) return null;
  const cost = Math.min(megapixels, 1) * rule.first + Math.max(further, 0) * (rule.more || 0);
  return defaultSteps && steps ? cost * Math.max(steps / defaultSteps, 1) : cost;
}

function areaOf(size) {
  const [width, height] = size.split("x").map(Number);
  return width * height;
}

function isKnown(cost) {
  return cost !== null && cost !== undefined;
}
