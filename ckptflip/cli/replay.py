"""`ckptflip replay`."""

from __future__ import annotations

from typing import Any

import click

from ckptflip.checkpoints.target import CHECKSUM_MODES
from ckptflip.cli import options


@click.command()
@click.argument("record")
@click.argument("ckpt")
@options.destination_options
@options.epoch_option
@click.option(
    "--record",
    "new_record",
    type=click.Path(),
    help="The record of this replay.  [default: OUTPUT.flips.jsonl]",
)
@click.option(
    "--checksum", type=click.Choice(CHECKSUM_MODES), help=f"{options.checksum_help}  [default: as recorded]"
)
@options.format_option
def command(record: str, ckpt: str, output: str | None, epoch: int | None, form: str, **given: Any) -> None:
    """Put the faults of RECORD into CKPT: the same bits of the same elements of the same tensors.

    On the checkpoint the record was made from, this gives the identical file.
    """
    from ckptflip import record_files
    from ckptflip.alter import replay
    from ckptflip.cli.output import say
    from ckptflip.cli.show import said, summarise

    path = options.picked(ckpt, epoch)
    original = record_files.read(record)
    with options.progress_bar(path, "copying") as progress:
        made = replay(original, path, out=output, progress=progress, **given)
    summarise(made, form)
    said(made, dry_run=given["dry_run"])
    differing = sum(made.plan.before != original.plan.before) if len(made) == len(original) else 0
    if differing:
        say(
            f"{differing} of {len(made)} words held another value than in the record; "
            "the same bits were inverted in them"
        )
