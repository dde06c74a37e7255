// Talking with the server: the key, the feed, streams of answers.

const KEY = "orcaserve-key";

export function headers(more = {}) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...more, Authorization: "Bearer " + key } : more;
}

export function keep(key) { sessionStorage.setItem(KEY, key); }

// The JSON of each event of a stream, until [DONE].
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// What went wrong, in the server's words.
export async function trouble(response) {
  try { return (await response.json()).error.message; } catch { return "The server answers " + response.status + "."; }
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const SILENCE = 15000; // the server says something every 5 s

// For ever. on: message(message), link(state), key(status): resolves when another key has been given.
export async function follow(state, on) {
  let wait = 300;
  for (;;) {
    const control = new AbortController();
    let timer = 0;
    const alive = () => { clearTimeout(timer); timer = setTimeout(() => control.abort(), SILENCE); };
    try {
      alive();
      const known = state.life ? `?life=${encodeURIComponent(state.life)}&after=${state.next}` : "";
      const response = await fetch("/page/events" + known, { headers: headers(), signal: control.signal, cache: "no-store" });
      if (response.status === 401 || response.status === 403) {
        clearTimeout(timer);
        on.link("lost", "locked");
        await on.key(response.status);
        continue;
      }
      if (!response.ok) throw new Error(String(response.status));
      for await (const message of events(response)) {
        alive();
        wait = 300;
        on.message(message);
      }
    } catch (error) {
      // A server that is gone says so by the next attempt; everything else is a mistake of this page.
      if (!(error instanceof TypeError && /fetch|network/i.test(error.message)) && error.name !== "AbortError") console.error(error);
    }
    clearTimeout(timer);
    on.link("lost", "reconnecting");
    await pause(wait);
    wait = Math.min(5000, 2 * wait);
  }
}
