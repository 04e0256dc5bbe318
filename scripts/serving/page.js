// The page: a conversation with the model, how it writes, and what it was trained on.
// All text goes in as text, never as markup; nothing is fetched from anywhere but this server.

import { rendererOf } from "./markdown.js";

const STRINGS = {
  en: {
    clear: "Clear",
    settings: "Settings",
    conversation: "Conversation",
    welcome: "Begin a text",
    continues:
      "This model continues text: it writes what might come next, and does not answer as an " +
      "assistant would.",
    joined: "Your messages and its own are joined with blank lines, and it goes on from there.",
    greeting: "Ask something",
    answers: "This model answers by what it has learnt, right or wrong.",
    message: "Message",
    placeholder: "Begin a text …",
    question: "Ask something …",
    keys: "Enter sends, Shift+Enter begins a line, Escape stops",
    more: "Go on",
    retry: "Try again",
    stop: "Stop",
    send: "Send",
    copy: "Copy",
    copied: "Copied",
    edit: "Edit",
    cancel: "Cancel",
    system: "System prompt",
    systemHint: "Who the model is and how it answers; the next answer heeds it",
    sampling: "How it writes",
    temperature: "Temperature",
    temperatureHint: "0: always the likeliest token; higher: bolder",
    topP: "Top-p",
    minP: "Min-p",
    penalty: "Repetition penalty",
    topK: "Top-k",
    maxTokens: "Most tokens",
    seed: "Seed",
    all: "all",
    random: "random",
    reset: "Back to the run's own",
    run: "The run",
    enlarge: "Enlarge the picture of the losses",
    pictureAlt: "Training and validation loss over the run, and the loss of every batch",
    close: "Close",
    token: "This server's token",
    enter: "Enter",
    wrongToken: "That is not the token.",
    user: "You",
    assistant: "The model",
    step: "Step",
    parameters: "Parameters",
    tokenizer: "Tokenizer",
    context: "Context",
    weights: "Weights",
    trainLoss: "Training loss",
    valLoss: "Validation loss",
    text: "Text",
    textTokens: "Its tokens",
    others: "others",
    tokens: "tokens",
    perSecond: "tokens/s",
    stopped: "stopped",
    ended: "the model ended the text here",
    cut: "cut off: Most tokens, or the context, allows no more",
    dropped: "read without the oldest messages, which no longer fit:",
    gone: "The server does not answer.",
  },
  zh: {
    clear: "清空",
    settings: "设置",
    conversation: "对话",
    welcome: "写个开头",
    continues: "这个模型只会续写：它接着写可能出现的下文，不会像助手那样回答问题。",
    joined: "你的话和它的话以空行相连，它从末尾继续往下写。",
    greeting: "问点什么",
    answers: "这个模型凭所学作答，可能对，也可能错。",
    message: "消息",
    placeholder: "写个开头……",
    question: "问点什么……",
    keys: "回车发送，Shift+回车换行，Esc 停止",
    more: "继续",
    retry: "重写",
    stop: "停止",
    send: "发送",
    copy: "复制",
    copied: "已复制",
    edit: "编辑",
    cancel: "取消",
    system: "系统提示词",
    systemHint: "模型是谁、怎样回答；从下一次回答起生效",
    sampling: "生成方式",
    temperature: "温度",
    temperatureHint: "0：总取最可能的词元；越高越大胆",
    topP: "Top-p",
    minP: "Min-p",
    penalty: "重复惩罚",
    topK: "Top-k",
    maxTokens: "最多词元",
    seed: "种子",
    all: "全部",
    random: "随机",
    reset: "恢复为训练时的设置",
    run: "这次训练",
    enlarge: "放大损失曲线",
    pictureAlt: "训练损失与验证损失曲线，以及每个批次的损失",
    close: "关闭",
    token: "此服务器的令牌",
    enter: "进入",
    wrongToken: "令牌不对。",
    user: "你",
    assistant: "模型",
    step: "步数",
    parameters: "参数",
    tokenizer: "分词器",
    context: "上下文",
    weights: "权重",
    trainLoss: "训练损失",
    valLoss: "验证损失",
    text: "文本",
    textTokens: "词元数",
    others: "其他",
    tokens: "个词元",
    perSecond: "词元/秒",
    stopped: "已停止",
    ended: "模型在此结束了全文",
    cut: "被截断：已达最多词元数或上下文上限",
    dropped: "最早的消息已放不进上下文，未读入的条数：",
    gone: "服务器没有响应。",
  },
};

// a model reads no more than its newest few thousand tokens, and the server 1 MB
const MOST_CHARACTERS = 200_000;
const SLIDERS = ["temperature", "top_p", "min_p", "repetition_penalty"];
const NUMBERS = ["top_k", "max_tokens", "seed"];

