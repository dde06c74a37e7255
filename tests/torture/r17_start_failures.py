"""R17: a start that cannot be ends at once, with one line that says why and an exit code other than 0."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from orcaserve.builtin import MODEL_DIR
from torture.rows import Outcome, Row, Setup

ROWS = (Row("R17", "missing, corrupt or foreign model; occupied port", "one clear line, exit ≠ 0, within 5 s"),)
MOST_SECONDS = 5.0
PATIENCE = 60.0
MOST_CHARACTERS = 1000
WEIGHTS = "model.safetensors"
UNCLEAR = re.compile(r"Traceback|\bat 0x[0-9a-f]+|^\s*$|Errno -?\d+\]$")
POWERS = "-dac_override,-dac_read_search,-net_bind_service"  # by which root may read and bind whatever it wants


@dataclass(frozen=True)
class Start:
    """One start that must fail. spoil: harms the copy of a model that it is given, and returns further arguments.

    says: what the line must name. without_powers: the process must not be root, or must not have root's powers.
    memory: a limit of all its memory, in bytes, by a control group.
    """

    name: str
    spoil: Callable[[Path], Sequence[str] | None]
    says: str
    without_powers: bool = False
    memory: int | None = None


@dataclass(frozen=True)
class End:
    """How a start ended: seconds by the clock, and what of them processors have worked."""

    start: Start
    code: int | None
    said: str
    seconds: float
    cpu_seconds: float

    @property
    def fault(self) -> str | None:
        """What was wrong with it but for the time it took."""
        lines = self.said.splitlines()
        if self.code is None:
            return "it did not end"
        if self.code <= 0:
            return f"exit code {self.code}"
        if len(lines) != 1 or len(lines[0]) > MOST_CHARACTERS or UNCLEAR.search(lines[0]):
            return f"not one clear line: {self.said[-2000:]!r}"
        if self.start.says not in lines[0]:
            return f"it does not name {self.start.says!r}: {lines[0]}"
        return None


def torture(setup: Setup) -> Iterator[Outcome]:
    [row] = ROWS
    size = setup.size("starts", len(SHORT), len(STARTS))
    asked = STARTS if size == len(STARTS) else [start for start in STARTS if start.name in SHORT][:size]
    ends, left_out = [], []
    for start in asked:
        end = attempt(start)
        (left_out.append(start.name) if end is None else ends.append(end))
    record = [f"{end.start.name}: {end.seconds:.1f} s, {end.cpu_seconds:.1f} s of work, {end.said}" for end in ends]
    (setup.folder / "r17-starts.txt").write_text("\n".join(record) + "\n")
    trace = tuple(f"{end.start.name}: {end.fault}" for end in ends if end.fault is not None)
    slowest = max(ends, key=lambda end: end.seconds)
    late = [end for end in ends if end.seconds > MOST_SECONDS]
    figure = (
        f"{len(ends) - len(trace)} of {len(ends)} kinds of start ended by one clear line, the slowest "
        f"({slowest.start.name}) after {slowest.seconds:.1f} s with {slowest.cpu_seconds:.1f} s of work"
    )
    causes = [f"{len(late)} took longer than {MOST_SECONDS:.0f} s"] if late else []
    causes += [f"not asked here: {', '.join(left_out)}"] if left_out else []
    yield Outcome(row, figure, not trace and not late, "; ".join(causes), trace)


def attempt(start: Start) -> End | None:
    """Runs it on a copy of the built-in model. None where this machine has no way to ask it."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orcaserve-r17-")))
        model = Path(shutil.copytree(MODEL_DIR, folder / "model"))
        occupied = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        given = start.spoil(model)
        more = ["--port", str(occupied.getsockname()[1])] if given is OCCUPIED else list(given or ())
        where = more.pop(0) if more and not more[0].startswith("--") else str(model)
        command = [sys.executable, "-m", "orcaserve", "serve", where, "--port", "0", "--threads", "1", *more]
        if start.without_powers and os.geteuid() == 0:
            if shutil.which("setpriv") is None:
                return None
            command = ["setpriv", f"--bounding-set={POWERS}", *command]
        group = None
        if start.memory is not None:
            group = memory_group(start.memory)
            if group is None:
                return None
            stack.callback(group.rmdir)
        # The hub is a port where nobody listens: what is not here is nowhere.
        environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(folder / "hub")}
        began, before = time.monotonic(), _worked()
        process = subprocess.Popen(
            command if group is None else ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        try:
            said, code = process.communicate(timeout=PATIENCE)[1], process.returncode
        except subprocess.TimeoutExpired:
            process.terminate()
            said, code = process.communicate()[1], None
        seconds = time.monotonic() - began
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o700)
        return End(start, code, said.strip(), seconds, _worked() - before)


def memory_group(limit: int) -> Path | None:
    """A control group of so many bytes, version 1 or 2; None where none can be made."""
    for top, name in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(top) / f"orcaserve-r17-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / name).write_text(str(limit))
        except OSError:
            group.rmdir()
            continue
        return group
    return None


