// The page of scripts.watch: the runs, and the curves of one of them as they grow.
// All text goes in as text, never as markup; nothing is fetched from anywhere but this server.

const STRINGS = {
  en: {
    runs: "Your runs",
    none: "There is no run here yet.",
    progress: "Steps done",
    stop: "Stop",
    keep: "Let it train",
    sure: (name) =>
      `Stop ${name} after its current step? It saves a checkpoint, and the same command goes on ` +
      "from there.",
    diagnosis: "What it means",
    certain: (percent) => ` (${percent}% sure)`,
    write: "Write with it",
    beginning: "The beginning of a text",
    begin: "Begin a text …",
    go: "Go on from it",
    halt: "Stop",
    withStep: (step) => `With the weights of step ${step}, on this machine's processor.`,
    noWeights: "It has saved no weights yet: the first ones come within minutes.",
    samples: "What it wrote",
    moment: "Moment of the run",
    card: "The card",
    settings: "The run",
    token: "This server's token, from the address that it printed",
    enter: "Enter",
    wrongToken: "That is not the token.",
    gone: "The server does not answer. Trying again …",
    training: "trains",
    stopping: "stops after this step",
    finished: "finished",
    stopped: "stopped",
    of: "of",
    left: (time) => `about ${time} left`,
    begun: (at) => `begun ${at}`,
    loss: "Loss",
    trainLoss: "training",
    valLoss: "validation",
    rate: "Learning rate",
    norm: "Gradient norm",
    speed: "Tokens a second",
    expected: (loss, low, high) => `expected at the end: ${loss} (${low} to ${high})`,
    bits: (bits) => `${bits} bits a byte`,
    chart: (name) => `${name} by step; the arrow keys move through it`,
    facts: {
      mode: "Mode",
      model: "Model",
      layers: "Layers",
      width: "Width",
      context: "Context",
      tokenizer: "Tokenizer",
      vocabulary: "Vocabulary",
      batch: "Batch, in tokens",
      optimizer: "Optimizer",
      rate: "Learning rate",
      budget: "Time budget",
      start: "Began from",
      device: "Device",
    },
    text: "Text",
    textTokens: "Its tokens",
    seen: "Tokens seen",
    others: "others",
    hours: "h",
    minutes: "min",
    seconds: "s",
    problems: {}, // by status: what to say in place of the server's words
    failed: (message) => message,
  },
  zh: {
    runs: "你的训练",
    none: "这里还没有训练。",
    progress: "已完成的步数",
    stop: "停止",
    keep: "继续训练",
    sure: (name) => `在当前这一步之后停止 ${name} 吗？它会保存检查点，用同一条命令可从那里继续。`,
    diagnosis: "这意味着什么",
    certain: (percent) => `（把握 ${percent}%）`,
    write: "用它写",
    beginning: "文本的开头",
    begin: "写个开头……",
    go: "接着写",
    halt: "停止",
    withStep: (step) => `使用第 ${step} 步的权重，在本机处理器上运行。`,
    noWeights: "它还没有保存过权重：几分钟内会有第一份。",
    samples: "它写了什么",
    moment: "训练中的时刻",
    card: "预报卡",
    settings: "这次训练",
    token: "此服务器的令牌，在它打印的地址中",
    enter: "进入",
    wrongToken: "令牌不对。",
    gone: "服务器没有响应，正在重试……",
    training: "训练中",
    stopping: "这一步之后停止",
    finished: "已完成",
    stopped: "已停止",
    of: "/",
    left: (time) => `约剩 ${time}`,
    begun: (at) => `开始于 ${at}`,
    loss: "损失",
    trainLoss: "训练",
    valLoss: "验证",
    rate: "学习率",
    norm: "梯度范数",
    speed: "每秒 token 数",
    expected: (loss, low, high) => `预计最终：${loss}（${low} 至 ${high}）`,
    bits: (bits) => `每字节 ${bits} 比特`,
    chart: (name) => `${name}随步数的变化；方向键在其中移动`,
    facts: {
      mode: "模式",
      model: "模型",
      layers: "层数",
      width: "宽度",
      context: "上下文",
      tokenizer: "分词器",
      vocabulary: "词表",
      batch: "批次（token）",
      optimizer: "优化器",
      rate: "学习率",
      budget: "时间预算",
      start: "起始权重",
      device: "设备",
    },
    text: "文本",
    textTokens: "token 数",
    seen: "已学 token",
    others: "其他",
    hours: "小时",
    minutes: "分钟",
    seconds: "秒",
    problems: {
      404: "这里没有这次训练。",
      409: "现在不行：它没有在这台机器上训练，或还没有保存过权重。",
      413: "文本太长。",
      429: "打开的页面或等待的请求太多，请稍后再试。",
      500: "服务器出错了，详情见它的终端。",
      503: "服务器正在停止。",
    },
    failed: (message) => `服务器报错：${message}`,
  },
};

