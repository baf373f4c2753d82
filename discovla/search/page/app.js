// The page: what is searched for lives in the address, so that back, forward and reload work.

import * as library from "/page/library.js";
import * as player from "/page/player.js";
import { ask, baseName, clock, element, icon, isGiven, plural, request, size, thumbnail } from "/page/requests.js";

const $ = (id) => document.getElementById(id);
const [input, hitList] = [$("query"), $("hits")];
const STEP = 24;
const MOST = 200;
const LARGEST = 10 * 1024 ** 2; // bytes of an image; the server refuses larger ones
const CROSS = "m6 6 12 12M18 6 6 18";
const PLAIN_NAME = /^(?!(and|or|not|in|like|is|null|true|false)$)[a-z_]\w*$/i; // of a column; others are quoted
const OPERATORS = { text: ["=", "!=", "contains"], other: ["=", "!=", "<", "<=", ">", ">="] };
let query = null;
let where = "";
let count = STEP;
let hits = [];
let columns = {};
let running = null;
let typing = 0;
let picture = ""; // object URL of the uploaded image

// Searches

async function search() {
  running?.abort();
  running = new AbortController();
  showQuery();
  if (!query) {
    hits = [];
    hitList.replaceChildren();
    say("");
    $("more").hidden = true;
    return;
  }
  hitList.classList.add("busy");
  try {
    const result = await ask("/api/search", query, { where, k: count }, running.signal);
    hits = result.hits;
    showHits(result);
  } catch (error) {
    if (error.name === "AbortError") return;
    say("", error.message);
    hits = [];
    hitList.replaceChildren();
    $("more").hidden = true;
  }
  hitList.classList.remove("busy");
}

function start(next, { replace = false } = {}) {
  clearTimeout(typing);
  if (picture && picture !== next?.picture) URL.revokeObjectURL(picture);
  picture = next?.picture ?? "";
  query = next ? { ...next, picture: undefined } : null;
  count = STEP;
  if (query?.q === undefined) input.value = "";
  const fields = Object.entries({ ...query, where }).filter(([name, value]) => isGiven(value) && name !== "image");
  const address = fields.length ? `/?${new URLSearchParams(fields)}` : "/";
  history[replace ? "replaceState" : "pushState"](null, "", address);
  $("results").hidden = false;
  showView("results");
  search();
}

function readAddress(typed = "") {
  const fields = Object.fromEntries(new URLSearchParams(location.search));
  where = $("where").value = fields.where ?? "";
  [query, count] = [null, STEP];
  if (fields.q) query = { q: fields.q };
  else if (isGiven(fields.like)) query = { like: fields.like };
  else if (isGiven(fields.clip)) query = { clip: fields.clip, start: fields.start, end: fields.end };
  input.value = fields.q ?? typed;
  $("filter").classList.toggle("on", where !== "");
  showView(fields.view === "library" ? "library" : "results");
  search();
}

function showView(name) {
  for (const view of ["results", "library"]) $(view).hidden = view !== name;
  $("library-link").toggleAttribute("aria-current", name === "library");
  if (name === "library") showFilters(false);
  if (name === "library") library.show().catch((error) => { $("library-summary").textContent = error.message; });
  else library.hide();
}

// Hits

function showHits({ note, seconds }) {
  const time = seconds < 1 ? `${Math.max(1, Math.round(seconds * 1000))} ms` : `${seconds.toFixed(1)} s`;
  say(hits.length ? `${plural(hits.length, "hit")} in ${time}` : "No hits", note);
  hitList.replaceChildren(...hits.map((hit, index) => element("li", {}, card(hit, index))));
  $("more").hidden = hits.length < count || count >= MOST;
}

