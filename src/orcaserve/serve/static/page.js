// The live page: what the feed tells, as figures, pictures and tables. Text from outside is only ever set as text.

import { State, KINDS, panel } from "./state.js";
import * as draw from "./draw.js";
import { follow, headers, keep, trouble } from "./feed.js";
import { asked, playground } from "./play.js";

const $ = (id) => document.getElementById(id);
const state = new State();
const view = { byTime: false, width: 7, span: 8, paused: null, cursor: null, engine: 0, hover: null };
let colour = draw.colours(), layout = null, dirty = true, compared = null;

const WHY = {
  rows: (hello) => `all ${hello.max_batch_size} rows of an iteration are taken`,
  tokens: (hello) => `all ${hello.max_batch_tokens} tokens of an iteration are given out`,
  blocks: () => "KV blocks are lacking", memory: () => "one that runs lacks KV blocks itself",
  preemption: () => "KV blocks have just been taken away for an older request", closed: () => "the static batch is closed until its longest member ends",
  shape: () => "it cannot be stacked with those that run", prefix: () => "another is computing the beginning of its prompt",
};
const ENDS = { stop: "ended", length: "ended at its length", abort: "left", error: "failed" };

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function plural(count, word) { return `${count} ${word}${count === 1 ? "" : "s"}`; }

function set(id, text) { const at = typeof id === "string" ? $(id) : id; if (at.textContent !== text) at.textContent = text; }

let toasting = 0;
function say(text) {
  set("toast", text);
  $("toast").hidden = false;
  clearTimeout(toasting);
  toasting = setTimeout(() => { $("toast").hidden = true; }, 5000);
}

// -- tabs ---------------------------------------------------------------------------------------------------------

const tabs = [...document.querySelectorAll("[role=tab]")];
function open(tab) {
  for (const other of tabs) {
    const isOpen = other === tab;
    other.setAttribute("aria-selected", String(isOpen));
    other.tabIndex = isOpen ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !isOpen;
  }
  dirty = true;
  slow();
}
for (const tab of tabs) {
  tab.addEventListener("click", () => open(tab));
  tab.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    const next = tabs[(tabs.indexOf(tab) + move + tabs.length) % tabs.length];
    next.focus();
    open(next);
  });
}

// -- the timeline -------------------------------------------------------------------------------------------------

for (const [kind, words] of Object.entries(KINDS)) {
  const item = element("li"), mark = element("i", "k-" + kind + (kind === "queued" || kind === "preempted" ? " thin" : ""));
  item.append(mark, words);
  $("legend").append(item);
}

function columns() {
  const all = state.hello && state.hello.replicas > 1 ? state.columns.filter((column) => column.engine === view.engine) : state.columns;
  if (view.paused === null) return all;
  return all.filter((column) => column.number <= view.paused.number);
}

function drawTimeline() {
  const all = columns();
  $("nothing").hidden = state.columns.length > 0;
  const latest = all.length ? all[all.length - 1] : null;
  const until = view.paused === null ? (state.requests.size || !latest ? state.now : latest.at + 0.02 * view.span) : view.paused.at;
  layout = draw.timeline($("timeline"), all, {
    byTime: view.byTime, width: view.width, until, span: view.span, labels: true, strip: true, lanes: 8, cursor: view.cursor || view.hover,
  }, colour);
  tell(view.cursor || view.hover);
}