const RETRY_MS = 2000;
const WRITTEN_TOKENS = 120;
const language = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
const strings = STRINGS[language];
const element = (id) => document.getElementById(id);
const number = new Intl.NumberFormat(language);

let token = null; // from the address, or asked for
let chosen = null; // the name of the run that is shown
let detail = {}; // what the server said of it
let curves = {}; // by name: points of step, mean, lowest and highest value
let following = null; // the AbortController of the events
let writing = null; // and of the text that is being written
let entries = new Map(); // of the list of runs, by name

// ------------------------------------------------------------------------------- the server

async function ask(path, options = {}) {
  const headers = token === null ? {} : { authorization: `Bearer ${token}` };
  return fetch(path, { ...options, headers: { ...headers, ...options.headers } });
}

function post(path, body, signal) {
  const headers = { "content-type": "application/json" };
  return ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let received = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    received += value;
    const events = received.split("\n\n");
    received = events.pop();
    for (const event of events) {
      if (event !== "data: [DONE]") yield JSON.parse(event.slice("data: ".length));
    }
  }
}

async function problemOf(response) {
  const known = strings.problems[response.status];
  if (known) return known;
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

// follows the runs until another one is chosen; begins again when the server was away
async function follow() {
  following?.abort();
  const controller = new AbortController();
  following = controller;
  for (;;) {
    try {
      const query = chosen === null ? "" : `?run=${encodeURIComponent(chosen)}`;
      const response = await ask(`/events${query}`, { signal: controller.signal });
      if (response.status === 401) {
        askToken();
        return;
      }
      if (response.status === 404 && chosen !== null) {
        chosen = null; // its folder is gone
        element("run").hidden = true;
        continue;
      }
      if (!response.ok) throw new Error(await problemOf(response));
      if (element("ask").open) element("ask").close();
      element("summary").textContent = "";
      for await (const event of readEvents(response.body)) {
        if (controller.signal.aborted) return; // it is of the run before
        take(event);
      }
    } catch (error) {
      if (controller.signal.aborted) return;
      const isAway = error instanceof TypeError;
      element("summary").textContent = isAway ? strings.gone : error.message;
    }
    if (controller.signal.aborted) return;
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

function take(event) {
  if (event.runs) showRuns(event.runs);
  if (!event.run) return;
  for (const [name, { from, points }] of Object.entries(event.run.curves ?? {})) {
    curves[name] = (curves[name] ?? []).slice(0, from).concat(points);
  }
  if (event.run.curves) drawAll();
  const { curves: _, ...rest } = event.run;
  if (Object.keys(rest).length > 0) {
    detail = { ...detail, ...rest };
    showDetail(rest);
  }
}

function choose(name) {
  if (name === chosen) return;
  writing?.abort();
  chosen = name;
  detail = {};
  curves = {};
  for (const id of ["told", "written"]) element(id).textContent = "";
  for (const [other, entry] of entries) entry.button.ariaCurrent = String(other === name);
  drawAll();
  follow();
}

function askToken() {
  element("ask-problem").textContent = token === null ? "" : strings.wrongToken;
  if (!element("ask").open) element("ask").showModal();
  element("token").select();
}

// --------------------------------------------------------------------------------- the runs

function duration(seconds) {
  const minutes = Math.round(seconds / 60);
  if (seconds < 90) return `${Math.round(seconds)} ${strings.seconds}`;
  if (minutes < 90) return `${minutes} ${strings.minutes}`;
  return `${Math.floor(minutes / 60)} ${strings.hours} ${minutes % 60} ${strings.minutes}`;
}

function describe({ state, step, total, loss, seconds_left: left }) {
  const parts = [strings[state]];
  const end = total === null ? "" : ` ${strings.of} ${number.format(total)}`;
  parts.push(
    language === "zh" ? `${number.format(step)}${end} 步` : `step ${number.format(step)}${end}`,
  );
  if (typeof loss === "number") parts.push(`${strings.valLoss} ${loss.toFixed(3)}`);
  if (left !== null) parts.push(strings.left(duration(left)));
  return parts.join(" · ");
}

function showRuns(runs) {
  const list = element("runs");
  const names = runs.map((run) => run.name);
  for (const [name, entry] of entries) {
    if (!names.includes(name)) {
      entry.item.remove();
      entries.delete(name);
    }
  }
  for (const run of runs) {
    const entry = entries.get(run.name) ?? newEntry(run.name);
    entry.item.className = run.state;
    entry.about.textContent = describe(run);
  }
  // an element that moves loses the focus, so they move only where the order is another
  if (names.some((name, i) => list.children[i] !== entries.get(name).item)) {
    list.replaceChildren(...names.map((name) => entries.get(name).item));
  }
  element("none").hidden = runs.length > 0;
  if (chosen === null && runs.length > 0) {
    choose((runs.find((run) => run.state === "training") ?? runs[0]).name);
  }
}

function newEntry(name) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  const title = document.createElement("strong");
  const about = document.createElement("small");
  button.type = "button";
  button.ariaCurrent = String(name === chosen);
  title.textContent = name;
  title.dir = "auto";
  button.append(title, about);
  button.addEventListener("click", () => choose(name));
  item.append(button);
  const entry = { item, button, about };
  entries.set(name, entry);
  return entry;
}

// ------------------------------------------------------------------------------ the chosen run

function showDetail(changed) {
  element("run").hidden = false;
  element("name").textContent = detail.name;
  const bits = detail.bits_per_byte;
  const about = [describe(detail)];
  if (typeof bits === "number") about.push(strings.bits(bits.toFixed(3)));
  if (detail.started) about.push(strings.begun(detail.started));
  element("about").textContent = about.join(" · ");
  document.title = `${detail.name}: ${strings[detail.state]}`;
  element("progress").value = detail.total ? Math.min(1, detail.step / detail.total) : 0;
  element("stop").hidden = detail.state !== "training";
  const { weights } = detail;
  element("weights").textContent =
    weights === null ? strings.noWeights : strings.withStep(number.format(weights));
  element("go").disabled = weights === null;
  if ("forecast" in changed) drawAll();
  if ("samples" in changed) showSamples();
  if ("diagnosis" in changed) showDiagnosis();
  if ("card" in changed) {
    element("card").hidden = detail.card.length === 0;
    const rows = detail.card.map(([name, words]) => [name[language], words[language]]);
    element("card-rows").replaceChildren(...described(rows));
  }
  showFacts();
}

function showSamples() {
  const { samples } = detail;
  const slider = element("moment");
  const atEnd = slider.value === slider.max;
  element("samples").hidden = samples.length === 0;
  slider.max = Math.max(0, samples.length - 1);
  if (atEnd) slider.value = slider.max;
  slider.hidden = samples.length < 2;
  showSample();
}

function showSample() {
  const sample = detail.samples?.[Number(element("moment").value)];
  const at = sample && (language === "zh" ? `第 ${sample.step} 步` : `step ${sample.step}`);
  const name = sample ? `${sample.label[language]} · ${at}` : "";
  element("moment-name").textContent = name;
  element("moment").ariaValueText = name;
  const texts = (sample?.texts ?? []).map((text, i) => {
    const place = document.createElement("p");
    place.className = "text";
    place.dir = "auto";
    place.textContent = text + (sample.remarks[i]?.[language] ?? "");
    return place;
  });
  element("sample").replaceChildren(...texts);
}

function showDiagnosis() {
  const { headline, findings } = detail.diagnosis;
  element("diagnosis").hidden = headline === undefined;
  element("headline").textContent = headline?.[language] ?? "";
  const items = (findings ?? []).map((finding) => {
    const item = document.createElement("li");
    const name = document.createElement("strong");
    const why = document.createElement("p");
    const what = document.createElement("p");
    const lines = document.createElement("pre");
    item.className = finding.severity;
    name.textContent = finding.title[language];
    why.textContent = finding.evidence[language];
    what.textContent = finding.advice[language];
    lines.textContent = finding.lines.map((line) => line[language]).join("\n");
    lines.tabIndex = 0; // it may be wide: the arrow keys move it
    item.append(name, strings.certain(Math.round(100 * finding.confidence)), why, what);
    if (finding.lines.length) item.append(lines);
    return item;
  });
  element("findings").replaceChildren(...items);
}

function showFacts() {
  const count = (value) => (typeof value === "number" ? number.format(value) : null);
  const names = detail.text.join(", ");
  const text = detail.more_texts ? `${names}, ${detail.more_texts} ${strings.others}` : names;
  const rows = detail.facts.map(([name, value]) => [strings.facts[name] ?? name, value]);
  rows.push([strings.text, text], [strings.textTokens, count(detail.text_tokens)]);
  rows.push([strings.seen, count(detail.tokens)]);
  const wanted = rows.filter(([, value]) => value !== null && value !== "");
  element("facts").replaceChildren(...described(wanted));
}

// the elements of a list of names and what each is
function described(rows) {
  return rows.flatMap(([name, value]) => {
    const term = document.createElement("dt");
    const description = document.createElement("dd");
    term.textContent = name;
    description.textContent = value;
    return [term, description];
  });
}

async function stop() {
  element("sure-text").textContent = strings.sure(detail.name);
  element("sure").returnValue = "no";
  element("sure").showModal();
}

async function stopNow() {
  if (element("sure").returnValue !== "yes") return;
  try {
    const response = await post("/stop", { run: chosen });
    element("told").textContent = response.ok ? "" : await problemOf(response);
  } catch {
    element("told").textContent = strings.gone;
  }
}

async function write(event) {
  event.preventDefault();
  if (writing !== null) {
    writing.abort();
    return;
  }
  const controller = new AbortController();
  writing = controller;
  const prompt = element("prompt").value;
  const place = element("written");
  place.textContent = prompt;
  element("told").textContent = "";
  element("go").textContent = strings.halt;
  try {
    const body = { prompt, max_tokens: WRITTEN_TOKENS, stream: true };
    const path = `/write?run=${encodeURIComponent(chosen)}`;
    const response = await post(path, body, controller.signal);
    if (!response.ok) throw new Error(await problemOf(response));
    for await (const part of readEvents(response.body)) {
      if (part.error) throw new Error(strings.failed(part.error.message));
      place.append(part.choices[0]?.text ?? ""); // a string goes in as text
    }
  } catch (error) {
    if (!controller.signal.aborted) {
      element("told").textContent = error instanceof TypeError ? strings.gone : error.message;
    }
  }
  writing = null;
  element("go").textContent = strings.go;
}

// ---------------------------------------------------------------------------------- charts

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 46, right: 10, top: 8, bottom: 20 };
const CHARTS = [
  {
    id: "loss",
    height: 260,
    series: [
      { name: "train/loss", label: "trainLoss", className: "train", band: true },
      { name: "val/loss", label: "valLoss", className: "val", dots: true },
    ],
  },
  { id: "rate", height: 120, series: [{ name: "train/lr", className: "train" }] },
  { id: "norm", height: 120, series: [{ name: "train/grad_norm", className: "train", band: true }] },
  { id: "speed", height: 120, series: [{ name: "train/tok_per_sec", className: "train" }] },
];

function svg(name, attributes, parent) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent?.append(made);
  return made;
}

