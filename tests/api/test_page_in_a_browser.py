"""The live page in a browser, as somebody meets it who looks, types and clicks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import browser
import httpx
import pytest
from api_world import Server, free_port
from browser import Browser

from orcaserve.builtin import MODEL_DIR
from orcaserve.serve.supervisor import COMMAND

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

IS_LIVE = "document.getElementById('link').innerText === 'live'"
NO_LONGER_CROWDED = "!document.getElementById('crowd').disabled"
# How many pixels of the timeline have a colour: decodes are 47,109,181, prompts 242,165,65.
PIXELS = """(colour) => {
  const canvas = document.getElementById('timeline');
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  let count = 0;
  for (let i = 0; i < data.length; i += 4) if ([data[i], data[i + 1], data[i + 2]].join() === colour) count++;
  return count;
}"""
# Every answer of a model is TEXT from now on; all else is the server's.
ANSWERED_BY = """(() => {
  const real = window.fetch;
  window.fetch = (url, options) => {
    if (!String(url).startsWith('/v1/')) return real(url, options);
    const chunk = { choices: [{ delta: { content: TEXT }, text: TEXT }] };
    return Promise.resolve(new Response('data: ' + JSON.stringify(chunk) + '\\n\\ndata: [DONE]\\n\\n'));
  };
})()"""
# Contrast ratios of WCAG 2.1 (section 1.4.3): 4.5 is wanted of small text.
CONTRASTS = """(() => {
  const style = getComputedStyle(document.documentElement);
  const light = (name) => {
    const hex = style.getPropertyValue('--' + name).trim();
    const of = (i) => {
      const value = parseInt(hex.slice(i, i + 2), 16) / 255;
      return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    };
    return 0.2126 * of(1) + 0.7152 * of(3) + 0.0722 * of(5);
  };
  const ratio = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((m, n) => n - m);
    return (x + 0.05) / (y + 0.05);
  };
  return {
    text: ratio('ink', 'card'), dim: ratio('dim', 'card'), soft: ratio('dim', 'soft'),
    button: ratio('on-accent', 'accent'), good: ratio('good', 'soft'), bad: ratio('bad', 'soft'),
    decode: ratio('decode', 'card') / 1.5, background: light('bg'),
  };
})()"""
EVIL = "<img src=x onerror='window.pwned=1'><script>window.pwned=1</script>"


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[Server]:
    http = {"served_model_names": [f"tiny {EVIL}"]}
    with Server(model_dir, "--step-seconds", "0.01", "--blocks", "200", http=http) as server:
        yield server.ready()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture
def page(chromium: Browser, server: Server) -> Iterator[Browser]:
    chromium.errors.clear()
    chromium.size(1280, 900)
    chromium.scheme("light")
    chromium.open(server.url + "/")
    chromium.until(IS_LIVE)
    yield chromium
    assert not chromium.errors, "scripts fail, or break the content security policy"


def numbers(page: Browser) -> list[int]:
    """The iteration that the line under the timeline tells of, and its rows."""
    words = page.text("readout").split()
    return [int(words[1])]


def test_a_newcomer_sees_continuous_batching(page: Browser) -> None:
    page.click("crowd")
    page.until("document.querySelectorAll('#rows tr:not(.gone)').length > 8")
    page.until(NO_LONGER_CROWDED)
    page.until("document.getElementById('f-running').innerText === '0'")
    for _ in range(8):  # until the whole run is in the picture
        page.click("narrower")
    page.until(f"({PIXELS})('47,109,181') > 2000")
    page.until(f"({PIXELS})('242,165,65') > 50")
    assert page.run("document.querySelectorAll('.tile.done').length") == 20
    assert page.run("document.querySelectorAll('#rows tr.gone .said')[0].innerText").strip(), "what was asked here"
    page.click("compare")
    page.until("!document.getElementById('panels').hidden")
    assert "static: all done after" in page.text("simulated-title")
    assert page.run("document.querySelector('.tag.simulated').innerText") == "simulated"


def test_the_keyboard_walks_through_iterations(page: Browser) -> None:
    page.click("crowd")
    page.until(NO_LONGER_CROWDED)
    page.until("document.getElementById('readout').innerText.startsWith('Iteration')")
    page.run("document.getElementById('timeline').focus()")
    page.key("ArrowLeft")
    page.until("document.getElementById('pause').getAttribute('aria-pressed') === 'true'")
    # The line speaks out once the frame with the chosen iteration is drawn; until then it tells of an older one.
    page.until("document.getElementById('readout').getAttribute('aria-live') === 'polite'")
    [latest] = numbers(page)
    for _ in range(5):
        page.key("ArrowLeft")
    page.until(f"document.getElementById('readout').innerText.startsWith('Iteration {latest - 5} ')")
    page.key("ArrowRight")
    page.until(f"document.getElementById('readout').innerText.startsWith('Iteration {latest - 4} ')")
    page.key("ArrowDown")
    page.key("Home")
    page.until(f"!document.getElementById('readout').innerText.startsWith('Iteration {latest - 4} ')")
    page.key("End")
    page.until(f"document.getElementById('readout').innerText.startsWith('Iteration {latest} ')")
    page.key("Escape")
    page.until("document.getElementById('pause').getAttribute('aria-pressed') === 'false'")


def test_tabs_are_a_keyboard_s_too(page: Browser) -> None:
    page.run("document.getElementById('tab-live').focus()")
    page.key("ArrowRight")
    assert page.run("document.activeElement.id") == "tab-play"
    assert not page.run("document.getElementById('play').hidden")
    page.key("ArrowLeft")
    page.key("ArrowLeft")
    assert page.run("document.activeElement.id") == "tab-engine"
    assert "trigram" in page.text("about")
    page.key("Tab")
    assert page.run("document.activeElement.id") == "crowd", "the tabs are one stop"


def test_texts_of_others_are_only_text(page: Browser, server: Server) -> None:
    with server.client() as client:
        body = {"prompt": "x", "max_tokens": 20, "user": EVIL, "ignore_eos": True}
        client.post("/v1/completions", json=body).raise_for_status()
    page.until("document.getElementById('rows').innerText.includes('onerror')")
    assert EVIL in page.text("model")
    # The model of these tests cannot say this, but another one may: the stream is replaced, nothing else is.
    page.run(ANSWERED_BY.replace("TEXT", json.dumps(EVIL)))
    page.click("tab-play")
    page.run("document.getElementById('prompt').focus()")
    page.call("Input.insertText", text="<b onmouseover=alert(1)>hello</b>")
    page.key("Enter")
    page.until("document.querySelector('#log .assistant')?.innerText.includes('onerror')")
    assert page.run("document.querySelector('#log .user').innerText") == "<b onmouseover=alert(1)>hello</b>"
    assert page.run("document.querySelectorAll('#log b, #log img, main script, main img').length") == 0
    assert page.run("window.pwned") is None


def test_chat_streams(page: Browser) -> None:
    page.click("tab-play")
    page.run("document.getElementById('max-tokens').value = 12")
    page.run("document.getElementById('prompt').focus()")
    page.call("Input.insertText", text="hello")
    page.key("Enter")
    page.until("/^12 tokens in/.test(document.querySelector('#log small')?.innerText)")
    assert page.run("document.querySelector('#log .assistant').innerText.length") > 0


def test_an_answer_is_no_part_of_the_conversation_that_follows(page: Browser) -> None:
    page.run(
        "(() => { const real = fetch; window.sent = []; window.fetch = (url, options) => {"
        " if (String(url).startsWith('/v1/')) sent.push(JSON.parse(options.body)); return real(url, options); }; })()"
    )
    page.click("tab-play")
    page.run("document.getElementById('max-tokens').value = 300")
    page.click("send")
    page.until("document.querySelector('#log .assistant')?.innerText.length > 0")
    page.click("clear")
    page.until("document.getElementById('send').innerText === 'Send'")
    page.run("document.getElementById('max-tokens').value = 5")
    page.click("send")
    page.until("/^5 tokens in/.test(document.querySelector('#log small')?.innerText)")
    assert [len(one["messages"]) for one in page.run("sent")] == [1, 1]


def test_a_request_is_cancelled_in_the_table(page: Browser) -> None:
    """An answer may end by itself before it is cancelled; then the next one is."""
    for attempt in range(10):
        try:
            page.click("tab-play")
            page.run("document.getElementById('max-tokens').value = 300")
            page.click("send")
            page.click("tab-live")
            page.until("document.querySelector('#rows tr:not(.gone) button')", 2)
            page.run("document.querySelector('#rows tr:not(.gone) button').click()")
            page.until("document.querySelector('#rows tr.gone')?.innerText.includes('left')", 3)
            page.until("document.querySelector('#log').innerText.includes('cancelled')", 3)
        except AssertionError:
            if attempt == 9:
                raise
        else:
            return


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_can_be_read(page: Browser, scheme: str) -> None:
    page.scheme(scheme)
    ratios = page.run(CONTRASTS)
    assert (ratios.pop("background") > 0.5) == (scheme == "light")
    decode = ratios.pop("decode")
    assert min(ratios.values()) >= 4.5, ratios
    assert decode >= 2


def test_it_fits_a_phone(page: Browser) -> None:
    page.size(360, 740, mobile=True, scale=2)
    page.click("crowd")
    for tab in ("tab-live", "tab-play", "tab-engine"):
        page.click(tab)
        time.sleep(0.1)
        assert page.run("document.documentElement.scrollWidth") <= 360, tab
        outside = page.run(
            "[...document.querySelectorAll('button, select, input, h2, canvas, textarea')].filter((one) => {"
            " const box = one.getBoundingClientRect(); return box.width && (box.left < 0 || box.right > 360) &&"
            " !one.closest('.scroll'); }).map((one) => one.id || one.innerText)"
        )
        assert outside == [], tab
    page.until(NO_LONGER_CROWDED)


def test_it_comes_back_when_the_server_does(chromium: Browser, model_dir: Path) -> None:
    port = free_port()
    with Server(model_dir, http={"port": port}).ready() as server:
        chromium.open(server.url + "/")
        chromium.until(IS_LIVE)
        with server.client() as client:
            client.post("/v1/completions", json={"prompt": "x", "max_tokens": 5}).raise_for_status()
        chromium.until("document.querySelectorAll('#rows tr.gone').length === 1")
        server.stop()
        chromium.until("document.getElementById('link').innerText === 'reconnecting'")
    with Server(model_dir, http={"port": port}).ready():
        chromium.until(IS_LIVE)
        chromium.until("document.querySelectorAll('#rows tr.gone').length === 0")


def test_it_asks_for_the_key(chromium: Browser, model_dir: Path) -> None:
    with Server(model_dir, http={"api_keys": ["a=theirs", "ops=right"], "operator": "ops"}).ready() as server:
        chromium.open(server.url + "/")
        chromium.until("document.getElementById('ask-key').open")
        for key, asked in (("wrong", "wants one"), ("theirs", "does not know"), ("right", "operator")):
            chromium.until("document.getElementById('ask-key').open")
            chromium.until(f"document.getElementById('key-note').innerText.includes('{asked}')")
            chromium.run("document.getElementById('key').focus()")
            chromium.call("Input.insertText", text=key)
            chromium.key("Enter")
            chromium.until("document.getElementById('key').value === ''")
        chromium.until(IS_LIVE)
        assert "right" not in chromium.run("location.href + document.cookie + JSON.stringify(localStorage)")
        assert chromium.run("Object.values(sessionStorage)") == ["right"]
        chromium.open(server.url + "/")
        chromium.until(IS_LIVE)
        assert not chromium.run("document.getElementById('ask-key').open")
        chromium.run("sessionStorage.clear()")


@pytest.mark.slow
def test_the_built_in_model_answers(chromium: Browser) -> None:
    with Server(MODEL_DIR, command=COMMAND).ready() as server:
        chromium.open(server.url + "/")
        chromium.until(IS_LIVE)
        chromium.click("tab-play")
        chromium.run("document.getElementById('temperature').value = 0")
        chromium.run("document.getElementById('prompt').focus()")
        chromium.call("Input.insertText", text="What is a whale?")
        chromium.key("Enter")
        chromium.until("document.querySelector('#log small')?.innerText.includes('tokens in')")
        assert "animal" in chromium.run("document.querySelector('#log .assistant').innerText")
        assert httpx.get(server.url + "/trace").json()["traceEvents"]
