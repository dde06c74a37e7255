"""Draws a report on kernels: a panel for each, bars for how near everyone comes to the ceiling.

Needs matplotlib (the extra `plots`).
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from orcaserve.bench.draw import COLOURS, GREY
from orcaserve.bench.kernel_report import Report, subject, warnings
from orcaserve.bench.kernels import OURS, RUNNERS, Line, summary

COLOUR = dict(zip(RUNNERS, (*COLOURS[:2], "#c3c8d0"), strict=True))
LABEL = {"ours": "OrcaServe", "torch": "torch's own operators", "twin": "the torch twin (equal bits)"}
COLUMNS = 3
TOP = 115  # percent; what claims more is cut, but for its label


def draw(report: Report, path: Path) -> None:
    """Writes a PNG. Kernels without a ceiling are left to the table."""
    panels: dict[str, list[Line]] = {}
    for line in summary(report.works, report.samples):
        if line.cells[OURS].share is not None:
            panels.setdefault(line.work.kernel, []).append(line)
    rows = -(-len(panels) // COLUMNS)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.09)
    figure = Figure(figsize=(11.5, 1.2 + 2.2 * rows), dpi=150, layout=layout)
    axes = figure.subplots(rows, COLUMNS, squeeze=False, sharey=True).flatten()
    for panel, (name, lines) in zip(axes, panels.items(), strict=False):
        panel.set_title(name, fontsize=10, loc="left")
        _bars(panel, lines)
        panel.set_xlim(-0.5, max(map(len, panels.values())) - 0.5)  # bars of one width everywhere
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    figure.legend(
        handles=[Patch(facecolor=COLOUR[name], label=LABEL[name]) for name in RUNNERS],
        loc="outside upper left",
        ncols=len(RUNNERS),
        frameon=False,
        title="Percent of the nearer ceiling, by number of rows; memory's bandwidth (bw), or peak of products (peak)",
        title_fontsize=10,
        alignment="left",
    )
    foot = "\n".join((f"{subject(report)}; {report.machine}; {report.date}", *warnings(report)))
    figure.supxlabel(foot, fontsize=7.5, color=GREY, x=0.99, ha="right")
    figure.savefig(path)


def _bars(panel: Axes, lines: list[Line]) -> None:
    width = 0.84 / len(RUNNERS)
    for x, line in enumerate(lines):
        for i, name in enumerate(RUNNERS):
            if name not in line.cells or (share := line.cells[name].share) is None:
                continue
            place = x + (i - 1) * width
            panel.bar(place, min(100 * share, TOP), width * 0.92, color=COLOUR[name])
            label = panel.text(place, min(100 * share, TOP) + 3.5, f"{100 * share:.0f}", ha="center", fontsize=7)
            label.set_color("#222" if name == OURS else GREY)
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0})  # over the line at 100
    panel.set_xticks(range(len(lines)), [f"{line.work.m}\n{_limit(line)}" for line in lines], fontsize=8)
    panel.axhline(100, color="#222", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0.9)
    panel.set_ylim(0, TOP + 14)
    panel.set_yticks((0, 25, 50, 75, 100))
    panel.tick_params(length=0, labelsize=8)
    panel.yaxis.grid(True, color="#e6e8ec")
    panel.set_axisbelow(True)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)


def _limit(line: Line) -> str:
    """The ceiling that is nearer to ours."""
    ours = line.cells[OURS]
    return "bw" if ours.share == ours.of_bandwidth else "peak"
