// Requests to the API. A server with a token answers 401 once: the page then asks for it and repeats the request.

const login = document.querySelector("#login");
const token = document.querySelector("#token");
const loginError = document.querySelector("#login-error");
let asking = null; // one dialog for all requests that wait for the token

export async function request(path, options = {}) {
  for (;;) {
    const response = await fetch(path, options);
    if (response.status === 401) {
      await askToken();
      continue;
    }
    if (response.ok) return response.status === 204 ? null : response.json();
    const text = await response.text();
    let detail = text;
    try { detail = JSON.parse(text).detail; } catch { /* no JSON */ }
    const busy = response.status === 503 ? "The server is busy; try again in a moment." : "";
    throw new Error(busy || detail || `The server answered ${response.status}.`);
  }
}

function askToken() {
  asking ??= new Promise((done) => {
    loginError.hidden = true;
    login.showModal();
    login.oncancel = (event) => event.preventDefault(); // nothing works without it
    login.querySelector("form").onsubmit = async (event) => {
      event.preventDefault();
      const response = await fetch("/api/session", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ token: token.value }),
      });
      if (response.ok) {
        token.value = "";
        login.close();
        asking = null;
        done();
      } else {
        loginError.textContent = "This is not the token.";
        loginError.hidden = false;
        token.select();
      }
    };
  });
  return asking;
}

// A query is {q}, {like}, {clip, start, end} or {image: File}; an image has to be sent as a form.
export function ask(path, query, options = {}, signal = undefined) {
  const fields = Object.entries({ ...query, ...options }).filter(([, value]) => isGiven(value));
  if (query.image) {
    const form = new FormData();
    for (const [name, value] of fields) form.append(name, value);
    return request(path, { method: "POST", body: form, signal });
  }
  return request(`${path}?${new URLSearchParams(fields)}`, { signal });
}

export const isGiven = (value) => value !== undefined && value !== null && value !== ""; // 0 is a moment, or a time
export const thumbnail = (moment) => `/api/moments/${moment}/thumbnail`;
export const baseName = (path) => path.split("/").pop();
export const plural = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

export function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = Math.min(units.length - 1, bytes ? Math.floor(Math.log10(bytes) / 3) : 0);
  return `${(bytes / 1000 ** power).toLocaleString("en", { maximumFractionDigits: 1 })} ${units[power]}`;
}

// 75.25 -> "1:15", with tenths "1:15.2"
export function clock(seconds, tenths = false) {
  const total = tenths ? Math.floor(seconds * 10) / 10 : Math.floor(seconds);
  const [hours, minutes] = [Math.floor(total / 3600), Math.floor(total / 60) % 60];
  const rest = (total % 60).toFixed(tenths ? 1 : 0).padStart(tenths ? 4 : 2, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}

// element("p", {className: "note"}, "text", child, ...)
export function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

export function icon(path) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(svg.namespaceURI, "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}
