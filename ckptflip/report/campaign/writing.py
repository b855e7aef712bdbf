"""Writing a report: the figures as files, then the page that holds them all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ckptflip.errors import UsageError
from ckptflip.report.campaign import bands, hits, measured, page, recovery, shares, spread
from ckptflip.report.campaign.drawing import Drawn, Shown, drawing, keep
from ckptflip.report.campaign.gathering import Gathered, gather
from ckptflip.report.campaign.rates import CellRow, cell_rows
from ckptflip.report.style import writable

PAGE, FIGURES = "index.html", "figures"
# What an earlier report left: figures of these kinds alone are taken away.
_OURS = re.compile(r"(convergence|measured|outcomes|heatmap|propagation|recovery)[-\w]*\.(svg|png|pdf)")


def write(store: str | Path, out: str | Path, *, metric: str | None = None, overwrite: bool = False) -> Path:
    """Write the report of a campaign: ``index.html``, which needs nothing else, and its figures as files.

    The store is read only; a campaign may be running on it.

    Args:
        store: the campaign's store.
        out: folder of the report; made where it is missing.
        metric: whose curves are drawn; by default the one that outcomes are judged by.
        overwrite: replace a report that is there.

    Returns:
        The page.

    Raises:
        UsageError: the store holds no such metric; a report is there already; a file cannot be written.
        CampaignError: the store cannot be read.
    """
    out = Path(out)
    if (out / PAGE).exists() and not overwrite:
        raise UsageError(f"{out / PAGE} is there already: give another folder, or --overwrite to replace it")
    gathered = gather(store, metric)
    folder = _folder(out)
    rows = cell_rows(gathered)
    with drawing():
        figures: dict[str, list[Shown]] = {}
        for kind, drawn in _figures(gathered, rows):
            figures.setdefault(kind, []).append(keep(drawn, folder))
    return _put(out / PAGE, page.render(gathered, rows, figures))


def _figures(gathered: Gathered, rows: list[CellRow]) -> Iterator[tuple[str, Drawn]]:
    found = hits.hits(gathered)
    for kind, figures in (
        ("convergence", bands.figures(gathered)),
        ("measured", measured.figures(gathered)),
        ("outcomes", shares.figures(gathered, found)),
        ("heatmap", hits.figures(gathered, found)),
        ("propagation", spread.figures(gathered)),
        ("recovery", recovery.figures(gathered, rows)),
    ):
        for drawn in figures:
            yield kind, drawn


def _folder(out: Path) -> Path:
    """The folder of the figures, without those of an earlier report."""
    folder = out / FIGURES
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if _OURS.fullmatch(path.name) and path.is_file():
                path.unlink()
    return folder


def _put(path: Path, text: str) -> Path:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        with writable(path):
            part.write_text(text, encoding="utf-8")
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
