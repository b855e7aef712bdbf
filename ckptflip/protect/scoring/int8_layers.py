"""Layers that compute with int8 as it lies in memory: packed matrices with checksum columns, protected rows.

Their buffers are what a fault hits. What they were made of is kept beside them, and never hit: the numbers
that a check compares with, and the scales of the inputs.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ckptflip.errors import UsageError
from ckptflip.protect.embeddings.rows import Row
from ckptflip.protect.embeddings.tables import bad_rows, row_of_protected
from ckptflip.protect.gemm.checked import Checked
from ckptflip.protect.gemm.packing import SCHEMES, pack
from ckptflip.protect.gemm.quantised import Quantised, codes_of


class Int8Linear(torch.nn.Module):  # type: ignore[misc]
    """A linear layer on floats, by an int8 product of the matrix as it lies in memory; each row is checked.

    The buffers are ``weight``, int8 of shape (width, k): the matrix as it is packed, with the columns of the
    exact checksum and padding; ``weight_scale``, float32 of shape (n,); and ``bias``, if there is one.

    Args:
        layer: the clean numbers, with a scale of the input.

    Attributes:
        scheme: which check is made: ``exact`` by the columns of the buffer as they are; ``mod127`` by clean
            columns of the published scheme beside the outputs of the buffer.
        faulty: whether a row did not hold, in any call since it was set to False. Nothing else is done.

    Example:
        >>> layer = Int8Linear(Quantised(torch.eye(3, dtype=torch.int8), torch.ones(3), x_scale=0.5))
        >>> layer(torch.tensor([[1.0, 2.0, 3.0]])), layer.faulty
        (tensor([[1., 2., 3.]]), False)
        >>> layer.weight[1, 1] ^= 4
        >>> layer(torch.tensor([[1.0, 2.0, 3.0]])), layer.faulty
        (tensor([[ 1., 10.,  3.]]), True)
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, layer: Quantised) -> None:
        super().__init__()
        if layer.x_scale is None:  # one that is calibrated anew in every call cannot live with NaN
            raise UsageError("a layer that is scored in int8 needs the scale of its input's codes, x_scale")
        self._layer, self._x_scale = layer, layer.x_scale
        self._sound = {scheme: pack(layer, scheme=scheme, placement="columns") for scheme in SCHEMES}
        self.scheme, self.faulty = "exact", False
        self.register_buffer("weight", self._sound["exact"].matrix.clone())
        self.register_buffer("weight_scale", layer.weight_scale.expand(layer.outputs).clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Results, float32 of shape (m, n), of floats of shape (m, k)."""
        sound, layer = self._sound[self.scheme], self._layer
        matrix = self.weight
        if self.scheme != "exact":
            matrix = sound.matrix.clone()
            matrix[: layer.outputs] = self.weight[: layer.outputs]
        # Where the pass finds them: its plan holds their addresses.
        sound.scales.copy_(self.weight_scale)
        if self.bias is not None:
            sound.shifts.copy_(self.bias)
        packed = replace(sound, weight=torch.ops.onednn.qlinear_prepack(matrix, [1, layer.inputs]))
        checked = Checked(packed, on_error="count")
        out = checked.run(codes_of(x, self._x_scale, layer.x_zero))
        self.faulty |= checked.seen.faulty > 0
        return out

    def pack_anew(self) -> None:
        """Put the clean matrix in place of what lies in memory; scales and bias stay as they are."""
        self.weight.copy_(self._sound["exact"].matrix)


class Int8Rows(torch.nn.Module):  # type: ignore[misc]
    """Sums of rows of a protected int8 table, by ATen's operator.

    Args:
        table: as `ckptflip.protect.embeddings.protect_table` gives it, uint8[rows, bytes of a row].

    Attributes:
        read: the rows that were read since it was set to an empty set.

    Example:
        >>> from ckptflip.protect.embeddings import protect_table
        >>> from ckptflip.recsys.tables import quantise
        >>> stored = torch.from_numpy(quantise(np.array([[0.0, 1.0], [2.0, 4.0]]), "int8"))
        >>> table = Int8Rows(protect_table(stored, "int8"))
        >>> table(torch.tensor([[0, 1]])), table.bad(), table.read
        (tensor([[2., 5.]]), array([], dtype=int64), {0, 1})
    """

    weight: torch.Tensor

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self._row: Row = row_of_protected(table.numpy(), "int8")
        self._clean = table.clone()
        self.read: set[int] = set()
        self.register_buffer("weight", table.clone())

    def forward(self, bags: torch.Tensor) -> torch.Tensor:
        """Sums, float32 of shape (m, D), of rows by their numbers, int64 of shape (m, length)."""
        self.read.update(torch.unique(bags).tolist())
        offsets = torch.arange(len(bags)) * bags.shape[1]
        operator = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
        # To the operator the check bytes are columns.
        sums = operator(self.weight, bags.reshape(-1).contiguous(), offsets, False, 0, False, None)
        return sums[:, : self._row.dim].contiguous()

    def bad(self) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """The rows among those read that do not fit their check bytes."""
        return bad_rows(self.weight, "int8", np.array(sorted(self.read), np.int64))

    def restore(self) -> int:
        """Put clean rows in place of the bad ones among those read; returns how many."""
        rows = torch.from_numpy(self.bad())
        self.weight[rows] = self._clean[rows]
        return len(rows)

    def numbers(self) -> dict[str, torch.Tensor]:
        """The floats in the rows: ``scale`` and ``bias``, float32[rows] each."""
        held = self.weight[:, -self._row.numbers :].contiguous().view(torch.float32)
        return {"scale": held[:, 0], "bias": held[:, 1]}
