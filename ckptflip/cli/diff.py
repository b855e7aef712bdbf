"""`ckptflip diff`."""

from __future__ import annotations

import click

from ckptflip.cli.options import HELP, format_option, progress_bar, rowwise_option, tensors_option

COLUMNS = ("tensor", "status", "words", "bits", "max_abs", "relative_l2", "max_ulp", "nev_a", "nev_b", "note")


@click.command(context_settings=HELP)
@click.argument("a")
@click.argument("b")
@tensors_option
@rowwise_option
@click.option("--all", "every", is_flag=True, help="List tensors that are the same, too.")
@click.option(
    "--threshold", type=float, default=1e10, show_default="1e10", help="Above this, a value is extreme."
)
@format_option
@click.pass_context
def command(
    ctx: click.Context,
    a: str,
    b: str,
    tensors: tuple[str, ...],
    rowwise: str | None,
    every: bool,
    threshold: float,
    form: str,
) -> None:
    """Compare two checkpoints A and B, tensor by tensor and bit by bit.

    Lists words and bits that differ, the largest |B−A|, the relative L2 distance, the largest
    distance in representable numbers (ULP), and NaN, infinite and extreme values (nev) in each.
    Distances are over values finite in both; a note says how many changed ones are not. Exit code 3
    when they differ.
    """
    from msgspec import structs

    from ckptflip.cli.output import emit, many, say
    from ckptflip.compare import diff, has_difference

    with progress_bar(a, "comparing") as progress:
        rows = diff(a, b, tensors=tensors, rowwise=rowwise, threshold=threshold, progress=progress)
    shown = [r for r in rows if every or r.status != "same"]
    emit([structs.asdict(r) for r in shown], COLUMNS, form)
    words, bits = sum(r.words for r in rows), sum(r.bits for r in rows)
    same = sum(r.status == "same" for r in rows)
    differ = f"{many(words, 'word')} and {many(bits, 'bit')} differ"
    say(f"{same} of {many(len(rows), 'tensor')} are the same; {differ}")
    ctx.exit(3 if has_difference(rows) else 0)
