"""``ckptflip train``: a clean run, one checkpoint per epoch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ckptflip.training.track import Row


@click.command("train")
@click.argument("workload")
@click.option("--epochs", type=int, required=True, metavar="N", help="Epochs to train.")
@click.option(
    "--save", type=click.Path(path_type=Path, file_okay=False), required=True, metavar="DIR",
    help="Folder for epoch_000.h5, epoch_001.h5, … and track.jsonl.",
)  # fmt: skip
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    metavar="S",
    help="Seed of weights, data order and dropout.",
)
@click.option("--label", metavar="TEXT", help="What runs of the same kind share, for figures.")
@click.option("--overwrite", is_flag=True, help="Replace the run that the folder holds.")
def command(workload: str, epochs: int, save: Path, seed: int, label: str | None, overwrite: bool) -> None:
    """Train WORKLOAD from the start and keep a checkpoint of every epoch.

    WORKLOAD is digits-cnn, digits-mlp or package.module:object, a workload of yours.
    """
    from ckptflip.training import harness

    harness.train(workload, epochs, save, seed=seed, label=label, overwrite=overwrite, progress=echo_row)
    click.echo(save / "track.jsonl")


def echo_row(row: Row) -> None:
    """Report one epoch on stderr."""
    parts = [f"epoch {row.epoch:3d}"]
    for name, value in (("train loss", row.train_loss), ("test loss", row.loss), ("accuracy", row.accuracy)):
        if value is not None:
            parts.append(f"{name} {value:.4g}")
    for name, count in (("NaN", row.nan), ("Inf", row.inf), ("extreme", row.extreme)):
        if count:
            parts.append(f"{count} weights {name}")
    click.echo("  ".join([*parts, f"{row.seconds:.2f} s"]), err=True)
