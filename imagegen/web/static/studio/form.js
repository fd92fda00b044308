// The form of a request: only what the model can, with its price.

import { faultText, useStudio } from "./context.js";
import { useLayoutEffect, useRef } from "./hooks.js";
import { bodyOf, sizeOf } from "./draft.js";
import { InputImages } from "./inputs.js";
import { endsSoon, fieldsOf, hasEnded, MAX_IMAGES, MAX_SIDE, MIN_SIDE, sizeChoices, stepOfSide } from "./models.js";
import { estimate, formatDollars } from "./price.js";
import { errorText, html, useNow } from "./ui.js";

const FORMATS = ["png", "jpeg", "webp"];

export function Form() {
  const { studio, state, t } = useStudio();
  const { draft, faults, error } = state;
  const fields = fieldsOf(studio.model);
  const form = useRef(null);
  const onSubmit = (event) => { event.preventDefault(); studio.submit(); };
  const onKeyDown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) onSubmit(event);
  };
  useLayoutEffect(() => {
    form.current.querySelector("[aria-invalid=true]")?.focus();
  }, [faults]);
  return html`<form ref=${form} class="form" onSubmit=${onSubmit} onKeyDown=${onKeyDown} novalidate aria-label=${t("nav.make")}>
    <${Prompt} max=${fields.promptMax} />
    <${ModelChoice} />
    <${Size} />
    <div class="row">
      <${Field} name="n" label=${t("count")}>
        <input id="n" type="number" min="1" max=${MAX_IMAGES} value=${draft.n} onInput=${({ target }) => studio.edit({ n: bounded(target.value, 1, MAX_IMAGES) })} ...${invalid(faults.n, "n")} />
      <//>
      ${fields.seed && html`<${TextField} name="seed" label=${t("seed")} placeholder=${t("seed.random")} inputmode="numeric" />`}
    </div>
    <${InputImages} />
    <details class="more" open=${["steps", "quality", "background", "negativePrompt", "outputFormat"].some((name) => draft[name] || faults[name])}>
      <summary>${t("more")}</summary>
      <div class="row">
        ${fields.steps && html`<${TextField} name="steps" label=${t("steps")} placeholder=${fields.defaultSteps ?? t("steps.own")} inputmode="numeric" />`}
        ${fields.qualities.length > 0 && html`<${Choice} name="quality" label=${t("quality")} values=${fields.qualities} />`}
        ${fields.transparent && html`<${Choice} name="background" label=${t("background")} values=${["transparent", "opaque"]} text=${(value) => t(`background.${value}`)} />`}
        <${Choice} name="outputFormat" label=${t("format")} values=${FORMATS} />
      </div>
      <${TextField} name="negativePrompt" label=${t("negative")} />
    </details>
    ${error && html`<div class="error" role="alert"><p>${errorText(t, error)}</p>${unplaced(error, faults).map(({ field, message }) => html`<p><code>${field}</code> ${message}</p>`)}
      ${error.requestId && html`<p class="faint">${t("error.request", { id: error.requestId })}</p>`}</div>`}
    <${SubmitRow} />
  </form>`;
}

function Prompt({ max }) {
  const { studio, state, t } = useStudio();
  const count = [...state.draft.prompt.trim()].length;
  return html`<${Field} name="prompt" label=${t("prompt")}>
    <textarea id="prompt" rows="4" dir="auto" placeholder=${t("prompt.hint")} value=${state.draft.prompt} autofocus
      onInput=${({ target }) => studio.edit({ prompt: target.value })} ...${invalid(state.faults.prompt, "prompt")}></textarea>
    ${count > max * 0.9 && html`<p class=${count > max ? "fault" : "faint"}>${t("prompt.count", { count, max })}</p>`}
  <//>`;
}

function ModelChoice() {
  const { studio, state, t } = useStudio();
  const { models, modelsError, draft } = state;
  const now = Date.now();
  const model = studio.model;
  const listed = models ?? [];
  const isListed = !draft.model || listed.some(({ id }) => id === draft.model);
  return html`<${Field} name="model" label=${t("model")}>
    <select id="model" value=${draft.model} onChange=${({ target }) => studio.chooseModel(target.value)} ...${invalid(state.faults.model, "model")}>
      <option value="">${t("model.default")}${state.defaultModel && `: ${state.defaultModel}`}</option>
      ${!isListed && html`<option value=${draft.model}>${draft.model}</option>`}
      ${listed.map((one) => html`<option key=${one.id} value=${one.id}>${one.id}${priceNote(one, state, t)}${hasEnded(one, now) ? ` (${t("model.ended")})` : ""}</option>`)}
    </select>
    ${modelsError && html`<p class="fault">${t("model.none")} ${errorText(t, modelsError)}</p>`}
    ${endsSoon(model, now) && html`<p class="warn">${t("model.ends", { date: model.endsAt })} ${model.successor && t("model.successor", { successor: model.successor })}</p>`}
  <//>`;
}

