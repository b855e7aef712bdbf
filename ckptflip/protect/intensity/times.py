"""Times of every scheme by shape: from the cache, or measured and written back when all is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from ckptflip.protect.intensity import cache
from ckptflip.protect.intensity.calibration import measured
from ckptflip.protect.intensity.roofline import Balance, measured_balance
from ckptflip.protect.intensity.schemes import chosen


@dataclass(slots=True)
class Book:
    """What is known of one device and dtype.

    Attributes:
        balance: of the device.
        seconds: by shape and scheme, every scheme that fits and `none`.
        new: whether there is something to write.
    """

    balance: Balance
    seconds: dict[cache.Key, dict[str, float]]
    new: bool


@dataclass(slots=True)
class Times:
    """Times of the devices of a model.

    Attributes:
        remeasure: measure anew what is in the cache.
        folder: of the cache; None for the user's.
    """

    remeasure: bool = False
    folder: Path | None = None
    _books: dict[cache.Device, Book] = field(default_factory=dict)
    _fresh: set[tuple[cache.Device, cache.Key]] = field(default_factory=set)

    def of(self, weight: torch.Tensor, bias: torch.Tensor | None, rows: int) -> dict[str, float]:
        """Seconds per call, by scheme.

        Args:
            weight: (n, k); its shape, dtype and device count, not its values.
            bias: (n,) or None.
            rows: m.
        """
        device = cache.this_device(weight.device, weight.dtype)
        book = self._book(device, weight)
        key = (rows, weight.shape[0], weight.shape[1], bias is not None)
        if key not in book.seconds or (self.remeasure and (device, key) not in self._fresh):
            book.seconds[key] = measured(weight, bias, rows, chosen(None))
            book.new = True
            self._fresh.add((device, key))
        return book.seconds[key]

    def balance(self, weight: torch.Tensor) -> Balance:
        """The balance of the device where a weight is, for products of its dtype."""
        return self._book(cache.this_device(weight.device, weight.dtype), weight).balance

    def keep(self) -> None:
        """Write what was measured."""
        for device, book in self._books.items():
            if book.new:
                cache.store(device, book.balance, book.seconds, self.folder)

    def _book(self, device: cache.Device, weight: torch.Tensor) -> Book:
        if device not in self._books:
            balance, known = cache.load(device, self.folder)
            new = balance is None or self.remeasure
            if balance is None or self.remeasure:
                balance = measured_balance(weight.device, weight.dtype)
            self._books[device] = Book(balance, known, new)
        return self._books[device]
