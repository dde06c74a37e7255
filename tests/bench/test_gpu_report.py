"""A GPU's limits by hand and pencil, and the page made of what was found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from orcaserve.bench.gpu import report
from orcaserve.bench.gpu.models import MODELS, SMALL
from orcaserve.bench.gpu.report import Found, Line, Report, duration, markdown, told, warnings
from orcaserve.bench.gpu.roofline import Card, least_seconds, least_seconds_of, moved, multiplied
from orcaserve.bench.gpu.run import run
from orcaserve.bench.report import Machine
from orcaserve.cli import main
from orcaserve.model.config import Generation, make_config
from orcaserve.model.shape import shape_of
from orcaserve.sim.cost import size_of
from orcaserve.sim.shape import ModelShape

# A layer has 2 heads of 4 and 1 of keys: 8 × (8 + 2·4 + 8) = 192 weights, and 3 × 8 × 16 = 384 of the MLP.
SHAPE = ModelShape(
    name="by hand", layers=2, hidden=8, intermediate=16, heads=2, kv_heads=1, head_dim=4, vocab=100, matrices=3
)
CARD = Card(copy=900.0, read=1000.0, flops=10_000.0)


def test_what_an_iteration_moves_and_multiplies() -> None:
    decode = size_of([(9, 1, True), (4, 1, True)])
    # two bytes of each of 2 × 576 + 800 weights; a token's K and V take 2 × 2 layers × 4 values × 2 bytes
    assert moved(SHAPE, decode) == 2 * (2 * 576 + 800) + 32 * (10 + 5)
    # a token is multiplied with all weights; a query meets each key of each of 2 × 4 values twice, in 2 layers
    assert multiplied(SHAPE, decode) == 2 * 2 * (2 * 576 + 800) + 4 * 2 * 8 * (10 + 5)
    chunk = size_of([(0, 3, False)])
    assert moved(SHAPE, chunk) == 2 * 2 * 576 + 32 * 3
    assert multiplied(SHAPE, chunk) == 2 * 3 * 2 * 576 + 4 * 2 * 8 * (1 + 2 + 3)


def test_the_longer_of_reading_and_multiplying_counts() -> None:
    decode, prompt = size_of([(0, 1, True)]), size_of([(0, 50, True)])
    assert least_seconds(CARD, SHAPE, decode) == moved(SHAPE, decode) / 1000
    assert least_seconds(CARD, SHAPE, prompt) == multiplied(SHAPE, prompt) / 10_000


def test_requests_come_and_go_as_rows_are_free() -> None:
    iterations = [
        [(0, 5, True), (0, 3, True)],  # two prompts give their first tokens
        [(5, 1, True), (3, 1, True)],  # the second request has its two tokens now
        [(6, 1, True), (0, 4, True)],  # the third takes its place
    ]
    expected = sum(least_seconds(CARD, SHAPE, size_of(rows)) for rows in iterations)
    assert least_seconds_of(CARD, SHAPE, [(5, 3), (3, 2), (4, 1)], 2) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("model", "parameters"), [("Qwen3-0.6B", 0.596e9), ("Qwen3-8B", 7.57e9), ("Llama-3.1-8B", 7.5e9)]
)
def test_models_have_the_sizes_of_their_names(model: str, parameters: float) -> None:
    """The embedding of a model that does not share it with the output matrix is read a row at a time: not counted."""
    config = make_config(MODELS[model], model, Generation())
    assert shape_of(config, model).parameters == pytest.approx(parameters, rel=0.01)
    assert config.dtype == "bfloat16" and config.layers[0].rope is not None


def test_small_models_are_of_different_architectures() -> None:
    configs = [make_config(MODELS[model], model, Generation()) for model in SMALL]
    assert len({config.architecture for config in configs}) == len(SMALL)
    assert {config.dtype for config in configs} == {"float32"}


def a_report(*sections: Found, is_tiny: bool = False) -> Report:
    machine = Machine("Abacus", 2, 2**30, "Linux", 0.1)
    return Report("today", machine, "a card", {"torch": "2"}, is_tiny, CARD, list(sections))


LINE = Line(what="decode", seconds=2e-3, rate=30.0, unit="GB/s", limit=40.0, beside={"torch": 3e-3}, note="rotated")


def test_a_line_says_how_near_the_limit_it_is() -> None:
    assert LINE.share == 0.75
    assert told(LINE) == "decode; 2 ms; 30 GB/s; 75% of 40; torch 3 ms (1.50×); rotated"
    assert told(Line(what="equal", note="all")) == "equal; all"
    assert [duration(seconds) for seconds in (3.0, 0.25, 4.5e-6)] == ["3 s", "250 ms", "4.5 µs"]


def test_the_page_leaves_out_what_nobody_measured() -> None:
    page = markdown(a_report(Found("kernels", "Kernels", [LINE], 3.2), Found("promise", "Promise", [Line(what="x")])))
    assert "| decode | 2 ms | 30 GB/s | 40 GB/s | 75% | 3 ms (1.50×) | rotated |" in page
    assert "| what |\n| --- |\n| x |" in page
    assert "a card" in page and "torch 2" in page and "It took 3 s." in page


def test_the_page_says_what_is_wrong() -> None:
    broken = Found("kernels", "Kernels", [Line(what="unequal", wrong=True)], error="RuntimeError: out of memory")
    lines = warnings(a_report(broken, is_tiny=True))
    assert len(lines) == 3
    assert all(f"**⚠ {line}**" in markdown(a_report(broken, is_tiny=True)) for line in lines)
    assert warnings(a_report(Found("kernels", "Kernels", [LINE]))) == []


def test_an_error_ends_its_section_alone(tmp_path: Path) -> None:
    def broken() -> Iterator[Line]:
        yield LINE
        raise RuntimeError("no\nluck")

    found, said = a_report(), []
    run(found, {"kernels": broken, "check": lambda: [LINE]}, tmp_path, said.append)
    kernels, check = found.sections
    assert (kernels.lines, kernels.error) == ([LINE], "RuntimeError: no luck")
    assert (check.lines, check.error) == ([LINE], None)
    assert f"  {told(LINE)}" in said
    assert report.read(tmp_path / report.JSON) == found
    assert (tmp_path / report.PAGE).read_text() == markdown(found)


def test_the_figure_is_drawn_later(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.write(a_report(Found("kernels", "Kernels", [LINE, Line(what="x")])), tmp_path)
    assert report.FIGURE not in (tmp_path / report.PAGE).read_text()
    result = CliRunner().invoke(main, ["bench", "gpu", "--draw", str(tmp_path / report.JSON)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / report.FIGURE).read_bytes().startswith(b"\x89PNG")
    assert report.FIGURE in (tmp_path / report.PAGE).read_text()


def test_a_page_has_no_figure_of_the_run_before(tmp_path: Path) -> None:
    (tmp_path / report.FIGURE).write_bytes(b"of another card")
    run(a_report(), {"kernels": lambda: [LINE]}, tmp_path, lambda _: None)
    assert report.FIGURE not in (tmp_path / report.PAGE).read_text()
    assert not (tmp_path / report.FIGURE).exists()


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / report.JSON
    for text in ("{", '{"date": 3}'):
        path.write_text(text)
        result = CliRunner().invoke(main, ["bench", "gpu", "--draw", str(path)])
        assert result.exit_code == 1 and "cannot be drawn" in result.output and "Traceback" not in result.output


def test_a_section_that_is_not_there_is_refused() -> None:
    result = CliRunner().invoke(main, ["bench", "gpu", "--only", "steps,dreams"])
    assert result.exit_code == 2 and "dreams" in result.output