function prepareChart(chart) {
  const figure = element(chart.id);
  const caption = document.createElement("figcaption");
  const title = document.createElement("strong");
  title.textContent = strings[chart.id];
  caption.append(title);
  for (const { label, className } of chart.series.filter((series) => series.label)) {
    const name = document.createElement("span");
    name.className = className;
    name.textContent = `— ${strings[label]}`;
    caption.append(name);
  }
  chart.svg = svg("svg", { role: "img", tabindex: "0", height: chart.height });
  chart.svg.ariaLabel = strings.chart(strings[chart.id]);
  chart.readout = document.createElement("p");
  chart.readout.className = "readout";
  figure.append(caption, chart.svg, chart.readout);
  chart.svg.addEventListener("pointermove", (event) => {
    const x = event.clientX - chart.svg.getBoundingClientRect().left;
    point(chart, chart.stepAt?.(x) ?? null);
  });
  chart.svg.addEventListener("pointerleave", () => point(chart, null));
  chart.svg.addEventListener("keydown", (event) => {
    const steps = chart.steps ?? [];
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined || steps.length === 0) return;
    event.preventDefault();
    const at = chart.pointed === null ? steps.length - 1 : steps.indexOf(chart.pointed) + move;
    point(chart, steps[Math.max(0, Math.min(steps.length - 1, at))]);
  });
  chart.pointed = null;
}

