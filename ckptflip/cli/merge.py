"""`ckptflip merge`."""

from __future__ import annotations

import click

from ckptflip.cli.options import HELP


@click.command(context_settings=HELP)
@click.argument("stores", metavar="STORE...", nargs=-1, required=True)
@click.option("-o", "--output", required=True, help="The new store.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
def command(stores: tuple[str, ...], output: str, overwrite: bool) -> None:
    """Make one store of several of the same campaign, such as those of `run --shard`.

    Clean runs that are in several stores must agree value for value, and so must trials; a failed trial gives
    way to one that is done. The STOREs stay as they are.
    """
    from ckptflip.campaign.store import merge
    from ckptflip.cli.output import many, say

    done = merge(stores, output, overwrite=overwrite)
    say(
        f"{', '.join(stores)} → {output}: {many(done.cells, 'cell')}, {many(done.trials, 'trial')} "
        f"({done.failed} failed, {done.shared} in several stores)"
    )
