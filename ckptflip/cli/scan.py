"""`ckptflip scan`."""

from __future__ import annotations

import click

from ckptflip.cli.options import HELP, epoch_option, format_option, picked, progress_bar, tensors_option

COLUMNS = ("tensor", "elements", "nan", "inf", "extreme", "outliers", "minimum", "maximum", "first")


@click.command(context_settings=HELP)
@click.argument("ckpt")
@tensors_option
@epoch_option
@click.option(
    "--threshold", type=float, default=1e10, show_default="1e10", help="Above this, a value is extreme."
)
@click.option("--all", "every", is_flag=True, help="List tensors in which nothing stands out, too.")
@format_option
@click.pass_context
def command(
    ctx: click.Context,
    ckpt: str,
    tensors: tuple[str, ...],
    epoch: int | None,
    threshold: float,
    every: bool,
    form: str,
) -> None:
    """Look for NaN, infinite, extreme and outlying values in CKPT.

    Outliers are at least 1024 times larger than their tensor's median magnitude: worth a look, proof
    of nothing. Minimum and maximum are of finite values. `first` is the flat index of the first NaN,
    infinite or extreme element. Exit code 3 when there is one of those.
    """
    from msgspec import structs

    from ckptflip.cli.output import emit, say
    from ckptflip.compare import scan

    path = picked(ckpt, epoch)
    with progress_bar(path, "scanning") as progress:
        rows = scan(path, tensors=tensors, threshold=threshold, progress=progress)
    shown = [r for r in rows if every or r.nev or r.outliers]
    emit([structs.asdict(r) for r in shown], COLUMNS, form)
    found = sum(r.nev for r in rows)
    say(
        f"{len(rows)} floating-point tensors; {found} NaN, infinite or extreme values, "
        f"{sum(r.outliers for r in rows)} outliers"
    )
    ctx.exit(3 if found else 0)
