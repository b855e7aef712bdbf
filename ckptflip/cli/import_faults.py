"""`ckptflip import-faults`."""

from __future__ import annotations

import click

from ckptflip.cli.options import HELP, Several, format_option


@click.command("import-faults", context_settings=HELP)
@click.argument("faults")
@click.argument("ckpt")
@click.option("-o", "--output", "record", type=click.Path(), required=True, help="The record to write.")
@click.option(
    "--layer-types",
    type=Several(),
    default=(),
    metavar="TYPE,…",
    help="For PyTorchALFI: the layers of its scenario, of conv2d, conv3d, fcc.",
)
@click.option(
    "--modules",
    type=Several(),
    default=(),
    metavar="LAYER,…",
    help="For PyTorchALFI, instead: the layers that it counted, by name, in order.",
)
@click.option("--overwrite", is_flag=True, help="Replace the record if it exists.")
@format_option
def command(
    faults: str,
    ckpt: str,
    record: str,
    layer_types: tuple[str, ...],
    modules: tuple[str, ...],
    overwrite: bool,
    form: str,
) -> None:
    """Write FAULTS that another injector drew as a record for CKPT, which stays as it is.

    FAULTS is a sequence that hdf5_corrupter saved (JSON), or what PyTorchALFI drew for bit flips in weights
    (a pickled array, read without unpickling). `ckptflip replay` carries the record out.
    """
    from ckptflip.cli.output import say
    from ckptflip.cli.show import summarise
    from ckptflip.equivalence.importers import import_faults

    made = import_faults(
        faults, ckpt, record=record, layer_types=layer_types, modules=modules, overwrite=overwrite
    )
    summarise(made, form)
    counts = made.header.counts
    say(
        f"words hit: {counts.words_hit}, bits: {counts.bits_hit}, tensors: {counts.tensors} → {record}; "
        f"{ckpt} is as it was: ckptflip replay {record} {ckpt} carries the faults out"
    )
