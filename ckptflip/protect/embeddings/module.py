"""An embedding bag that checks what it looks up: a stand-in for PyTorch's, float or quantised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptflip.errors import DetectedError, MissingExtraError, UsageError

try:
    import torch
except ImportError as error:
    raise MissingExtraError("torch", "torch", "Protected embedding bags") from error

from ckptflip.protect.embeddings.ids import seal_ids
from ckptflip.protect.embeddings.kept import KeptRows
from ckptflip.protect.embeddings.look_up import ARITHMETIC, Bags, Found, bags_of, look_up, verdict_of
from ckptflip.protect.embeddings.rows import Row
from ckptflip.protect.embeddings.tables import (
    bad_rows,
    check_layout,
    protect_table,
    protected_rows,
    row_of_protected,
    unprotect_table,
)

Restore = Callable[[torch.Tensor], torch.Tensor]
REACTIONS = ("raise", "count", "recompute", "restore", "zero")


@dataclass(slots=True)
class Counts:
    """What a protected table has seen.

    Attributes:
        calls, bags: looked up.
        unsound: bags that were found unsound when they were first looked up.
        recomputed: bags that were sound when they were looked up once more.
        restored, zeroed: rows.
        altered_ids: calls whose ids did not fit their seal.
    """

    calls: int = 0
    bags: int = 0
    unsound: int = 0
    recomputed: int = 0
    restored: int = 0
    zeroed: int = 0
    altered_ids: int = 0


class ProtectedEmbeddingBag(torch.nn.Module):  # type: ignore[misc]
    """Sums or means of a protected table's rows, every row and every addition checked.

    For inference: it has no gradients. Its table is the buffer ``weight``, as `protect_table` gives it; other
    modules may hold it, and `ckptflip.live` hits it, as any buffer.

    Args:
        table: protected, uint8[rows, bytes of a row], float32 or bfloat16[rows, D + check columns].
        layout: see `protect_table`.
        mode: ``sum`` or ``mean``.
        include_last_offset, padding_idx: as for `torch.nn.EmbeddingBag`.
        on_error: what is done where something is found: ``raise`` a DetectedError; ``count`` it and go on
            with what came out; ``recompute`` those bags, and raise if they are unsound again; ``restore`` the
            damaged rows and recompute; ``zero`` the damaged rows, for good, and recompute.
        restore: gives rows as they were before they were protected, by their numbers: int64[k] to [k, stored
            row]. For ``restore``; a `ckptflip.protect.embeddings.kept.KeptRows` has a copy of the table, and
            takes another where `load_state_dict` brings one.
        threads: how many share the bags of a call; only the compiled kernel does.
        name: of the table, for messages.

    Attributes:
        counts: what was seen so far.

    Raises:
        SelectionError, UsageError: arguments that make no sense.

    Example:
        >>> bag = ProtectedEmbeddingBag.from_float(torch.rand(10, 4), "int8", on_error="count")
        >>> bag(torch.tensor([[1, 2], [3, 3]])).shape
        torch.Size([2, 4])
        >>> bag.weight[3, 0] ^= 16
        >>> _ = bag(torch.tensor([[1, 2], [3, 3]]))
        >>> bag.verdict.tolist(), bag.counts.unsound
        ([0, 3], 1)
    """

    weight: torch.Tensor

    def __init__(
        self,
        table: torch.Tensor,
        layout: str,
        *,
        mode: str = "sum",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        on_error: str = "raise",
        restore: Restore | None = None,
        threads: int = 1,
        name: str = "without a name",
    ) -> None:
        super().__init__()
        check_layout(layout)
        if mode not in ("sum", "mean"):
            raise UsageError(f"table {name}: mode is sum or mean, not {mode!r}")
        if on_error not in REACTIONS or (on_error == "restore") != (restore is not None):
            raise UsageError(
                f"table {name}: on_error is one of {', '.join(REACTIONS)}, not {on_error!r}; "
                "restore=FUNCTION goes with 'restore' alone"
            )
        if padding_idx is not None and not -table.shape[0] <= padding_idx < table.shape[0]:
            raise UsageError(
                f"table {name} has {table.shape[0]} rows, and no row {padding_idx} for padding_idx"
            )
        if not isinstance(threads, int) or threads < 1:
            raise UsageError(f"table {name}: threads is a number from 1 on, not {threads!r}")
        bare_name = layout.partition(":")[0]
        array = torch.empty(0, table.shape[1], dtype=table.dtype) if table.dim() == 2 else table
        self.row: Row = row_of_protected(_numpy(array, bare_name), layout)
        self.layout, self.mode, self.include_last_offset = layout, mode, include_last_offset
        self.padding_idx = None if padding_idx is None else padding_idx % max(table.shape[0], 1)
        self.on_error, self.restore, self.threads, self.name = on_error, restore, threads, name
        self.counts = Counts()
        self._verdicts = bytearray()
        self._width, self._padding = self.row.width, -1 if self.padding_idx is None else self.padding_idx
        self.register_buffer("weight", table.contiguous())
        self._rows = int(table.shape[0])
        self._plan = self.row.plan(self._rows)

    @classmethod
    def from_float(cls, table: torch.Tensor, layout: str, **options: Any) -> ProtectedEmbeddingBag:
        """From a table in float, which is quantised as ATen does it where `layout` is one of codes.

        Args:
            table: float[rows, D].
            layout: see `protect_table`.
            options: as for the class.
        """
        from ckptflip.recsys.tables import quantise

        check_layout(layout)
        if layout.startswith("int"):
            stored = torch.from_numpy(quantise(table.detach().float().numpy(), layout))
        else:
            stored = table.detach().to(torch.bfloat16 if layout == "bf16" else torch.float32)
        return cls(protect_table(stored, layout), layout, **options)

    @property
    def verdict(self) -> torch.Tensor:
        """What was found in the last call, as first looked up.

        uint8[bags]: 0, or the sum of 1 (values), 2 (tag: values, scale, bias or row number) and 4
        (arithmetic).
        """
        return verdict_of(self._verdicts)

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return int(self.weight.shape[0])

    @property
    def embedding_dim(self) -> int:
        """Columns of the table."""
        return self.row.dim

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
        *,
        seal: int | None = None,
    ) -> torch.Tensor:
        """As `torch.nn.EmbeddingBag.forward`, without gradients.

        Args:
            input: int32 or int64[bags, length], or [n] with offsets.
            offsets: int32 or int64[bags], or [bags + 1] with `include_last_offset`.
            per_sample_weights: float, of the shape of `input`; for sums alone.
            seal: what `ckptflip.protect.embeddings.ids.seal_ids` gave for `input` and `offsets` where they
                were made. It is looked at before the look-up. Nothing brings altered ids back: they are
                counted with ``on_error="count"``, and raise otherwise.

        Returns:
            float32[bags, D]; bfloat16 of a table in bfloat16.

        Raises:
            UsageError: ids beyond the table, and arguments that make no sense.
            DetectedError: something was found, and `on_error` does not mend it.
        """
        if per_sample_weights is not None and self.mode != "sum":
            raise UsageError(f"table {self.name}: per_sample_weights are for mode='sum' alone")
        if seal is not None:
            self._check_seal(input, offsets, seal)
        last = self.include_last_offset and input.dim() == 1
        bags = bags_of(input, offsets, per_sample_weights, last, self.name)
        found = self._look_up(bags)
        counts = self.counts
        counts.calls += 1
        counts.bags += bags.count
        # Past PyTorch's own way of setting attributes, which takes longer than a small bag.
        self.__dict__["_verdicts"] = found.verdicts
        if found.unsound:
            counts.unsound += found.unsound
            self._react(bags, found)
        return found.values.to(torch.bfloat16) if self.row.layout == "bf16" else found.values

    def scrub(self) -> list[int]:
        """The rows of the whole table that do not fit their check bytes."""
        found: list[int] = bad_rows(self.weight, self.layout).tolist()
        return found

    def unprotected(self) -> torch.Tensor:
        """The table as it was before it was protected."""
        table: torch.Tensor = unprotect_table(self.weight, self.layout)
        return table

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, layout={self.layout}, mode={self.mode}"

    def _check_seal(self, ids: torch.Tensor, offsets: torch.Tensor | None, seal: int) -> None:
        found = seal_ids(ids, offsets)
        if found == seal:
            return
        self.counts.altered_ids += 1
        if self.on_error != "count":
            raise DetectedError(
                f"table {self.name}: the ids are not those that were sealed: {found:#018x}, and the seal is "
                f"{seal:#018x}. Fetch the batch anew"
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if isinstance(self.restore, KeptRows) and f"{prefix}weight" in state_dict:
            self.restore.renew(self.weight)

    def _look_up(self, bags: Bags) -> Found:
        weight = self._buffers["weight"]
        assert weight is not None
        rows, columns = weight.shape
        if not (weight.is_cpu and weight.is_contiguous() and columns * weight.itemsize == self._width):
            raise UsageError(
                f"table {self.name} is {weight.dtype} {tuple(weight.shape)} on {weight.device}: a protected "
                "table stays on the CPU, and as protect_table gave it"
            )
        if rows != self._rows:
            self._rows = rows
            self._plan = self.row.plan(self._rows)
        return look_up(
            weight,
            self.row,
            self._plan,
            bags,
            mean=self.mode == "mean",
            padding=self._padding,
            threads=self.threads,
            name=self.name,
        )

    def _react(self, bags: Bags, found: Found) -> None:
        """Do with unsound bags what `on_error` says; their values are put in place."""
        if self.on_error == "count":
            return
        unsound = found.verdict.nonzero().squeeze(1)
        if self.on_error != "raise":
            rows = self._damaged(bags)
            if self.on_error in ("restore", "zero") and rows.numel():
                self._replace(rows)
            again = self._look_up(bags)
            found.values.copy_(again.values)
            self.counts.recomputed += int((again.verdict[unsound] == 0).sum())
            if not again.unsound:
                return
            found = again
            unsound = found.verdict.nonzero().squeeze(1)
        raise DetectedError(self._message(bags, found, int(unsound[0]), unsound.numel()))

    def _damaged(self, bags: Bags) -> torch.Tensor:
        bounds = bags.bounds()
        return torch.from_numpy(bad_rows(self.weight, self.layout, bags.ids[bounds[0] : bounds[-1]]))

    def _replace(self, rows: torch.Tensor) -> None:
        """Put restored rows, or zeros, in the place of damaged ones."""
        if self.restore is not None:
            try:
                given = self.restore(rows)
            except DetectedError as error:
                raise DetectedError(f"table {self.name}: {error}") from None
            stored = _numpy(given, self.row.layout)
            fresh = np.ascontiguousarray(stored).view(np.uint8).reshape(rows.numel(), -1)
            if fresh.shape[1] != self.row.stored_width:
                raise UsageError(
                    f"table {self.name}: restore gave rows of {fresh.shape[1]} bytes, and stored rows have "
                    f"{self.row.stored_width}"
                )
            self.counts.restored += rows.numel()
        else:
            fresh = np.zeros((rows.numel(), self.row.stored_width), np.uint8)
            self.counts.zeroed += rows.numel()
        bytes_of = torch.from_numpy(protected_rows(fresh, self.row, rows.numpy().astype(np.uint64)))
        self.weight.view(torch.uint8)[rows] = bytes_of

    def _message(self, bags: Bags, found: Found, first: int, many: int) -> str:
        rows = self._damaged(bags).tolist()
        verdict = int(found.verdict[first])
        what = (
            "rows do not fit their check bytes"
            if verdict & ~ARITHMETIC
            else "two additions gave different sums"
        )
        where = f"; damaged rows: {', '.join(map(str, rows[:8]))}{', …' * (len(rows) > 8)}" if rows else ""
        more = f" and {many - 1} more" if many > 1 else ""
        return (
            f"table {self.name}: bag {first}{more}: {what}{where}. Load the table anew, or use "
            "on_error='restore' with a source of its rows"
        )


def _numpy(table: torch.Tensor, layout: str) -> Any:
    from ml_dtypes import bfloat16

    if layout == "bf16" and table.dtype == torch.bfloat16:
        return table.contiguous().view(torch.int16).numpy().view(bfloat16)
    return table.contiguous().numpy() if table.dtype != torch.bfloat16 else table.float().numpy()
