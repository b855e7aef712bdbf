"""``ckptflip train``: a clean run, one checkpoint per epoch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptflip.cli.options import HELP

if TYPE_CHECKING:
    from ckptflip.training.track import Row


def _pairs(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """Options as a dict; a value that is JSON counts as that, any other as text."""
    import json

    found: dict[str, Any] = {}
    for pair in values:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip():
            raise click.BadParameter(f"{pair!r}: write KEY=VALUE, as in config=kaggle")
        try:
            found[name.strip().replace("-", "_")] = json.loads(text)
        except ValueError:
            found[name.strip().replace("-", "_")] = text
    return found


def workload_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of the vision models, as `options` in one dict; those not given are left to the workload."""
    listed = (
        click.option("--data", metavar="DATA", help="digits, cifar10:DIR, cifar100:DIR, or DIR."),
        click.option("--precision", metavar="P", help="fp32, fp64, fp16, bf16, mixed-fp16 or mixed-bf16."),
        click.option("--width", type=float, metavar="F", help="Multiply the model's channels, as 0.25."),
        click.option("--augment/--no-augment", default=None, help="Random crops and flips, or none."),
        click.option("--subset", type=int, metavar="N", help="Use N training and test samples only."),
        click.option(
            "-O", "--option", "others", multiple=True, metavar="KEY=VALUE", callback=_pairs,
            help="Any option of the workload, such as -O config=kaggle.",
        ),
    )  # fmt: skip

    @functools.wraps(command)
    def called(**given: Any) -> Any:
        names = ("data", "precision", "width", "augment", "subset")
        chosen = {name: given.pop(name) for name in names}
        others = given.pop("others")
        return command(
            options={name: one for name, one in chosen.items() if one is not None} | others, **given
        )

    wrapped: Callable[..., Any] = called
    for option in reversed(listed):
        wrapped = option(wrapped)
    return wrapped


def _cost(_: click.Context, __: click.Parameter, text: str | None) -> float | None:
    """Of --seal: None without it, 0 for digests alone."""
    from ckptflip.cli.seal import share

    return share(text)


seal_option = click.option(
    "--seal", is_flag=False, flag_value="0", metavar="[=COST]", callback=_cost,
    help="Seal each checkpoint as it is saved; with =5%, so that lost blocks can be repaired.",
)  # fmt: skip


@click.command("train", context_settings=HELP)
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
@seal_option
@workload_options
def command(
    workload: str, epochs: int, save: Path, seed: int, label: str | None, overwrite: bool,
    seal: float | None, options: dict[str, Any],
) -> None:  # fmt: skip
    """Train WORKLOAD from the start and keep a checkpoint of every epoch.

    WORKLOAD is digits-cnn, digits-mlp, alexnet, resnet18, resnet50 or vgg16, the Keras twin of one of these
    (digits-cnn-keras), dlrm, fm, deepfm, wide-deep, dcn, dcn-v2, afm, served (one of the last seven with
    its tables quantised), dummy-dlrm, sharded (another workload, its checkpoints distributed) or
    package.module:object, one of yours. --data to --subset are the vision models'; -O gives any workload
    its options.
    """
    from ckptflip.training import find, harness

    with notes_shown():
        harness.train(
            find(workload, **options),
            epochs,
            save,
            seed=seed,
            label=label,
            overwrite=overwrite,
            seal=seal,
            progress=echo_row,
        )
    click.echo(save / "track.jsonl")


@contextmanager
def notes_shown() -> Iterator[None]:
    """Show on stderr what the library says of work that takes its time, such as making a click log."""
    import logging

    logger, handler = logging.getLogger("ckptflip"), logging.StreamHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def echo_row(row: Row) -> None:
    """Report one epoch on stderr."""
    parts = [f"epoch {row.epoch:3d}"]
    measured = (
        ("train loss", row.train_loss), ("test loss", row.loss), ("accuracy", row.accuracy),
        ("AUC", row.extra.get("auc")),
    )  # fmt: skip
    for name, value in measured:
        if value is not None:
            parts.append(f"{name} {value:.4g}")
    for name, count in (("NaN", row.nan), ("Inf", row.inf), ("extreme", row.extreme)):
        if count:
            parts.append(f"{count} weights {name}")
    click.echo("  ".join([*parts, f"{row.seconds:.2f} s"]), err=True)
