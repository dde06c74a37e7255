// `State`: what the feed has told, folded to requests, lanes, columns and numbers. Nothing here touches the page.

const MOST_COLUMNS = 1500;
const MOST_LANES = 96; // what waits behind them is counted, not drawn
const MOST_GONE = 40;
const SECONDS = 60; // that charts look back

export const KINDS = {
  queued: "queued", prefill: "prefill", cached: "from the prefix cache", decode: "decode",
  preempted: "preempted", again: "computed again", idle: "ended, but computed on",
};

export class State {
  constructor() {
    this.life = "";
    this.next = 0;
    this.hello = null;
    this.reset();
  }

  reset() {
    this.requests = new Map(); // id → request; those that are here
    this.gone = []; // the latest that ended, the newest first
    this.columns = []; // iterations
    this.numColumns = 0; // all that there were
    this.lanes = []; // lane → null, or the request that has it
    this.freed = []; // lane → column at which it became free
    this.clock = { now: 0, at: performance.now() };
    this.rate = []; // [second, generated, read]
    this.ttft = []; // [at, seconds]
    this.itl = []; // [at, seconds]
    this.owners = new Uint16Array(0);
    this.engines = new Map(); // engine → its last iteration
  }

  // The timeline's clock, now.
  get now() { return this.clock.now + (performance.now() - this.clock.at) / 1000; }

  take(message) {
    const hello = message.hello;
    if (hello && (hello.life !== this.life || message.begin !== this.next)) this.reset();
    if (hello) {
      this.life = hello.life;
      this.hello = hello;
      if (this.owners.length !== hello.num_blocks) this.owners = new Uint16Array(hello.num_blocks);
    }
    for (const event of message.events) this[event.type](event);
    if (message.present) this.know(message.present);
    this.next = message.next;
    this.clock = { now: message.now, at: performance.now() };
    this.forget();
  }

  // Who is here, as the server knows it; better than what the last events tell.
  know(present) {
    const here = new Set(present.map((one) => one.id));
    for (const [id, request] of this.requests) if (!here.has(id)) this.leave(request);
    this.owners.fill(0);
    for (const one of present) {
      const request = this.request(one.id);
      Object.assign(request, {
        arrived: one.arrived, prompt: one.prompt, max: one.max_tokens, name: one.name || "", tenant: one.tenant || "",
        engine: one.engine || 0, reached: one.reached || 0, generated: one.generated || 0, cached: one.cached || 0,
        began: one.began ?? null, first: one.first ?? null, blocks: one.blocks || [],
      });
      request.state = request.began === null ? "queued" : !one.has_kv ? "preempted" : request.generated ? "decode" : "prefill";
      for (const block of request.blocks) this.hold(request, block, 1);
    }
  }

  request(id) {
    let request = this.requests.get(id);
    if (!request) {
      request = {
        id, arrived: null, prompt: 0, max: 0, name: "", tenant: "", engine: 0, reached: 0, generated: 0, cached: 0,
        began: null, first: null, lastToken: null, blocks: [], state: "queued", lane: this.lane(), cell: null,
      };
      if (request.lane < MOST_LANES) this.lanes[request.lane] = request;
      this.requests.set(id, request);
    }
    return request;
  }

  lane() {
    for (let lane = 0; lane < MOST_LANES; lane++) {
      if (!this.lanes[lane] && this.numColumns >= (this.freed[lane] ?? 0)) return lane;
    }
    return MOST_LANES;
  }

  hold(request, block, change) {
    const place = block + request.engine * Math.floor(this.owners.length / (this.hello?.replicas || 1));
    if (place < this.owners.length) this.owners[place] = Math.max(0, this.owners[place] + change);
  }

  release(request) {
    for (const block of request.blocks) this.hold(request, block, -1);
    request.blocks = [];
  }

  leave(request) {
    this.release(request);
    this.requests.delete(request.id);
    if (this.lanes[request.lane] === request) {
      this.lanes[request.lane] = null;
      this.freed[request.lane] = this.numColumns + 2; // a gap, so that two do not look like one
    }
  }

  arrived(event) {
    const request = this.request(event.id);
    Object.assign(request, {
      arrived: event.at, prompt: event.prompt, max: event.max_tokens, name: event.name || "", tenant: event.tenant || "",
    });
  }

  ended(event) {
    const request = this.requests.get(event.id) || {};
    if (request.cell) request.cell.end = event.how;
    if (request.id !== undefined) this.leave(request);
    this.gone.unshift({
      id: event.id, state: event.how, arrived: event.arrived, at: event.at, prompt: event.prompt, began: event.began ?? null,
      generated: event.generated || 0, cached: event.cached || 0, first: event.first ?? null, name: event.name || "",
      tenant: event.tenant || "", blocks: [],
    });
    this.gone.length = Math.min(this.gone.length, MOST_GONE);
  }

