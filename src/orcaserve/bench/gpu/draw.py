"""Draws what a run on a GPU found: a panel for each section, a bar for each share of what the card can do.

Needs matplotlib (the extra `plots`).
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from orcaserve.bench.draw import COLOURS, GREY
from orcaserve.bench.gpu.report import Line, Report, duration, warnings
from orcaserve.bench.report import number

TOP = 115  # percent; what claims more is cut, but for its label
OURS, OTHERS = COLOURS[0], "#c3c8d0"


def draw(report: Report, path: Path) -> None:
    """Writes a PNG. Lines without a limit are left to the tables. Raises ValueError if none has one."""
    panels = {found.title: [line for line in found.lines if line.share is not None] for found in report.sections}
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        raise ValueError("nothing in it has a limit to be drawn against")
    heights = [len(lines) + 1.5 for lines in panels.values()]
    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.1)
    figure = Figure(figsize=(11, 1.4 + 0.2 * sum(heights)), dpi=150, layout=layout)
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for panel, (title, lines) in zip(axes, panels.items(), strict=True):
        panel.set_title(title, fontsize=10, loc="left")
        _bars(panel, lines)
    figure.suptitle(f"Percent of what {report.device} was measured to do", fontsize=12, x=0.01, ha="left")
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    foot = "\n".join((f"{report.date}; {versions}; grey: others at the same", *warnings(report)))
    figure.supxlabel(foot, fontsize=7.5, color=GREY, x=0.99, ha="right")
    figure.savefig(path)


def _bars(panel: Axes, lines: list[Line]) -> None:
    for y, line in enumerate(lines):
        share = 100 * (line.share or 0)
        for seconds in line.beside.values():
            panel.barh(y, min(share * (line.seconds or 0) / seconds, TOP), height=0.85, color=OTHERS)
        panel.barh(y, min(share, TOP), height=0.5, color=OURS)
        took = "" if line.seconds is None else f", {duration(line.seconds)}"
        text = panel.text(
            min(share, TOP) + 1, y, f"{share:.0f} %: {number(line.rate)} {line.unit}{took}", va="center", fontsize=7
        )
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    panel.set_yticks(range(len(lines)), [line.what for line in lines], fontsize=7.5)
    panel.set_ylim(len(lines) - 0.4, -0.6)
    panel.set_xlim(0, TOP + 25)
    panel.set_xticks((0, 25, 50, 75, 100))
    panel.axvline(100, color="#222", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0.9)
    panel.tick_params(length=0, labelsize=7.5)
    panel.xaxis.grid(True, color="#e6e8ec")
    panel.set_axisbelow(True)
    for side in ("top", "right", "bottom"):
        panel.spines[side].set_visible(False)
