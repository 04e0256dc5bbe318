// Markdown as nodes of the page: paragraphs, headings, lists, code, bold and italics. All that is
// not one of these stays as it is written. Text goes in as text, so that no markup of an answer
// can be anything else.

// none of these takes more than a moment for any line, however long
const FENCE = /^ *(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*)$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +(.*)$/;
const DEEPEST = 6; // levels of lists

// ------------------------------------------------------------------------------------ blocks

// The blocks of a text, each with the lines that it is made of; a text's end may be missing.
export function blocksOf(text) {
  const blocks = [];
  let open = null; // the block that the next line may belong to
  for (const line of text.split("\n")) {
    if (open?.kind === "code") {
      if (line.trim().startsWith(open.fence) && /^ *(`+|~+) *$/.test(line)) open = null;
      else open.lines.push(line);
      continue;
    }
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    if (fence) {
      open = { kind: "code", fence: fence[1], language: fence[2].trim(), lines: [] };
      open.indent = line.search(/[`~]/);
      blocks.push(open);
    } else if (heading) {
      const title = heading[2].trimEnd().replace(/(^| )#+$/, "");
      blocks.push({ kind: "heading", level: heading[1].length, lines: [title] });
      open = null;
    } else if (ITEM.test(line)) {
      if (open?.kind !== "list") blocks.push((open = { kind: "list", lines: [] }));
      open.lines.push(line);
    } else if (line.trim() === "") {
      if (open?.kind === "list") open.lines.push(""); // its items may be apart
      else open = null;
    } else if (open?.kind === "list" && (/^ /.test(line) || open.lines.at(-1) !== "")) {
      open.lines.push(line); // an item goes on
    } else {
      if (open?.kind !== "paragraph") blocks.push((open = { kind: "paragraph", lines: [] }));
      open.lines.push(line);
    }
  }
  return blocks;
}

// The items of a list, each with its depth, its mark and its text.
function itemsOf(lines) {
  const items = [];
  const indents = []; // of the open levels
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found) {
      const [, blanks, mark, text] = found;
      while (indents.length > 1 && blanks.length < indents.at(-1)) indents.pop();
      const deeper = indents.length === 0 || blanks.length > indents.at(-1) + 1;
      if (deeper && indents.length < DEEPEST) indents.push(blanks.length);
      items.push({ depth: indents.length, mark, text });
    } else if (line !== "") {
      items.at(-1).text += `\n${line.trim()}`;
    }
  }
  return items;
}

function make(name, children = []) {
  const node = document.createElement(name);
  for (const child of children) node.append(child); // too many to be arguments
  return node;
}

function listOf(lines) {
  const root = { node: make("div"), depth: 0 };
  const open = [root];
  for (const { depth, mark, text } of itemsOf(lines)) {
    while (open.at(-1).depth > depth) open.pop();
    const name = /\d/.test(mark) ? "ol" : "ul";
    if (open.at(-1).depth === depth && open.at(-1).node.localName !== name) open.pop();
    if (open.at(-1).depth < depth) {
      const list = make(name);
      if (name === "ol" && parseInt(mark, 10) !== 1) list.start = parseInt(mark, 10);
      const { node } = open.at(-1);
      (node === root.node ? node : node.lastChild).append(list);
      open.push({ node: list, depth });
    }
    open.at(-1).node.append(make("li", inlinesOf(text)));
  }
  return root.node;
}

function codeOf({ lines, language, indent }, copyButton) {
  const blanks = new RegExp(`^ {0,${indent}}`);
  const text = lines.map((line) => line.replace(blanks, "")).join("\n");
  const block = make("div", [make("div", [make("span", [language]), copyButton(text)])]);
  const pre = make("pre", [make("code", [text])]);
  pre.tabIndex = 0; // it scrolls
  block.className = "code";
  block.append(pre);
  return block;
}

function nodeOf(block, copyButton) {
  if (block.kind === "code") return codeOf(block, copyButton);
  if (block.kind === "list") return listOf(block.lines);
  const name = block.kind === "heading" ? `h${Math.min(6, block.level + 2)}` : "p";
  return make(name, inlinesOf(block.lines.join("\n")));
}

