"use strict";
// Everything is shown through text nodes and class names: nothing of the document is ever read as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const { prompt } = data;
const NUM_LEVELS = 10;
const at = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en", { maximumFractionDigits: 1 });
const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)}%`;

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

// Methods: each layer's counts become bytes, and their shares over layers and KV heads an entry of their own in front.
function sum(values) {
  let total = 0;
  for (const value of values) total += value;
  return total;
}

function unpack(method) {
  const views = method.layers.map((layer) => {
    const counts = Uint8Array.from(atob(layer.retained), (char) => char.charCodeAt(0));
    return { layer: layer.layer, heads: layer.num_kv_heads, counts, kept: sum(counts) / layer.num_kv_heads };
  });
  const shares = new Float32Array(prompt.texts.length);
  for (const view of views) {
    view.counts.forEach((count, token) => { shares[token] += count / view.heads / views.length; });
  }
  const all = { layer: null, heads: 1, counts: shares, kept: sum(views.map((view) => view.kept)) / views.length };
  return { ...method, views: [all, ...views] };
}
const methods = data.methods.map(unpack);
const state = { method: 0, view: 0, focus: 0, attended: false };
const view = () => methods[state.method].views[state.view];

// Cells: one token, or the tokens that make up one character.
const special = new Set(prompt.special);
const within = (token, [start, end]) => token >= start && token < end;
const cells = [];
prompt.texts.forEach((text, token) => {
  if (text === "" && cells.length) cells[cells.length - 1].end = token + 1;
  else cells.push({ text, start: token, end: token + 1 });
});

function partOf(token) {
  if (special.has(token)) return "special token";
  if (within(token, prompt.document)) return "document";
  return within(token, prompt.question) ? "question" : "template";
}

const evidence = [...new Set(prompt.evidence.flatMap(([start, end]) =>
  Array.from({ length: end - start }, (_, offset) => start + offset)))];
const isEvidence = new Set(evidence);

function baseClass(cell) {
  const part = partOf(cell.start);
  const names = [];
  if (part === "special token") names.push("x");
  if (part === "template") names.push("t");
  if (isEvidence.has(cell.start)) names.push("e");
  if (cell.text.includes("\n")) names.push("n");
  return names.join(" ");
}

function buildText() {
  const fragment = document.createDocumentFragment();
  cells.forEach((cell, index) => {
    cell.base = baseClass(cell);
    cell.level = 0;
    cell.element = make("span", cell.base, cell.text);
    cell.element.dataset.i = index;
    fragment.append(cell.element);
  });
  at("text").replaceChildren(fragment);
  if (cells.length) cells[0].element.tabIndex = 0;
}

function shareOf(shown, cell) {
  let kept = 0;
  for (let token = cell.start; token < cell.end; token += 1) kept += shown.counts[token];
  return kept / (shown.heads * (cell.end - cell.start));
}
// What is kept anywhere has a shade: only 0 is blank. Shares are sums in Float32, so 1 can be a little more or less.
const levelOf = (share) => (share <= 1e-6 ? 0 : Math.min(NUM_LEVELS, Math.max(1, Math.ceil(share * NUM_LEVELS - 1e-5))));

// What the answer's tokens attended to: relative to the most of any token of the document or the question, as a root, so
// that little is seen, too. The first and the special tokens take much from every answer, and are no measure.
const attention = (cell) => sum(methods[state.method].attended.slice(cell.start, cell.end));
const isText = (cell) => ["document", "question"].includes(partOf(cell.start));
const mostAttended = () => Math.max(...cells.filter(isText).map(attention), 1e-9);

function shade() {
  const shown = view();
  const most = state.attended ? mostAttended() : 1;
  for (const cell of cells) {
    const level = levelOf(state.attended ? Math.sqrt(attention(cell) / most) : shareOf(shown, cell));
    if (level !== cell.level) {
      cell.level = level;
      cell.element.className = level ? `${cell.base} s${level}` : cell.base;
    }
  }
}

// Header and controls.
function showFacts() {
  const method = methods[state.method];
  const cut = data.truncated_tokens ? ` (${number(data.truncated_tokens)} more cut from the middle)` : "";
  const facts = [
    ["Model", data.model], ["Method", method.method],
    ["Budget", method.budget_text],
    ["Prompt", `${number(data.prompt_tokens)} tokens${cut}`],
    ["Retained", percent(method.retained_fraction)],
    ["KV cache", `${megabytes(method.kv_nbytes_full)} → ${megabytes(method.kv_nbytes)} MB`],
  ];
  if (method.chunks) facts.push(["Cuts while read", number(method.chunks.num_cuts)]);
  if (evidence.length) facts.push(["Evidence retained", percent(evidenceShare(method.views[0]))]);
  at("facts").replaceChildren(...facts.map(([name, value]) => {
    const pair = make("div");
    pair.append(make("dt", "", name), make("dd", "", value));
    return pair;
  }));
  const ending = method.cut_off ? " [...]" : "";
  at("answer").textContent = method.answer ? method.answer + ending : "The model said nothing.";
  at("answer").className = method.answer ? "" : "none";
  at("answer-block").hidden = method.answer === null;
}
const megabytes = (nbytes) => (nbytes / 1e6).toLocaleString("en", { maximumFractionDigits: nbytes < 1e8 ? 1 : 0 });
const evidenceShare = (shown) => sum(evidence.map((token) => shown.counts[token])) / (shown.heads * evidence.length);

function buildTabs() {
  const tabs = methods.map((method, index) => {
    const tab = make("button", "", method.method);
    tab.type = "button";
    tab.setAttribute("role", "tab");
    tab.addEventListener("click", () => select({ method: index }));
    return tab;
  });
  at("methods").replaceChildren(...tabs);
  at("methods").hidden = tabs.length < 2;
  at("methods").addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    select({ method: (state.method + step + tabs.length) % tabs.length });
    tabs[state.method].focus();
  });
}

function showStrip() {
  const { views } = methods[state.method];
  const most = Math.max(...views.map((shown) => shown.kept), 1);
  const bars = views.map((shown, index) => {
    const bar = make("div");
    bar.title = `${nameOf(shown)}: ${number(shown.kept)} tokens`;
    bar.addEventListener("click", () => select({ view: index }));
    const fill = make("i");
    fill.style.height = `${(100 * shown.kept) / most}%`;
    bar.append(fill);
    return bar;
  });
  at("strip").replaceChildren(...bars);
  at("layer").max = views.length - 1;
  document.documentElement.style.setProperty("--n", views.length);
}
const nameOf = (shown) => (shown.layer === null ? "All layers" : `Layer ${shown.layer}`);

function showState() {
  const shown = view();
  const isAll = shown.layer === null;
  const share = shown.kept / prompt.texts.length;
  const found = evidence.length ? `; evidence ${percent(evidenceShare(shown))}` : "";
  const keeps = isAll ? "keep" : "keeps";
  const tokens = `${number(prompt.texts.length)} tokens${isAll ? " a layer" : ""}`;
  const words = ` ${keeps} ${number(shown.kept)} of ${tokens} (${percent(share)})${found}`;
  at("state").replaceChildren(make("b", "", nameOf(shown)), words);
  at("layer").value = state.view;
  at("layer").setAttribute("aria-valuetext", nameOf(shown));
  at("all").disabled = isAll;
  at("attended").hidden = !methods[state.method].attended;
  at("attended").setAttribute("aria-pressed", state.attended);
  [...at("strip").children].forEach((bar, index) => bar.classList.toggle("on", index === state.view));
  [...at("methods").children].forEach((tab, index) => {
    tab.setAttribute("aria-selected", index === state.method);
    tab.tabIndex = index === state.method ? 0 : -1;
  });
}

function showLegend() {
  const scale = make("span", "scale");
  for (let level = 0; level <= NUM_LEVELS; level += 1) scale.append(make("i", level ? `s${level}` : ""));
  const shares = make("span");
  const kept = view().layer === null ? "100% of layers and KV heads" : "100% of this layer's KV heads";
  const ends = state.attended ? ["no attention", `${percent(mostAttended())} of the answer's attention`] : ["evicted", kept];
  shares.append(ends[0], scale, ends[1]);
  const most = Math.max(...methods[state.method].views.map((shown) => shown.kept));
  const items = [shares, make("span", "bars", `bars: tokens each layer keeps, at most ${number(most)}`)];
  for (const [used, name, text] of [[evidence.length, "key-e", "evidence"], [special.size, "key-x", "special token"]]) {
    if (!used) continue;
    const item = make("span");
    item.append(make("span", name, text));
    items.push(item);
  }
  at("legend").replaceChildren(...items);
}

