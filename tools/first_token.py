"""Starts `orcaserve serve` and says how many seconds pass until the first token of the first request is there.

python tools/first_token.py [MODEL …options of serve]
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import httpx
from serving import free_port


def first_token(url: str, server: subprocess.Popen) -> str:
    """The first piece of text; asks again while the server is not there or still loading."""
    body = {"prompt": "Once upon a time", "stream": True, "max_tokens": 8, "ignore_eos": True, "return_token_ids": True}
    while server.poll() is None:
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        choice = json.loads(line.removeprefix("data: "))["choices"][0]
                        if choice.get("token_ids"):
                            return choice["text"]
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise SystemExit(f"the server ended with exit code {server.returncode}")


if __name__ == "__main__":
    port = free_port()
    began = time.perf_counter()
    command = [sys.executable, "-m", "orcaserve", "serve", *sys.argv[1:], "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)  # noqa: S603
    try:
        text = first_token(f"http://127.0.0.1:{port}", server)
        print(f"{time.perf_counter() - began:.2f} s to the first token ({text!r})")
    finally:
        server.terminate()
        server.wait(30)
