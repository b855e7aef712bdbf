"""Whole models and collections of tables, protected in one call."""

from __future__ import annotations

import warnings

import pytest
import torch

from ckptflip.errors import SelectionError, UsageError
from ckptflip.protect.embeddings.collections import ProtectedBagCollection
from ckptflip.protect.embeddings.conversion import protect_bags
from ckptflip.protect.embeddings.module import ProtectedEmbeddingBag
from ckptflip.recsys.models.dlrm import Dlrm


def test_a_dlrm_keeps_its_names_and_nearly_its_logits():
    torch.manual_seed(0)
    model = Dlrm((10, 20), dense=3, embedding=4, bottom=(8, 4), top=(8, 1)).eval()
    dense, ids = torch.rand(5, 3), torch.randint(0, 10, (5, 2))
    names = list(model.state_dict())
    with torch.no_grad():
        before = model(dense, ids)
        protect_bags(model, "fp32")
        assert torch.equal(model(dense, ids), before)
    assert list(model.state_dict()) == names
    assert isinstance(model.emb_l[1], ProtectedEmbeddingBag)
    with pytest.raises(SelectionError, match="no embedding bag"):
        protect_bags(model)


def test_restore_keeps_a_copy_of_each_table():
    model = Dlrm((10, 20), dense=3, embedding=4, bottom=(8, 4), top=(8, 1)).eval()
    bags = protect_bags(model, "int8", tables="emb_l.1", on_error="restore")
    bag = bags["emb_l.1"]
    ids = torch.tensor([[3, 4]])
    clean = bag(ids)
    bag.weight[3, 1] ^= 64
    assert torch.equal(bag(ids), clean)
    assert list(bags) == ["emb_l.1"]


@pytest.mark.parametrize(("dtype", "layout"), [(torch.quint8, "int8"), (torch.quint4x2, "int4")])
def test_quantised_modules_of_torch_give_the_same_bits(dtype, layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.nn.quantized import EmbeddingBag

        theirs = EmbeddingBag(10, 8, dtype=dtype)
        random = torch.Generator().manual_seed(1)
        scales, zeros = torch.rand(10, generator=random) / 9, torch.rand(10, generator=random)
        values = torch.rand(10, 8, generator=random)
        theirs.set_weight(torch.quantize_per_channel(values, scales, zeros, 0, dtype))
        ids, offsets = torch.tensor([1, 2, 3, 3, 9]), torch.tensor([0, 2, 2])
        expected = theirs(ids, offsets)
        model = torch.nn.ModuleDict({"emb": theirs})
        protect_bags(model, layout)
    assert torch.equal(model["emb"](ids, offsets), expected)


def test_bags_that_cannot_be_protected_are_refused():
    with pytest.raises(UsageError, match="sum or mean"):
        protect_bags(torch.nn.ModuleDict({"a": torch.nn.EmbeddingBag(4, 2, mode="max")}))
    with pytest.raises(UsageError, match="max_norm"):
        protect_bags(torch.nn.ModuleDict({"a": torch.nn.EmbeddingBag(4, 2, max_norm=1.0)}))


class Jagged:
    """What TorchRec's `JaggedTensor` offers, as far as it is used."""

    def __init__(self, values, lengths, weights=None):
        self._parts = values, lengths, weights

    def values(self):
        return self._parts[0]

    def lengths(self):
        return self._parts[1]

    def weights(self):
        return self._parts[2]


def test_a_collection_looks_up_features_in_their_tables():
    tables = {
        "users": ProtectedEmbeddingBag.from_float(torch.rand(10, 4), "fp32"),
        "products": ProtectedEmbeddingBag.from_float(torch.rand(6, 8), "fp32", include_last_offset=True),
    }
    collection = ProtectedBagCollection(tables, {"users": ["user", "friends"]}, weighted=True)
    batch = {
        "user": Jagged(torch.tensor([1, 2]), torch.tensor([1, 1]), torch.ones(2)),
        "friends": Jagged(torch.tensor([3, 4, 5]), torch.tensor([0, 3]), torch.tensor([1.0, 2.0, 3.0])),
        "products": Jagged(torch.tensor([0, 5]), torch.tensor([2, 0]), torch.ones(2)),
    }
    pooled = collection(batch)
    assert pooled.keys() == ["user", "friends", "products"]
    assert pooled.values().shape == (2, 16)
    users = tables["users"].unprotected()
    torch.testing.assert_close(pooled["friends"][1], users[3] + 2 * users[4] + 3 * users[5])
    assert not pooled["friends"][0].any()
    with pytest.raises(UsageError, match="no tables"):
        ProtectedBagCollection(tables, {"others": ["x"]})