function select({ method = state.method, view: index = state.view, attended = state.attended }) {
  state.attended = attended && methods[method].attended !== null;
  const changesMethod = method !== state.method || !at("strip").children.length;
  state.method = method;
  state.view = Math.min(index, methods[method].views.length - 1);
  if (changesMethod) {
    showFacts();
    showStrip();
  }
  showState();
  showLegend();
  shade();
  hideTip();
}

// The token under the pointer or the keyboard.
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");

function describe(cell) {
  const layers = methods[state.method].views.slice(1);
  const shares = layers.map((shown) => shareOf(shown, cell));
  const kept = shares.filter((share) => share > 0).length;
  const several = cell.end - cell.start > 1;
  const place = several ? `Tokens ${cell.start}–${cell.end - 1}` : `Token ${cell.start}`;
  const here = shareOf(view(), cell);
  const layer = `layer ${view().layer}`;
  const inThis = here > 0 ? `; in ${layer} by ${percent(here)} of KV heads` : `; not in ${layer}`;
  const strip = make("div", "cells");
  shares.forEach((share, index) => {
    strip.append(make("i", `s${levelOf(share)}${index + 1 === state.view ? " at" : ""}`));
  });
  const head = make("div");
  head.append(make("code", "", visible(cell.text) || "(no text)"));
  const part = isEvidence.has(cell.start) ? "evidence" : partOf(cell.start);
  const where = `${place} of ${number(prompt.texts.length)}, ${part}`;
  const verdict = `Kept in ${kept} of ${layers.length} layers${state.view ? inThis : ""}`;
  const parts = [head, make("div", "where", where), make("div", "", verdict), strip];
  if (methods[state.method].attended) {
    parts.push(make("div", "", `${percent(attention(cell))} of the attention of the answer's tokens`));
  }
  return parts;
}