function tell(cursor) {
  const out = $("readout");
  const shown = layout ? layout.shown : [];
  const column = cursor ? shown.find((one) => one.number === cursor.number) : shown[shown.length - 1];
  if (!column) return out.replaceChildren();
  const key = `${column.number} ${cursor ? cursor.lane : ""} ${column.cells.length}`;
  if (out.dataset.key === key) return;
  out.dataset.key = key;
  out.setAttribute("aria-live", cursor ? "polite" : "off");
  const count = (kind) => column.cells.filter((cell) => cell.kind === kind).length;
  const parts = ["decode", "prefill", "again", "idle"].filter(count).map((kind) => `${count(kind)} ${kind === "idle" ? "idle" : kind}`);
  const line = element("div");
  line.append(element("b", "", `Iteration ${column.number + 1}`),
    ` took ${draw.seconds(column.seconds)}, until ${column.at.toFixed(2)} s: ${plural(column.rows, "row")} (${parts.join(", ")}), ${plural(column.tokens, "token")}; ` +
    `${column.waiting} waiting, ${plural(column.held, "KV block")} held`);
  const members = element("div", "members");
  const sorted = [...column.cells].sort((a, b) => (a.lane === (cursor && cursor.lane) ? -1 : b.lane === (cursor && cursor.lane) ? 1 : a.lane - b.lane));
  for (const cell of sorted.slice(0, 40)) {
    const isHere = cursor && cursor.lane === cell.lane;
    const what = cell.kind === "prefill" || cell.kind === "again" ? `${cell.kind} ${cell.start}–${cell.start + cell.tokens - 1}` +
      (cell.cached ? `, ${cell.cached} cached` : "") : cell.kind === "idle" ? "ended" : cell.kind;
    members.append(element("span", `member ${cell.kind}${isHere ? " here" : ""}`, `#${cell.id}${cell.tenant ? " " + cell.tenant.slice(0, 24) : ""} ${what}`));
  }
  out.replaceChildren(line, members);
}

function at(event) {
  const box = $("timeline").getBoundingClientRect();
  const column = layout && layout.column(event.clientX - box.left);
  return column ? { number: column.number, lane: layout.lane(event.clientY - box.top) } : null;
}
$("timeline").addEventListener("pointermove", (event) => { if (event.pointerType === "mouse") { view.hover = at(event); dirty = true; } });
$("timeline").addEventListener("pointerleave", () => { view.hover = null; dirty = true; });
$("timeline").addEventListener("click", (event) => {
  const found = at(event);
  const isSame = view.cursor && found && found.number === view.cursor.number && found.lane === view.cursor.lane;
  if (!found || isSame) return release();
  hold();
  view.cursor = found;
  dirty = true;
});
$("timeline").addEventListener("keydown", (event) => {
  if (event.key === "Escape") return release();
  if (!layout || !layout.shown.length || !["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End", " "].includes(event.key)) return;
  event.preventDefault();
  if (event.key === " ") return toggle();
  hold();
  const all = columns(), shown = layout.shown;
  let index = view.cursor ? all.findIndex((column) => column.number === view.cursor.number) : all.length - 1;
  let lane = view.cursor ? view.cursor.lane : null;
  if (view.cursor) {
    if (event.key === "ArrowLeft") index = Math.max(all.indexOf(shown[0]), index - 1);
    if (event.key === "ArrowRight") index = Math.min(all.length - 1, index + 1);
  }
  if (event.key === "Home") index = all.indexOf(shown[0]);
  if (event.key === "End") index = all.length - 1;
  if (event.key === "ArrowDown") lane = lane === null ? 0 : Math.min(layout.lanes - 1, lane + 1);
  if (event.key === "ArrowUp") lane = lane === null || lane === 0 ? null : lane - 1;
  if (index >= 0) view.cursor = { number: all[index].number, lane };
  dirty = true;
});
function hold() {
  if (view.paused !== null) return;
  const all = columns(), last = all[all.length - 1];
  if (!last) return;
  view.paused = { number: last.number, at: view.byTime ? state.now : last.at };
  $("pause").setAttribute("aria-pressed", "true");
}
function release() {
  view.paused = view.cursor = null;
  $("pause").setAttribute("aria-pressed", "false");
  dirty = true;
}
function toggle() { if (view.paused === null) { hold(); dirty = true; } else release(); }
$("pause").addEventListener("click", toggle);
$("by-time").addEventListener("click", () => {
  view.byTime = !view.byTime;
  $("by-time").setAttribute("aria-pressed", String(view.byTime));
  dirty = true;
});
function zoom(factor) {
  view.width = Math.min(40, Math.max(1, Math.round(view.width * factor + (factor > 1 ? 0.5 : -0.5))));
  view.span = Math.min(120, Math.max(0.25, view.span / factor));
  dirty = true;
}
$("wider").addEventListener("click", () => zoom(1.4));
$("narrower").addEventListener("click", () => zoom(1 / 1.4));
$("engine-of").addEventListener("change", (event) => { view.engine = Number(event.target.value); view.cursor = null; dirty = true; });

// -- the cards ----------------------------------------------------------------------------------------------------

