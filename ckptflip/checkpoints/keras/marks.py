"""What tells Keras' HDF5 files from others, noted while a file is walked."""

from __future__ import annotations

from msgspec import Struct


class Marks(Struct, frozen=True):
    """The marks of a file.

    Attributes:
        vars: the attribute ``name``, or "", of each group called ``vars``, by the group's path.
        layers: the path, ending in ``/`` or empty, of the group that lists its layers, as Keras 2 does. None:
            there is none.
    """

    vars: dict[str, str] = {}
    layers: str | None = None

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return bool(self.vars) or self.layers is not None
