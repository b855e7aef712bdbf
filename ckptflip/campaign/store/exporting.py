"""A store's tables as Parquet or CSV, for whatever analyses them next."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ckptflip.campaign.store.listing import TABLES, Listing, listing
from ckptflip.campaign.store.reading import reading
from ckptflip.checkpoints.files import check_new, new_file
from ckptflip.errors import MissingExtraError, UsageError


def export(store: str | Path, out: str | Path, *, table: str = "values", overwrite: bool = False) -> int:
    """Write a table of a store, of the cells that its spec has.

    ``values`` has one row per trial, epoch and metric, with the clean run's value beside it; ``trials``,
    ``flips``, ``propagation``, ``cells`` and ``clean`` (the clean runs) are what their names say. Swept
    fields are columns. What is not there is null in Parquet and empty in CSV; NaN is NaN.

    Args:
        store: the store; a campaign may be writing it.
        out: the new file: ``.parquet``, ``.csv`` or ``.csv.gz``. It appears when it is whole.
        table: which.
        overwrite: whether `out` may be replaced.

    Returns:
        How many rows it has.

    Raises:
        UsageError: another suffix or table, or `out` exists.
        MissingExtraError: Parquet without pyarrow.
        CampaignError: the store cannot be read.
        CheckpointError: the file cannot be written.
    """
    out = Path(out)
    if table not in TABLES:
        raise UsageError(f"there is no table {table!r}; there are {', '.join(TABLES)}")
    write = _writer(out)
    check_new(out, overwrite=overwrite)
    with reading(store) as reader, new_file(out, overwrite=overwrite) as draft:
        reader.check()
        return write(listing(reader, table), draft)


def _writer(out: Path) -> Callable[[Listing, Path], int]:
    name = out.name.lower()
    if name.endswith(".parquet"):
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise MissingExtraError("pyarrow", "parquet", "writing Parquet") from None
        return _write_parquet
    if name.endswith((".csv", ".csv.gz")):
        return _write_compressed_csv if name.endswith(".gz") else _write_csv
    raise UsageError(f"{out}: the suffix says what is written: .parquet, .csv or .csv.gz")


def _write_parquet(table: Listing, path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {
        "text": pa.string(), "int": pa.int64(), "uint": pa.uint64(), "real": pa.float64(), "flag": pa.bool_(),
    }  # fmt: skip
    schema = pa.schema([(column.name, kinds[column.kind]) for column in (*table.fixed, *table.varying)])
    fixed = [
        pa.array([owner[i] for owner in table.owners], kinds[column.kind])
        for i, column in enumerate(table.fixed)
    ]
    rows = 0
    with pq.ParquetWriter(path, schema) as writer:
        for owner, values in table.batches:
            arrays = [column.take(pa.array(owner)) for column in fixed]
            for column, each in zip(table.varying, values, strict=True):
                arrays.append(pa.array(each, kinds[column.kind]))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            rows += len(owner)
    return rows


def _write_csv(table: Listing, path: Path) -> int:
    with path.open("w", newline="", encoding="utf-8") as file:
        return _put_csv(table, file)


def _write_compressed_csv(table: Listing, path: Path) -> int:
    # Without the time in its header: the same store gives the same file.
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,
        io.TextIOWrapper(packed, newline="", encoding="utf-8") as file,
    ):
        return _put_csv(table, file)


def _put_csv(table: Listing, file: io.TextIOBase) -> int:
    columns = (*table.fixed, *table.varying)
    file.write(",".join(_text(column.name) for column in columns) + "\n")
    # What holds for an owner is written out once: most of every line.
    owners = [",".join(map(_field, owner)) for owner in table.owners]
    rows = 0
    for owner, values in table.batches:
        beside = [_fields(each) for each in values]
        lines = map(",".join, zip((owners[i] for i in owner.tolist()), *beside, strict=True))
        file.write("\n".join(lines) + "\n")
        rows += len(owner)
    return rows


def _fields(column: Any) -> list[str]:
    if not isinstance(column, np.ndarray):
        known = {each: _text(each) for each in set(column)}
        return [known[each] for each in column]
    return [*map(_field, column.tolist())] if np.ma.isMaskedArray(column) else [*map(repr, column.tolist())]


def _field(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return _text(value) if isinstance(value, str) else repr(value)


def _text(text: str) -> str:
    """A field, quoted where RFC 4180 asks for it."""
    if any(c in text for c in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text
