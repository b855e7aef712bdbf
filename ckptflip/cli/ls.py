"""`ckptflip ls`."""

from __future__ import annotations

import click

from ckptflip.cli.options import epoch_option, format_option, picked

COLUMNS = ("name", "shape", "dtype", "layer", "role", "bytes", "offset", "layout", "aliases")


@click.command()
@click.argument("ckpt")
@epoch_option
@format_option
def command(ckpt: str, epoch: int | None, form: str) -> None:
    """List the tensors of CKPT: where they lie and what they are taken for.

    What is left out (strings, references, dangling links …) is said on standard error, with the reason.
    """
    from ckptflip.checkpoints import opened
    from ckptflip.cli.output import emit, say

    with opened(picked(ckpt, epoch)) as target:
        rows = [
            {
                "name": t.name,
                "shape": t.shape,
                "dtype": t.dtype,
                "layer": t.layer,
                "role": t.role,
                "bytes": t.nbytes,
                "offset": t.offset,
                "layout": t.layout,
                "aliases": t.aliases,
            }
            for t in target.tensors
        ]
        emit(rows, COLUMNS, form)
        for skipped in target.skipped:
            say(f"left out: {skipped.name} ({skipped.reason})")
