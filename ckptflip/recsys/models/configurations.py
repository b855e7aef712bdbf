"""Sizes and recipes of DLRM: the reference's for Criteo Kaggle and Terabyte, a small one, a dummy model.

Sources: Naumov et al., "Deep learning recommendation model for personalization and recommendation systems"
(arXiv 1906.00091) and its open-source reference; for the dummy model, the public code of Terrorch.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckptflip.errors import UsageError
from ckptflip.recsys.recipes import check_kinds


@dataclass(frozen=True, slots=True)
class Configuration:
    """How large a DLRM is and how it is trained.

    Attributes:
        embedding: columns of every table, and outputs of the bottom MLP.
        bottom: units of the bottom MLP's layers; the last is `embedding`.
        top: units of the top MLP's layers; the last is 1.
        rate: learning rate.
        batch: samples per step.
        optimizer: ``sgd`` or ``adagrad``.
        modulo: ids are taken modulo this, so that no table has more rows; None for all of them.
        sparse: whether the tables' gradients hold the rows of a step alone.
    """

    embedding: int
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    rate: float
    batch: int
    optimizer: str = "sgd"
    modulo: int | None = None
    sparse: bool = True


CONFIGURATIONS = {
    "small": Configuration(
        embedding=16, bottom=(64, 16), top=(64, 32, 1), rate=0.02, batch=1024, optimizer="adagrad",
        sparse=False,
    ),
    "kaggle": Configuration(embedding=16, bottom=(512, 256, 64, 16), top=(512, 256, 1), rate=0.1, batch=128),
    "terabyte": Configuration(
        embedding=64, bottom=(512, 256, 64), top=(512, 512, 256, 1), rate=0.1, batch=2048, modulo=10_000_000
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Dummy:
    """The study's dummy model: a DLRM on random inputs, judged by its own clean outputs.

    Attributes:
        embedding: columns of the tables; the study has 64 to 512.
        mlp: units of each hidden layer; the study has 64 to 512.
        layers: hidden layers of the bottom and of the top MLP, 1 or 2.
        sparsity: the share of a table's rows that one sample looks up; the study has 0.001, 0.01 and 0.1.
        rows: of a table.
        dense: dense features.
        tables: how many.

    Raises:
        UsageError: a size that makes no sense.
    """

    embedding: int = 64
    mlp: int = 64
    layers: int = 1
    sparsity: float = 0.001
    rows: int = 8192
    dense: int = 128
    tables: int = 1

    def __post_init__(self) -> None:
        check_kinds(self)
        sizes = (self.embedding, self.mlp, self.layers, self.rows, self.dense, self.tables)
        if min(sizes) < 1:
            raise UsageError(f"the sizes of a dummy model are 1 or more: {self}")
        if not 0 < self.sparsity <= 1:
            raise UsageError(f"sparsity is more than 0 and at most 1, not {self.sparsity}")

    @property
    def bag(self) -> int:
        """Rows that one sample looks up in each table, at least one.

        Example:
            >>> [Dummy(sparsity=share).bag for share in (0.001, 0.01, 0.1)]
            [8, 82, 819]
        """
        return max(1, round(self.sparsity * self.rows))

    @property
    def bottom(self) -> tuple[int, ...]:
        """Units of the bottom MLP's layers."""
        return (self.mlp,) * self.layers + (self.embedding,)

    @property
    def top(self) -> tuple[int, ...]:
        """Units of the top MLP's layers."""
        return (self.mlp,) * self.layers + (1,)


def configuration(name: str) -> Configuration:
    """A configuration by its name.

    Raises:
        UsageError: there is none of that name.

    Example:
        >>> configuration("kaggle").bottom
        (512, 256, 64, 16)
    """
    if name not in CONFIGURATIONS:
        raise UsageError(f"a configuration of dlrm is one of {', '.join(CONFIGURATIONS)}, not {name!r}")
    return CONFIGURATIONS[name]