function showTip(cell) {
  const tip = at("tip");
  tip.replaceChildren(...describe(cell));
  tip.hidden = false;
  const box = cell.element.getClientRects()[0] || cell.element.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left), document.documentElement.clientWidth - tip.offsetWidth - 8);
  const fits = box.bottom + 8 + tip.offsetHeight < window.innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${fits ? box.bottom + 6 : box.top - tip.offsetHeight - 6}px`;
  cell.element.setAttribute("aria-describedby", "tip");
}

const hideTip = () => { at("tip").hidden = true; };

function focusCell(index) {
  cells[state.focus].element.tabIndex = -1;
  state.focus = Math.min(Math.max(index, 0), cells.length - 1);
  const { element } = cells[state.focus];
  element.tabIndex = 0;
  element.focus({ preventScroll: true });
  element.scrollIntoView({ block: "nearest" });
  const bottom = document.querySelector(".controls").getBoundingClientRect().bottom;
  const covered = bottom - element.getBoundingClientRect().top;  // the controls stick above the text
  if (covered > 0) window.scrollBy(0, -covered - 12);
  showTip(cells[state.focus]);
}

function listen() {
  const cellOf = (event) => cells[event.target.dataset?.i];
  const text = at("text");
  for (const name of ["mouseover", "focusin"]) {
    text.addEventListener(name, (event) => { if (cellOf(event)) showTip(cellOf(event)); });
  }
  for (const name of ["mouseleave", "focusout"]) text.addEventListener(name, hideTip);
  text.addEventListener("click", (event) => { if (cellOf(event)) focusCell(Number(event.target.dataset.i)); });
  text.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: state.focus - 1, ArrowRight: state.focus + 1, Home: 0, End: cells.length - 1 }[event.key];
    if (event.key === "Escape") hideTip();
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    focusCell(to);
  });
  window.addEventListener("scroll", () => { if (!text.contains(document.activeElement)) hideTip(); });
  at("layer").addEventListener("input", (event) => select({ view: Number(event.target.value) }));
  at("attended").addEventListener("click", () => select({ attended: !state.attended }));
  at("all").addEventListener("click", () => { select({ view: 0 }); at("layer").focus(); });
}

// A link can name what to show: #method=snapkv&layer=3&token=17
function fromHash() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const method = Math.max(0, methods.findIndex((one) => one.method === wanted.get("method")));
  const layer = wanted.get("layer");
  const shown = methods[method].views.findIndex((one) => one.layer !== null && String(one.layer) === layer);
  select({ method, view: Math.max(0, shown) });
  const token = Number(wanted.get("token") ?? NaN);
  const cell = cells.findIndex((one) => token >= one.start && token < one.end);
  if (cell >= 0) focusCell(cell);
}

at("document").textContent = data.document;
at("question").textContent = data.question;
buildTabs();
buildText();
listen();
fromHash();
window.addEventListener("hashchange", fromHash);
