"""`ckptflip repair`."""

from __future__ import annotations

import click

from ckptflip.cli.options import HELP, format_option, progress_bar, workers_option
from ckptflip.cli.verify import COLUMNS, row


@click.command(context_settings=HELP)
@click.argument("ckpt")
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    help="The new checkpoint.  [default: CKPT with .repaired before its suffix]",
)
@click.option(
    "--in-place", is_flag=True, help="Repair CKPT itself; a kill leaves no more damage than there was."
)
@click.option("--partial", is_flag=True, help="Mend what can be mended even if some bytes cannot.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@click.option("--seal", type=click.Path(), metavar="FILE", help="Its seal.  [default: CKPT.seal]")
@workers_option
@format_option
@click.pass_context
def command(
    ctx: click.Context,
    ckpt: str,
    output: str | None,
    in_place: bool,
    partial: bool,
    overwrite: bool,
    seal: str | None,
    workers: int | None,
    form: str,
) -> None:
    """Give every damaged byte of CKPT back what it was when it was sealed, proven by its digest.

    A checkpoint of several files is written into a folder. Lists what was damaged. Exit code 0 when every
    sealed byte is what it was: OUTPUT is there then, as a copy where nothing was damaged; without -o nothing
    is written in that case. Exit code 3 when some bytes cannot be mended: they are listed, and nothing is
    written without --partial. Damage to the seal alone is told, and changes no exit code. Extra files are
    left where they are. Changes that were meant are undone like any others.
    """
    from ckptflip.cli.output import emit, many, say
    from ckptflip.protect.seals import repair

    with progress_bar(ckpt, "checking") as progress:
        done = repair(
            ckpt, out=output, in_place=in_place, seal=seal, overwrite=overwrite, partial=partial,
            workers=workers, progress=progress,
        )  # fmt: skip
    if done.found.damage or form != "table":
        emit([row(d) for d in done.found.damage], COLUMNS, form)
    kinds = {d.what for d in done.found.damage}
    if done.out is not None and kinds <= {"seal", "extra"}:
        say(f"{done.out}: a copy; {ckpt} is as it was sealed")
    elif done.out is not None:
        say(f"{done.out}: {many(done.mended, 'block')} mended, proven by digest")
    elif done.whole:
        say(f"{ckpt} is as it was sealed; nothing was written")
    if done.left:
        wrote = "" if done.out is not None else "; nothing was written (--partial mends the rest)"
        say(f"{many(done.left, 'block')} cannot be mended{wrote}. Take the checkpoint from a copy")
    if "seal" in kinds:
        say(f"{done.found.seal} itself is damaged: seal what is right now again (ckptflip seal --overwrite)")
    ctx.exit(0 if done.whole else 3)