function bar(name, note, share, kind) {
  const made = element("div", "bar"), line = element("div", "name"), track = element("div", "track");
  line.append(element("span", "", name), element("span", "", note));
  for (const [part, of] of Array.isArray(share) ? share : [[share, kind]]) {
    const fill = element("i", "k-" + of);
    fill.style.width = 100 * Math.min(1, part) + "%";
    track.append(fill);
  }
  made.append(line, track);
  return made;
}

function queue() {
  const tenants = new Map();
  let waiting = 0;
  for (const request of state.requests.values()) {
    const of = tenants.get(request.tenant) || { waiting: 0, running: 0 };
    const waits = request.state === "queued" || request.state === "preempted";
    waiting += waits;
    of[waits ? "waiting" : "running"]++;
    tenants.set(request.tenant, of);
  }
  const last = state.engines.get(view.engine);
  const reason = last && last.why && state.hello ? WHY[last.why](state.hello) : null;
  set("why", !waiting ? "Nobody waits." : reason ? `The first in the queue waits because ${reason}.` : "They wait for the next iteration.");
  const most = Math.max(1, ...[...tenants.values()].map((of) => of.waiting + of.running));
  const rows = [...tenants].sort((a, b) => b[1].waiting + b[1].running - a[1].waiting - a[1].running).slice(0, 8)
    .map(([name, of]) => bar(name || "no tenant", `${of.waiting} waiting, ${of.running} running`, [[of.running / most, "decode"], [of.waiting / most, "queued"]]));
  $("tenants").replaceChildren(...rows);
}

function quantiles(values) {
  if (!values.length) return "";
  const sorted = values.map((one) => one[1]).sort((a, b) => a - b);
  const of = (share) => draw.seconds(sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))]);
  return `median ${of(0.5)}, 95 % ${of(0.95)}`;
}

const rowsOf = new Map();
function row(request, isGone) {
  const key = (isGone ? "gone " : "") + request.id;
  let made = rowsOf.get(key);
  if (!made) {
    made = element("tr", isGone ? "gone" : "");
    for (const name of ["id", "tenant", "state", "n", "n", "n", "n", "n", "n", ""]) made.append(element("td", name));
    const [id, tenant, phase, , , , , , , last] = made.children;
    id.append(element("span", "", "#" + request.id), element("span", "said", ""));
    tenant.textContent = request.tenant || "–";
    phase.append(element("i", "dot"), element("span"));
    if (!isGone) {
      const button = element("button", "", "cancel");
      button.setAttribute("aria-label", "Cancel request " + request.id);
      button.addEventListener("click", () => cancel(request.id, button));
      last.append(button);
    }
    rowsOf.set(key, made);
  }
  const cells = made.children, words = isGone ? ENDS[request.state] || request.state : request.state;
  cells[0].title = request.name;
  set(cells[0].lastChild, asked(request.name));
  cells[2].firstChild.className = "dot k-" + (isGone ? "free" : request.state);
  set(cells[2].lastChild, words);
  set(cells[3], String(request.prompt));
  set(cells[4], request.cached ? String(request.cached) : "–");
  set(cells[5], isGone ? String(request.generated) : `${request.generated} of ${request.max}`);
  set(cells[6], request.blocks.length ? String(request.blocks.length) : "–");
  const until = request.began ?? (isGone ? request.at : state.now);
  set(cells[7], request.arrived === null ? "–" : draw.seconds(Math.max(0, until - request.arrived)));
  set(cells[8], request.first === null || request.arrived === null ? "–" : draw.seconds(request.first - request.arrived));
  return made;
}

function table() {
  const live = [...state.requests.values()];
  const first = live.slice(0, 60), rows = [...first.map((one) => row(one, false)), ...state.gone.slice(0, 15).map((one) => row(one, true))];
  const body = $("rows");
  rows.forEach((made, i) => { if (body.children[i] !== made) body.insertBefore(made, body.children[i] || null); });
  while (body.children.length > rows.length) body.lastChild.remove();
  const kept = new Set(rows);
  for (const [key, made] of rowsOf) if (!kept.has(made)) rowsOf.delete(key);
  set("table-note", live.length > 60 ? `the first 60 of ${live.length}` : live.length ? `${live.length} here` : "nobody is here");
}

async function cancel(id, button) {
  button.disabled = true;
  const response = await fetch("/page/cancel", { method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify({ id }) });
  if (!response.ok) { say(await trouble(response)); button.disabled = false; }
}

