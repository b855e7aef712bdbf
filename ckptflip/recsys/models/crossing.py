"""Wide&Deep, and deep and cross networks of both versions, on the tables' rows beside the dense features."""

from __future__ import annotations

from collections.abc import Sequence

from ckptflip.errors import MissingExtraError, UsageError

try:
    import torch
    from torch import nn
except ImportError as error:
    raise MissingExtraError("torch", "torch", "The recommendation models") from error

from ckptflip.recsys.models.fields import Fields, hidden


class WideDeep(Fields):
    """Wide&Deep (Cheng et al., DLRS 2016): first order, without crossed features, and a deep part.

    Args:
        sizes: rows of each table.
        dense: dense features per sample; 0 for none.
        embedding: columns of every table.
        mlp: units of the hidden layers.
        dropout: after each of them.

    Example:
        >>> model = WideDeep((10, 20), dense=3)
        >>> model(torch.rand(5, 3), torch.zeros(5, 2, dtype=torch.int64)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        dense: int,
        embedding: int = 16,
        mlp: Sequence[int] = (16, 16),
        dropout: float = 0.2,
    ) -> None:
        super().__init__(sizes, dense, embedding, first_order=True, dense_fields=False)
        self.mlp = hidden(self.flat_width, mlp, dropout)
        self.out = nn.Linear(mlp[-1], 1)

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits float[n] of dense float[n, dense] and ids int64[n, tables] or [n, tables, bag]."""
        deep: torch.Tensor = self.out(self.mlp(self.flat(dense, ids))).squeeze(1)
        return self.first_order(dense, ids) + deep


class Dcn(Fields):
    """A deep and cross network: cross layers beside a deep part, joined by one last layer.

    With x0 the input, version 1 (Wang et al., ADKDD 2017) has x' = x0 (w·x) + b + x with a vector w,
    version 2 (Wang et al., WWW 2021, parallel) x' = x0 ⊙ (W x + b) + x with a full matrix W.

    Args:
        sizes: rows of each table.
        dense: dense features per sample; 0 for none.
        embedding: columns of every table.
        mlp: units of the deep part's layers.
        dropout: after each of them.
        crosses: cross layers.
        version: 1 or 2.

    Example:
        >>> model = Dcn((10, 20), dense=3, version=2)
        >>> model(torch.rand(5, 3), torch.zeros(5, 2, dtype=torch.int64)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        dense: int,
        embedding: int = 16,
        mlp: Sequence[int] = (16, 16),
        dropout: float = 0.2,
        crosses: int = 3,
        version: int = 1,
    ) -> None:
        super().__init__(sizes, dense, embedding, first_order=False, dense_fields=False)
        if version not in (1, 2) or crosses < 1:
            raise UsageError(f"a DCN is of version 1 or 2 and has cross layers, not {version} and {crosses}")
        cross = VectorCross if version == 1 else MatrixCross
        self.cross_l = nn.ModuleList(cross(self.flat_width) for _ in range(crosses))
        self.mlp = hidden(self.flat_width, mlp, dropout)
        self.out = nn.Linear(self.flat_width + mlp[-1], 1)

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits float[n] of dense float[n, dense] and ids int64[n, tables] or [n, tables, bag]."""
        start = crossed = self.flat(dense, ids)
        for layer in self.cross_l:
            crossed = layer(start, crossed)
        logits: torch.Tensor = self.out(torch.cat([crossed, self.mlp(start)], dim=1))
        return logits.squeeze(1)


class VectorCross(nn.Module):  # type: ignore[misc]
    """A cross layer of version 1: a weight and a bias per input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width).normal_(0.0, (2 / (width + 1)) ** 0.5))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, start: torch.Tensor, crossed: torch.Tensor) -> torch.Tensor:
        """The layer's float[n, width] from the first layer's and the last one's."""
        return start * (crossed @ self.weight).unsqueeze(1) + self.bias + crossed


class MatrixCross(nn.Linear):  # type: ignore[misc]
    """A cross layer of version 2: a square matrix and a bias."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        nn.init.xavier_normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, start: torch.Tensor, crossed: torch.Tensor) -> torch.Tensor:
        """The layer's float[n, width] from the first layer's and the last one's."""
        return start * super().forward(crossed) + crossed