const language = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
const strings = STRINGS[language];
const element = (id) => document.getElementById(id);
const log = element("log");
const prompt = element("prompt");

let token = null; // kept in memory only
let facts = null;
let messages = []; // {role, content, view}
let retries = 0; // since the last message was sent
let writing = null; // the AbortController of the answer that is being written

// ------------------------------------------------------------------------------- the server

// an input method's own keys: WebKit ends composing before the key that ended it
const isComposing = (event) => event.isComposing || event.keyCode === 229;

async function fetchHere(path, options = {}) {
  const headers = token === null ? {} : { authorization: `Bearer ${token}` };
  return fetch(path, { ...options, headers: { ...headers, ...options.headers } });
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
      if (event === "data: [DONE]") continue; // the body ends behind it
      yield JSON.parse(event.slice("data: ".length));
    }
  }
}

async function problemOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

// -------------------------------------------------------------------------------- the run

async function loadRun() {
  const response = await fetchHere("/run.json");
  if (response.status === 401) {
    askToken();
    return;
  }
  if (!response.ok) throw new Error(await problemOf(response));
  const isFirst = facts === null;
  facts = await response.json();
  document.body.classList.add(facts.converses ? "chat" : "base");
  prompt.placeholder = facts.converses ? strings.question : strings.placeholder;
  if (element("ask").open) element("ask").close();
  element("name").textContent = facts.name;
  document.title = facts.name;
  const millions = new Intl.NumberFormat(language, { notation: "compact" });
  const step = facts.step === null ? "" : `${strings.step} ${facts.step} · `;
  element("summary").textContent =
    `${step}${strings.parameters} ${millions.format(facts.parameters)}`;
  showFacts();
  if (isFirst) resetControls();
  if (facts.step !== null) await loadPicture(); // a model from elsewhere has none
}

function showFacts() {
  const number = new Intl.NumberFormat(language);
  const count = (value) => (value === null ? null : number.format(value));
  const loss = (value) => (value === null ? null : value.toFixed(3));
  const names = facts.text.join(", ");
  const text = facts.more_texts ? `${names}, ${facts.more_texts} ${strings.others}` : names;
  const rows = [
    [strings.step, count(facts.step)],
    [strings.parameters, number.format(facts.parameters)],
    [strings.tokenizer, facts.tokenizer],
    [strings.context, `${number.format(facts.context_length)} ${strings.tokens}`],
    [strings.weights, `${facts.weights}, ${facts.device}`],
    [strings.trainLoss, loss(facts.final_train_loss)],
    [strings.valLoss, loss(facts.final_val_loss)],
    [strings.text, text],
    [strings.textTokens, count(facts.text_tokens)],
  ];
  const list = element("facts");
  list.replaceChildren();
  for (const [name, value] of rows) {
    if (value === null || value === "") continue;
    const term = document.createElement("dt");
    const description = document.createElement("dd");
    term.textContent = name;
    description.textContent = value;
    list.append(term, description);
  }
}

async function loadPicture() {
  const response = await fetchHere("/training_losses.png");
  if (!response.ok) return; // a run that has just begun has none
  const address = URL.createObjectURL(await response.blob());
  element("picture").querySelector("img").src = address;
  element("large").querySelector("img").src = address;
  element("picture").hidden = false;
}

function askToken() {
  element("ask-problem").textContent = token === null ? "" : strings.wrongToken;
  if (!element("ask").open) element("ask").showModal();
  element("token").select();
}

// -------------------------------------------------------------------------- how it writes

function resetControls() {
  const own = facts.sampling;
  for (const name of SLIDERS) {
    const slider = element(name);
    const value = own[name] ?? Number(slider.max); // top_p may be lifted
    if (value > Number(slider.max)) slider.max = value;
    if (value < Number(slider.min)) slider.min = value;
    slider.step = Number.isInteger(Math.round(value * 1e6) / 1e4) ? "0.01" : "any";
    slider.value = value;
    showValue(slider);
  }
  element("top_k").value = own.top_k ?? "";
  element("max_tokens").value = own.max_new_tokens;
  element("max_tokens").max = facts.answer_limit;
  element("seed").value = facts.seed ?? "";
}

function showValue(slider) {
  element(`${slider.id}-shown`).textContent = Number(Number(slider.value).toFixed(4));
}

function chosenSampling() {
  const chosen = { top_k: null }; // null lifts it
  for (const name of [...SLIDERS, ...NUMBERS]) {
    const { value } = element(name);
    if (value !== "") chosen[name] = Number(value);
  }
  if ("seed" in chosen) chosen.seed += retries; // else it would write the same again
  return chosen;
}

// ------------------------------------------------------------------------ the conversation

