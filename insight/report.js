"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const SVG = "http://www.w3.org/2000/svg";

const word = (words) => words[root.dataset.language === "zh" ? 1 : 0];
const stepWord = (step) => word(data.words.step).replace("{}", step.toLocaleString("en"));

// -------------------------------------------------------------------------------- charts

function make(name, attributes, parent, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

function shown(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size >= 100) return value.toFixed(0);
  if (size >= 0.01 || size === 0) return String(Number(value.toFixed(3)));
  if (size >= 0.0001) return String(Number(value.toPrecision(3)));
  return value.toExponential(1);
}

// round numbers that divide a range into some four parts
function ticks(low, high) {
  const rough = (high - low || 1) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high + step / 1e6; n++) found.push(n * step);
  return found;
}

// the point of a curve that is nearest to a step, by bisection
function nearest(points, step) {
  let low = 0;
  let high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle;
    else high = middle;
  }
  return Math.abs(points[low][0] - step) <= Math.abs(points[high][0] - step)
    ? points[low] : points[high];
}

class Chart {
  constructor(host) {
    this.host = host;
    this.given = data.charts[host.dataset.chart];
    this.legend = host.querySelector(".legend");
    this.svg = make("svg", { role: "img", tabindex: "0" }, null);
    host.append(this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerdown", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.show(null));
    this.svg.addEventListener("blur", () => this.show(null));
    this.svg.addEventListener("keydown", (event) => this.walk(event));
    this.steps = [...new Set(this.given.curves.flatMap((c) => c.points.map((p) => p[0])))];
    this.steps.sort((a, b) => a - b);
  }

  draw() {
    const width = Math.max(220, this.host.clientWidth);
    const height = this.given.tall ? Math.round(Math.min(360, Math.max(220, width * 0.42))) : 130;
    const left = 46;
    const [right, top, bottom] = [10, 8, 22];
    const last = this.steps[this.steps.length - 1] || 1;
    // the fall of the first steps would make all that follows flat
    const first = this.given.tall && !isWhole ? last / 20 : 0;
    const values = this.given.curves
      .flatMap((c) => c.points.filter((p) => p[0] >= first).flatMap((p) => p.slice(1)))
      .filter((v) => v !== null);
    const drawn = this.given.lines || [];
    let [low, high] = [Math.min(...values), Math.max(...values)];
    if (this.given.zero) low = 0;
    if (!values.length) [low, high] = [0, 1];
    const pad = (high - low || Math.abs(high) || 1) * 0.05;
    [low, high] = [this.given.zero ? 0 : low - pad, high + pad];
    this.x = (step) => left + (step / last) * (width - left - right);
    this.y = (value) => top + ((high - value) / (high - low)) * (height - top - bottom);
    this.stepAt = (x) => ((x - left) / (width - left - right)) * last;
    this.svg.replaceChildren();
    this.svg.setAttribute("aria-label", word(this.given.title));
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const clip = make("clipPath", { id: `clip-${this.host.dataset.chart}` }, this.svg);
    const inner = { x: left, y: 0, width: width - left, height: height - bottom };
    make("rect", inner, clip);
    for (const value of ticks(low, high)) {
      const y = this.y(value);
      make("line", { class: "grid", x1: left, x2: width - right, y1: y, y2: y }, this.svg);
      make("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, this.svg, shown(value));
    }
    for (const step of ticks(0, last)) {
      const near = step > last * 0.95;
      make("text", { x: this.x(step), y: height - 6, "text-anchor": near ? "end" : "middle" },
        this.svg, step.toLocaleString("en"));
    }
    let above = -100;
    for (const { name, value } of [...drawn].sort((a, b) => b.value - a.value)) {
      if (value < low || value > high) continue;
      const y = this.y(value);
      make("line", { class: "baseline", x1: left, x2: width - right, y1: y, y2: y }, this.svg);
      if (y - above > 13) {
        make("text", { x: width - right, y: y - 4, "text-anchor": "end" }, this.svg, word(name));
        above = y;
      }
    }
    for (const curve of this.given.curves) this.drawCurve(curve);
    this.cursor = make("g", { "pointer-events": "none" }, this.svg);
    this.show(null);
  }

  drawCurve({ points, kind }) {
    const known = points.filter((p) => p[1] !== null);
    const clip = `url(#clip-${this.host.dataset.chart})`;
    const group = make("g", { class: kind, "clip-path": clip }, this.svg);
    const at = (index) => known.map((p) => `${this.x(p[0]).toFixed(1)},${this.y(p[index]).toFixed(1)}`);
    if (known.length && known[0].length === 4) {
      make("polygon", { class: "band", points: [...at(3), ...at(2).reverse()].join(" ") }, group);
    }
    make("polyline", { class: "curve", points: at(1).join(" ") }, group);
    if (known.length <= 40) {
      for (const p of known) make("circle", { class: "dot", cx: this.x(p[0]), cy: this.y(p[1]), r: 2.4 }, group);
    }
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    const scale = this.svg.viewBox.baseVal.width / box.width;
    const step = this.stepAt((event.clientX - box.left) * scale);
    if (this.steps.length) this.show(nearest(this.steps.map((s) => [s]), step)[0]);
  }

  walk(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9 };
    if (!(event.key in moves) || !this.steps.length) return;
    event.preventDefault();
    const place = this.at === null ? this.steps.length : this.steps.indexOf(this.at);
    const next = Math.min(this.steps.length - 1, Math.max(0, place + moves[event.key]));
    this.show(this.steps[next]);
  }

  // the values at a step, or at the end
  show(step) {
    this.at = step;
    this.cursor.replaceChildren();
    this.legend.replaceChildren();
    const at = step ?? this.steps[this.steps.length - 1];
    if (step !== null) {
      const [x, height] = [this.x(step), this.svg.viewBox.baseVal.height];
      make("line", { class: "cursor", x1: x, x2: x, y1: 8, y2: height - 22 }, this.cursor);
    }
    if (at !== undefined) this.say("", stepWord(at));
    for (const curve of this.given.curves) {
      if (!curve.points.length) continue;
      const [found, value] = nearest(curve.points, at);
      let text = `${word(curve.name)} ${shown(value)}`;
      if (curve.kind === "val" && data.bytes && value !== null) {
        const bits = value / Math.LN2 / data.bytes;
        text += ` (${bits.toFixed(3)} ${word(data.words.bits)})`;
      }
      this.say(`key ${curve.kind}`, text);
      if (step !== null && value !== null) {
        const group = make("g", { class: curve.kind }, this.cursor);
        make("circle", { class: "dot", cx: this.x(found), cy: this.y(value), r: 4 }, group);
      }
    }
  }

  say(kind, text) {
    const span = document.createElement("span");
    span.className = kind;
    span.textContent = text;
    this.legend.append(span);
  }
}

let isWhole = false; // the loss is drawn from the first step
const whole = document.getElementById("whole");
whole.addEventListener("click", () => {
  isWhole = !isWhole;
  whole.setAttribute("aria-pressed", String(isWhole));
  for (const chart of charts) chart.draw();
});

const charts = [];
for (const host of document.querySelectorAll("[data-chart]")) charts.push(new Chart(host));
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return; // a phone's keyboard or address bar
  width = innerWidth;
  for (const chart of charts) chart.draw();
});

// --------------------------------------------------------------------- what it has written

function showMoment(index) {
  const moment = data.moments[index];
  const place = document.getElementById("texts");
  document.getElementById("when").textContent =
    `${word(moment.label)} · ${stepWord(moment.step)}`;
  place.replaceChildren();
  moment.texts.forEach((text, number) => {
    if (moment.texts.length > 1) {
      const label = document.createElement("p");
      label.className = "prompt quiet";
      label.textContent = `${word(data.words.prompt)} ${number + 1}`;
      place.append(label);
    }
    const block = document.createElement("p");
    block.className = "written";
    for (const [piece, isCopied] of text) {
      const part = document.createElement(isCopied ? "mark" : "span");
      part.textContent = typeof piece === "string" ? piece : word(piece);
      block.append(part);
    }
    place.append(block);
  });
}

const slider = document.getElementById("moment");
if (slider) {
  slider.addEventListener("input", () => showMoment(Number(slider.value)));
  slider.value = String(data.moments.length - 1); // a reloaded page would keep another one
}
document.addEventListener("speak", () => {
  for (const chart of charts) chart.draw();
  if (slider) showMoment(Number(slider.value));
});
