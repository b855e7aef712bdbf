"""How the figures of a report are made and kept: three files each, and SVG in the colours of the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from ckptflip.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Colours that stand for the page's: text and axes, what is said in passing, lines of the grid, the paper.
INK, MUTED, GRID, PAPER = "#1b1b1c", "#606163", "#e5e6e8", "#fefeff"
_OF_THE_PAGE = {
    INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)",
    "#0072b2": "var(--blue)",  # too dark on a dark page
}  # fmt: skip
# Good to bad, from Okabe and Ito's colours: blue to red, with a light one in the middle.
OUTCOME_COLOURS = {
    "identical": "#0072B2", "masked": "#56B4E9", "slowed": "#F0E442", "degraded": "#E69F00",
    "collapsed": "#D55E00",
}  # fmt: skip
WIDTH = 6.6
# Inches; beyond it a figure goes on in the next one.
TALLEST = 11.0
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none", "font.family": ["DejaVu Sans"], "font.size": 10, "axes.titlesize": 10,
    "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "axes.titlecolor": INK,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.facecolor": "none", "grid.color": GRID, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "legend.frameon": False, "hatch.color": MUTED, "hatch.linewidth": 0.6,
}  # fmt: skip
_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_COLOUR = re.compile("|".join(_OF_THE_PAGE))
_REFERENCE = re.compile(r"url\(#([^)]*)\)")


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """A figure that is ready to be saved.

    Attributes:
        stem: of its file names.
        title: over it, on the page.
        caption: below it: what is shown, and how.
        figure: matplotlib's.
    """

    stem: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True, slots=True)
class Shown:
    """A figure on the page.

    Attributes:
        stem: of its file names.
        title: over it.
        caption: below it.
        svg: markup, of matplotlib's making, to stand in the page.
    """

    stem: str
    title: str
    caption: str
    svg: str


@contextmanager
def drawing() -> Iterator[None]:
    """Draw as reports do, whatever the user's settings are."""
    with style.strangers_names(_SETTINGS):
        yield


def canvas(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width, and its panels row by row."""
    figure = style.blank(WIDTH, height)
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(panels.ravel())


def keep(drawn: Drawn, folder: Path) -> Shown:
    """Write a figure as SVG, PDF and PNG, and give it to the page.

    Raises:
        UsageError: a file cannot be written.
    """
    figure = drawn.figure
    # Where everything lies is settled once, not again for each file.
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.execute(figure)
    figure.set_layout_engine("none")
    with style.writable(folder):
        svg = _files(figure, folder / drawn.stem)
    title = style.harmless(drawn.title)
    return Shown(drawn.stem, title, drawn.caption, embedded(svg, drawn.stem, title))


def _files(figure: Figure, path: Path) -> bytes:
    """Write the three files and give back the SVG. `savefig` would draw each of them twice.

    They are drawn in memory first: matplotlib does not survive a disk that is full.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    pdf, png, svg = io.BytesIO(), io.BytesIO(), io.BytesIO()
    FigureCanvasPdf(figure).print_pdf(pdf, metadata=style.UNDATED[".pdf"])
    FigureCanvasAgg(figure).print_png(png)
    FigureCanvasSVG(figure).print_svg(svg, metadata=style.UNDATED[".svg"])
    for suffix, drawn in (("pdf", pdf), ("png", png), ("svg", svg)):
        Path(f"{path}.{suffix}").write_bytes(drawn.getvalue())
    return svg.getvalue()


def embedded(svg: bytes, stem: str, label: str) -> str:
    """A figure of matplotlib's as part of a page: in the page's colours, its names apart from other figures'.

    Args:
        svg: the file.
        stem: goes before each of its ids.
        label: what screen readers say.
    """
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.parse(io.BytesIO(svg)).getroot()
    for child in [found for found in root if found.tag == f"{{{_SVG}}}metadata"]:
        root.remove(child)
    for parent in root.iter():
        for child in [found for found in parent if found.get("id") == "patch_1"]:
            parent.remove(child)  # the paper
    for element in root.iter():
        _adapt(element.attrib, stem)
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    root.attrib.update({"role": "img", "aria-label": label, "class": "figure"})
    # Within a page, no namespace of the elements themselves is needed but the links'.
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def on_page(colour: str) -> str:
    """A colour of a figure as the page's style names it."""
    return _OF_THE_PAGE.get(colour.lower(), colour)


def _adapt(attributes: dict[str, str], stem: str) -> None:
    for key, value in attributes.items():
        if key == "id":
            attributes[key] = f"{stem}-{value}"
        elif key == _LINK and value.startswith("#"):
            attributes[key] = f"#{stem}-{value.removeprefix('#')}"
        elif "#" in value:
            value = _COLOUR.sub(lambda found: _OF_THE_PAGE[found[0]], value)
            attributes[key] = _REFERENCE.sub(rf"url(#{stem}-\1)", value)


def pages(items: list[Any], most: int) -> list[list[Any]]:
    """Items in portions of about the same size, none larger than `most`.

    Example:
        >>> pages([1, 2, 3, 4, 5], 3)
        [[1, 2, 3], [4, 5]]
    """
    count = -(-len(items) // most)
    size = -(-len(items) // count) if count else 1
    return [items[start : start + size] for start in range(0, len(items), size)]


def stem(name: str, place: int, of: int) -> str:
    """The file name of one of several figures of a kind.

    Example:
        >>> stem("outcomes", 0, 1), stem("outcomes", 0, 12)
        ('outcomes', 'outcomes-01')
    """
    # Names come from stores, too; none may lead out of the folder.
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60]
    return plain if of == 1 else f"{plain}-{place + 1:0{len(str(of))}d}"


def legend_below(figure: Figure, handles: list[Any], columns: int = 2) -> None:
    """One legend for all panels, below them."""
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)))


def name_axes(panels: list[Axes], columns: int, below: str, beside: str) -> None:
    """Name the axes of a grid of panels once: below the lowest ones, and beside."""
    for place, panel in enumerate(panels):
        if place + columns >= len(panels):
            panel.set_xlabel(below)
            panel.tick_params(labelbottom=True)
    if columns > 1:
        # Of the figure and not of one panel, where it would be too long.
        panels[0].figure.supylabel(beside, fontsize=10)
        return
    for panel in panels:
        panel.set_ylabel(beside)


def powers(axis: Axis) -> None:
    """Write the ticks of a logarithmic axis as powers of ten, in plain letters: no mathematics is parsed."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
    axis.set_minor_locator(NullLocator())


def power(value: float) -> str:
    """A power of ten, or a number.

    Example:
        >>> power(1e-12), power(1.0), power(1000.0), power(20.0)
        ('10⁻¹²', '1', '10³', '20')
    """
    exponent = round(math.log10(value)) if value > 0 else 0
    if exponent == 0 or not math.isclose(value, 10.0**exponent, rel_tol=1e-6):
        return f"{value:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
