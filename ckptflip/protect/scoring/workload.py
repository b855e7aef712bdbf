"""A trained model that each evaluation measures bare and under every protection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ckptflip import torch_h5
from ckptflip.errors import CheckpointError, MissingExtraError, WorkloadError

try:
    import torch
except ImportError as error:
    raise MissingExtraError("torch", "torch", "Scoring protections") from error

from ckptflip.protect.scoring.contender import Contender, Run
from ckptflip.protect.scoring.contenders import CONTENDERS
from ckptflip.protect.scoring.forms import Kind, form_of
from ckptflip.training.checks import check_parts, no_state
from ckptflip.training.digests import state_digest
from ckptflip.training.pytorch import TorchWorkload

_PARTS = {"workload", "epoch", "seed", "model", "clean"}
_BATCH = 1024
# Trials of a campaign start from several seeds in turn.
_MOST_KNOWN = 8


class _Known:
    """What belongs to one clean model: what computes, its outputs, and what each contender prepared."""

    def __init__(self, model: torch.nn.Module, outputs: torch.Tensor, prepared: dict[str, Any]) -> None:
        self.model, self.outputs, self.prepared = model, outputs, prepared


class ScoredWorkload:
    """A model that is trained when it is started; its checkpoint is altered, measured, and not trained on.

    The checkpoint holds the model, and its clean weights once more as one run of bytes (``clean``), which is
    what the protections were prepared on. Faults belong into ``model/*``: a checkpoint whose ``clean`` was
    hit is refused. In a campaign, ``restart.epochs = [0]`` and ``restart.horizon = 0``.

    Args:
        trained: the recipe.
        epochs: how many are trained before.
        calibration: training samples that contenders may learn from.
        contenders: the protections; all of `contenders.CONTENDERS` unless given.
        form: how the model lies in memory, of `forms.FORMS`.

    Example:
        >>> from ckptflip.protect.scoring import scored
        >>> workload = scored(model="digits-mlp", trained=1)
        >>> workload.start(1)
        >>> found = workload.evaluate()
        >>> found["changed"], found["found/nan"], found["found/seal"]
        (0.0, 0.0, 0.0)
    """

    def __init__(
        self,
        trained: TorchWorkload,
        epochs: int,
        calibration: int,
        contenders: Sequence[Contender] = CONTENDERS,
        form: str = "fp32",
    ) -> None:
        self._trained, self._epochs, self._calibration = trained, epochs, calibration
        self._form = form_of(form)
        self._contenders = tuple(contenders)
        self._state: dict[str, Any] | None = None
        self._known: dict[str, _Known] = {}
        told = "" if calibration == 8192 else f"calibration={calibration},"
        told += "" if form == "fp32" else f"form={form},"
        self.name = f"scored[trained={epochs},{told}model={trained.name}]"

    @property
    def epoch(self) -> int:
        """Epochs counted since the model was trained; 0 before `start`."""
        return self._state["epoch"] if self._state else 0

    @property
    def model(self) -> torch.nn.Module:
        """The model as it is now."""
        state = self._current()
        model = self._of_clean(state).model
        model.load_state_dict(state["model"])
        return model

    def start(self, seed: int) -> None:
        """Train the model from a seed >= 0, and keep a clean copy."""
        self._known.clear()  # what was prepared holds on to the model that is replaced here
        self._trained.start(seed)
        for _ in range(self._epochs):
            self._trained.train_epoch()
        trained = self._trained.model.eval()
        stored = self._form.stored(trained, self._batches())
        weights = {name: stored[name] for name in self._form.kinds(trained)}
        self._state = {
            "workload": self.name, "epoch": 0, "seed": seed, "model": weights, "clean": _packed(stored),
        }  # fmt: skip

    def train_epoch(self) -> dict[str, float]:
        """Count an epoch; nothing is trained, and nothing measured."""
        self._current()["epoch"] += 1
        return {}

    def evaluate(self) -> dict[str, float]:
        """Measure the model bare and under every contender.

        Returns:
            What the recipe measures; ``changed``, the share of test samples whose outputs are not the clean
            model's, bit for bit; and for each contender: ``found/NAME``, 1 where it noticed a fault and 0
            where it did not; where it alters outputs, ``auc/NAME``, ``accuracy/NAME`` and ``loss/NAME``, as
            far as the recipe measures them, and ``changed/NAME``; its own counts as ``COUNT/NAME``.
        """
        state = self._current()
        known = self._of_clean(state)
        known.model.load_state_dict(state["model"])
        run = self._run_of(known.model)
        bare = run()
        found = self._trained.measure(bare) | {"changed": _changed(bare, known.outputs)}
        for contender in self._contenders:
            prepared = known.prepared[contender.name]
            if prepared is not None:
                found |= self._faced(contender, known, run)
                known.model.load_state_dict(state["model"])
        return found

    def save(self, path: str | Path) -> None:
        """Write the model, its clean copy, seed and epoch to an HDF5 file."""
        torch_h5.save(self._current(), path)

    def digest(self) -> str:
        """A digest of everything that `save` would write."""
        return state_digest(self._current())

    def load(self, path: str | Path) -> None:
        """Take up a checkpoint, altered or not; when that fails, the present state stays.

        Raises:
            CheckpointError: the file is damaged, or its clean copy was hit.
            WorkloadError: it belongs to another workload or architecture.
        """
        state = torch_h5.load(path)
        check_parts(state, _PARTS, self.name, str(path))
        if self._state is None:
            self._trained.start(state["seed"])  # for the model's form; its weights are replaced
        self._check(state, str(path))
        self._state = {part: state[part] for part in ("workload", "epoch", "seed", "model", "clean")}

    def _check(self, state: dict[str, Any], path: str) -> None:
        expected = self._form.kinds(self._trained.model)
        model = state["model"]
        if not isinstance(model, dict) or model.keys() != expected.keys():
            raise WorkloadError(f"{path} holds a model of another architecture than {self.name}")
        for name, kind in expected.items():
            if not _fits(model[name], kind):
                raise WorkloadError(f"{path} holds a model of another form: {name} differs")
        try:
            self._clean_of(state)
        except (ValueError, RuntimeError, TypeError, AttributeError):
            raise CheckpointError(
                f"{path}: the clean copy beside the model is damaged; faults belong into the model: "
                "tensors = 'model/*' in the policy"
            ) from None

    def _clean_of(self, state: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The clean copy: what lies in memory, of the same shapes, and constants. Raises as `_unpacked`."""
        trained = self._trained.model
        kinds = {
            name: (dtype, tuple(state["model"][name].shape))
            for name, (dtype, _) in self._form.kinds(trained).items()
        }
        return _unpacked(state["clean"], kinds | self._form.constants(trained))

    def _of_clean(self, state: dict[str, Any]) -> _Known:
        """Prepare the contenders on the clean weights, once for each clean model."""
        key = bytes(state["clean"][:_DIGEST].tolist()).hex()
        if key not in self._known:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            model = self._form.served(self._trained.model, self._clean_of(state))
            batches = self._batches()
            outputs = self._run_of(model)()
            prepared = {each.name: each.prepare(model, batches) for each in self._contenders}
            self._known[key] = _Known(model, outputs, prepared)
        return self._known[key]

    def _faced(self, contender: Contender, known: _Known, run: Run) -> dict[str, float]:
        known.model.eval()
        verdict = contender.face(known.model, known.prepared[contender.name], run)
        found = {f"{name}/{contender.name}": value for name, value in verdict.counts.items()}
        if verdict.found is not None:
            found[f"found/{contender.name}"] = float(verdict.found)
        if verdict.outputs is not None:
            measured = self._trained.measure(verdict.outputs)
            found |= {f"{name}/{contender.name}": measured[name] for name in _TOLD if name in measured}
            found[f"changed/{contender.name}"] = _changed(verdict.outputs, known.outputs)
        return found

    def _run_of(self, model: torch.nn.Module) -> Run:
        return lambda: self._trained.outputs(model)[0]

    def _batches(self) -> list[tuple[torch.Tensor, ...]]:
        inputs = (part[: self._calibration].split(_BATCH) for part in self._trained.inputs())
        return list(zip(*inputs, strict=True))

    def _current(self) -> dict[str, Any]:
        if self._state is None:
            raise no_state(self.name)
        return self._state


_DIGEST = 32
_TOLD = ("auc", "accuracy", "loss")


def _packed(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """uint8[n]: a digest, then the weights' bytes in order; of no role that a policy's ``model`` holds."""
    flat = [value.contiguous().reshape(-1).view(torch.uint8) for value in weights.values() if value.numel()]
    held = torch.cat(flat)
    return torch.cat([_digest_of(held), held])


def _unpacked(packed: torch.Tensor, kinds: dict[str, Kind]) -> dict[str, torch.Tensor]:
    """The weights again.

    Raises:
        ValueError: the bytes are not those that were packed.
    """
    held = packed[_DIGEST:]
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in kinds.values()]
    if packed.dtype != torch.uint8 or sum(sizes) != len(held):
        raise ValueError("another size")
    if not torch.equal(_digest_of(held), packed[:_DIGEST]):
        raise ValueError("another digest")
    parts = held.split(sizes)
    return {
        name: part.clone().view(dtype).reshape(shape)
        for (name, (dtype, shape)), part in zip(kinds.items(), parts, strict=True)
    }


def _fits(value: Any, kind: Kind) -> bool:
    dtype, shape = kind
    held = tuple(getattr(value, "shape", ()))
    if getattr(value, "dtype", None) != dtype or len(held) != len(shape):
        return False
    return all(wanted in (-1, length) for length, wanted in zip(held, shape, strict=True))


def _digest_of(held: torch.Tensor) -> torch.Tensor:
    import hashlib

    digest = hashlib.blake2b(held.numpy(), digest_size=_DIGEST).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)


def _changed(outputs: torch.Tensor, clean: torch.Tensor) -> float:
    """The share of samples whose outputs are not the clean ones, bit for bit."""
    one, other = (each.contiguous().reshape(len(each), -1).view(torch.uint8) for each in (outputs, clean))
    return float((one != other).any(1).double().mean())
