"""How far the live page is behind: from the end of an iteration to the frame in which Chromium has drawn it.

    python tools/page_behind.py --seconds 30

The built-in model generates for `--running` requests all the time, on one thread, while a headless Chromium has the
page open. Of every message of the feed the oldest iteration counts, up to the end of the next frame that was drawn
after the message came. Server and browser have one clock. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from pathlib import Path

from serving import Serving

from orcaserve.bench import client, measures
from orcaserve.bench.client import Server
from orcaserve.bench.workloads import spec

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "api"))
from browser import CHROMIUM, Browser

# Reads along what the page reads, and notes for each message how old its oldest iteration is once a frame is drawn.
LISTEN = """
window.behind = [];
const get = window.fetch;
window.fetch = async (...asked) => {
  const response = await get(...asked);
  if (!String(asked[0]).startsWith("/page/events")) return response;
  const [theirs, ours] = response.body.tee();
  (async () => {
    const { events } = await import("/feed.js");
    let offset = null;
    for await (const message of events(new Response(ours))) {
      const isFirst = offset === null;
      if (message.hello) offset = message.hello.unix_time - message.hello.now;
      const iterated = message.events.filter((event) => event.type === "iterated");
      if (isFirst || !iterated.length) continue; // the first message is what there was before
      const oldest = Math.min(...iterated.map((event) => event.at)) + offset;
      const running = Math.max(...iterated.map((event) => event.running));
      requestAnimationFrame(() => setTimeout(() => window.behind.push([running, Date.now() / 1000 - oldest])));
    }
  })();
  return new Response(theirs, { status: response.status, headers: response.headers });
};
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--running", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=3072)
    arguments = parser.parse_args()
    if CHROMIUM is None:
        raise SystemExit("there is no Chromium: apt-get install chromium")
    size = str(arguments.running)
    serving = Serving(["--threads", "1", "--max-batch-size", size])
    ended = threading.Event()
    server = Server("ours", serving.url)
    work = spec.make(f"burst:in=16,out=200,n={3 * arguments.running}", vocab=arguments.vocab, seed=0)

    async def load() -> None:
        usable = await client.asked(server)
        while not ended.is_set():
            await client.run(usable, work)

    thread = threading.Thread(target=lambda: client.in_loop(load()))
    thread.start()
    try:
        with Browser() as browser:
            browser.size(1400, 1000)
            browser.call("Page.addScriptToEvaluateOnNewDocument", source=LISTEN)
            browser.open(serving.url)
            time.sleep(arguments.seconds)
            found = browser.run("window.behind")
            if browser.errors:
                raise SystemExit(browser.errors[0])
    finally:
        ended.set()
        thread.join()
        serving.close()
    late = [seconds for count, seconds in found if count == arguments.running]
    if not late:
        raise SystemExit(f"there never were {arguments.running} requests at a time")
    marks = {name: measures.quantile(late, share) or 0 for name, share in (("p50", 0.5), ("p99", 0.99), ("most", 1.0))}
    times = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in marks.items())
    version = subprocess.run([CHROMIUM, "--version"], capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    print(f"{len(late)} messages with {arguments.running} requests running, {version}: {times}")


if __name__ == "__main__":
    main()
