"""What the factorisation and the crossing models share: tables, first-order weights, hidden layers."""

from __future__ import annotations

from collections.abc import Sequence

from ckptflip.errors import MissingExtraError, UsageError

try:
    import torch
    from torch import nn
except ImportError as error:
    raise MissingExtraError("torch", "torch", "The recommendation models") from error

from ckptflip.recsys.models.dlrm import Tables, look_up

# Rendle, "Factorization machines with libFM" (2012), draws factors from a narrow normal distribution.
_SPREAD = 0.01


class Fields(nn.Module):  # type: ignore[misc]
    """Tables of a model's categorical fields, and what stands for its dense features.

    ``emb_l.N`` are the tables. With `first_order`, ``linear_emb.N`` are tables of one column and ``linear``
    is a weight per dense feature and a bias. With `dense_fields`, every dense feature x_i is a field of its
    own, whose vector is x_i times row i of ``dense_l.weight``, as in Rendle's factorisation machines.

    Args:
        sizes: rows of each table.
        dense: dense features per sample; 0 for none.
        embedding: columns of every table.
    """

    def __init__(
        self, sizes: Sequence[int], dense: int, embedding: int, *, first_order: bool, dense_fields: bool
    ) -> None:
        super().__init__()
        if not sizes or min(*sizes, embedding, dense + 1, 1) < 1:
            raise UsageError(
                f"a model has tables of 1 or more rows and columns, and 0 or more dense features: "
                f"{len(sizes)} tables, {embedding} columns, {dense} dense features"
            )
        self.emb_l = Tables(_table(rows, embedding, _SPREAD) for rows in sizes)
        self.dense_l = Scaled(dense, embedding) if dense and dense_fields else None
        if first_order:
            self.linear_emb = Tables(_table(rows, 1, 0.0) for rows in sizes)
            self.linear = Linear(dense)
        self.count = len(sizes) + (dense if dense_fields else 0)
        self.flat_width = len(sizes) * embedding + dense

    def first_order(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The weighted sum of all features and the bias: float[n]."""
        weights: torch.Tensor = look_up(self.linear_emb, ids).sum(dim=(1, 2))
        return weights + self.linear(dense)

    def vectors(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """A vector per field: float[n, fields, columns]."""
        rows = look_up(self.emb_l, ids)
        return rows if self.dense_l is None else torch.cat([rows, self.dense_l(dense)], dim=1)

    def flat(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The tables' rows and the dense features side by side: float[n, flat_width]."""
        return torch.cat([look_up(self.emb_l, ids).flatten(1), dense], dim=1)


class Scaled(nn.Module):  # type: ignore[misc]
    """Vectors of dense features: each feature times a vector of its own."""

    def __init__(self, features: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, columns).normal_(0.0, _SPREAD))

    def forward(self, dense: torch.Tensor) -> torch.Tensor:
        """float[n, features] to float[n, features, columns]."""
        return dense.unsqueeze(2) * self.weight


class Linear(nn.Module):  # type: ignore[misc]
    """A weight per dense feature, of which there may be none, and a bias; all begin at 0."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features)) if features else None
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, dense: torch.Tensor) -> torch.Tensor:
        """float[n, features] to float[n]."""
        return self.bias.expand(len(dense)) if self.weight is None else dense @ self.weight + self.bias


def hidden(inputs: int, units: Sequence[int], dropout: float) -> nn.Sequential:
    """Linear layers, each with a ReLU and dropout behind it.

    Raises:
        UsageError: no layers, a size below 1, or a dropout that is no share.
    """
    if not units or min(units) < 1:
        raise UsageError(f"hidden layers have 1 or more units, not {tuple(units)}")
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout is 0 or more and below 1, not {dropout}")
    layers: list[nn.Module] = []
    for before, after in zip([inputs, *units[:-1]], units, strict=True):
        layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


def _table(rows: int, columns: int, spread: float) -> nn.EmbeddingBag:
    weight = torch.zeros(rows, columns)
    if spread:
        weight.normal_(0.0, spread)
    return nn.EmbeddingBag.from_pretrained(weight, freeze=False, mode="sum")