// Shows a text in a place as often as it is called, and replaces only blocks that have changed:
// what is written grows at its end. copyButton(text) is the button of a block of code.
export function rendererOf(place, copyButton) {
  let keys = [];
  return (text) => {
    const blocks = blocksOf(text);
    const wanted = blocks.map((block) => JSON.stringify(block));
    blocks.forEach((block, i) => {
      if (wanted[i] === keys[i]) return;
      const node = nodeOf(block, copyButton);
      if (i < keys.length) place.children[i].replaceWith(node);
      else place.append(node);
    });
    while (place.children.length > blocks.length) place.lastChild.remove();
    keys = wanted;
  };
}

// -------------------------------------------------------------------------- within a block

const SPECIAL = /[\\`*_]/g;
const MARKS = { "**": "strong", __: "strong", "*": "em", _: "em" };

// A text in a block as nodes and plain strings; `within` has the marks that are open around it.
export function inlinesOf(text, within = []) {
  const parts = [];
  const missing = new Set(); // what closes nowhere behind here: looked for once
  let plain = "";
  let at = 0;
  const closing = (mark, from, find) => {
    const end = missing.has(mark) ? -1 : find(text, mark, from);
    if (end < 0) missing.add(mark);
    return end;
  };
  const add = (node, end) => {
    if (plain) parts.push(plain);
    parts.push(node);
    plain = "";
    at = end;
  };
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const next = SPECIAL.exec(text)?.index ?? text.length;
    plain += text.slice(at, next);
    at = next;
    if (at === text.length) break;
    const mark = markAt(text, at);
    const from = at + mark.length;
    if (mark[0] === "\\") {
      const isEscape = /[\\`*_]/.test(text[from] ?? "");
      plain += isEscape ? text[from] : mark;
      at = isEscape ? from + 1 : from;
      continue;
    }
    const isCode = mark[0] === "`";
    const canOpen = isCode || (!within.includes(mark) && opens(text, at, mark));
    const end = canOpen ? closing(mark, from, isCode ? endOfCode : endOfMark) : -1;
    if (end < 0) {
      plain += mark;
      at = from;
    } else if (isCode) {
      const code = text.slice(from, end).replace(/^ (.+) $/s, "$1");
      add(make("code", [code]), end + mark.length);
    } else {
      const inner = inlinesOf(text.slice(from, end), [...within, mark]);
      add(make(MARKS[mark], inner), end + mark.length);
    }
  }
  if (plain) parts.push(plain);
  return parts;
}

// The mark that begins here: a backslash, all backticks of a run, or one or two stars or dashes.
function markAt(text, at) {
  const sign = text[at];
  if (sign === "\\") return sign;
  let end = at + 1;
  while (text[end] === sign && (sign === "`" || end < at + 2)) end += 1;
  return text.slice(at, end);
}

const isWord = (sign) => sign !== undefined && /[\p{L}\p{N}_]/u.test(sign);
// between Chinese characters stars may be anywhere; 2*3*4 is no emphasis
const isBound = (mark, sign) =>
  mark[0] === "_" ? isWord(sign) : mark === "*" && /[0-9A-Za-z]/.test(sign ?? "");

function opens(text, at, mark) {
  const next = text[at + mark.length];
  return next !== undefined && !/\s/.test(next) && !isBound(mark, text[at - 1]);
}

// Where a mark closes: at the end of a run of its sign, which may close another mark too.
function endOfMark(text, mark, from) {
  let at = text.indexOf(mark[0], from);
  while (at >= 0) {
    const start = at;
    while (text[at] === mark[0]) at += 1;
    const fits = mark.length === 2 ? at - start >= 2 : (at - start) % 2 === 1;
    const isBehind = start > from && !/[\s\\]/.test(text[start - 1]);
    if (fits && isBehind && !isBound(mark, text[at])) return at - mark.length;
    at = text.indexOf(mark[0], at);
  }
  return -1;
}

function endOfCode(text, mark, from) {
  for (let at = text.indexOf(mark, from); at >= 0; at = text.indexOf(mark, at + 1)) {
    let end = at + mark.length;
    while (text[end] === "`") end += 1;
    if (end === at + mark.length) return at;
    at = end - 1;
  }
  return -1;
}
