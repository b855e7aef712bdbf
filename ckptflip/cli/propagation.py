"""`ckptflip propagation`."""

from __future__ import annotations

from pathlib import Path

import click

from ckptflip.cli.options import HELP, format_option, progress_bar, tensor_options

COLUMNS = (
    *("layer", "elements", "changed", "share", "from_zero", "nev"),
    *("minimum", "lower", "median", "upper", "maximum", "mean"),
)


@click.command(context_settings=HELP)
@click.argument("clean")
@click.argument("faulty")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Box plots: .png, .svg or .pdf.")
@tensor_options
@click.option(
    "--threshold", type=float, default=1e10, show_default="1e10", help="Above this, a value is extreme."
)
@click.option("--title", help="Title over the figure.")
@format_option
def command(
    clean: str,
    faulty: str,
    output: Path | None,
    tensors: tuple[str, ...],
    layers: tuple[str, ...],
    roles: tuple[str, ...],
    threshold: float,
    title: str | None,
    form: str,
) -> None:
    """Say by layer how far the checkpoint FAULTY lies from CLEAN, both of the same epoch.

    Lists the relative differences (A2−A1)/|A1| of the elements: minimum, quartiles, maximum, mean; 0 where
    nothing changed. Elements that were 0 and no longer are (from_zero), and NaN, infinite and extreme ones
    (nev) have none and are counted apart. By default of the model's tensors (--roles model), or of those
    that --tensors names.
    """
    from msgspec.structs import asdict

    from ckptflip.cli.output import emit, say
    from ckptflip.propagation import propagation
    from ckptflip.report.propagation import SUFFIXES, plot

    if output is not None and output.suffix.lower() not in SUFFIXES:
        raise click.UsageError(f"{output}: a figure's name ends in {', '.join(SUFFIXES)}")
    with progress_bar(clean, "comparing") as progress:
        rows = propagation(
            clean, faulty, tensors=tensors, layers=layers, roles=roles or None, threshold=threshold,
            progress=progress,
        )  # fmt: skip
    emit([asdict(r) | {"share": r.changed_share} for r in rows], COLUMNS, form)
    changed = sum(r.changed for r in rows)
    say(
        f"{changed} of {sum(r.elements for r in rows)} elements differ, "
        f"in {sum(r.changed > 0 for r in rows)} of {len(rows)} layers"
    )
    if output is not None:
        plot(rows, output, title=title)
        say(f"→ {output}")
