// Everything that is drawn on a canvas. Colours come from the style sheet, so that both schemes have their own.

const LEFT = 46, TOP = 44, BOTTOM = 20, GAP = 8;
const FONT = "11px system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif";

export function colours() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue("--" + name).trim();
  return Object.fromEntries(["card", "ink", "dim", "line", "soft", "accent", "prefill", "decode", "again", "idle", "queued",
    "preempted", "cached", "free", "mark"].map((name) => [name, read(name)]));
}

// A context in CSS pixels, cleared; null while the canvas is not shown.
function begin(canvas) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  if (!width || !height) return null;
  if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
  if (canvas.height !== Math.round(height * ratio)) canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = FONT;
  context.textBaseline = "middle";
  return { context, width, height };
}

export function seconds(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value < 0.0995) return (1000 * value).toFixed(value < 0.00995 ? 1 : 0) + " ms";
  return value < 99.5 ? value.toFixed(value < 9.95 ? 2 : 1) + " s" : Math.round(value) + " s";
}

function step(span, most) {
  for (const size of [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 900]) if (span / size <= most) return size;
  return 3600;
}

function label(value, size) {
  const digits = size >= 1 ? 0 : size >= 0.1 ? 1 : size >= 0.01 ? 2 : 3;
  return value.toFixed(digits) + " s";
}

