"""`ckptflip undo`."""

from __future__ import annotations

import click

from ckptflip.cli.options import HELP, progress_bar


@click.command(context_settings=HELP)
@click.argument("ckpt")
@click.option("--record", required=True, type=click.Path(), help="The record of the injection to take back.")
@click.option(
    "-o", "--output", type=click.Path(), help="Write the restored checkpoint here; CKPT stays as it is."
)
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
def command(ckpt: str, record: str, output: str | None, overwrite: bool) -> None:
    """Give every word of CKPT that RECORD altered its value back.

    Works after an injection that was killed at any moment, too. Refused, with nothing altered, when a word is
    neither what the record says it was nor what it became.
    """
    from ckptflip.alter import undo
    from ckptflip.cli.output import many, say

    with progress_bar(ckpt, "copying") as progress:
        done = undo(ckpt, record, out=output, overwrite=overwrite, progress=progress)
    say(f"{output or ckpt}: {many(done.restored, 'word')} restored, {done.already} had their value already")
    if done.digest_matches:
        say("it is the original, byte for byte")
    elif done.digest_matches is False:
        say(
            "every recorded word has its value back; other bytes differ from the original "
            "(an index, or a compressed or otherwise encoded layout, was written anew)"
        )
