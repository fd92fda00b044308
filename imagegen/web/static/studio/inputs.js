// Input images of a request: dropped, pasted or chosen files, and the mask of the first one.

import { faultText, useStudio } from "./context.js";
import { useEffect, useRef, useState } from "./hooks.js";
import { fieldsOf } from "./models.js";
import { html } from "./ui.js";

export function InputImages() {
  const { studio, state, t } = useStudio();
  const { maxInputs, mask: canMask } = fieldsOf(studio.model);
  const { inputs, mask } = state.draft;
  const file = useRef(null);
  const drag = useDrop(studio);
  const fault = state.faults.inputs ?? state.faults.mask;
  if (maxInputs === 0) return inputs.length || fault ? html`<p class="warn" role="alert">${t("inputs.none")}</p>` : null;
  return html`<fieldset class=${drag ? "inputs dropping" : "inputs"}>
    <legend>${t("inputs")}</legend>
    ${inputs.length > 0 && html`<ul class="thumbnails">
      ${inputs.map((input, index) => html`<${Input} key=${input.id} input=${input} isFirst=${index === 0} />`)}
    </ul>`}
    ${state.uploading.map((name) => html`<p class="faint" role="status">${t("inputs.uploading", { name })}</p>`)}
    <p class="faint">${t("inputs.drop")} ${t("inputs.limit", { count: maxInputs })}</p>
    <div class="buttons">
      <input ref=${file} class="hidden" type="file" multiple accept="image/png,image/jpeg,image/webp" tabindex="-1" aria-hidden="true"
        onChange=${({ target }) => { studio.addFiles(target.files); target.value = ""; }} />
      <button type="button" disabled=${inputs.length >= maxInputs} onClick=${() => file.current.click()} aria-invalid=${fault ? "true" : undefined}>${t("inputs.add")}</button>
      ${canMask && inputs.length > 0 && html`<button type="button" disabled=${!inputs[0].preview} title=${inputs[0].preview ? "" : t("mask.preview")} onClick=${() => studio.go({ page: "mask" })}>${t(mask ? "mask.edit" : "mask.paint")}</button>`}
      ${mask && html`<button type="button" class="plain" onClick=${() => studio.edit({ mask: null })}>${t("mask.remove")}</button>`}
    </div>
    ${mask && html`<p class="faint">${t("mask.set")}</p>`}
    ${fault && html`<p class="fault" role="alert">${faultText(t, fault)}</p>`}
  </fieldset>`;
}

function Input({ input: { id, name, preview }, isFirst }) {
  const { studio, t } = useStudio();
  return html`<li>
    ${preview ? html`<img src=${preview} alt=${name} />` : html`<span class="faint">${name}</span>`}
    ${!isFirst && html`<button type="button" class="plain" aria-label=${t("inputs.first", { name })} onClick=${() => studio.makeFirst(id)}>⇤</button>`}
    <button type="button" class="plain" aria-label=${t("inputs.remove", { name })} onClick=${() => studio.removeInput(id)}>✕</button>
  </li>`;
}

// Takes files that are dropped or pasted anywhere on the page; returns whether one is dragged over it.
function useDrop(studio) {
  const [isOver, setIsOver] = useState(false);
  useEffect(() => {
    const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
    const on = {
      dragover: (event) => { if (hasFiles(event)) { event.preventDefault(); setIsOver(true); } },
      dragleave: (event) => { if (!event.relatedTarget) setIsOver(false); },
      drop: (event) => { if (hasFiles(event)) { event.preventDefault(); setIsOver(false); studio.addFiles(event.dataTransfer.files); } },
      paste: (event) => { if (event.clipboardData?.files.length) { event.preventDefault(); studio.addFiles(event.clipboardData.files); } },
    };
    for (const [name, listener] of Object.entries(on)) document.addEventListener(name, listener);
    return () => { for (const [name, listener] of Object.entries(on)) document.removeEventListener(name, listener); };
  }, [studio]);
  return isOver;
}
