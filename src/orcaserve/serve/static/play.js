// The playground: a chat, and a crowd of requests. What is asked here is the only text that the page ever has.

import { events, headers, trouble } from "./feed.js";
import { seconds } from "./draw.js";

// A browser has six connections to a server, one of which is the feed's: a crowd comes as lists of prompts.
const GROUPS = [[40, false], [150, false], [90, true], [200, false]]; // at most so many tokens; whether exactly so many
const EACH = 5;
const QUESTIONS = [
  "Tell me a story about a fox and a lake.", "What is a whale?", "Tell me a story about a lighthouse.", "What does an owl eat?",
  "Tell me a long story about two friends in a forest.", "Hello! How are you?", "Where does a bear live?",
  "Tell me a story about a lost kitten.", "What is a river?", "Tell me a story about a brave mouse.",
];
const said = new Map(); // request id → what was asked, to be shown beside it

const $ = (id) => document.getElementById(id);

// What was asked under this name of the feed ("chatcmpl-play-…"), if it was asked here.
export function asked(name) { return said.get(name.replace(/^(chat)?cmpl-/, "")) || ""; }

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

// A name for a request, by which its question is found again.
function name(question) {
  const id = "play-" + Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  said.set(id, question.length > 60 ? question.slice(0, 60) + "…" : question);
  if (said.size > 400) said.delete(said.keys().next().value);
  return id;
}

// Streams one answer. on(text): each piece. Gives { first, seconds, tokens }; throws an Error with words for the user.
async function answer(hello, messages, options, signal, on) {
  const question = messages[messages.length - 1].content, id = name(question);
  const began = performance.now();
  const asked = hello.has_chat ? { messages } : { prompt: question };
  const response = await fetch(hello.has_chat ? "/v1/chat/completions" : "/v1/completions", {
    method: "POST", signal, headers: headers({ "Content-Type": "application/json", "X-Request-Id": id }),
    body: JSON.stringify({ ...asked, ...options, stream: true, stream_options: { include_usage: true } }),
  });
  if (!response.ok) throw new Error(await trouble(response));
  let first = null, tokens = 0;
  for await (const chunk of events(response)) {
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.usage) tokens = chunk.usage.completion_tokens;
    const choice = chunk.choices[0];
    const text = choice ? (hello.has_chat ? choice.delta.content : choice.text) || "" : "";
    if (text) {
      if (first === null) first = (performance.now() - began) / 1000;
      on(text);
    }
  }
  return { first, seconds: (performance.now() - began) / 1000, tokens };
}

export function playground(state, say) {
  const log = $("log"), prompt = $("prompt");
  let conversation = [], running = null;

  function options() {
    const wish = { max_tokens: Math.max(1, Number($("max-tokens").value) || 200) };
    const temperature = Number($("temperature").value);
    if ($("temperature").value !== "" && temperature >= 0) wish.temperature = temperature;
    return wish;
  }

  $("ask").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return running.abort();
    const question = prompt.value.trim() || prompt.placeholder;
    if (!state.hello) return say("The server is not there yet.");
    prompt.value = "";
    const mine = conversation; // who clears the log meanwhile begins another one, in which this answer has no place
    mine.push({ role: "user", content: question });
    log.append(element("p", "user", question));
    const bubble = element("p", "assistant", ""), note = element("small", "", "…");
    log.append(bubble, note);
    log.scrollTop = log.scrollHeight;
    running = new AbortController();
    $("send").textContent = "Stop";
    let text = "";
    try {
      const end = await answer(state.hello, mine, options(), running.signal, (piece) => {
        const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
        text += piece;
        bubble.textContent = text;
        if (follows) log.scrollTop = log.scrollHeight;
      });
      note.textContent = `${end.tokens} tokens in ${seconds(end.seconds)}, the first after ${seconds(end.first)}`;
    } catch (error) {
      note.textContent = error.name === "AbortError" ? "stopped" : error.message;
      if (error.name !== "AbortError") note.className = "error";
    }
    if (text) mine.push({ role: "assistant", content: text }); else mine.pop();
    running = null;
    $("send").textContent = "Send";
    log.scrollTop = log.scrollHeight;
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("ask").requestSubmit();
    }
  });
  $("clear").addEventListener("click", () => {
    if (running) running.abort();
    conversation = [];
    log.replaceChildren();
  });

  let known = null; // the questions as prompts

  async function prompts() {
    if (!state.hello.has_chat) return QUESTIONS;
    return Promise.all(QUESTIONS.map(async (content) => {
      const response = await fetch("/tokenize", {
        method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify({ messages: [{ role: "user", content }] }),
      });
      if (!response.ok) throw new Error(await trouble(response));
      return (await response.json()).tokens;
    }));
  }

  async function group(number, tiles) {
    const [most, exactly] = GROUPS[number], began = performance.now(), texts = tiles.map(() => ""), id = name("a crowd");
    await new Promise((resolve) => setTimeout(resolve, 150 * number));
    try {
      const response = await fetch("/v1/completions", {
        method: "POST", headers: headers({ "Content-Type": "application/json", "X-Request-Id": id }),
        body: JSON.stringify({
          prompt: tiles.map((_, i) => known[(number * EACH + i) % known.length]), max_tokens: most, ignore_eos: exactly, temperature: 0.8, stream: true,
        }),
      });
      if (!response.ok) throw new Error(await trouble(response));
      for await (const chunk of events(response)) {
        if (chunk.error) throw new Error(chunk.error.message);
        for (const choice of chunk.choices) {
          const tile = tiles[choice.index], [title, body] = tile.children;
          texts[choice.index] += choice.text;
          tile.className = choice.finish_reason ? "tile done" : "tile runs";
          body.textContent = texts[choice.index].slice(-160);
          if (choice.finish_reason) title.textContent = "done after " + seconds((performance.now() - began) / 1000);
        }
      }
    } catch (error) {
      for (const tile of tiles.filter((one) => !one.className.includes("done"))) {
        tile.className = "tile failed";
        tile.lastChild.textContent = error.message;
      }
    }
  }

  async function crowd() {
    if (!state.hello) return say("The server is not there yet.");
    const buttons = [$("crowd"), $("crowd-2")];
    for (const button of buttons) button.disabled = true;
    try {
      known ??= await prompts();
      const tiles = Array.from({ length: EACH * GROUPS.length }, (_, i) => {
        const tile = element("div", "tile");
        tile.append(element("b", "", QUESTIONS[i % QUESTIONS.length]), element("span", "", "waiting"));
        return tile;
      });
      $("tiles").replaceChildren(...tiles);
      await Promise.all(GROUPS.map((_, i) => group(i, tiles.slice(i * EACH, (i + 1) * EACH))));
    } catch (error) { say(error.message); }
    for (const button of buttons) button.disabled = false;
  }
  $("crowd").addEventListener("click", crowd);
  $("crowd-2").addEventListener("click", crowd);
}
