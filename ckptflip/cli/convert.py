"""`ckptflip convert`."""

from __future__ import annotations

import click

from ckptflip.cli.options import HELP, progress_bar, tensor_options


@click.command(context_settings=HELP)
@click.argument("ckpt", metavar="IN")
@click.argument("out")
@tensor_options
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
def command(
    ckpt: str,
    out: str,
    tensors: tuple[str, ...],
    layers: tuple[str, ...],
    roles: tuple[str, ...],
    overwrite: bool,
) -> None:
    """Write the tensors of IN, a checkpoint of any format, into a new file OUT, with every bit as it is.

    The suffix of OUT says its format: .h5, .safetensors, .npz, or .pt (.pth, .bin, .ckpt). Tensors alone are
    carried over: no settings, no text, no code.
    """
    from ckptflip.cli.output import many, say
    from ckptflip.conversion import convert

    with progress_bar(ckpt, "converting") as progress:
        done = convert(
            ckpt, out, tensors=tensors, layers=layers, roles=roles, overwrite=overwrite, progress=progress
        )
    say(f"{ckpt} → {out}: {many(done.tensors, 'tensor')}, {many(done.nbytes, 'byte')}")
    if done.lost_names:
        say(f"{many(len(done.lost_names), 'other name')} of these tensors left out ({done.lost_names[0]} …)")
    if done.skipped:
        say(f"{many(len(done.skipped), 'entry', 'entries')} left out (`ckptflip ls` says why)")
