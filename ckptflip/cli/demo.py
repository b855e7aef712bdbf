"""``ckptflip demo``: the whole story on the built-in digits."""

from __future__ import annotations

from pathlib import Path

import click

from ckptflip.cli.options import HELP


@click.command("demo", context_settings=HELP)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", default="demo",
    show_default=True,
    help="Folder for checkpoints, records, tracks and the figure; a former demo there is replaced.",
)  # fmt: skip
@click.option(
    "--seeds", type=int, default=5, show_default=True, metavar="N", help="Altered copies per condition."
)
def command(out: Path, seeds: int) -> None:
    """Train, flip, resume, compare and draw, on scikit-learn's digits; in less than a minute."""
    from ckptflip import demo

    findings = demo.run(out, seeds, progress=lambda line: click.echo(line, err=True))
    click.echo(findings.table())
    click.echo()
    for sentence in findings.conclusions():
        click.echo(sentence)
    click.echo(f"Figure: {findings.figure}")
