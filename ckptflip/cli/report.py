"""``ckptflip report``: what a campaign found, on one page."""

from __future__ import annotations

from pathlib import Path

import click

from ckptflip.cli.options import HELP


@click.command("report", context_settings=HELP)
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", type=click.Path(path_type=Path, file_okay=False), default="report", show_default=True,
    help="Folder of the report.",
)  # fmt: skip
@click.option(
    "--metric", metavar="NAME",
    help="Whose curves are drawn. Default: the metric that outcomes are judged by.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a report that is there.")
def command(store: Path, out: Path, metric: str | None, overwrite: bool) -> None:
    """Write what the campaign in STORE found: one page, and its figures as files.

    OUT/index.html needs nothing else and works offline; OUT/figures/ holds every figure as SVG, PNG and PDF.
    The store is only read, so that a running campaign can be looked at.
    """
    from ckptflip.report.campaign import write

    click.echo(write(store, out, metric=metric, overwrite=overwrite))
