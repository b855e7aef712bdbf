"""`ckptflip verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckptflip.cli.options import HELP, epoch_option, format_option, picked, progress_bar, workers_option

if TYPE_CHECKING:
    from ckptflip.protect.seals import Damage

COLUMNS = ("what", "file", "start", "end", "tensor", "element", "index", "bit", "bits", "mendable", "note")


@click.command(context_settings=HELP)
@click.argument("ckpt")
@epoch_option
@click.option("--seal", type=click.Path(), metavar="FILE", help="Its seal.  [default: CKPT.seal]")
@workers_option
@format_option
@click.pass_context
def command(
    ctx: click.Context, ckpt: str, epoch: int | None, seal: str | None, workers: int | None, form: str
) -> None:
    """Say whether every byte of CKPT is what it was when it was sealed.

    Names tensor, element and bit of each flip (`what` is flip), as far as the seal allows; else the bytes
    that changed. Exit code 0 when all is as it was, 3 when something is not, 1 when there is no seal or none
    that is whole: then nothing is verified.
    """
    from ckptflip.cli.output import emit, say
    from ckptflip.protect.seals import verify
    from ckptflip.protect.seals.verifying import advice, summary

    path = picked(ckpt, epoch, folders=True)
    with progress_bar(path, "verifying") as progress:
        found = verify(path, seal=seal, workers=workers, progress=progress)
    if not found.intact or form != "table":
        emit([row(d) for d in found.damage], COLUMNS, form)
    say(summary(found))
    if found.unnamed:
        say(f"tensors are not named: {found.unnamed}")
    if not found.intact:
        say(advice(found))
    ctx.exit(0 if found.intact else 3)


def row(damage: Damage) -> dict[str, Any]:
    """A line of the listing."""
    from msgspec import structs

    return structs.asdict(damage) | {"mendable": "yes" if damage.mendable else "no", "note": damage.part}
