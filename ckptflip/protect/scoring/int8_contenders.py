"""Protections that are scored on a model in int8: scans of what is float, digests, checks in operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ckptflip.protect.scoring.contender import Contender, Run, Verdict
from ckptflip.protect.scoring.detectors import Digest, Extreme, Nan, Range
from ckptflip.protect.scoring.int8_layers import Int8Linear, Int8Rows


class Products:
    """ABFT of quantised GEMM: the sum of each row of each product against a checksum of the clean matrix.

    Args:
        name: what it is called.
        about: what it is.
        scheme: of `ckptflip.protect.gemm.packing.SCHEMES`.
    """

    def __init__(self, name: str, about: str, scheme: str) -> None:
        self.name, self.about, self._scheme = name, about, scheme

    def prepare(self, model: torch.nn.Module, batches: Sequence[Any]) -> bool:
        """Nothing is kept: the layers hold their checksums."""
        return True

    def face(self, model: torch.nn.Module, prepared: bool, run: Run) -> Verdict:
        """Run the model with every product checked."""
        with _watched(model, self._scheme):
            run()
            return Verdict(found=any(layer.faulty for layer in _layers(model)))


class BagRows:
    """``abft-bags``: the check bytes of every table row that the test set reads."""

    name = "abft-bags"
    about = "int8: the check bytes of every table row that the test set reads"

    def prepare(self, model: torch.nn.Module, batches: Sequence[Any]) -> bool:
        """Nothing is kept: rows hold their check bytes."""
        return True

    def face(self, model: torch.nn.Module, prepared: bool, run: Run) -> Verdict:
        """Run the model, and look at the rows that were read."""
        with _watched(model, "exact"):
            run()
            bad = sum(len(table.bad()) for table in _tables(model))
        return Verdict(found=bad > 0, counts={"rows": float(bad)})


class Restore:
    """``restore``: both checks together, and clean numbers in place of what they found.

    Scales and biases of linear layers are no part of a product, and stay as they are.
    """

    name = "restore"
    about = "int8: `abft-exact` and `abft-bags` together; matrices and rows that they find are taken anew"

    def prepare(self, model: torch.nn.Module, batches: Sequence[Any]) -> bool:
        """Nothing is kept: layers have their clean numbers."""
        return True

    def face(self, model: torch.nn.Module, prepared: bool, run: Run) -> Verdict:
        """Run the model, restore, and run it once more."""
        with _watched(model, "exact"):
            outputs = run()
            matrices = [layer for layer in _layers(model) if layer.faulty]
            for layer in matrices:
                layer.pack_anew()
            rows = sum(table.restore() for table in _tables(model))
            if matrices or rows:
                outputs = run()
        counts = {"rows": float(rows), "matrices": float(len(matrices))}
        return Verdict(found=bool(matrices or rows), outputs=outputs, counts=counts)


@contextmanager
def _watched(model: torch.nn.Module, scheme: str) -> Iterator[None]:
    """Layers and tables note what they see from here on; a scheme for the layers."""
    for layer in _layers(model):
        layer.scheme, layer.faulty = scheme, False
    for table in _tables(model):
        table.read = set()
    try:
        yield
    finally:
        for layer in _layers(model):
            layer.scheme = "exact"


def _layers(model: torch.nn.Module) -> list[Int8Linear]:
    return [module for module in model.modules() if isinstance(module, Int8Linear)]


def _tables(model: torch.nn.Module) -> list[Int8Rows]:
    return [module for module in model.modules() if isinstance(module, Int8Rows)]


INT8_CONTENDERS: tuple[Contender, ...] = (
    Nan(),
    Extreme(),
    Range(),
    Digest(),
    Products("abft-exact", "int8: every product against exact row sums in columns of its matrix", "exact"),
    Products("abft-mod127", "int8: the same modulo 127, as published; its checksums are not hit", "mod127"),
    BagRows(),
    Restore(),
)
