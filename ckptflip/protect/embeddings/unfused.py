"""Checks of int8 bags around ATen's unmodified operator: the published rule, and the in-row checksum.

Both are here to be measured beside the fused kernel, and for processors without it. Neither is exact: they
compare sums of floats, with a threshold.
"""

from __future__ import annotations

from ckptflip.errors import MissingExtraError

try:
    import torch
except ImportError as error:
    raise MissingExtraError("torch", "torch", "Protected embedding bags") from error

from ckptflip.protect.embeddings.rows import Row

_bags = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
PUBLISHED = 1e-5  # arXiv 2103.00130
IN_ROW = 4e-7


class Published:
    """The published rule: the sum of a bag's outputs against that of scale · row sum + D · bias.

    Source: arXiv 2103.00130; the row sums of the codes are kept beside the table.

    Args:
        table: uint8[rows, D + 8], as ATen packs it.

    Example:
        >>> table = torch.ops.quantized.embedding_bag_byte_prepack(torch.rand(20, 16))
        >>> out, flagged = Published(table)(torch.tensor([1, 2, 3]), torch.tensor([0, 2]), 2)
        >>> out.shape, flagged.tolist()
        (torch.Size([2, 16]), [False, False])
    """

    def __init__(self, table: torch.Tensor) -> None:
        self.table, self.dim = table, table.shape[1] - 8
        blocks = [b[:, : self.dim].sum(1, dtype=torch.int32) for b in table.split(1 << 16)]
        self.sums = torch.cat(blocks).float()

    def __call__(
        self, ids: torch.Tensor, offsets: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums of bags, float32[count, D], and which are flagged, bool[count]."""
        out = _bags(self.table, ids, offsets, False, 0, False, None)
        numbers = self.table[:, self.dim :].index_select(0, ids).view(torch.float32)
        each = torch.addcmul(numbers[:, 1] * self.dim, numbers[:, 0], self.sums[ids])
        lengths = _lengths(ids, offsets)
        expected = torch.zeros(count).index_add_(0, torch.repeat_interleave(lengths), each)
        found = out.sum(1)
        return out, (found - expected).abs() > PUBLISHED * torch.maximum(found.abs(), expected.abs())


class InRow:
    """The in-row checksum: the digits of a row's sum are added up with its codes, by one unmodified operator.

    In exact arithmetic Σ columns − Σ weight · digit column is 0, whatever the scales, biases and weights of
    the look-ups. It says nothing of scale, bias and the row's number.

    Args:
        table: of `protect_table`, int8.
        sound: take the threshold that no round-off can pass, instead of 4e-7 of the magnitudes.
        mean: give means of the bags instead of sums. Sums are what is checked; the division is not.

    Example:
        >>> from ckptflip.protect.embeddings import protect_table
        >>> stored = torch.ops.quantized.embedding_bag_byte_prepack(torch.rand(20, 16))
        >>> out, flagged = InRow(protect_table(stored, "int8"))(torch.tensor([1, 2]), torch.tensor([0, 1]), 2)
        >>> out.shape, flagged.tolist()
        (torch.Size([2, 16]), [False, False])
    """

    def __init__(self, table: torch.Tensor, sound: bool = False, mean: bool = False) -> None:
        self.table, self.row = table, Row("int8", _dim(table.shape[1]))
        self.sound, self.mean = sound, mean
        signs = torch.zeros(self.row.aten_columns)
        signs[: self.row.dim] = 1
        for place, weight in enumerate(self.row.weights):
            signs[self.row.first_digit + place] = -weight
        self.signs, self.magnitudes = signs, signs.abs()
        # The most that one look-up adds to a column: |scale| · 255 + |bias| of any row.
        numbers = table[:, -8:].contiguous().view(torch.float32).abs()
        self.reach = float((numbers[:, 0] * 255 + numbers[:, 1]).max()) if table.shape[0] else 0.0

    def __call__(
        self, ids: torch.Tensor, offsets: torch.Tensor, count: int, weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums or means of bags, float32[count, D], and which are flagged, bool[count]."""
        out = _bags(self.table, ids, offsets, False, 0, False, weights)
        residual = torch.mv(out, self.signs).abs()
        if self.sound:
            threshold = self._round_off(ids, offsets, count, weights)
        else:
            threshold = IN_ROW * torch.mv(out.abs(), self.magnitudes)
        values = out[:, : self.row.dim].contiguous()
        if self.mean:
            values /= _lengths(ids, offsets).clamp(min=1).unsqueeze(1)
        return values, residual > threshold

    def _round_off(
        self, ids: torch.Tensor, offsets: torch.Tensor, count: int, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """What the residual can be by rounding alone, float32[count].

        A column is rounded twice for each of its n look-ups, and the residual adds as many numbers as there
        are columns: γ(2n + columns + 1) times the sum of all magnitudes, with γ(k) = k·u / (1 − k·u) and
        u = 2^-24. Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, lemma 3.1 and
        section 4.2.
        """
        lengths = _lengths(ids, offsets)
        roundings = (2 * lengths + self.row.aten_columns + 1).double() * 2.0**-24
        added = lengths.double()
        if weights is not None:
            bags = torch.repeat_interleave(lengths)
            added = torch.zeros(count, dtype=torch.float64).index_add_(0, bags, weights.abs().double())
        total = added * self.reach * float(self.magnitudes.sum())
        return (roundings / (1 - roundings) * total).float()


def _lengths(ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return torch.diff(offsets, append=torch.tensor([ids.numel()]))


def _dim(width: int) -> int:
    return width - 12 if width - 12 <= 257 else width - 16