// round numbers in a range, about as many as wanted
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted;
  const base = 10 ** Math.floor(Math.log10(rough));
  const every = [1, 2, 5, 10].map((n) => n * base).find((n) => n >= rough);
  const found = [];
  for (let n = Math.ceil(low / every); n * every <= high; n += 1) found.push(n * every);
  return found;
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e4) return new Intl.NumberFormat(language, { notation: "compact" }).format(value);
  if (size !== 0 && size < 1e-3) return value.toExponential(1).replace("e-", "e−");
  return String(Number(value.toPrecision(4)));
}

function drawAll() {
  CHARTS.forEach(draw);
}

function draw(chart) {
  const series = chart.series.map((one) => ({ ...one, points: curves[one.name] ?? [] }));
  const points = series.flatMap((one) => one.points);
  chart.svg.replaceChildren();
  const width = chart.svg.clientWidth;
  chart.stepAt = null;
  chart.steps = [];
  if (points.length === 0 || width === 0) return point(chart, null);
  const forecast = chart.id === "loss" ? detail.forecast : undefined;
  const values = points.map(([, mean]) => mean);
  if (forecast?.expected) values.push(forecast.expected);
  let low = values.reduce((a, b) => Math.min(a, b));
  let high = values.reduce((a, b) => Math.max(a, b));
  const pad = (high - low || Math.abs(high) || 1) * 0.06;
  [low, high] = [low - pad, high + pad];
  const last = points.reduce((most, [step]) => Math.max(most, step), 1);
  const right = width - MARGIN.right;
  const bottom = chart.height - MARGIN.bottom;
  const x = (step) => MARGIN.left + (step / last) * (right - MARGIN.left);
  const clip = (value) => Math.max(low, Math.min(high, value));
  const y = (v) => bottom - ((clip(v) - low) / (high - low)) * (bottom - MARGIN.top);
  chart.svg.setAttribute("viewBox", `0 0 ${width} ${chart.height}`);
  for (const value of ticks(low, high, chart.height / 50)) {
    const at = y(value);
    svg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: at, y2: at }, chart.svg);
    const place = { x: MARGIN.left - 6, y: at + 4, "text-anchor": "end" };
    svg("text", place, chart.svg).textContent = short(value);
  }
  for (const step of ticks(0, last, width / 110)) {
    const anchor = step === 0 ? "start" : x(step) > right - 18 ? "end" : "middle";
    const at = anchor === "end" ? width : x(step);
    const place = { x: at, y: chart.height - 5, "text-anchor": anchor };
    svg("text", place, chart.svg).textContent = number.format(step);
  }
  if (forecast?.expected) {
    const at = y(forecast.expected);
    svg("line", { class: "expected", x1: MARGIN.left, x2: right, y1: at, y2: at }, chart.svg);
  }
  for (const one of series) drawSeries(chart.svg, one, x, y);
  chart.steps = [...new Set(points.map(([step]) => step))].sort((a, b) => a - b);
  chart.stepAt = (at) => nearest(chart.steps, ((at - MARGIN.left) / (right - MARGIN.left)) * last);
  chart.cursor = svg("line", { class: "cursor", y1: MARGIN.top, y2: bottom }, chart.svg);
  chart.x = x;
  point(chart, chart.pointed);
}

