// What the index holds: numbers, indexed and refused videos, and the progress of an indexing that runs.

import { baseName, clock, element, plural, request, size } from "/page/requests.js";

const $ = (id) => document.getElementById(id);
const PAGE = 100;
let source = null;
let onStatus = () => {};
let visible = false;

export function setUp(handler) {
  onStatus = handler;
  document.addEventListener("visibilitychange", () => (document.hidden ? unfollow() : follow()));
}

// A browser opens few connections to one server: a hidden tab gives its own back.
export function follow() {
  if (source) return;
  source = new EventSource("/api/status");
  source.onmessage = (event) => showStatus(JSON.parse(event.data));
}

function unfollow() {
  source?.close();
  source = null;
}

export function showStatus(status) {
  const { progress } = status;
  $("indexing").hidden = !progress;
  if (progress) {
    const rest = progress.remaining === null ? "" : `, ${duration(progress.remaining)} left`;
    $("indexing").querySelector("span").textContent =
      `Indexing: ${progress.done.toLocaleString("en")} of ${plural(progress.total, "video")}${rest}`;
    $("indexing").querySelector("progress").value = progress.total ? progress.done / progress.total : 0;
  }
  const gone = status.gone ? `, ${status.gone.toLocaleString("en")} gone` : "";
  const parts = [`${plural(status.videos, "video")}, ${plural(status.moments, "moment")}, ${duration(status.seconds)}${gone}`];
  if (status.refused) parts.push(", ", element("a", { href: "#refused-part" }, `${status.refused.toLocaleString("en")} refused`));
  $("library-summary").replaceChildren(...parts, `. Indexed by ${status.model}, ${size(status.size)} on disk.`);
  onStatus(status);
  if (visible) show();
}

export function hide() {
  visible = false;
}

export async function show() {
  visible = true;
  const shown = Math.max(PAGE, $("videos").tBodies[0].rows.length);
  const [indexed, refused] = await Promise.all([load("", 0, shown), load("refused", 0, 1000)]);
  $("videos").tBodies[0].replaceChildren(...indexed.videos.map(row));
  $("more-videos").hidden = shown >= indexed.total;
  $("refused-part").hidden = refused.total === 0;
  $("refused-count").textContent = refused.total.toLocaleString("en");
  $("refused").tBodies[0].replaceChildren(...refused.videos.map((video) =>
    element("tr", {}, name(video), element("td", {}, video.reason))));
}

function load(state, offset, limit) {
  const fields = { offset, limit: Math.min(limit, 1000), ...(state && { state }) };
  return request(`/api/videos?${new URLSearchParams(fields)}`);
}

function row(video) {
  const cells = [video.duration ? clock(video.duration, video.duration < 10) : "", video.moments.toLocaleString("en")];
  return element("tr", {}, name(video), ...cells.map((text) => element("td", { className: "number" }, text)),
    element("td", { className: `state-${video.state}` }, video.state));
}

function name(video) {
  const part = video.start === null ? "" : ` ${clock(video.start, true)} – ${video.end === null ? "end" : clock(video.end, true)}`;
  return element("td", { title: video.video }, baseName(video.video), element("span", { className: "muted" }, part));
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toLocaleString("en", { maximumFractionDigits: 1 })} h`;
}

$("more-videos").onclick = async () => {
  const body = $("videos").tBodies[0];
  const next = await load("", body.rows.length, PAGE);
  body.append(...next.videos.map(row));
  $("more-videos").hidden = body.rows.length >= next.total;
};