function bytes(count) {
  for (const [size, name] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) if (Math.abs(count) >= size) return (count / size).toFixed(1) + " " + name;
  return count + " B";
}

function about() {
  const hello = state.hello;
  set("model", hello.model);
  set("policy", hello.policy);
  $("policy").hidden = false;
  document.title = `${hello.model} – OrcaServe`;
  const facts = [["model", hello.model], ["architecture", hello.architecture || "loading"], ["numbers", hello.dtype], ["policy", hello.policy],
    ["iteration", `at most ${hello.max_batch_size} requests, ${hello.max_batch_tokens} tokens`], ["context", `${hello.max_model_len} tokens`],
    ["KV cache", `${hello.num_blocks} blocks of ${hello.block_size} tokens` + (hello.swap ? `, ${hello.swap} more in swap space` : "")],
    ["engines", String(hello.replicas)], ["threads", String(hello.threads)],
    ["numerics profile", hello.profile + (hello.deterministic ? " (bit-exact whatever the load)" : "")], ["version", hello.version]];
  $("about").replaceChildren(...facts.flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value || "–")]));
  const most = Math.max(1, ...hello.budget.map((line) => line.num_bytes));
  $("budget").replaceChildren(...hello.budget.map((line) => bar(line.name + (line.note ? ` (${line.note})` : ""), bytes(line.num_bytes), line.num_bytes / most, "decode")));
  const options = hello.options.map((one) => {
    const made = element("tr");
    made.append(element("td", "", one.name), element("td", "", one.value), element("td", "", one.default));
    made.lastChild.className = "n";
    return made;
  });
  if (!options.length) options.push(element("tr"));
  if (!hello.options.length) { const cell = element("td", "", "None: everything is at its default."); cell.colSpan = 3; options[0].append(cell); }
  $("options").replaceChildren(...options);
  const select = $("engine-of");
  select.hidden = hello.replicas < 2;
  if (select.options.length !== hello.replicas) {
    select.replaceChildren(...Array.from({ length: hello.replicas }, (_, i) => { const made = element("option", "", `engine ${i}`); made.value = String(i); return made; }));
  }
  $("compare").textContent = `Compare with ${other() === "static" ? "static" : "continuous"} batching`;
}

function figures() {
  const now = state.figures;
  set("f-running", String(now.running));
  set("f-waiting", String(now.waiting));
  set("f-kv", now.total ? `${(100 * now.held / now.total).toFixed(now.held && now.held < now.total / 10 ? 1 : 0)} %` : "–");
  set("f-tokens", now.tokens.toFixed(now.tokens && now.tokens < 10 ? 1 : 0));
  set("f-iterations", now.iterations.toFixed(now.iterations && now.iterations < 10 ? 1 : 0));
}

// What need not be drawn with every message: each part twice a second, one at a time, so that none holds up a frame.
const parts = [
  queue,
  () => {
    const each = draw.blocks($("blocks"), state.owners, colour);
    const now = state.figures;
    set("kv-note", now.total ? `${now.held} of ${now.total} blocks` + (each > 1 ? `, ${each} to a square` : "") : "");
  },
  () => {
    draw.rates($("rate"), state.rate, state.now, colour);
    const last = state.rate[state.rate.length - 2];
    set("rate-note", last && state.now - last[0] < 4 ? `${last[1]} generated, ${last[2]} read` : "");
  },
  () => { draw.heat($("ttft"), state.ttft, state.now, 0.001, 5, colour); set("ttft-note", quantiles(state.ttft)); },
  () => { draw.heat($("itl"), state.itl, state.now, 0.001, 4, colour); set("itl-note", quantiles(state.itl)); },
  table,
];
let nextPart = 0;

function drawPart() {
  if (document.hidden || !state.hello) return;
  if (nextPart === 0) figures();
  if (!$("live").hidden) parts[nextPart]();
  nextPart = (nextPart + 1) % parts.length;
}

function slow() { for (const _ of parts) drawPart(); }

// -- the comparison -----------------------------------------------------------------------------------------------

function other() { return state.hello && state.hello.policy.split(",")[0] === "static" ? "default" : "static"; }

