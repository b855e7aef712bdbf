"""Guessing layer and role of a tensor from its name, as Keras, PyTorch, Chainer, Flax and optax give them.

A guess, never a fact: selections by name are always possible, and `roles` in a policy only ever filters.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache

from ckptflip.bits import NumberFormat

# Parts of a path that group tensors without naming a layer.
_CONTAINERS = frozenset(
    (
        *(
            "model",
            "state_dict",
            "model_state_dict",
            "model_weights",
            "model:main",
            "params",
            "weights",
            "_ema",
        ),
        *(
            "optimizer",
            "optimizer_weights",
            "optimizer_state",
            "optimizer_state_dict",
            "optimizer:main",
            "updater",
        ),
        *("state", "layers", "_layer_checkpoint_dependencies", "vars"),
        *("batch_stats", "opt_state"),
    )
)
_RNG = frozenset(("rng", "rng_state", "rng_states", "seed_generator", "seed_generator_state"))
_NO_LAYERS = _CONTAINERS | _RNG
_COUNTERS = frozenset(
    (
        *(
            "num_batches_tracked",
            "step",
            "steps",
            "iteration",
            "iterations",
            "epoch",
            "global_step",
            "t",
            "N",
        ),
        *("_iterations", "save_counter"),
    )
)
# Of optax; elsewhere a count may be anything.
_OPTAX_COUNTERS = frozenset(("count", "mini_step", "gradient_step"))
# What optax keeps for all parameters: the parameters' own tree is below.
_TREES = frozenset(
    (
        *("mu", "nu", "nu_max", "trace", "momentum", "velocity", "m", "v", "v_row", "v_col"),
        *("sum_of_squares", "ema", "acc_grads"),
    )
)
_OPTIMIZERS = frozenset(("opt", "opt_state"))
_KERAS_OPTIMIZERS = frozenset(
    (
        *("adam", "adamw", "adamax", "nadam", "sgd", "SGD", "rmsprop", "adagrad", "adadelta", "adafactor"),
        *("ftrl", "lion", "lamb", "muon", "loss_scale_optimizer"),
    )
)
# What PyTorch's optimizers keep for each parameter.
_SLOTS = frozenset(
    (
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf"),
        *("momentum_buffer", "square_avg", "grad_avg", "acc_delta"),
    )
)
_STATISTICS = frozenset(
    ("running_mean", "running_var", "moving_mean", "moving_variance", "avg_mean", "avg_var")
)
_WEIGHTS = frozenset(["weight", "kernel", "W", "w", "weights", "in_proj_weight"])
_NUMBERED = re.compile(r":\d+$")
_WEIGHT_LIKE = re.compile(r"(weight|kernel)(_|$)|_(weight|kernel)$")
_NORM_LIKE = re.compile(
    r"(^|_)(bn|batch_?norm(alization)?|layer_?norm(alization)?|group_?norm|rms_?norm|norm|ln)(_?\d+|_f)?$",
    re.IGNORECASE,
)
# wte and wpe are GPT-2's token and position embeddings.
_EMBEDDING_LIKE = re.compile(
    r"(^|_)(emb|embd|embed|embedding|embeddings|emb_l)(_?\d+|_tokens|_positions)?$|^w[tp]e$"
)


def guess(
    path: str, number: NumberFormat, ndim: int, siblings: Collection[str], given: str = ""
) -> tuple[str, str]:
    """The layer and the role of a tensor.

    Args:
        path: its name in the file, parts joined by ``/``.
        number: its number format.
        ndim: how many axes it has.
        siblings: names beside it in the same group.
        given: the real name that the file gives the parent group (Keras 3, and optimizer state), or "".

    Returns:
        The layer ("" where the name tells none) and one of `ckptflip.faults.ROLES`.

    Example:
        >>> from ckptflip.bits import lookup
        >>> guess("model/conv1.weight", lookup("float32"), 4, ["conv1.weight", "conv1.bias"])
        ('conv1', 'weight')
        >>> guess("model_weights/dense/dense/bias:0", lookup("float32"), 1, [])
        ('dense', 'bias')
    """
    parts = path.strip("/").split("/")
    leaf = _NUMBERED.sub("", parts[-1]) if ":" in parts[-1] else parts[-1]
    owner, _, variable = leaf.rpartition(".")
    words = [*parts[:-1], *owner.split(".")]
    if variable in ("real", "imag") and owner:
        owner, _, variable = owner.rpartition(".")
    is_state = _is_optimizers(words)
    layer = _layer(parts, owner, given, is_state)
    return layer, _role(words, variable, number, ndim, siblings, owner, given, is_state)


def _is_optimizers(words: list[str]) -> bool:
    """Whether the parts of a path before the last one lead into an optimizer."""
    for word in words:  # any() takes twice as long
        if word in _OPTIMIZERS or word.startswith("optim"):
            return True
    # TensorFlow and Keras begin with the optimizer's own name: adam/iteration.
    return words[0] in _KERAS_OPTIMIZERS


def _layer(parts: list[str], owner: str, given: str, is_state: bool) -> str:
    if given:
        # An optimizer slot is named after its parameter: conv1.weight belongs to conv1.
        return given.rpartition(".")[0] or given
    groups = parts[:-1]
    if "model_weights" in groups:
        # Keras 2 repeats the layer's name inside its own group; variables may lie deeper still.
        at = groups.index("model_weights") + 1
        return groups[at] if at < len(groups) else owner
    if is_state:
        # What is before the tree of parameters, such as a place in a chain of optimizers, is no layer's name.
        at = next((i for i, g in enumerate(groups, 1) if g in _TREES), 0)
        groups = groups[at:] if at else [g for g in groups if not g.isdecimal()]
    named = _named(groups)
    if owner:
        named.append(owner)
    return "/".join(named)


def _named(groups: list[str]) -> list[str]:
    """The parts that name a layer; a number does so too, together with the list that it is a place in."""
    named: list[str] = []
    last = ""
    for group in groups:
        if group.isdecimal():
            if last == "layers":
                named.append(last)
            if last != "state":
                named.append(group)
        elif group not in _NO_LAYERS:
            named.append(group)
        last = group
    return named


def _role(
    words: list[str],
    variable: str,
    number: NumberFormat,
    ndim: int,
    siblings: Collection[str],
    owner: str,
    given: str,
    is_state: bool,
) -> str:
    if variable in _RNG or _RNG.intersection(words):
        return "rng"
    if variable in _COUNTERS and ndim <= 1:
        return "counter"
    if is_state or variable in _SLOTS:
        if variable in _OPTAX_COUNTERS and ndim <= 1 and not number.is_float:
            return "counter"
        return "counter" if variable == "0" and ndim == 0 and not number.is_float else "optimizer"
    if variable in _STATISTICS:
        return "statistic"
    nearest = [w for w in words if w and w not in _CONTAINERS][-1:]
    is_norm = any(_is_norm(w) for w in [*nearest, *owner.split(".")[-1:], given] if w)
    if variable.isdecimal() and "vars" in words:
        return _keras3(int(variable), ndim, nearest, is_norm)
    if variable in ("mean", "var") and (is_norm or "batch_stats" in words):
        return "statistic"
    if variable in ("gamma", "beta") or (variable == "scale" and is_norm):
        return "norm"
    is_bias = variable in ("bias", "b", "in_proj_bias") or variable.startswith("bias_")
    is_weight = variable in _WEIGHTS or _WEIGHT_LIKE.search(variable) is not None
    prefix = f"{owner}." if owner else ""
    beside_statistics = any(f"{prefix}{s}" in siblings for s in ("running_mean", "avg_mean", "moving_mean"))
    if (is_bias or is_weight) and ndim <= 1 and (is_norm or beside_statistics):
        return "norm"
    if is_bias:
        return "bias"
    if variable in ("embeddings", "embedding") or (is_weight and any(_is_embedding(w) for w in words)):
        return "embedding"
    return "weight" if is_weight else "other"


# Names repeat from layer to layer; a model has 100,000s of them.
@lru_cache(4096)
def _is_norm(word: str) -> bool:
    return _NORM_LIKE.search(word) is not None


@lru_cache(4096)
def _is_embedding(word: str) -> bool:
    return _EMBEDDING_LIKE.search(word) is not None


def _keras3(position: int, ndim: int, nearest: list[str], is_norm: bool) -> str:
    """Keras 3 numbers variables: 0 kernel, 1 bias; a normalisation's 0 gamma, 1 beta, 2 mean, 3 variance."""
    if is_norm:
        return "norm" if position < 2 else "statistic"
    if any(_is_embedding(w) for w in nearest):
        return "embedding"
    return "weight" if ndim >= 2 else "bias"
