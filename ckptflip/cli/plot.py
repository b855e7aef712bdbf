"""``ckptflip plot``: faulty curves against the clean one."""

from __future__ import annotations

from pathlib import Path

import click

from ckptflip.cli.options import HELP


@click.command("plot", context_settings=HELP)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", type=click.Path(path_type=Path, dir_okay=False), default="convergence.png",
    show_default=True, help="The figure: .png, .svg or .pdf.",
)  # fmt: skip
@click.option(
    "--metric", default="accuracy", show_default=True,
    help="accuracy, loss, train_loss, grad_norm, or another value that the tracks hold.",
)  # fmt: skip
@click.option(
    "--clean", type=click.Path(path_type=Path), metavar="RUN",
    help="The clean run. Default: every run whose track says that nothing was altered.",
)  # fmt: skip
@click.option("--title", help="Title over the figure.")
def command(runs: tuple[Path, ...], out: Path, metric: str, clean: Path | None, title: str | None) -> None:
    """Draw the curves of RUNs, altered against clean.

    Each RUN is a track (a .jsonl file) or the folder of a run, which holds track.jsonl. Runs of the same
    label share a colour.
    """
    from ckptflip.report import convergence

    convergence.plot(runs, out, metric, clean=clean, title=title)
    click.echo(out)
