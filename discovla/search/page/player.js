// The player: a hit's file from its moment on, the similarity of its frames to the query, and a clip as a new query.

import { ask, baseName, clock, element, thumbnail } from "/page/requests.js";

const $ = (id) => document.getElementById(id);
const [dialog, video, strip] = [$("player"), $("video"), $("strip")];
const SVG = "http://www.w3.org/2000/svg";
let hits = [];
let place = 0;
let query = null;
let span = null; // [start, end] seconds of the clip to search with
let frames = null; // range of times that the strip shows
let loading = null;
let onQuery = () => {};
let onClose = () => {};

export function setUp(handlers) {
  ({ onQuery, onClose } = handlers);
}

export function open(list, index, asked) {
  [hits, query] = [list, asked];
  if (!dialog.open) dialog.showModal();
  dialog.focus();
  show(index);
}

function show(index) {
  place = index;
  const hit = hits[place];
  $("player-title").textContent = baseName(hit.video);
  $("player-title").title = hit.video;
  $("player-time").textContent = `${clock(hit.start, true)} – ${clock(hit.end, true)}`;
  $("previous").disabled = place === 0;
  $("next").disabled = place === hits.length - 1;
  $("video-error").hidden = true;
  span = [hit.start, hit.end];
  showSpan();
  showFacts(hit);
  video.poster = thumbnail(hit.moment_id);
  video.src = `/api/media/${hit.moment_id}`;
  video.addEventListener("loadedmetadata", () => { video.currentTime = hit.start; }, { once: true });
  video.play().catch(() => {}); // a browser may refuse to play before the first click
  loadFrames(hit);
}

function showFacts(hit) {
  const facts = [["Score", hit.score.toFixed(3)]];
  if (hit.probability !== null) facts.unshift(["Probability", `${Math.round(hit.probability * 100)} %`]);
  facts.push(["Best frame", clock(hit.best_frame, true)], ["Moment", hit.moment_id]);
  for (const [name, value] of Object.entries(hit.columns)) if (value !== null) facts.push([name, value]);
  $("facts").replaceChildren(...facts.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))));
}

async function loadFrames(hit) {
  loading?.abort();
  loading = new AbortController();
  frames = null;
  strip.replaceChildren();
  $("why-best").textContent = "";
  try {
    const scores = await ask(`/api/moments/${hit.moment_id}/frames`, query, {}, loading.signal);
    if (scores.length) drawStrip(scores);
    $("why").hidden = scores.length === 0;
  } catch (error) {
    if (error.name !== "AbortError") $("why-best").textContent = error.message;
  }
}

function drawStrip(scores) {
  const times = scores.map((frame) => frame.time);
  const values = scores.map((frame) => frame.score);
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const last = times.at(-1);
  const step = times.length > 1 ? (last - times[0]) / (times.length - 1) : 1;
  frames = [times[0], last + step];
  strip.setAttribute("viewBox", `0 0 ${scores.length} 100`);
  const bars = scores.map(({ time, score }, i) => {
    const height = 14 + 86 * (most > least ? (score - least) / (most - least) : 1);
    const bar = document.createElementNS(SVG, "rect");
    for (const [name, value] of Object.entries({ x: i + .04, y: 100 - height, width: .92, height })) bar.setAttribute(name, value);
    bar.classList.toggle("best", score === most);
    const title = document.createElementNS(SVG, "title");
    title.textContent = `${clock(time, true)}: ${score.toFixed(3)}`;
    bar.append(title);
    return bar;
  });
  const cursor = document.createElementNS(SVG, "line");
  cursor.setAttribute("y1", 0);
  cursor.setAttribute("y2", 100);
  strip.replaceChildren(...bars, cursor);
  $("why-best").textContent = `best ${most.toFixed(3)} at ${clock(times[values.indexOf(most)], true)}`;
  moveCursor();
}

function moveCursor() {
  const cursor = strip.querySelector("line");
  if (!frames || !cursor) return;
  const share = (video.currentTime - frames[0]) / (frames[1] - frames[0]);
  const x = Math.min(1, Math.max(0, share)) * strip.viewBox.baseVal.width;
  cursor.setAttribute("x1", x);
  cursor.setAttribute("x2", x);
  cursor.style.opacity = share >= 0 && share <= 1 ? 1 : .25;
}

function animate() {
  moveCursor();
  if (!video.paused && dialog.open) requestAnimationFrame(animate);
}

function showSpan() {
  $("from").querySelector("b").textContent = clock(span[0], true);
  $("to").querySelector("b").textContent = clock(span[1], true);
  $("clip").disabled = !(span[1] > span[0]);
}

function askLike() {
  const hit = hits[place];
  dialog.close();
  onQuery({ like: hit.moment_id });
}

function askClip() {
  const hit = hits[place];
  const [start, end] = span.map((time) => Math.round(time * 1000) / 1000);
  dialog.close();
  onQuery({ clip: hit.moment_id, start, end });
}

video.addEventListener("play", animate);
video.addEventListener("seeked", moveCursor);
video.addEventListener("error", () => {
  if (!video.getAttribute("src")) return; // closed
  $("video-error").textContent = "This browser cannot play this kind of file. Other players open it.";
  $("video-error").hidden = false;
});
strip.addEventListener("click", (event) => {
  if (!frames) return;
  const box = strip.getBoundingClientRect();
  video.currentTime = frames[0] + (frames[1] - frames[0]) * (event.clientX - box.left) / box.width;
});
$("from").onclick = () => { span[0] = video.currentTime; showSpan(); };
$("to").onclick = () => { span[1] = video.currentTime; showSpan(); };
$("like").onclick = askLike;
$("clip").onclick = askClip;
$("close").onclick = () => dialog.close();
$("previous").onclick = () => show(place - 1);
$("next").onclick = () => show(place + 1);
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); }); // the backdrop
dialog.addEventListener("close", () => {
  loading?.abort();
  video.pause();
  video.removeAttribute("src");
  video.removeAttribute("poster");
  video.load(); // releases the connection
  onClose(place);
});
dialog.addEventListener("keydown", (event) => {
  if (event.target !== dialog || event.ctrlKey || event.metaKey || event.altKey) return; // buttons and the video have keys of their own
  const keys = {
    " ": () => (video.paused ? video.play() : video.pause()),
    ArrowLeft: () => place > 0 && show(place - 1),
    ArrowRight: () => place < hits.length - 1 && show(place + 1),
  };
  if (keys[event.key]) {
    event.preventDefault();
    keys[event.key]();
  }
});