function card(hit, index) {
  const name = baseName(hit.video);
  const likely = hit.probability === null ? "" : hit.probability >= .5 ? " likely" : " unlikely";
  const short = hit.end - hit.start < 2;
  const times = `${clock(hit.start, short)} – ${clock(hit.end, short)}`;
  const frame = element("span", { className: "frame" },
    element("img", { src: thumbnail(hit.moment_id), alt: "", loading: "lazy", onload: fit }),
    element("span", { className: "tag time" }, times));
  if (hit.probability !== null) {
    frame.append(element("span", { className: "tag probability", title: "probability that this is it" }, `${Math.round(hit.probability * 100)} %`));
  }
  const own = Object.values(hit.columns).filter((value) => value !== null).join(" · ");
  return element("button", { className: `hit${likely}`, title: hit.video, onclick: () => play(index), ariaLabel: `${name}, ${times}` },
    frame,
    element("span", { className: "name" }, name),
    element("span", { className: "detail" }, `score ${hit.score.toFixed(3)}${own && ` · ${own}`}`));
}

// Wide pictures fill their frame; others are shown whole.
function fit(event) {
  const { naturalWidth, naturalHeight, classList } = event.target;
  classList.toggle("whole", naturalWidth < 1.5 * naturalHeight);
}

function play(index) {
  player.open(hits, index, query);
}

function say(summary, note = "") {
  $("summary").textContent = summary;
  $("note").textContent = note;
  $("note").hidden = note === "";
}

// The query as it is shown

function showQuery() {
  const chips = [];
  if (query?.image) chips.push(chip(picture, query.image.name || "image", null));
  if (isGiven(query?.like)) chips.push(chip(thumbnail(query.like), "like this moment", null));
  if (isGiven(query?.clip)) chips.push(chip(thumbnail(query.clip), `clip ${clock(query.start, true)} – ${clock(query.end, true)}`, null));
  if (where && query) chips.push(chip("", where, query));
  $("queries").replaceChildren(...chips);
  $("welcome").hidden = query !== null;
  document.title = query?.q ? `${query.q} – discovla` : "discovla";
}

// A click on the cross of a filter keeps the query; on that of a picture it ends the query.
function chip(image, text, kept) {
  const cross = element("button", { className: "tool", title: "Remove", ariaLabel: `Remove ${text}`, onclick: () => {
    if (kept) setFilter("");
    start(kept && { ...kept, picture });
  } }, icon(CROSS));
  const parts = [element("span", {}, text), cross];
  if (image) parts.unshift(element("img", { src: image, alt: "" }));
  return element("span", { className: "chip" }, ...parts);
}

function searchImage(file) {
  if (!file?.type.startsWith("image/")) return;
  if (file.size > LARGEST) say("", `image: expected at most ${size(LARGEST)}, found ${size(file.size)}`);
  else start({ image: file, picture: URL.createObjectURL(file) });
}

// Filters

function showFilters(open) {
  $("filters").hidden = !open;
  $("filter").setAttribute("aria-expanded", open);
}

function setFilter(text) {
  where = $("where").value = text;
  if (!text) $("conditions").replaceChildren();
  $("filter").classList.toggle("on", text !== "");
}

function addCondition() {
  const column = element("select", { ariaLabel: "Column" }, ...Object.keys(columns).map((name) => element("option", {}, name)));
  const operator = element("select", { ariaLabel: "Comparison" });
  const value = element("input", { ariaLabel: "Value", placeholder: "value", maxLength: 200 });
  const list = () => operator.replaceChildren(...OPERATORS[columns[column.value] === "text" ? "text" : "other"].map((name) => element("option", {}, name)));
  const row = element("div", { className: "row" }, column, operator, value,
    element("button", { type: "button", className: "tool", title: "Remove", ariaLabel: "Remove the condition", onclick: () => { row.remove(); writeFilter(); } }, icon(CROSS)));
  column.onchange = list;
  list();
  row.oninput = writeFilter;
  $("conditions").append(row);
  column.focus();
}

