"""DLRM as its open-source reference builds it: bottom MLP, embedding bags, dot interaction, top MLP.

Source: Naumov et al., arXiv 1906.00091, and its reference implementation, whose initialisation, order of the
interaction and names in checkpoints (``emb_l.N.weight``, ``bot_l.N.weight``, ``top_l.N.weight``) are kept.
The reference ends in a sigmoid, which has no parameters; ours ends in the logit, since PyTorch's loss of
probabilities refuses the NaN that a fault may bring.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from ckptflip.errors import MissingExtraError, UsageError

try:
    import torch
    from torch import nn
except ImportError as error:
    raise MissingExtraError("torch", "torch", "The recommendation models") from error

from ckptflip.recsys.models.configurations import Dummy


class Dlrm(nn.Module):  # type: ignore[misc]
    """The model, freshly initialised from PyTorch's random generator.

    Args:
        sizes: rows of each table.
        dense: dense features per sample.
        embedding: columns of every table.
        bottom: units of the bottom MLP's layers, each with a ReLU; the last is `embedding`.
        top: units of the top MLP's layers, with ReLUs between; the last is 1.
        sparse: whether the tables' gradients are sparse: rows that no sample of a step looks up cost nothing.

    Raises:
        UsageError: sizes that do not fit together.

    Example:
        >>> model = Dlrm((10, 20), dense=3, embedding=4, bottom=(8, 4), top=(8, 1))
        >>> list(model.state_dict())[:4]
        ['emb_l.0.weight', 'emb_l.1.weight', 'bot_l.0.weight', 'bot_l.0.bias']
        >>> model(torch.rand(5, 3), torch.zeros(5, 2, dtype=torch.int64)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        dense: int,
        embedding: int,
        bottom: Sequence[int],
        top: Sequence[int],
        sparse: bool = False,
    ) -> None:
        super().__init__()
        if not sizes or min(*sizes, dense, embedding, *bottom, *top, 1) < 1:
            raise UsageError("a DLRM has tables and dense features, and every size is 1 or more")
        if bottom[-1] != embedding:
            raise UsageError(
                f"the bottom MLP ends in {bottom[-1]} units and the tables have {embedding} columns: the dot "
                "interaction needs as many of the one as of the other"
            )
        if top[-1] != 1:
            raise UsageError(f"the top MLP ends in 1 unit, not {top[-1]}")
        vectors = len(sizes) + 1
        self.emb_l = Tables(_table(rows, embedding, sparse) for rows in sizes)
        self.bot_l = _mlp([dense, *bottom], last_relu=True)
        self.top_l = _mlp([embedding + vectors * (vectors - 1) // 2, *top], last_relu=False)

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits of clicks.

        Args:
            dense: float[n, dense].
            ids: int64[n, tables], or [n, tables, bag] where a sample looks up several rows, which are summed.

        Returns:
            float[n].
        """
        bottom = self.bot_l(dense)
        logits: torch.Tensor = self.top_l(interact(bottom, look_up(self.emb_l, ids)))
        return logits.squeeze(1)


def dummy(sizes: Dummy) -> Dlrm:
    """The study's dummy model.

    Example:
        >>> model = dummy(Dummy(embedding=8, mlp=16, rows=32, dense=4, sparsity=0.1))
        >>> model(torch.rand(2, 4), torch.zeros(2, 1, 3, dtype=torch.int64)).shape
        torch.Size([2])
    """
    return Dlrm((sizes.rows,) * sizes.tables, sizes.dense, sizes.embedding, sizes.bottom, sizes.top)


class Tables(nn.ModuleList):  # type: ignore[misc]
    """The tables of a model, looked up together; so that what all of them give passes one module."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows that each sample looks up, those of a bag summed: float[n, tables, columns]."""
        return torch.stack(list(self.each(ids)), dim=1)

    def each(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """The rows out of one table after the other: float[n, columns]."""
        bags = ids.unsqueeze(2) if ids.dim() == 2 else ids
        for place, table in enumerate(self):
            yield table(bags[:, place])


def look_up(tables: Tables, ids: torch.Tensor) -> torch.Tensor:
    """The rows that each sample looks up, those of a bag summed: float[n, tables, columns]."""
    rows: torch.Tensor = tables(ids)
    return rows


def interact(bottom: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The bottom MLP's output and the dot products of all pairs of vectors, each pair once.

    Args:
        bottom: float[n, columns].
        rows: float[n, tables, columns].

    Returns:
        float[n, columns + pairs]: the strict lower triangle of the products, row by row; the bottom output
        is vector 0.
    """
    vectors = torch.cat([bottom.unsqueeze(1), rows], dim=1)
    count = vectors.shape[1]
    products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
    row, column = torch.tril_indices(count, count, -1, device=products.device)
    # Selecting from the flat products is faster, backwards too, than indexing with pairs.
    return torch.cat([bottom, products.index_select(1, row * count + column)], dim=1)


def _table(rows: int, columns: int, sparse: bool) -> nn.EmbeddingBag:
    limit = math.sqrt(1 / rows)
    weight = torch.empty(rows, columns).uniform_(-limit, limit)
    return nn.EmbeddingBag.from_pretrained(weight, freeze=False, mode="sum", sparse=sparse)


def _mlp(units: Sequence[int], last_relu: bool) -> nn.Sequential:
    """Linear layers and ReLUs in turn, so that layer k is number 2k, as in the reference."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(units):
        layer = nn.Linear(inputs, outputs)
        nn.init.normal_(layer.weight, 0.0, math.sqrt(2 / (inputs + outputs)))
        nn.init.normal_(layer.bias, 0.0, math.sqrt(1 / outputs))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*(layers if last_relu else layers[:-1]))