function addMessage(role, content) {
  const box = document.createElement("article");
  const speaker = document.createElement("span");
  const text = document.createElement("div");
  const note = document.createElement("p");
  box.className = `message ${role}`;
  speaker.className = "hidden";
  speaker.textContent = `${strings[role]}: `;
  text.className = "text";
  text.dir = "auto";
  note.className = "note";
  box.append(speaker, text);
  if (role === "assistant") box.append(note);
  const message = { role, content, view: { box, text, note, render: null } };
  if (facts.converses) {
    const tools = document.createElement("div");
    tools.className = "tools";
    tools.append(copyButton(() => message.content));
    if (role === "user") tools.append(button(strings.edit, () => edit(message)));
    else message.view.render = rendererOf(text, (code) => copyButton(() => code));
    box.append(tools);
  }
  if (message.view.render === null) text.textContent = content;
  messages.push(message);
  element("welcome").hidden = true;
  following(() => log.append(box));
  return message;
}

function button(label, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = label;
  made.addEventListener("click", action);
  return made;
}

function copyButton(textOf) {
  const made = button(strings.copy, async () => {
    await copy(textOf());
    made.textContent = strings.copied;
    setTimeout(() => (made.textContent = strings.copy), 1500);
  });
  return made;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // without HTTPS only this machine's own pages have a clipboard
    const focused = document.activeElement;
    const area = document.createElement("textarea");
    area.className = "hidden";
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    focused?.focus();
  }
}

// puts a message into a text field; sent again, it takes the place of all that came after it
function edit(message) {
  const { box, text } = message.view;
  const form = document.createElement("form");
  const area = document.createElement("textarea");
  const close = () => {
    form.remove();
    box.classList.remove("editing");
  };
  const submit = button(strings.send, resend);
  submit.className = "primary";
  area.value = message.content;
  area.ariaLabel = strings.message;
  form.append(area, button(strings.cancel, () => leave()), submit);
  box.classList.add("editing");
  text.after(form);
  area.focus();

  function leave() {
    close();
    box.querySelector(".tools button:last-child").focus();
  }
  function resend() {
    const content = area.value;
    if (content.trim() === "") return;
    stop();
    for (const { view } of messages.splice(messages.indexOf(message))) view.box.remove();
    pose(content);
  }
  area.addEventListener("keydown", (event) => {
    if (isComposing(event)) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      resend();
    } else if (event.key === "Escape") {
      event.stopPropagation(); // it stops nothing
      leave();
    }
  });
}

// changes the log, and keeps its end in sight where it was
function following(change) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

// many templates want a user and a model to take turns: a question without an answer is left out,
// but for the last one
function turns() {
  const isEmpty = (message) => message.role === "assistant" && message.content === "";
  return messages.filter((message, i) => {
    const isUnanswered = i + 2 < messages.length && isEmpty(messages[i + 1]);
    return !isEmpty(message) && !isUnanswered;
  });
}

function history() {
  const newest = [];
  let left = MOST_CHARACTERS;
  const system = facts.converses ? element("system").value.trim() : "";
  for (const { role, content } of (facts.converses ? turns() : [...messages]).reverse()) {
    // half of a surrogate pair is no text
    const text = left > 0 ? content.slice(-left).replace(/^[\udc00-\udfff]/, "") : "";
    if (text !== "") newest.unshift({ role, content: text });
    left -= content.length;
  }
  return system === "" ? newest : [{ role: "system", content: system }, ...newest];
}

// shows what comes once a frame: a small model writes faster than a long text can be laid out
function painterOf(message) {
  const { text, render } = message.view;
  const node = render === null ? text.appendChild(document.createTextNode("")) : null;
  let waiting = "";
  let frame = null;
  function paint() {
    frame = null;
    following(() => (node === null ? render(message.content) : node.appendData(waiting)));
    waiting = "";
  }
  return {
    add(piece) {
      waiting += piece;
      frame ??= requestAnimationFrame(paint);
    },
    finish() {
      if (frame !== null) cancelAnimationFrame(frame);
      paint();
    },
  };
}

async function write(message) {
  const { box, note } = message.view;
  const controller = new AbortController();
  writing = controller;
  box.classList.add("writing");
  note.className = "note";
  note.textContent = "";
  showState();
  const figures = { startedAt: null, usage: null, finish: null, dropped: null };
  const painter = painterOf(message);
  try {
    await receive(message, controller.signal, figures, painter.add);
    note.textContent = describe(figures);
  } catch (error) {
    if (controller.signal.aborted) {
      note.textContent = strings.stopped;
    } else {
      note.className = "note problem";
      note.textContent = error instanceof TypeError ? strings.gone : error.message;
    }
  }
  painter.finish();
  if (writing === controller) writing = null;
  box.classList.remove("writing");
  following(showState);
}

