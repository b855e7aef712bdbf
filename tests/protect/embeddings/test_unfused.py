"""Checks around the unmodified operator: means, no alarm of sound tables, and flips of high bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ckptflip.protect.embeddings import protect_table
from ckptflip.protect.embeddings.module import ProtectedEmbeddingBag
from ckptflip.protect.embeddings.unfused import InRow
from ckptflip.recsys.tables import quantise

OFFSETS = torch.tensor([0, 30, 30, 31])


def a_table(seed, dim=64):
    random = np.random.default_rng(seed)
    values = random.standard_normal((50, dim)) * 10.0 ** random.integers(-3, 4)
    ids = torch.from_numpy(random.integers(0, 50, 60))
    return protect_table(torch.from_numpy(quantise(values, "int8")), "int8"), ids


@pytest.mark.parametrize("mean", (False, True))
def test_in_row_gives_what_the_kernel_gives_and_its_sound_threshold_no_alarm(mean):
    for seed in range(50):
        table, ids = a_table(seed)
        found, flagged = InRow(table, sound=True, mean=mean)(ids, OFFSETS, 4)
        ours = ProtectedEmbeddingBag(table, "int8", mode="mean" if mean else "sum")
        torch.testing.assert_close(found, ours(ids, OFFSETS), rtol=1e-6, atol=0)
        assert not flagged.any() and not found[1].any()


@pytest.mark.parametrize("mean", (False, True))
def test_in_row_flags_the_bags_with_a_flip_of_a_high_bit(mean):
    table, ids = a_table(1)
    table[ids[30], 7] ^= 128
    flagged = InRow(table, sound=True, mean=mean)(ids, OFFSETS, 4)[1]
    read = [bool((part == ids[30]).any()) for part in ids.tensor_split(OFFSETS[1:])]
    assert flagged[2] and not flagged[1]
    assert not (flagged & ~torch.tensor(read)).any()
