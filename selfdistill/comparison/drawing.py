"""Figures of matplotlib as files for papers and as SVG that goes into a page: small, and in the page's colours."""

import html
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Colours that the page replaces by its own, which differ between light and dark; a PNG keeps them as they are.
INK, MUTED, GRID, PAPER = "#24292e", "#6a737c", "#e1e4e7", "#fefefe"
COLOURS = ("#0a6cb0", "#d55e02", "#099e73", "#cc79a6", "#c79a04", "#56b4e8")
REST = "#a9b0b6"
THEME = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", REST: "rest"}
THEME |= {colour: f"c{index}" for index, colour in enumerate(COLOURS)}

WIDTH_IN, HEIGHT_IN = 4.0, 2.9  # as wide as a telephone, where a page shows one beside none
STYLE: Any = {
    "font.size": 8.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 9.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "svg.fonttype": "none",
    "axes.unicode_minus": False,
}


@dataclass
class Chart:
    """One picture.

    Attributes:
        name: of the PNG file.
        section: the part of the report that it belongs to.
        title: what is drawn, for the picture and for those who cannot see it.
        draw: draws it.
        height_in: its height in inches.
        legend: what each colour stands for; the page shows it once for all its pictures.
    """

    name: str
    section: str
    title: str
    draw: Callable[["Canvas"], None]
    height_in: float = HEIGHT_IN
    legend: dict[str, str] = field(default_factory=dict)


@dataclass
class Canvas:
    """Where a chart is drawn, and what is said when a point is pointed at."""

    axes: Axes
    tips: list[str] = field(default_factory=list)

    def dot(self, x: float, y: float, colour: str, tip: str, *, size: float = 4.0, alpha: float = 0.55) -> None:
        """A dot that says what it is."""
        self.axes.plot(
            [x], [y], "o", ms=size, color=colour, alpha=alpha, markeredgewidth=0, gid=f"tip{len(self.tips)}", zorder=3
        )
        self.tips.append(tip)


def render(chart: Chart, plots: Path) -> str:
    """Writes the chart as a PNG into a folder, and returns it as SVG for a page."""
    with matplotlib.rc_context(STYLE):
        matplotlib.rcParams["svg.hashsalt"] = chart.name  # the same picture has the same text
        figure = Figure(figsize=(WIDTH_IN, chart.height_in), layout="constrained")
        canvas = Canvas(figure.add_subplot())
        canvas.axes.set_title(chart.title)
        canvas.axes.locator_params(nbins=6)
        chart.draw(canvas)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        if not chart.legend:
            figure.set_layout_engine("none")  # it is laid out already
        else:
            handles = [Line2D([], [], color=colour, label=label, lw=2) for label, colour in chart.legend.items()]
            figure.legend(handles=handles, loc="outside lower center", fontsize=6.5, frameon=False, ncols=1)
            figure.set_figheight(chart.height_in + 0.15 * len(handles))
        figure.savefig(plots / f"{chart.name}.png", dpi=160)
    return _for_a_page(text.getvalue(), chart.title, canvas.tips)


def _for_a_page(svg: str, title: str, tips: list[str]) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg, flags=re.S)
    view = re.search(r'viewBox="[^"]*"', svg)
    label = f'role="img" aria-label="{html.escape(title)}"'
    svg = re.sub(r"<svg[^>]*>", f"<svg {view[0] if view else ''} {label}>", svg, count=1)
    svg = re.sub(r'<g id="tip(\d+)">', lambda tip: f"<g><title>{html.escape(tips[int(tip[1])])}</title>", svg)
    svg = re.sub(r' id="[A-Za-z.\d]+_\d+"', "", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    # Coordinates need one decimal; the numbers that people read stand between the tags.
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(-?\d+\.\d)\d{2,}", r"\1", tag[0]), svg)
    # After M, coordinates are those of lines without saying so.
    svg = re.sub(
        r' d="(M[^"CQz]*)"', lambda path: f' d="{path[1].replace(" L ", " ").strip()}"', re.sub(r"\s*\n\s*", " ", svg)
    )
    svg = svg.replace("<defs> </defs>", "").replace("> <", "><").replace("xlink:href", "href")
    for colour, name in THEME.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg
