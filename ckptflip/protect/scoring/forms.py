"""The forms in which a trained model lies in memory while it is measured: as it was trained, or in int8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from ckptflip.errors import UsageError

if TYPE_CHECKING:
    import torch

    from ckptflip.protect.scoring.contender import Contender

# A dtype and a shape; a length of -1 is not known beforehand.
Kind = tuple["torch.dtype", tuple[int, ...]]

FORMS = ("fp32", "int8")


class Form(Protocol):
    """How a model lies in memory, and what computes with that.

    Attributes:
        contenders: the protections that make sense for it.
    """

    contenders: Sequence[Contender]

    def kinds(self, trained: torch.nn.Module) -> dict[str, Kind]:
        """Name, dtype and shape of what lies in memory, in order.

        Raises:
            UsageError: this form is not for such a model.
        """

    def constants(self, trained: torch.nn.Module) -> dict[str, Kind]:
        """The same of numbers that belong to the model and are never hit."""

    def stored(
        self, trained: torch.nn.Module, batches: Sequence[tuple[torch.Tensor, ...]]
    ) -> dict[str, torch.Tensor]:
        """What lies in memory, and the constants; `batches` are clean inputs to learn from."""

    def served(self, trained: torch.nn.Module, clean: dict[str, torch.Tensor]) -> torch.nn.Module:
        """The model that computes; its state dict is what lies in memory.

        Args:
            trained: its architecture.
            clean: as `stored` gave it.

        Raises:
            CheckpointError: `clean` does not fit together.
        """


class AsTrained:
    """``fp32``: the weights as they were trained."""

    def __init__(self) -> None:
        from ckptflip.protect.scoring.contenders import CONTENDERS

        self.contenders: Sequence[Contender] = CONTENDERS

    def kinds(self, trained: torch.nn.Module) -> dict[str, Kind]:
        """Those of its state dict."""
        return {name: (value.dtype, tuple(value.shape)) for name, value in trained.state_dict().items()}

    def constants(self, trained: torch.nn.Module) -> dict[str, Kind]:
        """There are none."""
        return {}

    def stored(
        self, trained: torch.nn.Module, batches: Sequence[tuple[torch.Tensor, ...]]
    ) -> dict[str, torch.Tensor]:
        """A copy of its state dict."""
        return {name: value.cpu().clone() for name, value in trained.state_dict().items()}

    def served(self, trained: torch.nn.Module, clean: dict[str, torch.Tensor]) -> torch.nn.Module:
        """The trained model itself."""
        trained.load_state_dict(clean)
        return trained.eval()


def form_of(name: str) -> Form:
    """A form by its name.

    Raises:
        UsageError: there is none of that name.

    Example:
        >>> type(form_of("fp32")).__name__
        'AsTrained'
    """
    if name not in FORMS:
        raise UsageError(f"a model is scored in one of the forms {', '.join(FORMS)}, not {name!r}")
    if name == "fp32":
        return AsTrained()
    from ckptflip.protect.scoring.int8_form import Int8

    return Int8()
