"""Seals of ids: every flip of one bit is found, and what the module does then."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from ckptflip.errors import DetectedError, UsageError
from ckptflip.protect.embeddings.ids import seal_ids
from ckptflip.protect.embeddings.module import ProtectedEmbeddingBag

IDS, OFFSETS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6]), torch.tensor([0, 3, 5])


@pytest.mark.parametrize("size", (torch.int32, torch.int64))
def test_every_flip_of_one_bit_is_found(size):
    ids, offsets = IDS.to(size), OFFSETS.to(size)
    seal = seal_ids(ids, offsets)
    assert seal == seal_ids(IDS, OFFSETS)
    for tensor in (ids, offsets):
        for place in range(tensor.numel()):
            for bit in range(8 * tensor.itemsize):
                view = tensor.view(torch.uint8)
                view[place * tensor.itemsize + bit // 8] ^= 1 << bit % 8
                assert seal_ids(ids, offsets) != seal
                view[place * tensor.itemsize + bit // 8] ^= 1 << bit % 8
    assert seal_ids(ids, offsets) == seal


def test_every_two_flips_of_bits_that_tables_use_are_found():
    ids = IDS.clone()
    seal = seal_ids(ids)
    bits = [(place, 1 << bit) for place in range(ids.numel()) for bit in range(32)]
    for (first, one), (second, other) in combinations(bits, 2):
        ids[first] ^= one
        ids[second] ^= other
        assert seal_ids(ids) != seal
        ids[first] ^= one
        ids[second] ^= other


def test_order_shape_and_offsets_count():
    seals = {
        seal_ids(IDS),
        seal_ids(IDS.flip(0)),
        seal_ids(IDS[:-1]),
        seal_ids(IDS, OFFSETS),
        seal_ids(IDS, OFFSETS.flip(0)),
        seal_ids(IDS.view(2, 4)),
        seal_ids(IDS.view(4, 2)),
        seal_ids(torch.cat([IDS, torch.zeros(1, dtype=torch.int64)])),
        seal_ids(IDS[:0]),
        seal_ids(IDS[:0], OFFSETS[:1]),
    }
    assert len(seals) == 10
    with pytest.raises(UsageError, match="int32 or int64"):
        seal_ids(IDS.float())


@pytest.mark.parametrize("on_error", ("raise", "recompute", "zero"))
def test_ids_that_do_not_fit_their_seal_are_refused(on_error):
    bag = ProtectedEmbeddingBag.from_float(torch.ones(10, 4), "int8", on_error=on_error, name="emb_l.2")
    ids = IDS.clone()
    seal = seal_ids(ids, OFFSETS)
    assert torch.equal(bag(ids, OFFSETS, seal=seal), bag(ids, OFFSETS))
    ids[2] ^= 1
    with pytest.raises(DetectedError, match=r"table emb_l\.2: the ids are not those that were sealed"):
        bag(ids, OFFSETS, seal=seal)


def test_count_counts_them_and_goes_on():
    bag = ProtectedEmbeddingBag.from_float(torch.ones(10, 4), "int8", on_error="count")
    ids = IDS.view(2, 4).clone()
    seal = seal_ids(ids)
    ids[1, 2] ^= 1
    assert bag(ids, seal=seal).shape == (2, 4)
    assert bag.counts.altered_ids == 1
    assert bag.counts.unsound == 0
