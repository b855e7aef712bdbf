"""How often each row of a table is read: counted from ids, written for ``--rows-weight``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ckptflip.checkpoints.files import new_file
from ckptflip.errors import UsageError


def count_ids(ids: Iterable[ArrayLike], rows: int) -> NDArray[np.int64]:
    """How often each row is read.

    Args:
        ids: arrays of row numbers, of any shape, such as the batches of a log.
        rows: rows of the table.

    Returns:
        int64[rows].

    Raises:
        UsageError: ids that are no whole numbers, or beyond the table.

    Example:
        >>> count_ids([[0, 2], [2]], rows=4).tolist()
        [1, 0, 2, 0]
    """
    counts = np.zeros(rows, np.int64)
    for batch in ids:
        flat = np.asarray(batch).reshape(-1)
        if not flat.size:
            continue
        if flat.dtype.kind not in "iu":
            raise UsageError(f"ids are whole numbers, not {flat.dtype}")
        outside = flat[(flat < 0) | (flat >= rows)]
        if outside.size:
            raise UsageError(f"id {outside[0]} is beyond the table, which has {rows} rows, numbered from 0")
        # As long as the largest id only: batches are small, tables are not.
        there = np.bincount(flat) if flat.size > rows // 8 else None
        if there is not None:
            counts[: there.size] += there
        else:
            np.add.at(counts, flat, 1)
    return counts


def write_counts(
    path: str | Path, counts: ArrayLike | Mapping[str, ArrayLike], *, overwrite: bool = False
) -> None:
    """Write access counts for ``rows_weight``.

    Args:
        path: ends in ``.npy`` for one table, in ``.npz`` for several.
        counts: of one table, or of several by the names of their tensors.
        overwrite: whether the file may exist.

    Raises:
        UsageError: the file exists, its ending does not fit, or there is something else than counts.
        CheckpointError: it cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "access.npz"
        >>> write_counts(path, {"emb_l.0.weight": [5, 0, 1], "emb_l.1.weight": [2, 9]})
        >>> sorted(np.load(path))
        ['emb_l.0.weight', 'emb_l.1.weight']
    """
    path = Path(path)
    several = isinstance(counts, Mapping)
    if path.suffix != (".npz" if several else ".npy"):
        raise UsageError(f"access counts {path}: name it .npz for several tables by name, .npy for one")
    given = counts if isinstance(counts, Mapping) else {"": counts}
    arrays = {name: np.asarray(each) for name, each in given.items()}
    for name, array in arrays.items():
        _check(name, array)
    if not arrays:
        raise UsageError(f"access counts {path}: there are no tables to write counts of")
    with new_file(path, overwrite=overwrite) as temporary, temporary.open("wb") as file:
        if several:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        else:
            np.save(file, arrays[""])


def _check(name: str, counts: NDArray[Any]) -> None:
    """Refuse what would be refused when it is read."""
    said = f"access counts of {name}" if name else "access counts"
    if counts.ndim != 1 or counts.dtype.kind not in "iuf":
        raise UsageError(
            f"{said} are integers or floats of one axis, a count per row; not {counts.dtype} {counts.shape}"
        )
    wrong = counts[~(np.isfinite(counts) & (counts >= 0))]
    if wrong.size:
        raise UsageError(f"{said}: a count is {wrong[0]}; counts are finite numbers from 0")
