"""What is measured on a PyTorch model while it trains: accuracy, gradient norm, N-EV."""

from __future__ import annotations

from collections.abc import Iterable

import torch

_PIECE = 1 << 22


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Share of samples whose largest output is the target's class.

    Args:
        outputs: float[samples, classes]; a row of NaN counts as some class, as it would in use.
        targets: int[samples].

    Example:
        >>> accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0]))
        0.75
    """
    return float((outputs.argmax(dim=1) == targets).double().mean().item())


def count_nev(model: torch.nn.Module, extreme: float = 1e10) -> dict[str, int]:
    """Count NaN, infinite and extreme (``|x| > extreme``) values among the weights and float buffers.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[float("nan"), 1e30]]))
        >>> count_nev(layer)
        {'nan': 1, 'inf': 0, 'extreme': 1}
    """
    counts = {"nan": 0, "inf": 0, "extreme": 0}
    for value in model.state_dict().values():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        # Piece by piece: a copy of a whole embedding table in float64 would be its size twice over.
        for piece in value.detach().reshape(-1).split(_PIECE):
            wide = piece.double()
            inf = int(wide.isinf().sum())
            counts["nan"] += int(wide.isnan().sum())
            counts["inf"] += inf
            counts["extreme"] += int((wide.abs() > extreme).sum()) - inf
    return counts


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> float:
    """L2 norm over the gradients of these, in float64: a square of 1e20 is no infinity there.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3e30, 4e30])
        >>> gradient_norm([weight]) == float(torch.linalg.vector_norm(weight.grad.double()))
        True
    """
    found = (parameter.grad for parameter in parameters)
    gradients = [grad.coalesce().values() if grad.is_sparse else grad for grad in found if grad is not None]
    if not gradients:
        return 0.0
    # One call for all, of many small tensors the same bits in half the time.
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float64)
    return float(torch.linalg.vector_norm(torch.stack(norms)).item())
