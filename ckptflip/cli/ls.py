"""`ckptflip ls`."""

from __future__ import annotations

import click

from ckptflip.cli.options import HELP, epoch_option, format_option, picked, tensor_options

COLUMNS = ("name", "shape", "dtype", "layer", "role", "bytes", "offset", "layout", "aliases")


@click.command(context_settings=HELP)
@click.argument("ckpt")
@tensor_options
@epoch_option
@format_option
def command(
    ckpt: str,
    tensors: tuple[str, ...],
    layers: tuple[str, ...],
    roles: tuple[str, ...],
    epoch: int | None,
    form: str,
) -> None:
    """List the tensors of CKPT: where they lie and what they are taken for.

    What is left out (strings, references, dangling links …) is said on standard error, with the reason.
    """
    from ckptflip.checkpoints import opened
    from ckptflip.cli.output import emit, many, say
    from ckptflip.faults.catalogue import select

    with opened(picked(ckpt, epoch)) as target:
        limited = bool(tensors or layers or roles)
        wanted = select(target.tensors, names=tensors, layers=layers, roles=roles) if limited else None
        chosen = target.tensors if wanted is None else [target.tensors[i] for i in wanted]
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
            for t in chosen
        ]
        emit(rows, COLUMNS, form)
        total = f"{many(len(chosen), 'tensor')}, {many(sum(t.nbytes for t in chosen), 'byte')}"
        say(f"{target.format}: {total}" + (f" of {len(target.tensors)} tensors" if limited else ""))
        for skipped in target.skipped:
            say(f"left out: {skipped.name} ({skipped.reason})")