function writeFilter() {
  const parts = [];
  for (const row of $("conditions").children) {
    const [column, operator, value] = row.querySelectorAll("select, input");
    if (value.value.trim() === "") continue;
    const text = value.value.trim().replaceAll("'", "''");
    const name = PLAIN_NAME.test(column.value) ? column.value : `\`${column.value}\``;
    if (columns[column.value] !== "text") parts.push(`${name} ${operator.value} ${text}`);
    else if (operator.value === "contains") parts.push(`${name} LIKE '%${text}%'`);
    else parts.push(`${name} ${operator.value} '${text}'`);
  }
  $("where").value = parts.join(" AND ");
}

// Events

$("search").onsubmit = (event) => {
  event.preventDefault();
  const text = input.value.trim();
  start(text ? { q: text } : null);
};
input.oninput = () => {
  clearTimeout(typing);
  const text = input.value.trim();
  if (text.length > 2 || (!text && query?.q)) typing = setTimeout(() => start(text ? { q: text } : null, { replace: true }), 350);
};
$("image").onchange = (event) => {
  searchImage(event.target.files[0]);
  event.target.value = "";
};
document.addEventListener("paste", (event) => searchImage(event.clipboardData.files[0]));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  searchImage(event.dataTransfer.files[0]);
});
$("filter").onclick = () => {
  const open = $("filters").hidden;
  showFilters(open);
  if (open && !$("conditions").children.length && Object.keys(columns).length) addCondition();
};
$("add-condition").onclick = addCondition;
$("filters").onsubmit = (event) => {
  event.preventDefault();
  setFilter($("where").value.trim());
  start(query && { ...query, picture });
};
$("clear-filter").onclick = () => {
  setFilter("");
  start(query && { ...query, picture });
};
$("more").onclick = async () => {
  const before = hits.length;
  count = Math.min(MOST, count + STEP);
  await search();
  hitList.children[before]?.firstChild.focus();
};
for (const [id, address] of [["home", "/"], ["library-link", "/?view=library"]]) {
  $(id).onclick = (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    history.pushState(null, "", address);
    readAddress();
  };
}
window.addEventListener("popstate", () => readAddress());

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const writes = event.target.matches("input, select, textarea");
  if (event.key === "/" && !writes) {
    event.preventDefault();
    input.select();
    scrollTo({ top: 0 });
  } else if (event.key === "Escape" && event.target === input) {
    input.blur();
  } else if (event.key === "ArrowDown" && event.target === input && hits.length) {
    event.preventDefault();
    hitList.querySelector(".hit").focus();
  } else if (event.target.matches(".hit")) {
    move(event);
  } else if (event.key.startsWith("Arrow") && !writes && event.target === document.body && hits.length) {
    event.preventDefault();
    hitList.querySelector(".hit").focus();
  }
});

// Move between hits with the arrow keys; from the first row up to the search box.
function move(event) {
  const cards = [...hitList.querySelectorAll(".hit")];
  const place = cards.indexOf(event.target);
  const across = cards.findIndex((one) => one.offsetTop > cards[0].offsetTop);
  const columnCount = across < 0 ? cards.length : across;
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columnCount, ArrowDown: columnCount };
  if (!(event.key in steps)) return;
  event.preventDefault();
  const next = place + steps[event.key];
  if (next < 0 && event.key === "ArrowUp") input.focus();
  else cards[Math.min(Math.max(next, 0), cards.length - 1)].focus();
}

player.setUp({
  onQuery: (next) => start(next),
  onClose: (index) => hitList.querySelectorAll(".hit")[index]?.focus(),
});
library.setUp((status) => {
  columns = status.columns;
  $("contents").textContent = status.moments
    ? `in ${plural(status.videos, "video")}, by text, by an image, or by a clip`
    : "The index is empty. What `discovla index` adds to it is found here at once.";
  $("add-condition").hidden = !Object.keys(columns).length;
});

readAddress(input.value); // before anything is awaited: what is typed meanwhile stays
try {
  library.showStatus(await request("/api/status")); // asks for the token, if there is one
  library.follow();
} catch (error) {
  say("", error.message);
}
