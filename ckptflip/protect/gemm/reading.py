"""The numbers of linear layers as others hold them: PyTorch's float and quantised ones, torchao's weights.

torchao is never imported: its tensors are known by their class, and read by their attributes.
"""

from __future__ import annotations

from typing import Any

import torch

from ckptflip.errors import UsageError
from ckptflip.protect.gemm.quantised import Quantised, quantise


class NotTakenError(UsageError):
    """A layer that cannot be protected; the message says why."""


def is_torchao(weight: Any) -> bool:
    """Whether a tensor is one of torchao's."""
    return type(weight).__module__.partition(".")[0] == "torchao"


def read_float(module: torch.nn.Linear, per_channel: bool = True) -> Quantised:
    """The numbers of a `torch.nn.Linear`, of floats or with an int8 weight of torchao.

    Raises:
        NotTakenError: its weight is something else.

    Example:
        >>> read_float(torch.nn.Linear(3, 2)).outputs
        2
    """
    if is_torchao(module.weight):
        return _read_torchao(module)
    weight = module.weight
    if type(weight) not in (torch.Tensor, torch.nn.Parameter) or not weight.is_floating_point():
        raise NotTakenError(f"its weight is a {type(weight).__name__} of {weight.dtype}")
    if weight.device.type != "cpu":
        raise NotTakenError(f"its weight is on {weight.device}, and int8 products are checked on the CPU")
    try:
        return quantise(module, per_channel=per_channel)
    except UsageError as error:
        raise NotTakenError(str(error)) from error


def _read_torchao(module: torch.nn.Linear) -> Quantised:
    weight = module.weight
    codes, scale, zero = (getattr(weight, name, None) for name in ("qdata", "scale", "zero_point"))
    if codes is None or scale is None or codes.dtype is not torch.int8 or codes.dim() != 2:
        raise NotTakenError(f"a weight of torchao other than int8: {type(weight).__name__}")
    if zero is not None and bool((zero != 0).any()):
        raise NotTakenError("its weight has zero points; symmetric codes can be taken")
    if scale.numel() not in (1, codes.shape[0]):
        raise NotTakenError(f"its weight has {scale.numel()} scales for {codes.shape[0]} outputs")
    bias = None if module.bias is None else module.bias.detach().float().clone()
    return Quantised(codes.clone().contiguous(), scale.detach().float().reshape(-1).clone(), bias)


def read_quantised(module: Any, *, out: bool, relu: bool = False) -> Quantised:
    """The numbers of a layer of `torch.ao.nn.quantized`.

    Args:
        module: a static or a dynamic one.
        out: whether it gives quantised tensors, and has a scale for them.
        relu: whether it ends with a ReLU.

    Raises:
        NotTakenError: its weight is no symmetric int8.
    """
    weight, bias = module.weight(), module.bias()
    if weight.dtype is not torch.qint8:
        raise NotTakenError(f"its weight is of {weight.dtype}; qint8 can be taken")
    per_channel = weight.qscheme() not in (torch.per_tensor_affine, torch.per_tensor_symmetric)
    if per_channel and weight.q_per_channel_axis() != 0:
        raise NotTakenError("its weight has scales along its inputs; along its outputs can be taken")
    zero = weight.q_per_channel_zero_points() if per_channel else torch.tensor(weight.q_zero_point())
    if bool((zero != 0).any()):
        raise NotTakenError("its weight has zero points; symmetric codes can be taken")
    scale = weight.q_per_channel_scales() if per_channel else torch.tensor([weight.q_scale()])
    return Quantised(
        weight.int_repr(),
        scale.float(),
        None if bias is None else bias.detach().float().clone(),
        out_scale=float(module.scale) if out else None,
        out_zero=int(module.zero_point) if out else 0,
        relu=relu,
    )


def dequantised(layer: Quantised, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A layer of floats with the weight that the codes stand for, and a ReLU behind it if there was one.

    Args:
        layer: the numbers.
        dtype: of the weight and the bias.

    Example:
        >>> plain = torch.nn.Linear(4, 2)
        >>> again = dequantised(quantise(plain))
        >>> bool((again.weight - plain.weight).abs().max() <= plain.weight.abs().max() / 254 * 1.01)
        True
    """
    linear = torch.nn.Linear(layer.inputs, layer.outputs, bias=layer.bias is not None, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(layer.weight * layer.weight_scale[:, None])
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)
    return (torch.nn.Sequential(linear, torch.nn.ReLU()) if layer.relu else linear).eval()