  iterated(event) {
    const engine = event.engine || 0;
    const column = {
      number: this.numColumns++, at: event.at, seconds: event.seconds, engine, tokens: event.tokens, generated: event.generated || 0,
      running: event.running || 0, waiting: event.waiting || 0, held: event.held || 0, why: event.why || null, cells: [], rows: 0, read: 0,
    };
    for (const id of event.preempted || []) {
      const request = this.request(id);
      this.release(request);
      request.state = "preempted";
    }
    const spared = new Map(event.cached || []);
    for (const [kind, chunks] of [["prefill", event.prefill || []], ["again", event.again || []]]) {
      for (const [id, start, count] of chunks) {
        const request = this.runs(id, kind, event, engine);
        if (kind === "again" && start + count > request.reached) request.generated += 1; // it has caught up, and goes on
        request.reached = Math.max(request.reached, start + count);
        const cell = this.cell(column, request, kind, count);
        cell.start = start;
        if (spared.has(id)) { cell.cached = spared.get(id); request.cached = cell.cached; }
        column.read += count;
      }
    }
    for (const id of event.decode || []) {
      const request = this.runs(id, "decode", event, engine);
      if (request.lastToken !== null) this.itl.push([event.at, event.at - request.lastToken]);
      request.lastToken = event.at;
      request.generated += 1;
      request.reached += 1;
      this.cell(column, request, "decode", 1);
    }
    for (const id of event.idle || []) this.cell(column, this.runs(id, "idle", event, engine), "idle", 1);
    for (const id of event.first || []) {
      const request = this.request(id);
      if (request.generated === 0) request.generated = 1;
      request.first = event.at;
      if (request.lastToken === null) request.lastToken = event.at;
      if (request.arrived !== null) this.ttft.push([event.at, event.at - request.arrived]);
    }
    column.rows = column.cells.length;
    for (const [id, blocks] of event.blocks || []) {
      const request = this.request(id);
      for (const block of blocks) { request.blocks.push(block); this.hold(request, block, 1); }
    }
    for (const request of this.lanes) {
      if (request && (request.state === "queued" || request.state === "preempted")) this.cell(column, request, request.state, 0);
    }
    this.columns.push(column);
    this.engines.set(engine, column);
    const second = Math.floor(event.at);
    let last = this.rate[this.rate.length - 1];
    if (!last || last[0] !== second) this.rate.push((last = [second, 0, 0, 0]));
    last[1] += column.generated;
    last[2] += column.read;
    last[3] += 1;
  }

  runs(id, state, event, engine) {
    const request = this.request(id);
    request.state = state;
    request.engine = engine;
    if (request.began === null) request.began = event.at;
    return request;
  }

  cell(column, request, kind, tokens) {
    const cell = { lane: request.lane, kind, id: request.id, tenant: request.tenant, tokens, start: request.reached - tokens, cached: 0, end: null };
    column.cells.push(cell);
    if (tokens) request.cell = cell;
    return cell;
  }

  forget() {
    if (this.columns.length > MOST_COLUMNS + 200) this.columns.splice(0, this.columns.length - MOST_COLUMNS);
    const since = this.clock.now - SECONDS - 2;
    for (const list of [this.rate, this.ttft, this.itl]) {
      let old = 0;
      while (old < list.length && list[old][0] < since) old++;
      if (old) list.splice(0, old);
    }
  }

  // Sums over the engines' last iterations; nobody runs in an engine that nobody is in.
  get figures() {
    let running = 0, waiting = 0;
    for (const request of this.requests.values()) {
      if (request.state === "queued" || request.state === "preempted") waiting++; else running++;
    }
    let held = 0;
    for (const owners of this.owners) if (owners) held++;
    const since = this.now - 3;
    let generated = 0, iterations = 0;
    for (let i = this.columns.length - 1; i >= 0 && this.columns[i].at > since; i--) {
      generated += this.columns[i].generated;
      iterations++;
    }
    return { running, waiting, held, total: this.owners.length, tokens: generated / 3, iterations: iterations / 3 };
  }
}

// Columns of a run that was compared, in lanes that are rows of the batch: taken at the first iteration, free at the end.
export function panel(run) {
  const lanes = [], last = new Map(), columns = [], where = new Map();
  run.iterations.forEach((event, number) => {
    for (const id of [...(event.decode || []), ...(event.idle || []), ...[...(event.prefill || []), ...(event.again || [])].map((c) => c[0])]) last.set(id, number);
  });
  run.iterations.forEach((event, number) => {
    const column = { number, at: event.at, seconds: event.seconds, tokens: event.tokens, cells: [], engine: 0 };
    const add = (id, kind, tokens) => {
      if (!where.has(id)) {
        let lane = 0;
        while (lanes[lane] !== undefined && lanes[lane] >= number) lane++;
        where.set(id, lane);
        lanes[lane] = last.get(id);
      }
      column.cells.push({ lane: where.get(id), kind, id, tokens, cached: 0, end: last.get(id) === number ? "stop" : null });
    };
    for (const id of event.decode || []) add(id, "decode", 1);
    for (const id of event.idle || []) add(id, "idle", 1);
    for (const [id, , count] of event.prefill || []) add(id, "prefill", count);
    for (const [id, , count] of event.again || []) add(id, "again", count);
    columns.push(column);
  });
  return columns;
}
