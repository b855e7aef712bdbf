"""What Keras' layers call their variables, in the order in which they save them.

A weights file numbers a layer's variables; their names follow from its class. Where a class has optional
variables, their count, their dtypes and (in an archive) the layer's configuration decide; what these leave
open stays without a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from msgspec import Struct

from ckptflip.checkpoints.roles import guess
from ckptflip.faults.catalogue import Tensor

# A variable: its name, then `:` and the kinds its dtype may be of (float unless said; `*` for any), then `?`
# where it may be missing. One line for each form that a class is saved in.
_DENSE = (
    "kernel bias?",
    "kernel:i bias? kernel_scale",
    "kernel:i bias? kernel_scale kernel_zero:* g_idx:*",
    "kernel bias? inputs_scale inputs_amax_history kernel_scale kernel_amax_history outputs_grad_scale "
    "outputs_grad_amax_history",
    "bias? quantized_kernel:u kernel_scale kernel_zero:* g_idx:*",
    "bias? quantized_kernel:u kernel_scale kernel_zero:* awq_scales g_idx:*",
)
_EMBEDDING = (
    "embeddings",
    "embeddings:i embeddings_scale",
    "embeddings:i embeddings_scale embeddings_zero:* g_idx:*",
)
_REVERSIBLE = (
    *_EMBEDDING,
    "embeddings reverse_embeddings",
    "embeddings:i embeddings_scale reverse_embeddings:i reverse_embeddings_scale",
    "embeddings:i embeddings_scale embeddings_zero:* g_idx:* reverse_embeddings:i reverse_embeddings_scale "
    "reverse_embeddings_zero:*",
)
_CONV = ("kernel bias?",)
_SEPARABLE = ("depthwise_kernel pointwise_kernel bias?",)
_RECURRENT = ("kernel recurrent_kernel bias?",)
_SCALE_AND_SHIFT = ("gamma? beta?",)
# By the name of the class as files spell it.
CLASSES = {
    "dense": _DENSE,
    "einsum_dense": _DENSE,
    "embedding": _EMBEDDING,
    "reversible_embedding": _REVERSIBLE,
    **{f"conv{n}d": _CONV for n in (1, 2, 3)},
    **{f"conv{n}d_transpose": _CONV for n in (1, 2, 3)},
    **{f"depthwise_conv{n}d": _CONV for n in (1, 2)},
    **{f"separable_conv{n}d": _SEPARABLE for n in (1, 2)},
    "batch_normalization": (
        "gamma? beta? moving_mean moving_variance",
        "gamma? beta? moving_mean moving_variance moving_stddev renorm_mean renorm_stddev",
    ),
    "layer_normalization": _SCALE_AND_SHIFT,
    "group_normalization": _SCALE_AND_SHIFT,
    "rms_normalization": ("scale",),
    "spectral_normalization": ("kernel vector_u",),
    "normalization": ("mean variance count:*",),
    "lstm_cell": _RECURRENT,
    "gru_cell": _RECURRENT,
    "simple_rnn_cell": _RECURRENT,
    "conv_lstm_cell": _RECURRENT,
    "attention": ("scale? concat_score_weight?",),
    "additive_attention": ("scale?",),
    "p_re_lu": ("alpha",),
    "stft_spectrogram": ("real_kernel imag_kernel",),
    "seed_generator": ("seed_generator_state:u",),
    # Of tf.keras, which saves metrics too.
    "mean": ("total count",),
}
# The attributes that hold the layers inside some layers, in the order in which the layers count them.
_ATTENTION = ("query_dense", "key_dense", "gate_dense", "value_dense", "output_dense")
INNER_ORDER = {
    "multi_head_attention": _ATTENTION,
    # The class has a second name, which configurations give.
    "grouped_query_attention": _ATTENTION,
    "group_query_attention": _ATTENTION,
    "bidirectional": ("forward_layer", "backward_layer"),
}
# Their real names, for files before Keras 3.6, which do not give them.
INNER_NAMES = {
    "query_dense": "query",
    "key_dense": "key",
    "gate_dense": "gate",
    "value_dense": "value",
    "output_dense": "attention_output",
}
# Variables that no optimizer trains, beside all integers.
_UNTRAINED = re.compile(
    r"(moving|renorm)_.*|mean|variance|count|total|vector_u|.*_(scale|zero|scales|amax_history)|g_idx"
)
_ROLES = {
    "alpha": "weight",
    "concat_score_weight": "weight",
    **dict.fromkeys(("mean", "variance", "vector_u", "inputs_scale", "outputs_grad_scale"), "statistic"),
    **dict.fromkeys(("moving_stddev", "renorm_mean", "renorm_stddev"), "statistic"),
    **dict.fromkeys(("inputs_amax_history", "kernel_amax_history", "outputs_grad_amax_history"), "statistic"),
    "count": "counter",
    "g_idx": "other",
    "total": "other",
    **dict.fromkeys(("embeddings_scale", "embeddings_zero", "reverse_embeddings"), "embedding"),
    **dict.fromkeys(("reverse_embeddings_scale", "reverse_embeddings_zero"), "embedding"),
}


class _Variable(Struct, frozen=True):
    name: str
    kinds: str
    optional: bool


def names_of(klass: str, tensors: Sequence[Tensor], config: Mapping[str, Any]) -> list[str | None]:
    """The names of a layer's variables, None for one that cannot be told.

    Args:
        klass: the layer's class as files spell it (``batch_normalization``), or "" where it is not known.
        tensors: its variables, in the order of their numbers.
        config: the layer's configuration, as far as it is known.
    """
    if not klass:
        return _by_shape(tensors)
    fitting = [
        form
        for form in _forms(klass)
        if len(form) == len(tensors)
        and all("*" in v.kinds or t.number.kind[0] in v.kinds for v, t in zip(form, tensors, strict=True))
    ]
    allowed = [form for form in fitting if _agrees({v.name for v in form}, klass, config)]
    columns = zip(*(allowed or fitting), strict=True)
    found = [{v.name for v in column} for column in columns]
    return [names.pop() if len(names) == 1 else None for names in found] or [None] * len(tensors)


def is_trained(name: str | None, tensor: Tensor) -> bool:
    """Whether an optimizer keeps state for a variable, as far as name and dtype tell."""
    return tensor.number.is_float and (name is None or not _UNTRAINED.fullmatch(name))


def role_of(path: str, klass: str, tensor: Tensor, siblings: Sequence[str]) -> str:
    """The role of a variable with a real name.

    Args:
        path: its name, such as ``dense/kernel``.
        klass: the layer's class, or "".
        tensor: the variable.
        siblings: names of the layer's variables.
    """
    variable = path.rpartition("/")[2]
    if variable == "scale":
        return "norm" if klass == "rms_normalization" else "weight"
    if klass in CLASSES and variable in _ROLES:
        return _ROLES[variable]
    return guess(path, tensor.number, len(tensor.shape), siblings)[1]


def class_of(name: str) -> str:
    """The class that a numbered name such as ``dense_3`` stands for; the name itself without a number.

    Example:
        >>> class_of("conv2d_transpose_12"), class_of("conv2d")
        ('conv2d_transpose', 'conv2d')
    """
    return re.sub(r"_\d+$", "", name)


def counter_of(name: str) -> int:
    """The number behind a name; 0 where there is none, as Keras counts.

    Example:
        >>> counter_of("dense_3"), counter_of("dense")
        (3, 0)
    """
    found = re.search(r"_(\d{1,18})$", name)
    return int(found.group(1)) if found else 0


def snake(klass: str) -> str:
    """A class name as files spell it.

    Example:
        >>> snake("Conv2DTranspose"), snake("LSTMCell"), snake("RMSNormalization"), snake("PReLU")
        ('conv2d_transpose', 'lstm_cell', 'rms_normalization', 'p_re_lu')
    """
    word_starts = r"(?<=.)(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])"
    return re.sub(word_starts, "_", re.sub(r"\W+", "", klass)).lower()


@cache
def _forms(klass: str) -> tuple[tuple[_Variable, ...], ...]:
    """Every list of variables that a class may be saved with."""
    return tuple(form for line in CLASSES.get(klass, ()) for form in _spelt_out(line.split()))


def _spelt_out(tokens: Sequence[str]) -> Iterator[tuple[_Variable, ...]]:
    if not tokens:
        yield ()
        return
    name, _, kinds = tokens[0].rstrip("?").partition(":")
    variable = _Variable(name, kinds or "f", tokens[0].endswith("?"))
    for rest in _spelt_out(tokens[1:]):
        yield (variable, *rest)
        if variable.optional:
            yield rest


def _agrees(present: set[str], klass: str, config: Mapping[str, Any]) -> bool:
    """Whether a layer of this configuration has these variables."""
    wanted = {
        "bias": config.get("use_bias"),
        "gamma": config.get("scale"),
        "beta": False if config.get("rms_scaling") is True else config.get("center"),
        "scale": None if klass == "rms_normalization" else config.get("use_scale"),
        "concat_score_weight": config["score_mode"] == "concat" if "score_mode" in config else None,
        "reverse_embeddings": config["tie_weights"] is False if "tie_weights" in config else None,
        "renorm_mean": config.get("renorm"),
    }
    return all((name in present) == flag for name, flag in wanted.items() if isinstance(flag, bool))


def _by_shape(tensors: Sequence[Tensor]) -> list[str | None]:
    """A kernel and its bias, the one pair that shapes give away; nothing else."""
    if len(tensors) == 2 and all(t.number.is_float for t in tensors):
        kernel, bias = (t.shape for t in tensors)
        if len(kernel) >= 2 and bias == kernel[-1:]:
            return ["kernel", "bias"]
    return [None] * len(tensors)