def _worked() -> float:
    """Seconds that processors have worked for children of this process that have ended, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# -- ways to spoil a start ------------------------------------------------------------------------------------------

OCCUPIED: Sequence[str] = ("occupied",)


def arguments(*given: str) -> Callable[[Path], Sequence[str]]:
    return lambda model: given


def without(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def content(name: str, data: bytes) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        (model / name).write_bytes(data)

    return spoil


def config(**values: object) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return spoil


def cut(name: str, keep: int) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        path = model / name
        path.write_bytes(path.read_bytes()[:keep])

    return spoil


def locked(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).chmod(0)


def renamed_tensor(model: Path) -> None:
    """Of the same length, so that every offset stays right."""
    path = model / WEIGHTS
    path.write_bytes(path.read_bytes().replace(b"model.norm.weight", b"model.form.weight", 1))


def only_pickled(model: Path) -> None:
    (model / WEIGHTS).rename(model / "pytorch_model.bin")


def header(length: int, data: bytes = b"") -> Callable[[Path], None]:
    return content(WEIGHTS, struct.pack("<Q", length) + data)


def step_log(model: Path) -> Sequence[str]:
    model.parent.chmod(0o500)
    return ("--step-log", str(model.parent / "log"))


_NESTED = b'{"a":' + b"[" * 5_000_000
_OVERFLOWING = json.dumps({"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 0]}}).encode()

STARTS: tuple[Start, ...] = (
    Start("no such folder", arguments("/nowhere/at/all"), "/nowhere/at/all"),
    Start("no such name on the hub", arguments("nobody/nothing"), "nobody/nothing"),
    Start("no config.json", without("config.json"), "config.json"),
    Start("no weights", without(WEIGHTS), WEIGHTS),
    Start("no tokenizer", without("tokenizer.json"), "tokenizer.json"),
    Start("weights only pickled", only_pickled, "pytorch_model.bin"),
    Start("weights cut short", cut(WEIGHTS, 5_000_000), WEIGHTS),
    Start("weights cut in the header", cut(WEIGHTS, 100), WEIGHTS),
    Start("empty weights", content(WEIGHTS, b""), WEIGHTS),
    Start("a header of 2^63 bytes", header(1 << 63), WEIGHTS),
    Start("a header of 90 MB that is not there", header(90_000_000, b"{"), WEIGHTS),
    Start("a header of five million brackets", header(len(_NESTED), _NESTED), WEIGHTS),
    Start("a tensor of 2^124 values", header(len(_OVERFLOWING), _OVERFLOWING), WEIGHTS),
    Start("a tensor of another name", renamed_tensor, "model.norm.weight"),
    Start("wrong shapes", config(hidden_size=512), "has the shape"),
    Start("a broken config.json", content("config.json", b'{"architectures": ['), "config.json"),
    Start("a config.json that is a list", content("config.json", b"[1, 2]"), "config.json"),
    Start("a deep config.json", content("config.json", b"[" * 200_000), "config.json"),
    Start("a config.json in another encoding", content("config.json", b"\xff\xfe\x00{"), "config.json"),
    Start("a broken tokenizer.json", content("tokenizer.json", b'{"model": {}}'), "tokenizer.json"),
    Start("a broken tokenizer_config.json", content("tokenizer_config.json", b"{"), "tokenizer_config.json"),
    Start("a broken generation_config.json", content("generation_config.json", b"{"), "generation_config.json"),
    Start("another kind of model", config(architectures=["MambaForCausalLM"], model_type="mamba"), "MambaForCausalLM"),
    Start("an encoder", config(architectures=["BertForMaskedLM"], model_type="bert"), "BertForMaskedLM"),
    Start(
        "a model with code of its own", config(auto_map={"AutoModel": "m.M"}, model_type="x", architectures=["X"]), "X"
    ),
    Start("quantised weights", config(quantization_config={"quant_method": "gptq", "bits": 4}), "gptq"),
    Start("an occupied port", lambda model: OCCUPIED, "Address already in use"),
    Start("an address of another machine", arguments("--host", "192.0.2.1", "--api-key", "k"), "192.0.2.1"),
    Start("a public address without a key", arguments("--host", "0.0.0.0"), "--api-key"),
    Start("more KV than memory", arguments("--kv-memory", "100TiB"), "not enough memory"),
    Start("a control group that is too small", arguments(), "not enough memory", memory=450 << 20),
    Start("a context that is too long", arguments("--max-model-len", "100000"), "longest is 1024"),
    Start("weights that may not be read", locked(WEIGHTS), WEIGHTS, without_powers=True),
    Start("a config.json that may not be read", locked("config.json"), "config.json", without_powers=True),
    Start("a folder that may not be read", locked("."), "model", without_powers=True),
    Start("a step log that may not be written", step_log, "Permission denied", without_powers=True),
)
SHORT = ("weights cut short", "a folder that may not be read", "an occupied port")
