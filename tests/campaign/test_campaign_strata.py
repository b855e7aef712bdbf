"""Strata: disjoint, and together all eligible bits."""

from __future__ import annotations

import numpy as np
import pytest

from ckptflip.bits import lookup
from ckptflip.campaign.strata import FIELDS, field_of, strata_of
from ckptflip.errors import SelectionError
from ckptflip.faults.catalogue import Tensor
from ckptflip.faults.plan import draw
from ckptflip.faults.policy import Policy

TENSORS = [
    Tensor("model/fc.weight", (5, 4), lookup("float32"), layer="fc", role="weight"),
    Tensor("model/fc.bias", (5,), lookup("float32"), layer="fc", role="bias"),
    Tensor("model/block.fc.weight", (3, 3), lookup("bfloat16"), layer="block.fc", role="weight"),
    Tensor("model/steps", (2,), lookup("int32"), layer="", role="counter"),
]


def read(tensor: int, words: np.ndarray) -> np.ndarray:
    number = TENSORS[tensor].number
    return np.zeros(words.size, f"u{number.word_size}")


def units(policy: Policy) -> set[tuple[int, int, int]]:
    """All (tensor, word, bit) that a policy may hit: found by hitting every one."""
    plan = draw(Policy(**{**{f: getattr(policy, f) for f in policy.__struct_fields__}, "count": None,
                          "fraction": 1.0}), TENSORS, read, 0)  # fmt: skip
    return {
        (int(tensor), int(word), bit)
        for tensor, word, mask in zip(plan.tensor, plan.word, plan.hit.tolist(), strict=True)
        for bit in range(64)
        if mask >> bit & 1
    }


@pytest.mark.parametrize("by", [["layer", "field"], ["layer"], ["field"]])
def test_strata_are_disjoint_and_complete(by: list[str]) -> None:
    policy = Policy(tensors=("!model/fc.bias",))
    strata = strata_of(policy, TENSORS, by)
    each = [units(stratum.policy) for stratum in strata]
    assert [len(found) for found in each] == [stratum.bits for stratum in strata]
    assert sum(map(len, each)) == len(set().union(*each))
    assert set().union(*each) == units(policy)
    assert sum(stratum.weight for stratum in strata) == pytest.approx(1)


def test_weights_are_shares_of_the_bits() -> None:
    strata = {(s.layer, s.field): s for s in strata_of(Policy(roles=("model",)), TENSORS, ["layer", "field"])}
    assert strata["fc", "critical"].bits == 25 and strata["block.fc", "mantissa"].bits == 63
    assert strata["fc", "mantissa"].weight == pytest.approx(25 * 23 / (25 * 32 + 9 * 16))


def test_nothing_selected_is_said() -> None:
    with pytest.raises(SelectionError, match="matches nothing"):
        strata_of(Policy(tensors=("conv*",)), TENSORS, ["layer"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int8"])
def test_every_bit_has_one_field(dtype: str) -> None:
    number = lookup(dtype)
    found = [field_of(bit, number) for bit in range(number.word_size * 8)]
    assert set(found) <= set(FIELDS)
    assert found.count("critical") == (dtype != "int8")
