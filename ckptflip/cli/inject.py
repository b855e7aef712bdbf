"""`ckptflip inject`."""

from __future__ import annotations

from typing import Any

import click

from ckptflip.checkpoints.target import CHECKSUM_MODES
from ckptflip.cli import options


@click.command(context_settings=options.HELP)
@click.argument("ckpt")
@options.destination_options
@options.selection_options
@options.amount_options
@options.epoch_option
@click.option("--seed", type=int, metavar="S", help="Same seed, same faults.  [default: drawn, and recorded]")
@click.option(
    "--policy", type=click.Path(), help="A TOML file of one policy or several, instead of the options above."
)
@click.option(
    "--record",
    type=click.Path(),
    help="The record; .h5 for millions of faults.  [default: OUTPUT.flips.jsonl]",
)
@click.option(
    "--checksum",
    type=click.Choice(CHECKSUM_MODES),
    default="repair",
    show_default=True,
    help=options.checksum_help,
)
@options.format_option
def command(ckpt: str, output: str | None, epoch: int | None, form: str, **given: Any) -> None:
    """Put faults into CKPT: write an altered copy and a record of every flip.

    Without options, one bit is flipped, drawn uniformly from all bits of all tensors. What was hit is listed
    by tensor, as `ckptflip show` does.
    """
    from ckptflip.alter import inject
    from ckptflip.cli.show import said, summarise

    path = options.picked(ckpt, epoch)
    with options.progress_bar(path, "copying") as progress:
        record = inject(path, out=output, progress=progress, **given)
    summarise(record, form)
    said(
        record, dry_run=given["dry_run"], source=path, output=options.written(path, output, given["in_place"])
    )
