"""The kernels of AMX with its tiles emulated, in a module that is built for this test: `make emulated`.

It runs what is said of every instruction set, and what is said of tiles, in processes with that module.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orcaserve.ops.native_kernels import instruction_sets

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif("avx512bf16" not in instruction_sets(), reason="all but the tiles is AVX512-BF16"),
]


def run(*command: str, **environment: str) -> str:
    ran = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=1800, check=False
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    return ran.stdout


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("emulated-amx")
    run(
        str(CMAKE), "-S", str(ROOT), "-B", str(build), "-DORCA_EMULATED_AMX=ON", f"-DPython_EXECUTABLE={sys.executable}"
    )
    run(str(CMAKE), "--build", str(build))
    [built] = build.glob("_native.*")
    if "amx_emulated" not in (build / "isas.inc").read_text():
        pytest.skip("this compiler does not know AMX")
    return built


@pytest.mark.parametrize("tests", ["test_kernels.py", "test_coded_weights.py", "products_by_tiles.py"])
def test_products_by_emulated_tiles(module: Path, tests: str) -> None:
    every = [] if tests == "products_by_tiles.py" else ["-k", "amx_emulated"]
    said = run(
        sys.executable, "-m", "pytest", "-p", "other_native", "-p", "no:cacheprovider", f"tests/ops/{tests}", *every,
        PYTHONPATH=os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]), ORCA_NATIVE=str(module),
    )  # fmt: skip
    assert " passed" in said and " failed" not in said
    print(said.splitlines()[-1])