async function receive(message, signal, figures, show) {
  const body = {
    model: facts.name,
    messages: history(),
    stream: true,
    stream_options: { include_usage: true },
    ...chosenSampling(),
  };
  const response = await fetchHere("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (response.status === 401) askToken();
  if (!response.ok) throw new Error(await problemOf(response));
  figures.dropped = response.headers.get("x-dropped-messages");
  for await (const event of readEvents(response.body)) {
    if (event.error) throw new Error(event.error.message);
    figures.usage = event.usage ?? figures.usage;
    const choice = event.choices[0];
    figures.finish = choice?.finish_reason ?? figures.finish;
    const piece = choice?.delta.content;
    if (piece) {
      figures.startedAt ??= performance.now();
      message.content += piece;
      show(piece);
    }
  }
}

function describe({ startedAt, usage, finish, dropped }) {
  const parts = [];
  if (usage !== null) {
    const drawn = usage.completion_tokens;
    parts.push(`${drawn} ${strings.tokens}`);
    const seconds = startedAt === null ? 0 : (performance.now() - startedAt) / 1000;
    if (drawn > 1 && seconds > 0) {
      parts.push(`${((drawn - 1) / seconds).toFixed(0)} ${strings.perSecond}`);
    }
  }
  if (finish === "stop" && !facts.converses) parts.push(strings.ended);
  if (finish === "length" && facts.converses) parts.push(strings.cut);
  if (dropped !== null) parts.push(`${strings.dropped} ${dropped}`);
  return parts.join(" · ");
}

function showState() {
  if (writing === null && document.activeElement === element("stop")) prompt.focus();
  const last = messages.at(-1);
  const answered = writing === null && last?.role === "assistant";
  element("stop").hidden = writing === null;
  element("send").hidden = writing !== null;
  element("retry").hidden = !answered;
  element("more").hidden = !answered || last.content === "";
  log.ariaBusy = String(writing !== null);
}

function send() {
  if (writing !== null) return;
  if (facts === null) {
    begin(); // the server may be there by now
    return;
  }
  const content = prompt.value;
  if (content.trim() === "") return;
  prompt.value = "";
  pose(content);
}

function pose(content) {
  prompt.focus();
  retries = 0;
  addMessage("user", content);
  log.scrollTop = log.scrollHeight;
  write(addMessage("assistant", ""));
}

function stop() {
  if (writing === null) return;
  writing.abort();
  prompt.focus();
}

function retry() {
  const last = messages.at(-1);
  if (writing !== null || last?.role !== "assistant") return;
  messages.pop();
  last.view.box.remove();
  retries += 1;
  write(addMessage("assistant", ""));
  prompt.focus();
}

function goOn() {
  const last = messages.at(-1);
  if (writing !== null || last?.role !== "assistant") return;
  write(last);
  prompt.focus();
}

function clear() {
  stop();
  for (const { view } of messages) view.box.remove();
  messages = [];
  element("welcome").hidden = false;
  showState();
  prompt.focus();
}

// ---------------------------------------------------------------------------------- begin

function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  const places = { text: "textContent", label: "ariaLabel", alt: "alt", placeholder: "placeholder" };
  for (const [name, property] of Object.entries(places)) {
    for (const found of document.querySelectorAll(`[data-${name}]`)) {
      found[property] = strings[found.dataset[name]];
    }
  }
}

function listen() {
  element("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  prompt.addEventListener("keydown", (event) => {
    // while an input method is composing, Enter takes its suggestion
    if (event.key !== "Enter" || event.shiftKey || isComposing(event)) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !isComposing(event) && !document.querySelector("dialog[open]")) {
      stop();
    }
  });
  const clicks = { stop, retry, more: goOn, clear, reset: resetControls };
  for (const [id, action] of Object.entries(clicks)) {
    element(id).addEventListener("click", () => action());
  }
  for (const name of SLIDERS) {
    element(name).addEventListener("input", (event) => showValue(event.target));
  }
  element("toggle").addEventListener("click", () => {
    const open = document.body.classList.toggle("settings");
    element("toggle").ariaExpanded = String(open);
  });
  element("picture").addEventListener("click", () => element("large").showModal());
  element("ask").addEventListener("cancel", (event) => event.preventDefault());
  element("ask-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    token = element("token").value.trim();
    if (/^[!-~]+$/.test(token)) await begin();
    else askToken();
  });
}

async function begin() {
  try {
    await loadRun();
  } catch (error) {
    const place = element(element("ask").open ? "ask-problem" : "summary");
    place.textContent = error instanceof TypeError ? strings.gone : error.message;
  }
}

translate();
listen();
showState();
prompt.focus();
begin();
