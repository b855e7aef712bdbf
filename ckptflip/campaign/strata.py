"""The strata of a cell: its eligible bits by layer and bit field, each with its share of them all."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ckptflip.bits import BitSpec, NumberFormat
from ckptflip.errors import UsageError
from ckptflip.faults.catalogue import Tensor, select
from ckptflip.faults.elements import choose
from ckptflip.faults.policy import Policy

# Disjoint, and together all bits of a float; of an integer, `value` is all there is.
FIELDS = {
    "sign": "sign",
    "critical": "critical",
    "exponent": "exponent,!critical",
    "mantissa": "mantissa",
    "value": "all,!sign,!exponent,!mantissa",
}


class CellStratum(msgspec.Struct, frozen=True, kw_only=True):
    """One stratum of a cell.

    Attributes:
        layer: its layer; empty where layers are not told apart.
        field: one of `FIELDS`; empty where fields are not told apart.
        bits: eligible bits in it.
        weight: their share of the cell's.
        policy: draws one flip from it, uniformly.
    """

    layer: str
    field: str
    bits: int
    weight: float
    policy: Policy


def strata_of(policy: Policy, tensors: Sequence[Tensor], by: Sequence[str]) -> list[CellStratum]:
    """Divide what a policy may hit into strata.

    Args:
        policy: single flips over all bits.
        tensors: the catalogue of the checkpoint.
        by: ``layer``, ``field`` or both.

    Returns:
        The strata that hold a bit, layers in the order of the catalogue.

    Raises:
        SelectionError: the policy selects nothing.
        UsageError: two layers cannot be told apart by their names.

    Example:
        >>> from ckptflip.bits import lookup
        >>> tensors = [Tensor("conv1/kernel", (3, 3), lookup("float32"), layer="conv1", role="weight")]
        >>> [(s.field, s.bits) for s in strata_of(Policy(), tensors, ["field"])]
        [('sign', 9), ('critical', 9), ('exponent', 63), ('mantissa', 207)]
    """
    chosen = select(tensors, names=policy.tensors, layers=policy.layers, roles=policy.roles)
    layers = list(dict.fromkeys(tensors[i].layer for i in chosen)) if "layer" in by else [""]
    fields = list(FIELDS) if "field" in by else [""]
    found: list[tuple[str, str, int, Policy]] = []
    for layer in layers:
        within = [i for i in chosen if "layer" not in by or tensors[i].layer == layer]
        named = _named(policy, layer, within, tensors) if "layer" in by else policy
        for field in fields:
            spec = FIELDS[field] if field else "all"
            bits = sum(_bits(tensors[i], spec, policy) for i in within)
            if bits:
                found.append((layer, field, bits, msgspec.structs.replace(named, bits=spec, count=1)))
    total = sum(bits for _, _, bits, _ in found)
    return [
        CellStratum(layer=layer, field=field, bits=bits, weight=bits / total, policy=made)
        for layer, field, bits, made in found
    ]


def field_of(bit: int, number: NumberFormat) -> str:
    """The field that a bit of a word belongs to.

    Example:
        >>> from ckptflip.bits import lookup
        >>> [field_of(bit, lookup("float32")) for bit in (31, 30, 23, 0)], field_of(3, lookup("int8"))
        (['sign', 'critical', 'exponent', 'mantissa'], 'value')
    """
    return next((name for name, spec in FIELDS.items() if BitSpec(spec).mask(number) >> bit & 1), "value")


def _bits(tensor: Tensor, spec: str, policy: Policy) -> int:
    return (
        BitSpec(spec).mask(tensor.number).bit_count() * choose(tensor.shape, policy.rows, policy.slice).size
    )


def _named(policy: Policy, layer: str, within: list[int], tensors: Sequence[Tensor]) -> Policy:
    """A policy that selects one layer of those that a policy selects, and no other.

    Where a glob on the layer is not enough (its name is part of another's), tensors are named.
    """
    candidates = (
        {"layers": (layer,)},
        {"layers": (), "tensors": tuple(tensors[i].name for i in within)},
    )
    for changes in candidates if layer else candidates[1:]:
        made = msgspec.structs.replace(policy, **changes)
        if select(tensors, names=made.tensors, layers=made.layers, roles=made.roles) == within:
            return made
    raise UsageError(
        f"layer {layer!r} cannot be told from others by its tensors' names: leave it out of the strata"
    )
