"""Names are resolved from a folder, then the local cache, then the hub; without any of them there is one clear line."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

NAME = "acme/tiny-1.5"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FILES = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}).encode(),
    SHARDS[0]: b"a" * 5000,
    SHARDS[1]: b"b" * 7000,
    "tokenizer.json": b"{ }",
    "chat_template.jinja": b"hello",
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
    "pytorch_model.bin": b"not for us",
    "original/consolidated.00.pth": b"not for us either",
}
WANTED = set(FILES) - {"pytorch_model.bin", "original/consolidated.00.pth"}
NOWHERE = "http://127.0.0.1:9"

_RESOLVE = """
import json, sys
from orcaserve.core.config import ModelError
from orcaserve.model.hub import resolve
seen = []
try:
    print(json.dumps(["folder", str(resolve(sys.argv[1], lambda *bytes: seen.append(bytes))), seen]))
except ModelError as error:
    print(json.dumps(["error", str(error), seen]))
"""


def resolve(name: str | Path, home: Path, endpoint: str = NOWHERE) -> tuple[str, str, list[list[int]]]:
    """In a process of its own: the hub's client reads its environment once."""
    environment = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HTTP"))}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", _RESOLVE, str(name)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    kind, text, seen = json.loads(ran.stdout.splitlines()[-1])
    return kind, text, seen


def lay_out(home: Path, files: set[str]) -> Path:
    """A cache as the hub's client makes it: blobs by hash, a snapshot of links, a ref."""
    root = home / "hub" / ("models--" + NAME.replace("/", "--"))
    snapshot = root / "snapshots" / COMMIT
    for path in (snapshot, root / "blobs", root / "refs"):
        path.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for file in files:
        blob = root / "blobs" / hashlib.sha256(FILES[file]).hexdigest()
        blob.write_bytes(FILES[file])
        (snapshot / file).parent.mkdir(exist_ok=True)
        (snapshot / file).symlink_to(os.path.relpath(blob, (snapshot / file).parent))
    return snapshot


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download of one repository needs."""

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        headers = {"X-Repo-Commit": COMMIT}
        if path == f"/api/models/{NAME}/revision/main":
            siblings = [{"rfilename": file} for file in FILES]
            body = json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode()
        elif path == f"/api/models/{NAME}/tree/{COMMIT}":
            entries = [{"type": "file", "path": f, "size": len(b), "oid": digest(b)} for f, b in FILES.items()]
            body = json.dumps(entries).encode()
        elif path.startswith(f"/{NAME}/resolve/{COMMIT}/") and path.partition(COMMIT + "/")[2] in WANTED:
            body = FILES[path.partition(COMMIT + "/")[2]]
            headers["ETag"] = f'"{digest(body)}"'
        else:
            body = b"{}"
            headers["X-Error-Code"] = "RepoNotFound"
        self.send_response(404 if "X-Error-Code" in headers else 200)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:40]


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_folder(tmp_path: Path) -> None:
    assert resolve(tmp_path, tmp_path / "home")[:2] == ("folder", str(tmp_path))


def test_cache_without_network(tmp_path: Path) -> None:
    snapshot = lay_out(tmp_path, WANTED)
    assert resolve(NAME, tmp_path)[:2] == ("folder", str(snapshot))


@pytest.mark.parametrize("files", [set(), {"config.json"}, WANTED - {SHARDS[1]}])
def test_neither_cache_nor_network(tmp_path: Path, files: set[str]) -> None:
    """A half-finished download is no model."""
    if files:
        lay_out(tmp_path, files)
    kind, message, _ = resolve(NAME, tmp_path)
    assert kind == "error" and "\n" not in message
    assert NAME in message and ("cannot be reached" in message or "does not hold all weights" in message)


@pytest.mark.parametrize(
    "name", ["no/such/folder", "/no/such/folder", "./model", "model", "../a/b", "a/b/../c", "", "-/x"]
)
def test_neither_folder_nor_name(tmp_path: Path, name: str) -> None:
    kind, message, _ = resolve(name, tmp_path)
    assert kind == "error" and "\n" not in message and "neither a model folder nor a name" in message


def test_download_then_cache(tmp_path: Path, hub: str) -> None:
    kind, folder, seen = resolve(NAME, tmp_path, hub)
    assert kind == "folder", folder
    found = {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    assert found == {file: FILES[file] for file in WANTED}
    size = sum(len(body) for body in found.values())
    assert seen and max(done for done, _ in seen) == size and max(total for _, total in seen) == size
    assert resolve(NAME, tmp_path)[:2] == ("folder", folder)  # the network is gone now


def test_half_a_download_is_finished(tmp_path: Path, hub: str) -> None:
    snapshot = lay_out(tmp_path, WANTED - {SHARDS[1]})
    assert resolve(NAME, tmp_path, hub)[:2] == ("folder", str(snapshot))
    assert (snapshot / SHARDS[1]).read_bytes() == FILES[SHARDS[1]]


def test_unknown_on_the_hub(tmp_path: Path, hub: str) -> None:
    kind, message, _ = resolve("acme/other", tmp_path, hub)
    assert kind == "error" and "\n" not in message and "not on the Hugging Face hub" in message