$("compare").addEventListener("click", async () => {
  if (compared) {
    compared = null;
    $("panels").hidden = true;
    $("compare").setAttribute("aria-pressed", "false");
    return set("compare-note", "Replays what was recorded through the engine's own scheduler, on a virtual clock.");
  }
  $("compare").disabled = true;
  set("compare-note", "Simulating…");
  try {
    const response = await fetch("/page/compare?policy=" + other(), { headers: headers() });
    if (!response.ok) throw new Error(await trouble(response));
    const found = await response.json();
    compared = { recorded: panel(found.recorded), simulated: panel(found.simulated), until: Math.max(found.recorded.seconds, found.simulated.seconds) };
    const told = (run) => `${run.policy}: all done after ${draw.seconds(run.seconds)}, mean latency ${draw.seconds(run.mean_latency)}, first token after ${draw.seconds(run.mean_first)}`;
    set("recorded-title", told(found.recorded));
    set("simulated-title", told(found.simulated));
    set("compare-note", `${found.recorded.requests.length} requests. The lower panel is a simulation: the engine's own scheduler, with a cost fitted to ` +
      `${found.fitted} recorded iterations (off by ${(100 * found.error).toFixed(0)} % at the median). Of the policy in force it says ${draw.seconds(found.check)}; ${draw.seconds(found.recorded.seconds)} were recorded.`);
    $("panels").hidden = false;
    $("compare").setAttribute("aria-pressed", "true");
    drawPanels();
  } catch (error) { set("compare-note", error.message); }
  $("compare").disabled = false;
});

function drawPanels() {
  if (!compared) return;
  const count = (list) => Math.max(1, ...list.flatMap((column) => column.cells.map((cell) => cell.lane + 1)));
  for (const id of ["recorded", "simulated"]) {
    const list = compared[id], lanes = count(list), canvas = $(id);
    canvas.style.height = Math.min(320, 24 + Math.max(40, 11 * lanes)) + "px";
    draw.timeline(canvas, list, { byTime: true, until: compared.until * 1.01, span: compared.until * 1.01, labels: false, strip: false, lanes, cursor: null }, colour);
  }
}

// -- the rest -----------------------------------------------------------------------------------------------------

$("trace").addEventListener("click", async (event) => {
  event.preventDefault();
  const response = await fetch("/trace", { headers: headers() });
  if (!response.ok) return say(await trouble(response));
  const link = element("a");
  link.href = URL.createObjectURL(await response.blob());
  link.download = "orcaserve-trace.json";
  link.click();
  URL.revokeObjectURL(link.href);
  say("Open it at ui.perfetto.dev or chrome://tracing.");
});

function askForKey(status) {
  const dialog = $("ask-key");
  const wrong = status === 403 ? "The page is for the server's operator, whose key this is not." : "The server does not know this key. Try another one.";
  set("key-note", sessionStorage.getItem("orcaserve-key") ? wrong : "This server wants one. It stays in this tab.");
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    $("key-form").onsubmit = () => { keep($("key").value.trim()); $("key").value = ""; resolve(); };
  });
}
$("ask-key").addEventListener("cancel", (event) => event.preventDefault());

function frame() {
  if (dirty && !document.hidden && !$("live").hidden) {
    dirty = false;
    drawTimeline();
  }
  requestAnimationFrame(frame);
}

function link(kind, words) {
  $("link").className = "chip link " + kind;
  set("link", words);
}

playground(state, say);
for (const change of ["(prefers-color-scheme: dark)", "(min-resolution: 2dppx)"]) {
  matchMedia(change).addEventListener("change", () => { colour = draw.colours(); dirty = true; drawPanels(); slow(); });
}
new ResizeObserver(() => { dirty = true; drawPanels(); slow(); }).observe(document.querySelector("main"));
document.addEventListener("visibilitychange", () => { dirty = true; slow(); });
setInterval(() => { if (view.byTime && view.paused === null && state.requests.size) dirty = true; }, 100);
setInterval(drawPart, 500 / parts.length);
requestAnimationFrame(frame);
follow(state, {
  link,
  key: askForKey,
  message: (message) => {
    state.take(message);
    if (message.hello) { about(); slow(); }
    link(state.hello && state.hello.state === "ready" ? "live" : "", state.hello ? (state.hello.state === "ready" ? "live" : state.hello.state) : "");
    if (message.events.length || message.hello) dirty = true;
  },
});
