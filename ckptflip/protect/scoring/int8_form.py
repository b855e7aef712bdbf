"""A trained recommendation model in int8: matrices with checksum columns, tables with check bytes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch

from ckptflip.errors import CheckpointError, CkptflipError, UsageError
from ckptflip.protect.embeddings import protect_table
from ckptflip.protect.embeddings.rows import Row
from ckptflip.protect.gemm.conversion import protect
from ckptflip.protect.gemm.quantised import Quantised
from ckptflip.protect.scoring.contender import Contender
from ckptflip.protect.scoring.forms import Kind
from ckptflip.protect.scoring.int8_contenders import INT8_CONTENDERS
from ckptflip.protect.scoring.int8_layers import Int8Linear, Int8Rows
from ckptflip.recsys.tables import quantise

Batches = Sequence[tuple[torch.Tensor, ...]]
_INPUT = ".input"


class Int8:
    """``int8``: linear layers and tables in int8, quantised after training.

    Linear layers as `ckptflip.protect.gemm.conversion.protect` makes them, with ranges of inputs from clean
    batches; tables row by row, as ATen does it. Constants are each layer's ``NAME.input``, float64[2]: scale
    and zero point of its input's codes.
    """

    contenders: Sequence[Contender] = INT8_CONTENDERS

    def kinds(self, trained: torch.nn.Module) -> dict[str, Kind]:
        """Tables are uint8, matrices int8, scales and biases float32.

        Raises:
            UsageError: the model is not made of linear layers and tables that are summed.
        """
        found: dict[str, Kind] = {}
        for name, module in _parts(trained).items():
            if isinstance(module, torch.nn.Linear):
                n, k = module.weight.shape
                # How many columns the checksum takes depends on the weights.
                found[f"{name}.weight"] = (torch.int8, (-1, k))
                found[f"{name}.weight_scale"] = (torch.float32, (n,))
                if module.bias is not None:
                    found[f"{name}.bias"] = (torch.float32, (n,))
            else:
                rows, columns = module.weight.shape
                found[f"{name}.weight"] = (torch.uint8, (rows, Row("int8", columns).width))
        return found

    def constants(self, trained: torch.nn.Module) -> dict[str, Kind]:
        """Scale and zero point of each layer's input."""
        parts = _parts(trained).items()
        return {
            name + _INPUT: (torch.float64, (2,)) for name, part in parts if isinstance(part, torch.nn.Linear)
        }

    def stored(self, trained: torch.nn.Module, batches: Batches) -> dict[str, torch.Tensor]:
        """Quantise a trained model."""
        parts = _parts(trained)
        layers = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Linear)}
        converted = protect(trained, on_error="count", calibration=batches).model
        new, inputs = {}, {}
        for name, part in parts.items():
            if name in layers:
                layer = converted.get_submodule(name).checked.packed.layer
                new[name] = Int8Linear(layer)
                inputs[name + _INPUT] = torch.tensor([layer.x_scale, layer.x_zero], dtype=torch.float64)
            else:
                table = torch.from_numpy(quantise(part.weight.detach().numpy(), "int8"))
                new[name] = Int8Rows(protect_table(table, "int8"))
        held = _with(trained, new).state_dict()
        return {name: held[name] for name in self.kinds(trained)} | inputs

    def served(self, trained: torch.nn.Module, clean: dict[str, torch.Tensor]) -> torch.nn.Module:
        """The model in int8.

        Raises:
            CheckpointError: a matrix is not the one that is packed from its own numbers.
        """
        new = {}
        for name, part in _parts(trained).items():
            weight = clean[f"{name}.weight"]
            if isinstance(part, torch.nn.Linear):
                new[name] = _layer(name, weight[: part.out_features], clean)
                fits = torch.equal(new[name].weight, weight)
            else:
                new[name] = Int8Rows(weight)
                fits = True
            if not fits:
                raise CheckpointError(f"{name}: the clean matrix does not fit its own checksum")
        return _with(trained, new).eval()


def _layer(name: str, codes: torch.Tensor, clean: dict[str, torch.Tensor]) -> Int8Linear:
    scale, zero = clean[name + _INPUT].tolist()
    try:
        layer = Quantised(codes.clone(), clean[f"{name}.weight_scale"], clean.get(f"{name}.bias"))
        return Int8Linear(replace(layer, x_scale=scale, x_zero=int(zero)))
    except (CkptflipError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{name}: the clean copy makes no layer: {error}") from error


def _parts(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The linear layers and tables, in order.

    Raises:
        UsageError: there is something else, or a table whose rows are not summed.
    """
    found: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear or (
            type(module) is torch.nn.EmbeddingBag and module.mode == "sum" and module.padding_idx is None
        ):
            found[name] = module
    covered = {f"{name}.{own}" for name, module in found.items() for own in module.state_dict()}
    if other := sorted(set(model.state_dict()) - covered):
        raise UsageError(
            f"form='int8' is for models of linear layers and summed tables, such as dlrm, and {other[0]} is "
            "of neither"
        )
    return found


def _with(model: torch.nn.Module, new: dict[str, torch.nn.Module]) -> torch.nn.Module:
    """A copy with other modules in some places."""
    return copy.deepcopy(model, {id(model.get_submodule(name)): module for name, module in new.items()})
