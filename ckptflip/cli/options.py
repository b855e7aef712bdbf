"""Options that several commands share, each group as one decorator."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from ckptflip.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])

# What every command is made with: click keeps the help option of the first context that a command is seen in,
# so that one called alone, without the group, would forget -h for good.
HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
FORMATS = ("table", "json", "ndjson", "csv")
# Below this size the work is over before a progress bar is read.
_WORTH_A_BAR = 1 << 28


class Several(click.ParamType):  # type: ignore[type-arg]
    """A list written with commas; the option may also be repeated."""

    name = "list"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Split at commas."""
        if isinstance(value, tuple):
            return value
        return tuple(part.strip() for part in value.split(",") if part.strip())


def _several(*names: str, metavar: str, help_text: str) -> Callable[[F], F]:
    def flatten(
        _: click.Context, __: click.Parameter, values: tuple[tuple[str, ...], ...]
    ) -> tuple[str, ...]:
        return tuple(part for value in values for part in value)

    return click.option(
        *names, type=Several(), multiple=True, metavar=metavar, callback=flatten, help=help_text
    )


def _grouped(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


tensors_option = _several(
    "-t",
    "--tensors",
    metavar="GLOB,…",
    help_text="Tensors by name: globs on the whole name, on its last part, or on a part that ends at a / or "
    "a dot. !GLOB excludes.",
)

rowwise_option = click.option(
    "--rowwise",
    metavar="LAYOUT",
    help="The tensors are row-wise quantised tables: int8, int4, int2 (ATen), or with -tbe (table-batched); "
    ":D for the dimension of padded rows.",
)

format_option = click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    default="table",
    show_default=True,
    help="Form of the listing.",
)

tensor_options = _grouped(
    tensors_option,
    _several("-l", "--layers", metavar="GLOB,…", help_text="Layers by name; !GLOB excludes."),
    _several(
        "--roles",
        metavar="ROLE,…",
        help_text="weight, bias, norm, statistic, embedding, optimizer, counter, rng, other; "
        "model stands for the first five, state for optimizer, counter and rng.",
    ),
)

selection_options = _grouped(
    tensor_options,
    click.option(
        "--rows",
        metavar="SPEC",
        help="Rows of the first axis, such as 0-99,200 or 0:1000:10; hot:1% or cold:1000 are those read most "
        "or least.",
    ),
    click.option(
        "--rows-weight",
        type=click.Path(),
        metavar="FILE",
        help="How often each row was read: .npy, or .npz with an array per table.",
    ),
    click.option("--slice", metavar="SPEC", help="A slice per axis, such as 0:16,:,3; instead of --rows."),
    rowwise_option,
    _several(
        "--fields", metavar="FIELD,…", help_text="Of such tables: code, scale, bias.  [default: all three]"
    ),
    click.option(
        "--ranks",
        metavar="SPEC",
        help="Parts that these ranks wrote (distributed checkpoints): 0,2-3, or '2 of 8' drawn at random.",
    ),
    click.option(
        "--bits",
        default="all",
        show_default=True,
        metavar="SPEC",
        help="all, sign, exponent, mantissa, critical, msb, 30, 23-30; joined by commas, ! excludes.",
    ),
)

amount_options = _grouped(
    click.option("-n", "--count", type=int, metavar="N", help="This many distinct faults.  [default: 1]"),
    click.option("--fraction", type=float, metavar="F", help="This share of all eligible bits."),
    click.option("--ber", type=float, metavar="P", help="Each eligible bit is hit with this probability."),
    click.option(
        "--fault",
        default="flip",
        show_default=True,
        metavar="SPEC",
        help="flip, set0, set1, burst:N, mask:101101, scale:F or value:X.",
    ),
    click.option(
        "--design",
        type=click.Choice(("uniform", "tensor", "layer")),
        default="uniform",
        show_default=True,
        help="Every eligible bit alike; or a tensor, or a layer, is drawn first.",
    ),
    _several(
        "--forbid", metavar="SPEC,…", help_text="Redraw faults that would give nan, inf or extreme[:1e10]."
    ),
)

destination_options = _grouped(
    click.option(
        "-o",
        "--output",
        type=click.Path(),
        help="The new file.  [default: CKPT with .flipped before its suffix]",
    ),
    click.option("--in-place", is_flag=True, help="Alter CKPT itself; the record is on disk first."),
    click.option("--overwrite", is_flag=True, help="Replace the output and its record if they exist."),
    click.option("--dry-run", is_flag=True, help="Say what would be hit; write nothing."),
)

checksum_help = "What happens to stored checksums that cover altered data."


@contextmanager
def progress_bar(path: str | Path, label: str) -> Iterator[Callable[[int], None] | None]:
    """A progress bar over the bytes of a large file, when somebody is watching."""
    size = Path(path).stat().st_size if Path(path).is_file() else 0
    if size < _WORTH_A_BAR or not sys.stderr.isatty():
        yield None
        return
    with click.progressbar(length=size, label=label, file=sys.stderr) as bar:
        yield bar.update


def picked(checkpoint: str, epoch: int | None, *, folders: bool = False) -> Path:
    """The checkpoint meant by CKPT and --epoch.

    Args:
        checkpoint: CKPT.
        epoch: as asked for.
        folders: whether a folder without an epoch is meant as a whole.

    Raises:
        UsageError: --epoch beside a single checkpoint.
        CheckpointError: there is no such checkpoint.
    """
    if epoch is None and "{" not in checkpoint and not Path(checkpoint).is_dir():
        return Path(checkpoint)
    if folders and epoch is None and Path(checkpoint).is_dir():
        return Path(checkpoint)
    from ckptflip.checkpoints.epochs import is_many, pick
    from ckptflip.checkpoints.registry import find

    if not is_many(checkpoint):
        if epoch is None:
            return Path(checkpoint)
        find(Path(checkpoint))
        raise UsageError(
            "--epoch picks from a folder or a pattern such as ckpt_{epoch:03d}.h5; "
            f"{checkpoint} is a single checkpoint"
        )
    return pick(checkpoint, epoch)


def written(source: Path, output: str | None, in_place: bool) -> Path | None:
    """The new checkpoint's name; None when the old one was altered."""
    from ckptflip.checkpoints.container import flipped_name

    if in_place:
        return None
    return Path(output) if output is not None else flipped_name(source)


workers_option = click.option(
    "--workers", type=int, metavar="N", help="Threads.  [default: one for each processor, at most 8]"
)

epoch_option = click.option(
    "--epoch", type=int, metavar="N", help="When CKPT is a folder, or a pattern such as ckpt_{epoch:03d}.h5."
)
