"""Shares of ceilings are what hand and pencil say, and `orcaserve bench kernels` measures and reports every kernel."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import kernel_sets
import pytest
from click.testing import CliRunner
from rich.console import Console

from orcaserve.bench import kernel_report
from orcaserve.bench.kernel_report import Ceiling, Report
from orcaserve.bench.kernels import SHAPES, Kernel, Sample, Shape, Work, kernels, share, summary, work
from orcaserve.bench.report import Machine
from orcaserve.cli import main

# K = 10, N = 16 for qkv: 2 heads of 4 and 1 for keys and 1 for values
SHAPE = Shape("by hand", hidden=10, mlp=20, heads=2, kv_heads=1, head_dim=4, vocab=100)


@pytest.mark.parametrize(
    ("kernel", "m", "moved", "flops", "weights"),
    [
        (Kernel("linear", "", (10, 16)), 3, 2 * (160 + 30 + 48), 2 * 3 * 160, 2 * 160),
        (Kernel("gated", "", (10, 20)), 3, 2 * (400 + 30 + 60), 2 * 3 * 400, 2 * 400),
        (Kernel("output", "", (10, 100)), 3, 2 * (1000 + 30) + 4 * 300, 2 * 3 * 1000, 2 * 1000),
        # a request has 256 keys and 256 values of 4, a query of 8 and an answer of 8
        (Kernel("decode", "", (256,)), 3, 3 * 2 * (2 * 256 * 4 + 16), 3 * 2 * 2 * 256 * 8, 0),
        # 1 + 2 + 3 positions are seen by 2 heads of 4
        (Kernel("prefill", ""), 3, 3 * 2 * (8 + 16), 2 * 2 * 6 * 8, 0),
        (Kernel("heads", ""), 3, 3 * 2 * 2 * 16, 0, 0),
        (Kernel("rms_norm", ""), 3, 3 * 2 * 2 * 10, 0, 0),
        (Kernel("peaks", ""), 3, 3 * 4 * 100, 0, 0),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_what_a_call_must_move_and_multiply(kernel: Kernel, m: int, moved: int, flops: int, weights: int) -> None:
    assert work(SHAPE, kernel, m, 2) == Work(kernel.name, m, moved, flops, weights)


def test_a_share_is_the_median_of_pairs() -> None:
    # 100, 50 and 25 a second, by ceilings of 100, 100 and 30: 1, 1/2 and 5/6; the medians' quotient would be 1/2
    assert share(100, [1.0, 2.0, 4.0], [100.0, 100.0, 30.0]) == pytest.approx(5 / 6)
    assert share(100, [1.0, 2.0], [None, None]) is None


def sample(runner: str, round: int, seconds: float, bandwidth: float | None, peak: float | None) -> Sample:
    return Sample(round, "qkv", 16, runner, seconds, 10**6, bandwidth, peak)


SAMPLES = [
    *(sample("ours", i, seconds, 1e9, 8e9) for i, seconds in enumerate((1e-3, 2e-3, 4e-3), 1)),
    *(sample("torch", i, seconds, 1e9, 8e9) for i, seconds in enumerate((4e-3, 4e-3, 4e-3), 1)),
]


def a_report(**changes: Any) -> Report:
    machine = Machine("Abacus", 2, 2**30, "Linux", 0.1)
    given = {"date": "today", "machine": machine, "shape": SHAPE, "dtype": "bfloat16", "isa": "avx2", "threads": 2}
    given |= {"torch": "2", "is_quick": False, "bandwidth": "a read", "peak": "a product", "samples": SAMPLES}
    return Report(**given | {"works": [Work("qkv", 16, 10**6, 4 * 10**6)]} | changes)


def test_a_line_has_medians_of_its_rounds() -> None:
    [line] = summary(a_report().works, SAMPLES)
    ours, torch = line.cells["ours"], line.cells["torch"]
    assert ours.seconds == 2e-3 and ours.speed == 1
    assert (ours.of_bandwidth, ours.of_peak) == (pytest.approx(0.5), pytest.approx(0.25))
    assert ours.share == ours.of_bandwidth
    assert torch.speed == pytest.approx(0.5)  # of 1/4, 1/2 and 1
    assert kernel_report.ceilings(a_report()) == {"bandwidth": Ceiling(1e9, 1e9), "peak": Ceiling(8e9, 8e9)}


def test_the_page_says_the_same() -> None:
    page = kernel_report.markdown(a_report())
    assert "| qkv | 16 | 2000 | 0.5 | 2 | 50% | 25% | 4000 (0.50×) | — |" in page
    assert "Peak of products: median 8, best 8 GFLOP/s (a product)." in page
    assert "⚠" not in page


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"is_quick": True}, "do not quote"),
        ({"machine": Machine("Abacus", 2, 2**30, "Linux", 1.5)}, "The load average was 1.50"),
    ],
)
def test_what_should_not_be_quoted_says_so(changes: dict[str, Any], warning: str) -> None:
    report = a_report(**changes)
    terminal = Console(record=True, width=100, file=io.StringIO())
    kernel_report.show(report, terminal)
    assert warning in terminal.export_text() and warning in kernel_report.markdown(report)


@kernel_sets.NEEDS_NATIVE
@pytest.mark.parametrize(
    "options",
    [
        ["--dtype", "bfloat16"],
        ["--dtype", "float32"],
        ["--quantization", "int8", "--kv-cache-dtype", "int8"],
        ["--quantization", "int4"],
    ],
    ids=" ".join,
)
def test_the_command_measures_every_kernel(options: list[str], tmp_path: Path) -> None:
    command = ["bench", "kernels", "--shape", "tiny", "--quick", "--rounds", "1", "--threads", "1", *options]
    done = CliRunner().invoke(main, [*command, "--out", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "kernels.json").read_bytes())
    page = (tmp_path / "kernels.md").read_text()
    assert ("weights in int" in page) == ("--quantization" in options)
    assert ("KV in int8" in page) == ("--kv-cache-dtype" in options)
    for kernel in kernels(SHAPES["tiny"]):
        assert f"| {kernel.name} |" in page and kernel.name in done.stdout
        lines = [line for line in found["summary"] if line["work"]["kernel"] == kernel.name]
        assert [line["work"]["m"] for line in lines] == kernel.rows((1, 16, 128))
        for line in lines:
            assert set(line["cells"]) == set(kernel.runners(is_quantised="--quantization" in options))
            for cell in line["cells"].values():
                assert cell["seconds"] > 0
                assert (cell["of_bandwidth"] is not None) == (kernel.streams and line["work"]["m"] < 128)
                assert (cell["of_peak"] is not None) == (line["work"]["flops"] > 0 and line["work"]["m"] > 8)
    assert (
        found["threads"] == 1
        and found["dtype"] == ("float32" if "float32" in options else "bfloat16")
        and found["isa"] == kernel_sets.BEST[0]
    )
    assert found["ceilings"]["bandwidth"]["best"] >= found["ceilings"]["bandwidth"]["median"] > 0
    assert "do not quote" in page and "do not quote" in done.stdout
    if (tmp_path / "kernels.png").exists():  # matplotlib is an extra
        assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG") and "(kernels.png)" in page


def test_without_native_kernels_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orcaserve.ops.native_kernels.instruction_sets", list)
    done = CliRunner().invoke(main, ["bench", "kernels"])
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [
        "Error: no native kernels to measure: OrcaServe was installed without a C++ compiler"
    ]


@kernel_sets.NEEDS_NATIVE
def test_an_unknown_instruction_set_is_one_line() -> None:
    done = CliRunner().invoke(main, ["bench", "kernels", "--kernels", "abacus"])
    assert done.exit_code == 1
    assert "no kernels for abacus; there are " in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_unknown_shape_is_a_usage_error() -> None:
    done = CliRunner().invoke(main, ["bench", "kernels", "--shape", "whale"])
    assert done.exit_code == 2 and "no shape is called whale; there are qwen3-0.6b," in done.stderr


def test_a_report_needs_no_torch() -> None:
    said = "import sys, orcaserve.bench.kernel_report, orcaserve.bench.draw_kernels; print('torch' in sys.modules)"
    pytest.importorskip("matplotlib")
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
