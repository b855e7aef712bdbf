"""A linear layer that checks its results, by the scheme chosen for the number of rows it is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ckptflip.errors import UsageError
from ckptflip.protect.detection import Detections, policy, settle
from ckptflip.protect.intensity.calibration import BUCKETS, bucket
from ckptflip.protect.intensity.schemes import SCHEMES, Run, Scheme
from ckptflip.protect.intensity.weights import prepared

_LAST = len(BUCKETS) - 1


def _loaded(module: Any, _: object) -> None:
    module.refresh()


class CheckedLinear(torch.nn.Module):  # type: ignore[misc]
    """A linear layer with a check of every result; for inference, with weights that no longer change.

    Checksums are taken from the weights when it is made, copied, moved or loaded; after weights were changed
    on purpose in another way, `refresh`.

    Attributes:
        weight, bias: those of the layer it stands for, frozen.
        detections: what the checks saw.
    """

    def __init__(
        self,
        layer: torch.nn.Linear,
        schemes: Mapping[int, str] | str,
        *,
        on_error: str = "raise",
        name: str = "linear",
    ) -> None:
        """Stand for a layer.

        Args:
            layer: its weights are shared, not copied.
            schemes: a scheme's name by bucket of rows (1, 2, 4 … 4096), or one for all.
            on_error: `raise`, `count` or `recompute`.
            name: for messages.

        Raises:
            UsageError: an unknown policy; weights that cannot be checked.

        Example:
            >>> layer = torch.nn.Linear(8, 4)
            >>> checked, x = CheckedLinear(layer, "row"), torch.ones(2, 8)
            >>> bool(torch.equal(checked(x), layer(x))), checked.detections.calls
            (True, 1)
        """
        super().__init__()
        self.weight = torch.nn.Parameter(layer.weight.detach(), requires_grad=False)
        bias = None if layer.bias is None else torch.nn.Parameter(layer.bias.detach(), requires_grad=False)
        self.bias = bias
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.detections = Detections()
        self.on_error = policy(on_error)
        self.name = name
        self.schemes = dict.fromkeys(BUCKETS, schemes) if isinstance(schemes, str) else dict(schemes)
        self.refresh()
        self.register_load_state_dict_post_hook(_loaded)

    def _apply(self, fn: Any, recurse: bool = True) -> CheckedLinear:
        super()._apply(fn, recurse)
        self.refresh()  # on another device, in another dtype
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_prepared", "_runs")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.refresh()

    def refresh(self) -> None:
        """Take the checksums anew from the weights as they are now."""
        self._prepared = prepared(self.weight, self.bias)
        made: dict[str, Run] = {}
        for name in self.schemes.values():
            if name not in made:
                made[name] = SCHEMES[name].prepare(self._prepared)
        by_bucket = [self.schemes[size] for size in BUCKETS]
        self._runs = [(made[name], SCHEMES[name]) for name in by_bucket]

    def scheme_for(self, rows: int) -> str:
        """The scheme that checks so many rows."""
        return self.schemes[bucket(rows)]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``x Wᵀ + b``, checked.

        Args:
            input: x, (…, in_features).

        Raises:
            UsageError: x has another number of features.
            DetectedError: a fault was found, and the policy is not to go on.
        """
        # The compiled product reads so many numbers of each row.
        if input.shape[-1:] != (self.in_features,):
            raise UsageError(
                f"layer {self.name} takes {self.in_features} features, not x of {tuple(input.shape)}"
            )
        rows = input if input.dim() == 2 else input.reshape(-1, self.in_features)
        power = (rows.shape[0] - 1).bit_length()
        run, scheme = self._runs[power if power < _LAST else _LAST]
        out, holds = run(rows)
        self.detections.calls += 1
        if not holds:
            out = self._suspect(scheme, run, rows, out)
        return out if input is rows else out.reshape(*input.shape[:-1], self.out_features)

    def _suspect(self, scheme: Scheme, run: Run, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        judged = scheme.judge(self._prepared, x, out)
        self.detections.unchecked += judged.unchecked
        if not judged.faulty:
            return out

        def again() -> tuple[torch.Tensor, bool]:
            renewed, holds = run(x)
            return renewed, holds or not scheme.judge(self._prepared, x, renewed).faulty

        return settle(self.on_error, self.detections, f"layer {self.name}", judged.found, out, again)

    def extra_repr(self) -> str:
        """What is printed of it."""
        used = ", ".join(dict.fromkeys(self.schemes.values()))
        return f"in_features={self.in_features}, out_features={self.out_features}, schemes={used}"
