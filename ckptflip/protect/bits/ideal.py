"""Ideal protection, emulated: faults that never reach the protected bits, as in the Terrorch study."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from ckptflip.bits import BitSpec
from ckptflip.errors import UsageError
from ckptflip.faults.catalogue import Tensor
from ckptflip.faults.plan import Plan
from ckptflip.faults.policy import Policy


def ideal(policy: Policy, bits: str = "sign,exponent") -> Policy:
    """A policy that leaves protected bits alone, as the study masks bits 31 to 23 out (arXiv 2307.10244).

    With a `ber` every other bit is as likely to be hit as before; which are hit is drawn anew.

    Args:
        policy: the faults without protection.
        bits: the protected bits, terms of a `BitSpec` without ``!``.

    Raises:
        UsageError: bits with ``!``.

    Example:
        >>> ideal(Policy(ber=1e-5)).bits
        'all,!sign,!exponent'
    """
    terms = [term.strip() for term in BitSpec(bits).text.split(",")]
    if any(term.startswith("!") for term in terms):
        raise UsageError(f"protected bits are named one by one, without '!': {bits!r}")
    return replace(policy, bits=",".join([policy.bits, *(f"!{term}" for term in terms)]))


def unprotected(plan: Plan, tensors: Sequence[Tensor], bits: str = "sign,exponent") -> Plan:
    """The very faults of a plan, less those in protected bits: what ideal protection leaves of them.

    Args:
        plan: drawn faults, see `ckptflip.live.Armed.draw`.
        tensors: the catalogue that it was drawn from.
        bits: the protected bits.

    Example:
        >>> import torch
        >>> from ckptflip import live
        >>> from ckptflip.live.torch_tensors import TorchTarget
        >>> target = TorchTarget(torch.nn.Linear(64, 64))
        >>> plan = live.Armed(target, Policy(ber=1e-2)).draw(1)
        >>> left = unprotected(plan, target.tensors)
        >>> 0.6 < left.bits_hit / plan.bits_hit < 0.8  # 23 of 32 bits are left
        True
    """
    spec, free = BitSpec(bits), np.zeros(len(plan), np.uint64)
    for i, rows in plan.by_tensor():
        number = tensors[i].number
        top = (1 << number.part_width) - 1
        masks = [~(spec.mask(number) >> part * number.part_width) & top for part in range(number.parts)]
        free[rows] = np.array(masks, np.uint64)[plan.word[rows] % number.parts]
    hit, changed = plan.hit & free, (plan.before ^ plan.after) & free
    return replace(plan, hit=hit, after=plan.before ^ changed).take(hit > 0)
