"""Factorisation machines: FM, DeepFM and AFM. Every dense feature is a field of its own (see `fields`)."""

from __future__ import annotations

from collections.abc import Sequence

from ckptflip.errors import MissingExtraError

try:
    import torch
    from torch import nn
except ImportError as error:
    raise MissingExtraError("torch", "torch", "The recommendation models") from error

from ckptflip.recsys.models.fields import Fields, hidden

# Samples whose pairs AFM has in memory at a time: what fits a cache is four times as fast as a whole batch.
_AT_A_TIME = 64


class Fm(Fields):
    """A factorisation machine (Rendle, ICDM 2010): first order, and the dot products of all pairs of fields.

    Args:
        sizes: rows of each table.
        dense: dense features per sample; 0 for none.
        embedding: columns of every table.

    Example:
        >>> model = Fm((10, 20), dense=3)
        >>> model(torch.rand(5, 3), torch.zeros(5, 2, dtype=torch.int64)).shape
        torch.Size([5])
    """

    def __init__(self, sizes: Sequence[int], dense: int, embedding: int = 16) -> None:
        super().__init__(sizes, dense, embedding, first_order=True, dense_fields=True)

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits float[n] of dense float[n, dense] and ids int64[n, tables] or [n, tables, bag]."""
        return self.first_order(dense, ids) + pairs(self.vectors(dense, ids))


class DeepFm(Fields):
    """DeepFM (Guo et al., IJCAI 2017): a factorisation machine and a deep part on the same vectors.

    Args:
        sizes: rows of each table.
        dense: dense features per sample; 0 for none.
        embedding: columns of every table.
        mlp: units of the hidden layers.
        dropout: after each of them.

    Example:
        >>> model = DeepFm((10, 20), dense=0)
        >>> model(torch.rand(5, 0), torch.zeros(5, 2, dtype=torch.int64)).shape
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
        super().__init__(sizes, dense, embedding, first_order=True, dense_fields=True)
        self.mlp = hidden(self.count * embedding, mlp, dropout)
        self.out = nn.Linear(mlp[-1], 1)

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits float[n] of dense float[n, dense] and ids int64[n, tables] or [n, tables, bag]."""
        vectors = self.vectors(dense, ids)
        deep: torch.Tensor = self.out(self.mlp(vectors.flatten(1))).squeeze(1)
        return self.first_order(dense, ids) + pairs(vectors) + deep


class Afm(Fields):
    """Attentional factorisation machine (Xiao et al., IJCAI 2017): an attention network weighs the pairs.

    Args:
        sizes: rows of each table.
        dense: dense features per sample; 0 for none.
        embedding: columns of every table.
        attention: units of the attention network.
        dropout: on the pairs' weights and on their weighted sum.

    Example:
        >>> model = Afm((10, 20), dense=3)
        >>> model(torch.rand(5, 3), torch.zeros(5, 2, dtype=torch.int64)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        dense: int,
        embedding: int = 16,
        attention: int = 16,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(sizes, dense, embedding, first_order=True, dense_fields=True)
        self.attention = hidden(embedding, [attention], 0.0)
        self.score = nn.Linear(attention, 1, bias=False)
        self.out = nn.Linear(embedding, 1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits float[n] of dense float[n, dense] and ids int64[n, tables] or [n, tables, bag]."""
        pooled = torch.cat([self._pooled(part) for part in self.vectors(dense, ids).split(_AT_A_TIME)])
        interaction: torch.Tensor = self.out(self.dropout(pooled)).squeeze(1)
        return self.first_order(dense, ids) + interaction

    def _pooled(self, vectors: torch.Tensor) -> torch.Tensor:
        """The weighted sum of all pairs' products: float[n, fields, columns] to float[n, columns]."""
        row, column = torch.tril_indices(self.count, self.count, -1, device=vectors.device)
        products = vectors.index_select(1, row) * vectors.index_select(1, column)
        weights = self.dropout(torch.softmax(self.score(self.attention(products)), dim=1))
        return torch.bmm(weights.transpose(1, 2), products).squeeze(1)


def pairs(vectors: torch.Tensor) -> torch.Tensor:
    """The sum of the dot products of all pairs, in linear time (Rendle 2010, lemma 3.1).

    Args:
        vectors: float[n, fields, columns].

    Returns:
        float[n].

    Example:
        >>> pairs(torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]))
        tensor([67.])
    """
    squares: torch.Tensor = vectors.sum(dim=1).square() - vectors.square().sum(dim=1)
    return squares.sum(dim=1) / 2
