// Editor of the mask of the first input image: painted with a pointer, a finger or the keyboard.

import { useStudio } from "./context.js";
import { useEffect, useReducer, useRef, useState } from "./hooks.js";
import { changeSteps, drawMask, drawSteps, MAX_BRUSH, MIN_BRUSH } from "./strokes.js";
import { html, Modal } from "./ui.js";

const COLOR = "#e0218a";
const SHOWN_SIDE = 1024;
const KEY_STEP = 0.02;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export function MaskEditor() {
  const { studio, state, t } = useStudio();
  const [input] = state.draft.inputs;
  const back = () => studio.go({ page: "make" }, true);
  if (!input?.preview) return html`<${Modal} label=${t("mask")} onClose=${back}><p>${t("mask.preview")}</p><//>`;
  return html`<${Modal} label=${t("mask")} wide onClose=${back}><${Painter} input=${input} onDone=${back} /><//>`;
}

function Painter({ input, onDone }) {
  const { studio, t } = useStudio();
  const canvas = useRef(null);
  const isPainting = useRef(false);
  const [steps, change] = useReducer(changeSteps, []);
  const [size, setSize] = useState(0.06);
  const [erase, setErase] = useState(false);
  const longer = Math.max(input.width, input.height);
  const ends = [input.width / longer, input.height / longer];
  const [cursor, setCursor] = useState([ends[0] / 2, ends[1] / 2]);
  const [isBusy, setIsBusy] = useState(false);
  const shown = Math.min(1, SHOWN_SIDE / longer);

  useEffect(() => { drawSteps(canvas.current.getContext("2d"), steps, COLOR); }, [steps]);

  const pointOf = (event) => {
    const box = canvas.current.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width * ends[0], (event.clientY - box.top) / box.height * ends[1]];
  };
  const paint = (kind, point) => { setCursor(point); change({ kind, point, size, erase }); };
  const onPointerDown = (event) => {
    if (event.button !== 0) return;
    event.currentTarget.setPointerCapture(event.pointerId);
    isPainting.current = true;
    paint("begin", pointOf(event));
  };
  const onPointerMove = (event) => {
    if (isPainting.current) for (const part of event.getCoalescedEvents?.() ?? [event]) paint("extend", pointOf(part));
  };
  const onPointerUp = () => { isPainting.current = false; };
  const onKeyDown = (event) => {
    const arrow = ARROWS[event.key];
    if (arrow) {
      const point = cursor.map((at, axis) => Math.min(ends[axis], Math.max(0, at + arrow[axis] * KEY_STEP)));
      if (event.shiftKey) paint("begin", point);
      else setCursor(point);
    } else if (event.key === " ") paint("begin", cursor);
    else if (event.key === "[") setSize(Math.max(MIN_BRUSH, size / 1.3));
    else if (event.key === "]") setSize(Math.min(MAX_BRUSH, size * 1.3));
    else if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey)) change({ kind: "undo" });
    else return;
    event.preventDefault();
  };
  const save = async () => {
    setIsBusy(true);
    const blob = await maskBlob(input, steps);
    if (await studio.useMask(blob)) onDone();
    else setIsBusy(false);
  };
  const place = { left: `${cursor[0] / ends[0] * 100}%`, top: `${cursor[1] / ends[1] * 100}%`, width: `${size / ends[0] * 100}%` };
  const position = t("mask.position", { x: Math.round(cursor[0] / ends[0] * 100), y: Math.round(cursor[1] / ends[1] * 100) });
  return html`<p class="faint" id="mask-help">${t("mask.help")}</p>
    <div class="painter" style=${{ aspectRatio: `${input.width} / ${input.height}`, maxWidth: `min(100%, calc(65vh * ${(input.width / input.height).toFixed(4)}))` }}>
      <img src=${input.preview} alt=${input.name} />
      <canvas ref=${canvas} width=${Math.round(input.width * shown)} height=${Math.round(input.height * shown)} tabindex="0" role="application" aria-label=${t("mask.canvas")} aria-describedby="mask-help"
        onPointerDown=${onPointerDown} onPointerMove=${onPointerMove} onPointerUp=${onPointerUp} onPointerCancel=${onPointerUp} onKeyDown=${onKeyDown}></canvas>
      <span class="brush" style=${place} aria-hidden="true"></span>
    </div>
    <p class="hidden" role="status">${position}</p>
    <div class="buttons">
      <label class="check">${t("mask.brush")} <input type="range" min=${MIN_BRUSH} max=${MAX_BRUSH} step="0.005" value=${size} onInput=${({ target }) => setSize(Number(target.value))} /></label>
      <label class="check"><input type="checkbox" checked=${erase} onChange=${({ target }) => setErase(target.checked)} /> ${t("mask.erase")}</label>
      <button type="button" disabled=${!steps.length} onClick=${() => change({ kind: "undo" })}>${t("mask.undo")}</button>
      <button type="button" disabled=${!steps.length} onClick=${() => change({ kind: "clear" })}>${t("mask.clear")}</button>
      <button type="button" onClick=${() => change({ kind: "invert" })}>${t("mask.invert")}</button>
      <button type="button" class="primary" disabled=${!steps.length || isBusy} onClick=${save}>${t("mask.done")}</button>
    </div>`;
}

// Returns the mask as a PNG of the image's own size, which providers demand.
function maskBlob({ width, height }, steps) {
  const painted = newCanvas(width, height);
  drawSteps(painted.getContext("2d"), steps, "#000");
  const mask = newCanvas(width, height);
  drawMask(mask.getContext("2d"), painted);
  return new Promise((resolve) => { mask.toBlob(resolve, "image/png"); });
}

function newCanvas(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}
