// A mask as the list of what was painted, so that a step is undone by leaving it out.

export const MIN_BRUSH = 0.005;
export const MAX_BRUSH = 0.25;

// Steps: {points: [[x, y], …], size, erase}, {clear: true} or {invert: true}. Places and sizes are parts of the image's longer side.
export function changeSteps(steps, change) {
  switch (change.kind) {
    case "begin": return [...steps, { points: [change.point], size: change.size, erase: change.erase }];
    case "extend": return [...steps.slice(0, -1), { ...steps.at(-1), points: [...steps.at(-1).points, change.point] }];
    case "clear": return steps.length ? [...steps, { clear: true }] : steps;
    case "invert": return [...steps, { invert: true }];
    case "undo": return steps.slice(0, -1);
    default: return steps;
  }
}

// Draws the painted area on a canvas: opaque where the image is to change, transparent elsewhere.
export function drawSteps(context, steps, color) {
  const { width, height } = context.canvas;
  const scale = Math.max(width, height);
  context.clearRect(0, 0, width, height);
  context.fillStyle = context.strokeStyle = color;
  context.lineCap = context.lineJoin = "round";
  for (const step of steps) {
    context.globalCompositeOperation = step.invert ? "xor" : step.erase ? "destination-out" : "source-over";
    if (step.clear) context.clearRect(0, 0, width, height);
    else if (step.invert) context.fillRect(0, 0, width, height);
    else drawStroke(context, step, scale);
  }
  context.globalCompositeOperation = "source-over";
}

// Makes the file that a request takes as its mask: transparent where the image is to change, black elsewhere.
export function drawMask(context, painted) {
  const { width, height } = context.canvas;
  context.globalCompositeOperation = "source-over";
  context.fillStyle = "#000";
  context.fillRect(0, 0, width, height);
  context.globalCompositeOperation = "destination-out";
  context.drawImage(painted, 0, 0, width, height);
}

// A line of no length is not drawn, so that a single point is a circle.
function drawStroke(context, { points, size }, scale) {
  const [[x, y], ...others] = points;
  context.beginPath();
  if (!others.length) {
    context.arc(x * scale, y * scale, size * scale / 2, 0, 2 * Math.PI);
    context.fill();
    return;
  }
  context.lineWidth = size * scale;
  context.moveTo(x * scale, y * scale);
  for (const [nextX, nextY] of others) context.lineTo(nextX * scale, nextY * scale);
  context.stroke();
}