function Size() {
  const { studio, state, t } = useStudio();
  const model = studio.model;
  const { sizes, free } = sizeChoices(model);
  const size = sizeOf(state.draft, model);
  const shown = free && (state.draft.ownSize || !sizes.includes(size)) ? "own" : size;
  const [width, height] = size.split("x");
  const side = (value) => (value === "" ? "" : bounded(value, 0, MAX_SIDE));
  const onSides = (one, other) => studio.edit({ ownSize: true, size: `${side(one)}x${side(other)}` });
  const onChoice = ({ target }) => studio.edit(target.value === "own" ? { ownSize: true, size } : { ownSize: false, size: target.value });
  return html`<div class="row">
    <${Field} name="size" label=${t("size")}>
      <select id="size" value=${shown} onChange=${onChoice} ...${invalid(state.faults.size, "size")}>
        ${sizes.map((one) => html`<option key=${one} value=${one}>${one.replace("x", " × ")}</option>`)}
        ${free && html`<option value="own">${t("size.own")}</option>`}
      </select>
    <//>
    ${shown === "own" && html`
      <${Field} name="width" label=${t("width")}><input id="width" type="number" min=${MIN_SIDE} max=${MAX_SIDE} step=${stepOfSide(model)} value=${width} onInput=${({ target }) => onSides(target.value, height)} /><//>
      <${Field} name="height" label=${t("height")}><input id="height" type="number" min=${MIN_SIDE} max=${MAX_SIDE} step=${stepOfSide(model)} value=${height} onInput=${({ target }) => onSides(width, target.value)} /><//>`}
  </div>`;
}

function SubmitRow() {
  const { studio, state, t } = useStudio();
  const { blockedUntil, isSubmitting, uploading, draft } = state;
  const now = useNow(blockedUntil > Date.now());
  const seconds = Math.ceil((blockedUntil - now) / 1000);
  const price = estimate(studio.model?.price, bodyOf(draft, studio.model));
  const label = seconds > 0 ? t("submit.wait", { seconds }) : isSubmitting ? t("submit.busy") : t("submit");
  return html`<div class="submit">
    <button type="submit" class="primary" title=${t("submit.keys")} disabled=${seconds > 0 || isSubmitting || uploading.length > 0}>${label}</button>
    <button type="button" class="plain" onClick=${() => studio.clear()}>${t("clear")}</button>
    <span class="price faint" aria-live="polite">${price === null ? t("price.unknown") : t("price", { price: formatDollars(price, state.language) })}</span>
  </div>`;
}

function Field({ name, label, children }) {
  const { state, t } = useStudio();
  const fault = state.faults[name];
  return html`<div class="field">
    <label for=${name}>${label}</label>${children}
    ${fault && html`<p class="fault" id=${`${name}-fault`}>${faultText(t, fault)}</p>`}
  </div>`;
}

function TextField({ name, label, ...more }) {
  const { studio, state } = useStudio();
  return html`<${Field} name=${name} label=${label}>
    <input id=${name} type="text" autocomplete="off" value=${state.draft[name]} onInput=${({ target }) => studio.edit({ [name]: target.value })} ...${more} ...${invalid(state.faults[name], name)} />
  <//>`;
}

function Choice({ name, label, values, text = (value) => value }) {
  const { studio, state, t } = useStudio();
  return html`<${Field} name=${name} label=${label}>
    <select id=${name} value=${state.draft[name]} onChange=${({ target }) => studio.edit({ [name]: target.value })} ...${invalid(state.faults[name], name)}>
      <option value="">${t("own")}</option>
      ${values.map((value) => html`<option key=${value} value=${value}>${text(value)}</option>`)}
    </select>
  <//>`;
}

function invalid(fault, name) {
  return fault ? { "aria-invalid": "true", "aria-describedby": `${name}-fault` } : {};
}

function priceNote(model, { draft, language }, t) {
  const { n: _, ...one } = bodyOf({ ...draft, model: model.id }, model);
  const price = estimate(model.price, one);
  return !price ? "" : ` · ${t("price.each", { price: formatDollars(price, language) })}`;
}

// Details of an error that no field of the form shows.
function unplaced(error, faults) {
  const shown = new Set(Object.values(faults).map(({ message }) => message));
  return error.details.filter(({ message }) => !shown.has(message));
}


function bounded(value, min, max) {
  return Math.min(max, Math.max(min, Math.round(Number(value)) || min));
}
