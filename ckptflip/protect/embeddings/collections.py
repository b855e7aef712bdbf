"""Protected tables by feature: a stand-in for TorchRec's `EmbeddingBagCollection`, without TorchRec.

What it is given need only look like a `KeyedJaggedTensor`; what it gives looks like a `KeyedTensor`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptflip.errors import MissingExtraError, UsageError

try:
    import torch
except ImportError as error:
    raise MissingExtraError("torch", "torch", "Protected embedding bags") from error

from ckptflip.protect.embeddings.module import ProtectedEmbeddingBag


@dataclass(frozen=True)
class Pooled:
    """Pooled embeddings of features, side by side; as TorchRec's `KeyedTensor`.

    Attributes:
        names: of the features.
        parts: float[batch, D] of each.
    """

    names: Sequence[str]
    parts: Sequence[torch.Tensor]

    def keys(self) -> list[str]:
        """The features, in order."""
        return list(self.names)

    def values(self) -> torch.Tensor:
        """All features side by side, float[batch, sum of D]."""
        return torch.cat(list(self.parts), dim=1)

    def to_dict(self) -> dict[str, torch.Tensor]:
        """Each feature's part."""
        return dict(zip(self.names, self.parts, strict=True))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.to_dict()[name]


class ProtectedBagCollection(torch.nn.Module):  # type: ignore[misc]
    """Looks up each feature of a batch in its protected table.

    Args:
        tables: by name; their names in a state dict are ``embedding_bags.NAME.weight``, as TorchRec's.
        features: the features that each table serves, in order; a table's own name where it is not listed.
        weighted: whether batches bring a weight for each id.

    Raises:
        UsageError: features of tables that are none.

    Example:
        >>> tables = {"t": ProtectedEmbeddingBag.from_float(torch.rand(10, 4), "int8")}
        >>> collection = ProtectedBagCollection(tables, {"t": ["user", "friend"]})
        >>> list(collection.state_dict())
        ['embedding_bags.t.weight']
    """

    def __init__(
        self,
        tables: Mapping[str, ProtectedEmbeddingBag],
        features: Mapping[str, Sequence[str]] | None = None,
        weighted: bool = False,
    ) -> None:
        super().__init__()
        unknown = set(features or ()) - set(tables)
        if unknown:
            raise UsageError(f"features were given for {', '.join(sorted(unknown))}, which are no tables")
        self.embedding_bags = torch.nn.ModuleDict(tables)
        self.features = {name: list((features or {}).get(name, [name])) for name in tables}
        self.weighted = weighted

    def forward(self, batch: Any) -> Pooled:
        """Pooled embeddings of every feature.

        Args:
            batch: as a `KeyedJaggedTensor`: ``batch[feature]`` has ``values()``, ``lengths()`` and, where
                look-ups are weighted, ``weights()``.

        Raises:
            UsageError, DetectedError: as `ProtectedEmbeddingBag`.
        """
        names: list[str] = []
        parts: list[torch.Tensor] = []
        for table, features in self.features.items():
            bag = self.embedding_bags[table]
            for feature in features:
                jagged = batch[feature]
                lengths = jagged.lengths()
                offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
                offsets = offsets if bag.include_last_offset else offsets[:-1]
                weights = jagged.weights() if self.weighted else None
                parts.append(bag(jagged.values(), offsets.to(jagged.values().dtype), weights))
                names.append(feature)
        return Pooled(names, parts)
