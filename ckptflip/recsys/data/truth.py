"""The click probabilities planted in the generated log: main effects, and products of two fields.

The logit of a row is an intercept, plus an effect for each dense feature and for each field's id, plus
products of two fields' effects, which on average add nothing to either field's own. Effects of ids are
drawn from a hash of (seed, field, popularity): nothing is stored, and tables of any size have them. Popular
ids carry the signal; that of the others fades with their popularity, for a model cannot learn what it sees
once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Standard deviations of what each part adds to the logit.
_DENSE_SPREAD = 0.95
_FIELD_SPREAD = 0.75
_PRODUCT_SPREAD = 0.42
_INTERCEPT = -1.44
# Ids up to this popularity carry their whole effect.
_HOT = 8
# Moments of effects are taken over this many of the most popular ids; the rest carries nearly nothing.
_COUNTED = 1 << 16
# Pairs of fields with a planted product, numbered from 0: small tables, whose ids are all seen often.
_PAIRS = ((4, 16), (5, 8), (13, 19), (21, 24))
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Truth:
    """What is planted.

    Attributes:
        seed: of the log.
        sizes: rows of each table.
        steps: m of the ids' exponent 1 + 1/m.
        fields: mean, and 1 / deviation, of each field's raw effects.
        dense: mean, and 1 / deviation, of each dense feature's `octaves`.
    """

    seed: int
    sizes: tuple[int, ...]
    steps: int
    fields: tuple[tuple[float, float], ...]
    dense: tuple[tuple[float, float], ...]


def octaves(counts: Integers) -> Floats:
    """log2(counts + 1) drawn as straight lines between powers of two: exact arithmetic on every machine.

    Args:
        counts: 0 or more, below 2^53.

    Example:
        >>> octaves(np.array([0, 1, 2, 3])).tolist()
        [0.0, 1.0, 1.5, 2.0]
    """
    fraction, exponent = np.frexp((counts + 1).astype(np.float64))
    found: Floats = exponent - 2 + 2 * fraction
    return found


def root(value: float, steps: int) -> float:
    """value^(1/steps) for a power of two, by square roots."""
    while steps > 1:
        value, steps = math.sqrt(value), steps // 2
    return value


def power_law(uniform: Floats, least: float, steps: int) -> Integers:
    """Whole numbers from 0 with a density of x^-(1 + 1/steps) on [1, 1/least^steps), less 1, rounded down.

    Args:
        uniform: in [0, 1).
        least: (most + 1)^(-1/steps), where numbers are below `most`; see `root`.
    """
    inverse = 1.0 - uniform * (1.0 - least)
    while steps > 1:
        inverse, steps = inverse * inverse, steps // 2
    found: Integers = (1.0 / inverse).astype(np.int64) - 1
    return found


def chances(count: int, size: int, steps: int) -> Floats:
    """Probability of each of the `count` most popular ids of a table."""
    edges = np.arange(1, count + 2, dtype=np.float64)
    below = 1.0 - edges ** (-1.0 / steps)
    found: Floats = np.diff(below) / (1.0 - root(1.0 / (size + 1), steps))
    return found


def mixed(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014) of one word."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def normal(ranks: Integers, seed: int, field: int) -> Floats:
    """A number for each id, of mean 0 and variance 1: four uniform ones of 16 bits, hashed, added."""
    word = ranks.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(mixed(seed ^ mixed(0xEF + field)))
    word ^= word >> np.uint64(30)
    word *= np.uint64(0xBF58476D1CE4E5B9)
    word ^= word >> np.uint64(27)
    word *= np.uint64(0x94D049BB133111EB)
    word ^= word >> np.uint64(31)
    total = np.zeros(word.shape, np.uint64)
    for shift in (0, 16, 32, 48):
        total += word >> np.uint64(shift) & np.uint64(0xFFFF)
    return (total.astype(np.float64) - 131_070.0) * (math.sqrt(3.0) / 65_536.0)


def _raw_effect(ranks: Integers, seed: int, field: int) -> Floats:
    return normal(ranks, seed, field) * np.minimum(1.0, _HOT / (ranks + 1.0))


def _moments(seed: int, field: int, size: int, steps: int) -> tuple[float, float]:
    """Mean, and 1 / deviation, of a field's raw effects, over ids as they occur."""
    count = min(size, _COUNTED)
    chance = chances(count, size, steps)
    values = _raw_effect(np.arange(count), seed, field)
    mean = float((chance * values).sum())
    return mean, 1.0 / math.sqrt(float((chance * values**2).sum()) - mean**2)


def plant(seed: int, sizes: tuple[int, ...], steps: int, dense: tuple[tuple[float, float], ...]) -> Truth:
    """Set up the effects of a log.

    Args:
        seed: of the log.
        sizes: rows of each table.
        steps: m of the ids' exponent 1 + 1/m.
        dense: mean, and 1 / deviation, of each dense feature's `octaves`.
    """
    fields = tuple(_moments(seed, field, size, steps) for field, size in enumerate(sizes))
    return Truth(seed, sizes, steps, fields, dense)


def logits(truth: Truth, ranks: Integers, counts: Integers) -> Floats:
    """The planted logits.

    Args:
        truth: what is planted.
        ranks: int64[n, 26]: the popularity of each row's ids, 0 the most popular.
        counts: int64[n, 13]: the dense features, missing and negative ones as 0.

    Returns:
        float64[n].
    """
    found = np.full(len(ranks), _INTERCEPT)
    for column, (mean, factor) in enumerate(truth.dense):
        sign = 1 if mixed(truth.seed ^ mixed(0xD0 + column)) & 1 else -1
        share = sign * factor * _DENSE_SPREAD / math.sqrt(len(truth.dense))
        found += (octaves(counts[:, column]) - mean) * share
    paired = {field for pair in _PAIRS for field in pair}
    kept: dict[int, Floats] = {}
    for field, (mean, factor) in enumerate(truth.fields):
        effect = (_raw_effect(ranks[:, field], truth.seed, field) - mean) * factor
        found += effect * (_FIELD_SPREAD / math.sqrt(len(truth.fields)))
        if field in paired:
            kept[field] = effect
    for one, other in _PAIRS:
        found += kept[one] * kept[other] * (_PRODUCT_SPREAD / math.sqrt(len(_PAIRS)))
    return found
