"""A model that is not trained, judged by the outputs of its clean self: the study's dummy model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptflip.errors import MissingExtraError

try:
    import torch
except ImportError as error:
    raise MissingExtraError("torch", "torch", "The dummy model") from error

from ckptflip.recsys import measures
from ckptflip.recsys.models.configurations import Dummy
from ckptflip.recsys.models.dlrm import dummy
from ckptflip.recsys.workloads import probabilities
from ckptflip.training.pytorch import TorchWorkload

# Keeps these numbers apart from other streams of the same seed.
_PURPOSE = 0x64756D6D
_TEST_BATCH = 256
# Trials of a campaign start from several seeds in turn.
_MOST_KNOWN = 32


class Still(torch.optim.Optimizer):  # type: ignore[misc]
    """An optimizer that never changes a weight."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        return closure() if closure is not None else None


def workload(
    name: str, sizes: Dummy, samples: int, data_seed: int, *, device: str = "cpu", threads: int = 1
) -> TorchWorkload:
    """The dummy model as a workload. An epoch of it is one sample's gradient, which nothing follows from.

    Args:
        name: kept in each checkpoint.
        sizes: of the model.
        samples: how many rows are evaluated.
        data_seed: of the inputs.
        device: where it is computed.
        threads: of PyTorch.
    """
    drawn: list[Any] = []

    def data() -> Any:
        if not drawn:
            drawn.append(inputs(sizes, samples, data_seed))
        nothing = np.zeros(samples, np.float32)
        return (drawn[0], nothing), (drawn[0], nothing)

    def made(metric: Any) -> TorchWorkload:
        return TorchWorkload(
            name, model=lambda: dummy(sizes), optimizer=Still, data=data, batch_size=1, per_epoch=1,
            loss=torch.nn.functional.binary_cross_entropy_with_logits, metric=metric, device=device,
            threads=threads, test_batch=_TEST_BATCH,
        )  # fmt: skip

    clean = made(lambda outputs, _: {})
    known: dict[int, torch.Tensor] = {}

    def compared(outputs: torch.Tensor, _: torch.Tensor) -> dict[str, float]:
        seed = tested.seed
        if seed not in known:
            clean.start(seed)
            if len(known) >= _MOST_KNOWN:
                known.clear()
            known[seed] = clean.outputs()[0]
        return measured(outputs, known[seed])

    tested = made(compared)
    return tested


def inputs(sizes: Dummy, samples: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Random inputs.

    Returns:
        Dense features float32[samples, dense], uniform in 0 to 1; ids int64[samples, tables, bag], uniform
        and independent.

    Example:
        >>> [part.shape for part in inputs(Dummy(), 3, 0)]
        [(3, 128), (3, 1, 8)]
    """
    draws = np.random.Generator(np.random.Philox(np.random.SeedSequence((_PURPOSE, seed))))
    dense = draws.random((samples, sizes.dense), np.float32)
    return dense, draws.integers(0, sizes.rows, (samples, sizes.tables, sizes.bag))


def measured(outputs: torch.Tensor, golden: torch.Tensor) -> dict[str, float]:
    """Compare logits with those of the clean model.

    Returns:
        ``auc``, ``auc_se``, ``loss``, ``ne``, ``calibration``, ``ece`` and ``unscored`` against golden labels
        (whether a golden logit lies above their median); ``deviation`` and ``max_deviation``, mean and
        largest difference of the probabilities, where NaN is as far off as can be, 1; ``changed``, the share
        of rows on the other side of the median, NaN included.

    Example:
        >>> golden = torch.tensor([-1.0, 0.0, 1.0, 2.0])
        >>> found = measured(torch.tensor([-1.0, 0.0, float("nan"), 2.0]), golden)
        >>> found["auc"], found["changed"], found["unscored"], found["max_deviation"]
        (0.5, 0.25, 1.0, 1.0)
    """
    middle = golden.double().median()
    labels = golden.double() > middle
    found = measures.evaluate(labels.cpu().numpy(), probabilities(outputs))
    names = ("loss", "auc", "auc_se", "ne", "calibration", "ece", "unscored")
    values = {name: getattr(found, name) for name in names}
    off = (outputs.double().sigmoid() - golden.double().sigmoid()).abs().nan_to_num(nan=1.0)
    # A comparison with NaN is false, on either side of the median.
    same = torch.where(labels, outputs.double() > middle, outputs.double() <= middle)
    values |= {
        "deviation": off.mean().item(), "max_deviation": off.max().item(),
        "changed": 1 - same.double().mean().item(),
    }  # fmt: skip
    return {name: float(value) for name, value in values.items() if value is not None}
