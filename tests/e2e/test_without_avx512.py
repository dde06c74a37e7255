"""On a processor without AVX-512 the engine chooses what runs there, and answers with that set's bits.

QEMU emulates the processor for one process (`apt-get install qemu-user`), which takes some twenty seconds each, so that
it is not part of `make test`: `make emulated`.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orcaserve.ops.native_kernels import instruction_sets

EMULATOR = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
ANSWERS = Path(__file__).with_name("answers_in_process.py")

pytestmark = pytest.mark.emulated


@functools.cache
def answers(kernels: str, kv_dtype: str, cpu: str | None = None) -> dict[str, Any]:
    """What the engine says here, or on an emulated processor."""
    machine = [] if cpu is None else [str(EMULATOR), "-cpu", cpu]
    # torch chooses by the processor as well; so that only our choice is looked at, it does without AVX-512 here
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    command = [*machine, sys.executable, str(ANSWERS), kernels, kv_dtype]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


@pytest.mark.skipif(EMULATOR is None, reason="there is no qemu-x86_64 (apt-get install qemu-user)")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are those of x86-64")
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize(
    ("cpu", "sets"),
    [
        pytest.param("Haswell", ["avx2", "portable"], id="Haswell"),
        pytest.param("SandyBridge", ["portable"], id="SandyBridge"),
    ],
)
def test_what_is_chosen_gives_its_own_bits(cpu: str, sets: list[str], kv_dtype: str) -> None:
    if not set(sets) <= set(instruction_sets()):
        pytest.skip("the set to compare with does not run here")
    found = answers("auto", kv_dtype, cpu)
    assert found["sets"] == sets
    assert all(found["alone"]) and found["together"] == found["alone"]
    assert answers(sets[0], kv_dtype)["alone"] == found["alone"]
