"""The population that a policy draws from, as strata: the possible faults of each layer or bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from ckptflip.bits import BitSpec
from ckptflip.checkpoints import opened
from ckptflip.errors import SelectionError, UsageError
from ckptflip.faults import models
from ckptflip.faults.catalogue import Tensor, select
from ckptflip.faults.draw import Population
from ckptflip.faults.plan import ReadWords
from ckptflip.faults.policy import Policy

# The parts of a number that behave alike: the critical bit apart from the rest of the exponent.
FIELDS = ("sign", "critical", "exponent,!critical", "mantissa")
GROUPS = ("none", "bit", "field")


class Stratum(Struct, frozen=True):
    """Some of a policy's possible faults.

    Attributes:
        layer: the layer they lie in; empty for all layers.
        bits: the bits they hit, as a bit specification.
        population: how many there are.
    """

    layer: str
    bits: str
    population: int


def strata(
    checkpoint: str | Path, policy: Policy, *, per_layer: bool = False, by: str = "none"
) -> list[Stratum]:
    """The possible faults of a policy in a checkpoint: bits, for flips; placements or words for others.

    Args:
        checkpoint: the file or folder.
        policy: what may be hit; its amount and guards have no part in this.
        per_layer: each layer alone (a tensor without a layer is one).
        by: ``bit``: each bit alone; ``field``: sign, critical bit, other exponent bits, mantissa; ``none``.

    Returns:
        Strata without gaps or overlaps, in the order of the checkpoint, empty ones left out. Integer formats
        have no fields: ``field`` leaves them out.

    Raises:
        SelectionError: the policy selects nothing.
        CheckpointError: the checkpoint cannot be read.
        UsageError: faults that are no single bits, by bit or field; ranks that a seed would draw.
    """
    if by not in GROUPS:
        raise UsageError(f"by {by!r} is not one of {', '.join(GROUPS)}")
    model = models.parse(policy.fault)
    if by != "none" and (model.is_wide or model.hits_words):
        raise UsageError(f"fault {policy.fault!r} hits more than one bit: its population has no single bits")
    if policy.ranks is not None and "of" in policy.ranks:
        raise UsageError(f"ranks {policy.ranks!r} are drawn anew by each seed; name ranks, such as 0,2-3")
    with opened(Path(checkpoint)) as target:
        every = Population(policy, target.tensors, target.read).units
        if not per_layer and by == "none":
            return [Stratum("", policy.bits, every)]
        return [
            Stratum(layer, bits or policy.bits, units)
            for layer, tensors in _layers(policy, target.tensors, per_layer).items()
            for bits, units in _by_bits(policy, tensors, target.read, by)
        ]


def _layers(policy: Policy, tensors: Sequence[Tensor], per_layer: bool) -> dict[str, list[Tensor]]:
    chosen = select(tensors, names=policy.tensors, layers=policy.layers, roles=policy.roles)
    found: dict[str, list[Tensor]] = {}
    for i in chosen:
        layer = (tensors[i].layer or tensors[i].name) if per_layer else ""
        found.setdefault(layer, []).append(tensors[i])
    return found


def _by_bits(policy: Policy, tensors: Sequence[Tensor], read: ReadWords, by: str) -> list[tuple[str, int]]:
    """The possible faults in some tensors, by their bits."""
    spec = BitSpec(policy.bits)
    wanted = {t.number: spec.mask(t.number) for t in tensors}
    groups: list[str] = [""]
    if by == "bit":
        widest = max(mask.bit_length() for mask in wanted.values())
        groups = [str(bit) for bit in range(widest)]
    elif by == "field":
        groups = list(FIELDS)
    found = []
    for group in groups:
        units = sum(_units(policy, t, read, wanted[t.number], group) for t in tensors)
        if units:
            found.append((group, units))
    return found


def _units(policy: Policy, tensor: Tensor, read: ReadWords, wanted: int, group: str) -> int:
    """The possible faults in one tensor whose bits are in a group."""
    alone = replace(policy, tensors=(), layers=(), roles=(), design="uniform")
    if group:
        common = wanted & BitSpec(group).mask(tensor.number)
        if not common:
            return 0
        alone = replace(
            alone, bits=",".join(str(bit) for bit in range(common.bit_length()) if common >> bit & 1)
        )
    try:
        return Population(alone, [tensor], read).units
    except SelectionError:
        # Rows, ranks or bits that leave nothing of this tensor leave something of another.
        return 0