// columns: those to draw, in order. view: { byTime, width (of a column), until, span (seconds, by time), labels, lanes, strip,
// cursor: { number, lane } or null }. Gives where things are, for pointers and keys.
export function timeline(canvas, columns, view, colour) {
  const area = begin(canvas);
  if (!area) return null;
  const { context, width, height } = area;
  const left = view.labels ? LEFT : 6, top = view.strip ? TOP : 4, room = width - left - 4;
  let shown, place;
  if (view.byTime) {
    const until = view.until, since = until - view.span, scale = room / view.span;
    shown = columns.filter((column) => column.at > since && column.at - column.seconds < until);
    place = (column) => {
      // Whole pixels, or neighbours would blend where they meet.
      const from = Math.max(left, Math.floor(left + (column.at - column.seconds - since) * scale));
      return [from, Math.max(1, Math.floor(left + (column.at - since) * scale) - from)];
    };
  } else {
    const count = Math.floor(room / view.width);
    shown = columns.slice(-count);
    const index = new Map(shown.map((column, i) => [column, i])); // with several engines the numbers of one have gaps
    place = (column) => [left + index.get(column) * view.width, view.width];
  }
  let lanes = view.lanes || 6, most = 1;
  for (const column of shown) {
    for (const cell of column.cells) if (cell.lane >= lanes) lanes = cell.lane + 1;
    if (column.tokens > most) most = column.tokens;
  }
  const floor = height - BOTTOM, tall = Math.min(40, (floor - top) / lanes);
  context.fillStyle = colour.soft;
  for (let lane = 0; lane < lanes; lane += 2) context.fillRect(left, top + lane * tall, room, tall);
  const gap = tall > 6 ? 1.5 : 0.5;
  const names = new Map();
  let noted = -Infinity;
  const apart = shown.length > 1 ? 74 / view.width * (shown[shown.length - 1].at - shown[0].at) / shown.length : 1; // labels, in seconds
  const size = view.byTime ? step(view.span, room / 80) : 0;
  for (const column of shown) {
    const [x, w] = place(column);
    const wide = w > 4 && !view.byTime ? w - 1 : w;
    if (view.strip) {
      let read = 0, made = 0;
      for (const cell of column.cells) if (cell.kind === "prefill" || cell.kind === "again") read += cell.tokens; else made += cell.tokens;
      const scale = (TOP - GAP - 6) / most, y = TOP - GAP;
      context.fillStyle = colour.decode;
      context.fillRect(x, y - made * scale, wide, made * scale);
      context.fillStyle = colour.prefill;
      context.fillRect(x, y - (made + read) * scale, wide, read * scale);
    }
    for (const cell of column.cells) {
      if (cell.lane >= lanes) continue;
      const y = top + cell.lane * tall;
      const isThin = cell.kind === "queued" || cell.kind === "preempted";
      const high = isThin ? Math.max(1.5, tall * 0.34) : tall - gap;
      const from = isThin ? y + (tall - high) / 2 : y + gap / 2;
      context.fillStyle = colour[cell.kind];
      context.fillRect(x, from, isThin ? w : wide, high);
      if (cell.cached) {
        context.fillStyle = colour.cached;
        context.fillRect(x, from, wide, high * cell.cached / (cell.cached + cell.tokens));
      }
      if (cell.end) {
        context.fillStyle = colour.mark;
        context.fillRect(x + wide - Math.min(2, wide / 2), from, Math.min(2, wide / 2), high);
      }
      names.set(cell.lane, cell.id);
    }
    if (!view.byTime && x - noted > 74 && x + 40 < width) {
      noted = x;
      context.fillStyle = colour.dim;
      context.fillText(label(column.at, apart), x, height - BOTTOM / 2 + 1);
    }
  }
  if (view.byTime) {
    context.fillStyle = colour.dim;
    const since = view.until - view.span;
    for (let at = Math.ceil(Math.max(0, since) / size) * size; at <= view.until; at += size) {
      const x = left + (at - since) * room / view.span;
      if (x + 34 < width) context.fillText(label(at, size), x, height - BOTTOM / 2 + 1);
      context.fillRect(x, height - BOTTOM, 1, 3);
    }
  }
  context.fillStyle = colour.dim;
  if (view.labels && tall >= 10) {
    context.textAlign = "right";
    for (const [lane, id] of names) context.fillText("#" + id, left - 6, top + (lane + 0.5) * tall);
    context.textAlign = "left";
  }
  if (view.strip && shown.length) {
    context.textAlign = "right";
    context.fillText(String(most), left - 6, 9);
    context.fillText("tokens", left - 6, TOP - GAP - 6);
    context.textAlign = "left";
  }
  context.fillStyle = colour.line;
  context.fillRect(left, floor, room, 1);
  if (view.cursor) {
    const at = shown.find((column) => column.number === view.cursor.number);
    if (at) {
      const [x, w] = place(at);
      context.strokeStyle = colour.ink;
      context.lineWidth = 1;
      context.strokeRect(Math.round(x) - 0.5, 1.5, Math.max(2, Math.round(w)), floor - 2);
      if (view.cursor.lane !== null && view.cursor.lane < lanes) {
        context.lineWidth = 2;
        context.strokeRect(x - 1, top + view.cursor.lane * tall - 1, Math.max(5, w) + 2, tall + 2);
      }
    }
  }
  return {
    shown, lanes,
    column: (x) => {
      let best = null;
      for (const column of shown) { const [from, w] = place(column); if (x >= from - 1 && x <= from + w + 1) best = column; }
      return best;
    },
    lane: (y) => (y < top || y > floor ? null : Math.min(lanes - 1, Math.floor((y - top) / tall))),
  };
}

// values: [at, seconds]. Logarithmic from `least` up, five steps to a decade, a column for each second.
export function heat(canvas, values, now, least, decades, colour) {
  const area = begin(canvas);
  if (!area) return;
  const { context, width, height } = area;
  const room = width - LEFT - 4, floor = height - BOTTOM, steps = 5 * decades, cellWidth = room / 60, cellHeight = (floor - 4) / steps;
  const counts = new Map();
  let most = 0;
  for (const [at, value] of values) {
    const x = 59 - Math.floor(now - at), y = Math.min(steps - 1, Math.max(0, Math.floor(5 * Math.log10(Math.max(value, 1e-6) / least))));
    if (x < 0 || x > 59) continue;
    const key = x * steps + y, count = (counts.get(key) || 0) + 1;
    counts.set(key, count);
    most = Math.max(most, count);
  }
  context.fillStyle = colour.soft;
  context.fillRect(LEFT, 4, room, floor - 4);
  context.fillStyle = colour.decode;
  for (const [key, count] of counts) {
    context.globalAlpha = 0.25 + 0.75 * Math.sqrt(count / most);
    context.fillRect(LEFT + Math.floor(key / steps) * cellWidth, floor - (key % steps + 1) * cellHeight, cellWidth - 0.5, cellHeight - 0.5);
  }
  context.globalAlpha = 1;
  context.fillStyle = colour.dim;
  context.textAlign = "right";
  for (let decade = 0; decade <= decades; decade++) {
    const value = least * 10 ** decade, y = floor - 5 * decade * cellHeight;
    context.fillText(value >= 1 ? Math.round(value) + " s" : Math.round(1000 * value) + " ms", LEFT - 6, Math.max(9, y));
    context.globalAlpha = 0.25;
    context.fillRect(LEFT, y, room, 1);
    context.globalAlpha = 1;
  }
  context.textAlign = "left";
  lastMinute(context, width, height, room, colour);
}

