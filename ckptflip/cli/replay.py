"""`ckptflip replay`."""

from __future__ import annotations

from typing import Any

import click

from ckptflip.checkpoints.target import CHECKSUM_MODES
from ckptflip.cli import options

COLUMNS = ("tensor", "element", "index", "bits", "to_tensor", "to_element", "to_index", "to_bits", "layout")


@click.command(context_settings=options.HELP)
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
@click.option(
    "--map",
    metavar="auto|MAP.toml",
    help="CKPT is another framework's: pair tensors by what they are (auto), or as a map says.",
)
@click.option("--source", type=click.Path(), help="With --map: RECORD's own checkpoint, to tell more by.")
@click.option(
    "--dtypes",
    type=click.Choice(("same", "fields")),
    help="With --map: refuse another float type, or hit the bit in the same place of its field.  "
    "[default: same]",
)
@options.format_option
def command(record: str, ckpt: str, output: str | None, epoch: int | None, form: str, **given: Any) -> None:
    """Put the faults of RECORD into CKPT: the same bits of the same elements of the same tensors.

    On the checkpoint the record was made from, this gives the identical file. With --map, CKPT may be of
    another framework: the same logical weights are hit, and the listing says what each word became.
    """
    from ckptflip import record_files
    from ckptflip.alter import replay
    from ckptflip.cli.output import say
    from ckptflip.cli.show import said, summarise

    path = options.picked(ckpt, epoch)
    original = record_files.read(record)
    became: list[Any] = []
    told = None if given["map"] is None else became.append
    with options.progress_bar(path, "copying") as progress:
        made = replay(original, path, out=output, progress=progress, told=told, **given)
    if told is None:
        summarise(made, form)
    else:
        _list(became, form)
    said(made, dry_run=given["dry_run"], source=path, output=options.written(path, output, given["in_place"]))
    differing = 0
    if told is None and len(made) == len(original):
        differing = sum(made.plan.before != original.plan.before)
    if differing:
        say(
            f"{differing} of {len(made)} words held another value than in the record; "
            "the same bits were inverted in them"
        )


def _list(became: list[Any], form: str) -> None:
    """List what each word became, and say what a user has to know of it."""
    from msgspec.structs import asdict

    from ckptflip.cli.output import emit, say

    emit((asdict(each) for each in became), COLUMNS, form)
    for note in dict.fromkeys(note for each in became for note in each.notes):
        say(f"Note: {note}")
