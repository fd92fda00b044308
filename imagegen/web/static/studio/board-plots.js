// Plots of the history. Each is drawn in its own frame, so that no task of the browser is long.

import { plotsOf, timesOf } from "./board-series.js";
import { useEffect, useMemo, useRef } from "./hooks.js";
import { html, useText } from "./ui.js";
import UPlot from "./uplot.js";

const HOURS = [1, 6, 24];
const HEIGHT = 150;
const COLORS = ["--accent", "--bad", "--warn", "--good", "--faint", "--text"];
const COLOR_OF = { completed: "--good", failed: "--bad", cancelled: "--warn", hit: "--good", ok: "--good", saved: "--good", plan: "--faint" };

// Runs functions one by one, each in a frame of its own; a later one of the same name replaces the one that waits.
const frames = {
  waiting: new Map(),
  frame: null,
  run(name, draw) {
    this.waiting.set(name, draw);
    this.frame ??= requestAnimationFrame(() => this.next());
  },
  next() {
    this.frame = null;
    const [name, draw] = this.waiting.entries().next().value;
    this.waiting.delete(name);
    draw();
    if (this.waiting.size) this.frame ??= requestAnimationFrame(() => this.next());
  },
};

export function Plots({ store, state }) {
  const { t } = useText();
  const { minutes, hours, snapshot } = state;
  const { monthPlan } = snapshot.redis;
  const { times, plots } = useMemo(() => {
    const at = timesOf(hours, Date.now() / 1000);
    return { times: at, plots: plotsOf(minutes, at, monthPlan) };
  }, [minutes, hours, monthPlan]);
  return html`<section class="history"><header><h2>${t("history")}</h2><div class="buttons" role="group" aria-label=${t("hours.label")}>
    ${HOURS.map((span) => html`<button key=${span} type="button" aria-pressed=${span === hours} onClick=${() => store.set({ hours: span })}>${t("hours", { hours: span })}</button>`)}</div></header>
    ${minutes.size === 0 && html`<p class="faint">${t("history.none")}</p>`}
    <div class="plots">${plots.map((plot) => html`<${Plot} key=${plot.name} plot=${plot} times=${times} theme=${state.theme} />`)}</div></section>`;
}

function Plot({ plot, times, theme }) {
  const { t } = useText();
  const place = useRef(null);
  const chart = useRef(null);
  const names = plot.series.map(({ name }) => name).join();
  useEffect(() => {
    const make = () => {
      chart.current?.destroy();
      chart.current = place.current && new UPlot(optionsOf(plot, place.current.clientWidth), dataOf(plot, times), place.current);
    };
    frames.run(plot.name, make);
    const resized = new ResizeObserver(([{ contentRect: { width } }]) => { if (chart.current && Math.abs(width - chart.current.width) > 1) chart.current.setSize({ width, height: HEIGHT }); });
    resized.observe(place.current);
    return () => { resized.disconnect(); chart.current?.destroy(); chart.current = null; };
  }, [names, theme]);
  useEffect(() => { if (chart.current) frames.run(`${plot.name} data`, () => chart.current?.setData(dataOf(plot, times))); }, [plot]);
  const title = t(`plot.${plot.name}`);
  return html`<figure aria-label=${title}><figcaption><b>${title}</b>${plot.series.map(({ name, values, isCode }, number) => html`<span key=${name}><i class=${`color c${colorNumber(name, number)}`}></i>${isCode ? name : t(`series.${name}`)} <output>${lastText(values)}</output></span>`)}</figcaption>
    <div class="canvas" aria-hidden="true" ref=${place}></div></figure>`;
}

function colorNumber(name, number) {
  const color = COLOR_OF[name];
  return color ? COLORS.indexOf(color) : number % COLORS.length;
}

function lastText(values) {
  const last = values.findLast((value) => value !== null);
  return last === undefined ? "–" : String(Math.round(last * 1000) / 1000);
}

function dataOf(plot, times) {
  return [times, ...plot.series.map(({ values }) => values)];
}

function optionsOf(plot, width) {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const axis = { stroke: color("--faint"), grid: { stroke: color("--line"), width: 0.5 }, ticks: { show: false } };
  const stroke = (name, number) => color(COLORS[colorNumber(name, number)]);
  return {
    width, height: HEIGHT, legend: { show: false }, cursor: { y: false, drag: { x: false } }, scales: { y: { range: (_, __, high) => [0, high > 0 ? high * 1.1 : 1] } },
    axes: [{ ...axis, space: 60 }, { ...axis, size: 48 }],
    // A percentile may be there for one minute alone, which is no line.
    series: [{}, ...plot.series.map(({ name, values }, number) => ({ stroke: stroke(name, number), width: 1.5, points: { show: values.includes(null), size: 3 } }))],
  };
}
