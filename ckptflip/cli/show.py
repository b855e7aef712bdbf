"""`ckptflip show`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from ckptflip.cli.options import HELP, format_option

if TYPE_CHECKING:
    from pathlib import Path

    from ckptflip.faults.record import Record

FIELDS = ("sign", "critical", "exponent", "mantissa", "value")
COLUMNS = ("tensor", "layer", "role", "dtype", "words", "bits", "effective", *FIELDS)
FLIP_COLUMNS = ("tensor", "element", "index", "bits", "before", "after", "value_before", "value_after")


@click.command(context_settings=HELP)
@click.argument("record")
@click.option("--flips", is_flag=True, help="List each fault instead of totals by tensor.")
@format_option
def command(record: str, flips: bool, form: str) -> None:
    """Say what a RECORD did: how many words and bits by tensor and bit field.

    `critical` is the exponent's most significant bit and is not counted under `exponent` again; `value` are
    the bits of integers. `bits` were hit, `effective` ones changed.
    """
    from ckptflip import record_files
    from ckptflip.cli.output import emit, say

    made = record_files.read(record)
    header = made.header
    for policy in header.policies:
        chosen = f"{policy.design} over {policy.selection}, bits {policy.bits}"
        say(f"{header.created}: {policy.amount}, {policy.fault}, {chosen}")
    if flips:
        emit(_flips(made), FLIP_COLUMNS, form)
    else:
        summarise(made, form)
    said(made)


def summarise(record: Record, form: str) -> None:
    """List what a record hit, by tensor."""
    from ckptflip.cli.output import emit

    emit(list(_by_tensor(record)), COLUMNS, form)


def said(
    record: Record, *, dry_run: bool = False, source: Path | None = None, output: Path | None = None
) -> None:
    """Say the totals of a record, and where things are, on standard error.

    Args:
        record: what was done.
        dry_run: nothing was written.
        source: the checkpoint as it was named, where that is known.
        output: the new one likewise; None: it was altered in place.
    """
    from ckptflip.cli.output import many, say

    header, counts = record.header, record.header.counts
    seed = f"seed {header.seed}" if header.seed is not None else f"replay of {header.replay_of}"
    say(
        f"{many(counts.bits_hit, 'bit')} hit in {many(counts.words_hit, 'word')} "
        f"of {many(counts.tensors, 'tensor')}; "
        f"{many(counts.bits_effective, 'bit')} effective ({seed})"
    )
    if header.ranks:
        say(f"ranks: {', '.join(map(str, header.ranks))}")
    if dry_run:
        say("dry run: nothing was written")
    elif record.path and source is not None:
        done = f"{source} was altered in place" if output is None else f"{source} → {output}"
        say(f"{done}, record {record.path}")
    elif record.path and header.checkpoint:  # a running model has no name
        say(f"{header.checkpoint} → {header.output}, checksums: {header.checksum}")


def _by_tensor(record: Record) -> Iterator[dict[str, Any]]:
    import numpy as np

    from ckptflip.bits import popcount

    for tensor, rows in record.plan.by_tensor():
        entry, plan = record.header.tensors[tensor], record.plan.take(rows)
        number = entry.number
        word = (1 << number.part_width) - 1
        masks = {name: number.field(name) & word for name in FIELDS[:-1]}
        masks["exponent"] &= ~masks["critical"]
        masks["value"] = word & ~sum(masks.values())
        yield {
            "tensor": entry.name,
            "layer": entry.layer,
            "role": entry.role,
            "dtype": entry.dtype,
            "words": len(plan),
            "bits": plan.bits_hit,
            "effective": plan.bits_effective,
            **{name: popcount(plan.hit & np.uint64(mask)) for name, mask in masks.items()},
        }


def _flips(record: Record) -> Iterator[dict[str, Any]]:
    from ckptflip.record_files import lines

    for line in lines(record):
        yield {c: getattr(line, c) for c in FLIP_COLUMNS}
