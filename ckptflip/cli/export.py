"""`ckptflip export`."""

from __future__ import annotations

import click

from ckptflip.cli.options import HELP

TABLES = ("values", "trials", "flips", "propagation", "cells", "clean")


@click.command(context_settings=HELP)
@click.argument("store")
@click.option("-o", "--output", required=True, help="The new file: .parquet, .csv or .csv.gz.")
@click.option(
    "--table", type=click.Choice(TABLES), default="values", show_default=True, help="What is written."
)
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
def command(store: str, output: str, table: str, overwrite: bool) -> None:
    """Write a table of STORE as Parquet or CSV.

    values: one row per trial, epoch and metric, with the clean run's value beside it. trials: one row each.
    flips: one row per altered word. propagation: one per trial, epoch and layer. cells: one per condition.
    clean: the clean runs, by epoch and metric. Swept fields are columns.
    """
    from ckptflip.campaign.store import export
    from ckptflip.cli.output import many, say

    rows = export(store, output, table=table, overwrite=overwrite)
    say(f"{store} → {output}: {many(rows, 'row')}")
