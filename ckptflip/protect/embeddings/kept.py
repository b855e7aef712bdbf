"""A copy of a protected table: the source that its damaged rows are restored from."""

from __future__ import annotations

from ckptflip.errors import DetectedError, MissingExtraError

try:
    import torch
except ImportError as error:
    raise MissingExtraError("torch", "torch", "Protected embedding bags") from error

from ckptflip.protect.embeddings.tables import bad_rows, unprotect_table


class KeptRows:
    """Gives rows of a copy that is kept with its check bytes: what is damaged itself is not given.

    A bag that has it as its `restore` takes the copy anew where `load_state_dict` brings another table.

    Args:
        table: as `protect_table` gave it; it is copied.
        layout: of the table.

    Raises:
        SelectionError, UsageError: as for `protect_table`.

    Example:
        >>> from ckptflip.protect.embeddings import protect_table
        >>> kept = KeptRows(protect_table(torch.eye(3), "fp32"), "fp32")
        >>> kept(torch.tensor([2])).tolist()
        [[0.0, 0.0, 1.0]]
    """

    def __init__(self, table: torch.Tensor, layout: str) -> None:
        self.layout = layout
        self.renew(table)

    def renew(self, table: torch.Tensor) -> None:
        """Copy another table.

        Args:
            table: of the same layout.
        """
        self.table = table.detach().clone()

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows without their check bytes, [k, stored row].

        Args:
            rows: their numbers, int64[k].

        Raises:
            DetectedError: some are damaged in the copy, too.
        """
        damaged = bad_rows(self.table, self.layout, rows).tolist()
        if damaged:
            raise DetectedError(
                f"{'row' if len(damaged) == 1 else 'rows'} {', '.join(map(str, damaged[:8]))}"
                f"{', …' * (len(damaged) > 8)} cannot be restored: damaged in the copy that was kept "
                "when the table was protected or loaded, too. Load a table that is sound"
            )
        stored: torch.Tensor = unprotect_table(self.table[rows], self.layout)
        return stored