function lastMinute(context, width, height, room, colour) {
  context.fillStyle = colour.dim;
  context.fillText("1 min ago", LEFT, height - BOTTOM / 2 + 1);
  context.textAlign = "right";
  context.fillText("now", width - 4, height - BOTTOM / 2 + 1);
  context.textAlign = "left";
}

// rate: [second, generated, read].
export function rates(canvas, rate, now, colour) {
  const area = begin(canvas);
  if (!area) return;
  const { context, width, height } = area;
  const room = width - LEFT - 4, floor = height - BOTTOM, w = room / 60;
  const most = nice(Math.max(10, ...rate.map((one) => one[1] + one[2])));
  const scale = (floor - 8) / most;
  context.fillStyle = colour.soft;
  context.fillRect(LEFT, 4, room, floor - 4);
  for (const [second, made, read] of rate) {
    const x = LEFT + (59 - (Math.floor(now) - second)) * w;
    if (x < LEFT) continue;
    context.fillStyle = colour.decode;
    context.fillRect(x, floor - made * scale, w - 0.5, made * scale);
    context.fillStyle = colour.prefill;
    context.fillRect(x, floor - (made + read) * scale, w - 0.5, read * scale);
  }
  context.fillStyle = colour.dim;
  context.textAlign = "right";
  context.fillText(String(most), LEFT - 6, 10);
  context.fillText("0", LEFT - 6, floor - 4);
  context.textAlign = "left";
  lastMinute(context, width, height, room, colour);
}

function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  for (const digit of [1, 2, 5, 10]) if (value <= digit * power) return digit * power;
  return value;
}

// owners: how many requests hold each block. A cell stands for as many blocks as it must.
export function blocks(canvas, owners, colour) {
  const area = begin(canvas);
  if (!area || !owners.length) return 1;
  const { context, width, height } = area;
  const most = Math.floor(width / 5) * Math.floor(height / 5);
  const each = Math.max(1, Math.ceil(owners.length / most)), cells = Math.ceil(owners.length / each);
  const size = Math.min(24, Math.max(4, Math.floor(Math.sqrt(width * height / cells))));
  let columns = Math.floor(width / size), side = size;
  while (Math.ceil(cells / columns) * side > height && side > 3) { side--; columns = Math.floor(width / side); }
  for (let cell = 0; cell < cells; cell++) {
    let held = 0, shared = 0, count = 0;
    for (let i = cell * each; i < Math.min(owners.length, (cell + 1) * each); i++) {
      count++;
      if (owners[i] > 1) shared++; else if (owners[i]) held++;
    }
    const x = (cell % columns) * side, y = Math.floor(cell / columns) * side;
    context.fillStyle = colour.free;
    context.fillRect(x, y, side - 1, side - 1);
    if (held || shared) {
      context.fillStyle = shared > held ? colour.cached : colour.decode;
      context.globalAlpha = 0.35 + 0.65 * (held + shared) / count;
      context.fillRect(x, y, side - 1, side - 1);
      context.globalAlpha = 1;
    }
  }
  return each;
}
