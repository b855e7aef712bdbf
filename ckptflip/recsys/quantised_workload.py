"""A trained model as it is served: its tables quantised after training, evaluated and not trained on.

The checkpoint holds the tables as they would lie in memory, row-wise quantised or in half precision. Before
an evaluation they are turned into float32 as ATen's operators do it (`ckptflip.recsys.tables.dequantise`),
and the model does the rest as it does with tables in float32.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ckptflip import torch_h5
from ckptflip.errors import MissingExtraError, UsageError, WorkloadError

try:
    import torch
except ImportError as error:
    raise MissingExtraError("torch", "torch", "Quantised tables as a workload") from error

from ckptflip.faults.rowwise import LAYOUTS, Rowwise, parse
from ckptflip.recsys.tables.quantised import dequantise, quantise
from ckptflip.training.checks import check_parts, no_state
from ckptflip.training.digests import state_digest
from ckptflip.training.pytorch import TorchWorkload

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# First-order weights have one column: a scale and a bias for each would make them larger.
_TABLE = re.compile(r"emb_l\.\d+\.weight")
_PARTS = {"workload", "epoch", "seed", "model"}


class ServedWorkload:
    """A model that is trained once, when it is started, and whose tables are then stored in another form.

    `start` trains `epochs` epochs as `trained` does; the stored model is epoch 0. Nothing is learnt after it:
    a further epoch only counts. Altered tables are measured and not trained on: in a campaign,
    ``restart.epochs = [0]`` and ``restart.horizon = 0``.

    Args:
        trained: the recipe; its tables are named ``emb_l.N.weight``.
        tables: ``fp32``, ``fp16``, ``bf16``, or a row-wise layout such as ``int8``, as
            `ckptflip.faults.rowwise.parse` reads it.
        epochs: how many are trained before.

    Raises:
        UsageError: `tables` is none of these, or `epochs` is negative.

    Example:
        >>> from ckptflip.training import find
        >>> recipe = find("dlrm", samples=200, test=100, per_epoch=100, rows=20, batch_size=50)
        >>> workload = ServedWorkload(recipe, "int4", epochs=1)
        >>> workload.start(1)
        >>> stored = workload.stored["emb_l.2.weight"]
        >>> stored.dtype, tuple(stored.shape), workload.model.emb_l[2].weight.shape
        (torch.uint8, (20, 12), torch.Size([20, 16]))
    """

    def __init__(self, trained: TorchWorkload, tables: str, epochs: int) -> None:
        if tables not in FLOATS and not tables.startswith("int"):
            raise UsageError(
                f"tables are stored as one of {', '.join((*FLOATS, *LAYOUTS))}, not as {tables!r}"
            )
        if epochs < 0:
            raise UsageError(f"a model is trained for 0 or more epochs before, not {epochs}")
        self._layout = None if tables in FLOATS else parse(tables)
        self._trained, self._tables, self._epochs = trained, tables, epochs
        self._state: dict[str, Any] | None = None
        self.name = f"served[tables={tables},trained={epochs},model={trained.name}]"

    @property
    def epoch(self) -> int:
        """Epochs counted since the tables were stored; 0 before `start`."""
        return self._state["epoch"] if self._state else 0

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """The model as it is stored: tables in their form, all else in float32."""
        found: dict[str, torch.Tensor] = self._current()["model"]
        return found

    @property
    def model(self) -> torch.nn.Module:
        """The model that is evaluated, its tables in float32."""
        self._current()
        return self._trained.model

    def start(self, seed: int) -> None:
        """Train the model from a seed >= 0, and store its tables."""
        self._trained.start(seed)
        for _ in range(self._epochs):
            self._trained.train_epoch()
        weights = self._trained.model.state_dict()
        stored = {name: self._as_stored(name, weight.cpu()) for name, weight in weights.items()}
        self._take_up({"workload": self.name, "epoch": 0, "seed": seed, "model": stored})

    def train_epoch(self) -> dict[str, float]:
        """Count an epoch; nothing is trained, and nothing measured."""
        self._current()["epoch"] += 1
        return {}

    def evaluate(self) -> dict[str, float]:
        """Measure what the recipe measures; NaN, infinities and extreme values are counted in float32."""
        self._current()
        return self._trained.evaluate()

    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's outputs for the test set, and the targets."""
        self._current()
        return self._trained.outputs()

    def save(self, path: str | Path) -> None:
        """Write the stored model, seed and epoch to an HDF5 file."""
        torch_h5.save(self._current(), path)

    def digest(self) -> str:
        """A digest of everything that `save` would write."""
        return state_digest(self._current())

    def load(self, path: str | Path) -> None:
        """Take up a checkpoint, altered or not; when that fails, the present state stays.

        Raises:
            CheckpointError: the file is damaged.
            WorkloadError: it belongs to another workload, or its model has another form.
        """
        state = torch_h5.load(path)
        check_parts(state, _PARTS, self.name, str(path))
        if self._state is None:
            self._trained.start(state["seed"])  # for the model's form; its weights are replaced
        self._check(state["model"], str(path))
        self._take_up({part: state[part] for part in ("workload", "epoch", "seed", "model")})

    def _take_up(self, state: dict[str, Any]) -> None:
        values = {name: self._in_use(name, value) for name, value in state["model"].items()}
        self._trained.model.load_state_dict(values)
        self._state = state

    def _as_stored(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        if not _TABLE.fullmatch(name):
            return weight.clone()
        if self._layout is None:
            return weight.to(FLOATS[self._tables], copy=True)
        return torch.from_numpy(quantise(weight.numpy(), self._tables))

    def _in_use(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if self._layout is None or not _TABLE.fullmatch(name):
            return value.float()
        columns = self._trained.model.state_dict()[name].shape[1]
        # Rows of 4-bit codes do not tell an odd dimension.
        return torch.from_numpy(dequantise(value.numpy(), _with_dim(self._layout, columns)))

    def _check(self, model: Any, path: str) -> None:
        expected = self._trained.model.state_dict()
        if not isinstance(model, dict) or model.keys() != expected.keys():
            raise WorkloadError(f"{path} holds a model of another architecture than {self.name}")
        for name, weight in expected.items():
            wanted = self._form(name, weight)
            found = (getattr(model[name], "dtype", None), tuple(getattr(model[name], "shape", ())))
            if found != wanted:
                raise WorkloadError(
                    f"{path} holds a model of another form: {name} is {found[0]} {found[1]}, "
                    f"{self.name} has {wanted[0]} {wanted[1]}"
                )

    def _form(self, name: str, weight: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
        if not _TABLE.fullmatch(name):
            return weight.dtype, tuple(weight.shape)
        if self._layout is None:
            return FLOATS[self._tables], tuple(weight.shape)
        return torch.uint8, (weight.shape[0], self._layout.packed(weight.shape[1]))

    def _current(self) -> dict[str, Any]:
        if self._state is None:
            raise no_state(self.name)
        return self._state


def row_bytes(tables: str, columns: int) -> int:
    """Bytes of one row of a table in a form.

    Args:
        tables: as in `ServedWorkload`.
        columns: of the table.

    Example:
        >>> [row_bytes(form, 16) for form in ("fp32", "bf16", "int8", "int4")]
        [64, 32, 24, 12]
    """
    if tables in FLOATS:
        return columns * int(FLOATS[tables].itemsize)
    return parse(tables).packed(columns)


def _with_dim(layout: Rowwise, columns: int) -> str:
    return layout.name if layout.dim is not None else f"{layout.name}:{columns}"
