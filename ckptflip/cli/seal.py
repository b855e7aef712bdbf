"""`ckptflip seal`."""

from __future__ import annotations

import click

from ckptflip.cli.options import HELP, epoch_option, picked, progress_bar, workers_option


def share(text: str | None) -> float | None:
    """A share of the checkpoint's size, as 5% or 0.05."""
    if text is None:
        return None
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is no share of a size, such as 5%: write =5%, or the bare option last"
        ) from None


@click.command(context_settings=HELP)
@click.argument("ckpt")
@epoch_option
@click.option(
    "--repair",
    is_flag=False,
    flag_value="5%",
    metavar="[=COST]",
    callback=lambda _, __, text: share(text),
    help="Add an erasure code of this share of CKPT's size, 0.5% to 100%.  [5% where none is said]",
)
@click.option("-o", "--output", type=click.Path(), help="The seal.  [default: CKPT.seal]")
@click.option("--overwrite", is_flag=True, help="Replace a seal that is there.")
@workers_option
def command(
    ckpt: str,
    epoch: int | None,
    repair: float | None,
    output: str | None,
    overwrite: bool,
    workers: int | None,
) -> None:
    """Write a seal beside CKPT: digests by which damage is found, and with --repair mended.

    Seal a checkpoint when it was just saved. CKPT is a checkpoint or any folder, which is sealed with all
    that is in it. One or two flips in a block are mended without --repair; with it, as many lost blocks as
    the seal says, and any run of them of about COST. A seal is no signature: who can write CKPT can write
    its seal.
    """
    from ckptflip.cli.output import many, say
    from ckptflip.protect.seals import seal

    path = picked(ckpt, epoch, folders=True)
    with progress_bar(path, "sealing") as progress:
        made = seal(path, repair=repair, out=output, overwrite=overwrite, workers=workers, progress=progress)
    click.echo(made.path)
    what = f"{many(made.bytes, 'byte')} in {many(made.files, 'file')}"
    blocks = f"{many(made.blocks, 'block')} of {made.block}"
    say(f"{what}, {blocks}; the seal has {made.size} ({made.size / max(1, made.bytes):.2%})")
    if made.groups:
        lost = many(made.shares, "lost block")
        together = f"of each of {made.groups} groups" if made.groups > 1 else "in all"
        say(f"it mends {lost} {together}, or a run of {made.shares * made.groups * made.block} bytes")
