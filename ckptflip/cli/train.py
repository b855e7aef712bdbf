"""``ckptflip train``: a clean run, one checkpoint per epoch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ckptflip.training.track import Row


def workload_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of the vision models, as `options` in one dict; those not given are left to the workload."""
    listed = (
        click.option("--data", metavar="DATA", help="digits, cifar10:DIR, cifar100:DIR, or DIR."),
        click.option("--precision", metavar="P", help="fp32, fp64, fp16, bf16, mixed-fp16 or mixed-bf16."),
        click.option("--width", type=float, metavar="F", help="Multiply the model's channels, as 0.25."),
        click.option("--augment/--no-augment", default=None, help="Random crops and flips, or none."),
        click.option("--subset", type=int, metavar="N", help="Use N training and test samples only."),
    )

    @functools.wraps(command)
    def called(**given: Any) -> Any:
        names = ("data", "precision", "width", "augment", "subset")
        chosen = {name: given.pop(name) for name in names}
        return command(options={name: one for name, one in chosen.items() if one is not None}, **given)

    wrapped: Callable[..., Any] = called
    for option in reversed(listed):
        wrapped = option(wrapped)
    return wrapped


@click.command("train")
@click.argument("workload")
@click.option("--epochs", type=int, required=True, metavar="N", help="Epochs to train.")
@click.option(
    "--save", type=click.Path(path_type=Path, file_okay=False), required=True, metavar="DIR",
    help="Folder for epoch_000.h5 (Keras: epoch_000.keras), epoch_001.h5, … and track.jsonl.",
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
@workload_options
def command(
    workload: str, epochs: int, save: Path, seed: int, label: str | None, overwrite: bool,
    options: dict[str, Any],
) -> None:  # fmt: skip
    """Train WORKLOAD from the start and keep a checkpoint of every epoch.

    WORKLOAD is digits-cnn, digits-mlp, alexnet, resnet18, resnet50 or vgg16, the Keras twin of one of these
    (digits-cnn-keras), or package.module:object, a workload of yours. The last five options are the vision
    models'.
    """
    from ckptflip.training import find, harness

    harness.train(
        find(workload, **options),
        epochs,
        save,
        seed=seed,
        label=label,
        overwrite=overwrite,
        progress=echo_row,
    )
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