function drawSeries(parent, { points, className, band, dots }, x, y) {
  const path = (pairs) => pairs.map(([a, b]) => `${a.toFixed(1)},${b.toFixed(1)}`).join("L");
  if (points.length === 0) return;
  if (band) {
    const upper = points.map(([step, , , most]) => [x(step), y(most)]);
    const lower = points.map(([step, , least]) => [x(step), y(least)]).reverse();
    svg("path", { class: `band ${className}`, d: `M${path([...upper, ...lower])}Z` }, parent);
  }
  const line = points.map(([step, mean]) => [x(step), y(mean)]);
  svg("path", { class: `line ${className}`, d: `M${path(line)}` }, parent);
  if (points.length === 1 || (dots && points.length <= 60)) {
    for (const [cx, cy] of line) svg("circle", { class: `dot ${className}`, cx, cy, r: 2.5 }, parent);
  }
}

function nearest(sorted, wanted) {
  let [low, high] = [0, sorted.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  const before = sorted[low - 1];
  return before !== undefined && wanted - before < sorted[low] - wanted ? before : sorted[low];
}

// shows the values at a step, or the newest ones
function point(chart, step) {
  chart.pointed = chart.steps?.includes(step) ? step : null;
  if (chart.cursor) {
    chart.cursor.setAttribute("visibility", chart.pointed === null ? "hidden" : "visible");
    for (const name of ["x1", "x2"]) chart.cursor.setAttribute(name, chart.x?.(step ?? 0) ?? 0);
  }
  const at = chart.pointed ?? chart.steps?.at(-1);
  if (at === undefined) {
    chart.readout.textContent = "";
    return;
  }
  const parts = [language === "zh" ? `第 ${number.format(at)} 步` : `step ${number.format(at)}`];
  for (const { name, label } of chart.series) {
    const points = curves[name] ?? [];
    if (points.length === 0) continue;
    const [, mean, least, most] = points[points.findLastIndex(([s]) => s <= at)] ?? points[0];
    const range = least < most ? ` (${short(least)}–${short(most)})` : "";
    parts.push(`${label ? `${strings[label]} ` : ""}${short(mean)}${range}`);
  }
  const { expected, least, most } = (chart.id === "loss" && detail.forecast) || {};
  if (expected) parts.push(strings.expected(...[expected, least, most].map(short)));
  chart.readout.textContent = parts.join(" · ");
}

// ---------------------------------------------------------------------------------- begin

function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  const places = { text: "textContent", label: "ariaLabel", placeholder: "placeholder" };
  for (const [name, property] of Object.entries(places)) {
    for (const found of document.querySelectorAll(`[data-${name}]`)) {
      found[property] = strings[found.dataset[name]];
    }
  }
}

function listen() {
  element("stop").addEventListener("click", stop);
  element("sure").addEventListener("close", stopNow);
  element("writing").addEventListener("submit", write);
  element("moment").addEventListener("input", showSample);
  element("ask").addEventListener("cancel", (event) => event.preventDefault());
  element("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    token = element("token").value.trim();
    if (/^[!-~]+$/.test(token)) follow();
    else askToken();
  });
  addEventListener("resize", drawAll);
  addEventListener("hashchange", begin);
}

function begin() {
  const given = decodeURIComponent(location.hash.slice(1));
  token = /^[!-~]+$/.test(given) ? given : token;
  follow();
}

translate();
CHARTS.forEach(prepareChart);
listen();
begin();
