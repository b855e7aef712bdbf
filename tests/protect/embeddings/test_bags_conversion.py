"""Whole models and collections of tables, protected in one call."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

from ckptflip.errors import DetectedError, UsageError
from ckptflip.protect.embeddings.collections import ProtectedBagCollection
from ckptflip.protect.embeddings.conversion import protect_bags
from ckptflip.protect.embeddings.kept import KeptRows
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
    with pytest.raises(UsageError, match=r"emb_l\.0 \(ProtectedEmbeddingBag\): it is protected already"):
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


def bag(**options):
    return torch.nn.EmbeddingBag(10, 4, **{"mode": "sum", **options})


def test_what_was_loaded_is_restored():
    torch.manual_seed(0)
    model, other = (torch.nn.ModuleDict({"e": bag()}) for _ in range(2))
    bags, ids = protect_bags(model, on_error="restore"), torch.tensor([[1, 2]])
    loaded = protect_bags(other, on_error="restore")["e"](ids)
    model.load_state_dict(other.state_dict())
    bags["e"].weight[1, 0] ^= 1
    assert torch.equal(model["e"](ids), loaded) and bags["e"].counts.restored == 1
    model.load_state_dict({}, strict=False)
    bags["e"].weight[1, 0] ^= 1
    model.load_state_dict({}, strict=False)
    assert torch.equal(model["e"](ids), loaded) and bags["e"].counts.restored == 2


@pytest.mark.parametrize("layout", ["int8", "int4", "fp32", "bf16"])
def test_a_copy_that_is_damaged_itself_restores_nothing(layout):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"e": bag()})
    kept = protect_bags(model, layout, on_error="restore")["e"]
    damaged = copy.deepcopy(model.state_dict())
    damaged["e.weight"].view(torch.uint8)[3, 0] ^= 1
    model.load_state_dict(damaged)
    assert kept(torch.tensor([[1, 2]])).shape == (1, 4)
    with pytest.raises(DetectedError, match="table e: row 3 cannot be restored: damaged in the copy"):
        kept(torch.tensor([[1, 3]]))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_restore_their_own_rows(copied):
    torch.manual_seed(0)
    model, ids = torch.nn.ModuleDict({"e": bag()}), torch.tensor([[1, 2]])
    protect_bags(model, on_error="restore")
    clean, made = model["e"](ids), copied(model)
    model.load_state_dict({"e.weight": model["e"].weight.flip(0)})
    made["e"].weight[1, 0] ^= 1
    assert torch.equal(made["e"](ids), clean) and made["e"].counts.restored == 1
    assert isinstance(made["e"].restore, KeptRows) and made["e"].restore is not model["e"].restore


def test_a_bag_of_two_names_is_protected_under_both():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = bag()
            self.b = self.a

    model = Twice()
    bags = protect_bags(model)
    assert model.a is model.b is bags["a"] and list(bags) == ["a"] and len(bags) == 1
    model = Twice()
    assert list(protect_bags(model, tables="b")) == ["b"] and model.a is model.b


class Scaled(torch.nn.EmbeddingBag):
    """A bag that does more."""

    def forward(self, *arguments):
        return 10 * super().forward(*arguments)


def test_bags_that_cannot_be_protected_are_left_and_named():
    from torch.ao.nn.quantized import EmbeddingBag

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = EmbeddingBag(10, 8)
    kinds = {
        "good": bag(),
        "hooked": bag(),
        "max": bag(mode="max"),
        "norm": bag(max_norm=1.0),
        "quantised": quantised,
        "scaled": Scaled(10, 4, mode="sum"),
        "elsewhere": bag(device="meta"),
    }
    model = torch.nn.ModuleDict(kinds)
    model["hooked"].register_forward_hook(lambda module, inputs, out: 2 * out)
    bags = protect_bags(model, "int4")
    assert list(bags) == ["good"] and isinstance(model["good"], ProtectedEmbeddingBag)
    assert {left.name: (left.was, left.reason) for left in bags.left} == {
        "hooked": ("EmbeddingBag", "it has hooks, which would be lost"),
        "max": ("EmbeddingBag", "bags that are checked take the sum or mean, not the max"),
        "norm": ("EmbeddingBag", "it renormalises its rows (max_norm) as it reads them"),
        "quantised": ("EmbeddingBag", "it is quantised as int8, and int4 was asked for"),
        "scaled": ("Scaled", "a subclass of EmbeddingBag may do more"),
        "elsewhere": ("EmbeddingBag", "it is on meta; protected tables stay on the CPU"),
    }
    assert all(model[left.name] is kinds[left.name] for left in bags.left)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("text", {}, "not str"),
        (bag(), {}, "this is an embedding bag itself"),
        (torch.nn.Linear(2, 2), {}, "has no torch.nn.EmbeddingBag"),
        ({"a": bag(mode="max")}, {}, r"a \(EmbeddingBag\): bags that are checked take the sum or mean"),
        ({"a": bag(max_norm=1.0)}, {}, "max_norm"),
        ({"a": bag()}, {"tables": "b*"}, r"no embedding bag is named 'b\*'; this model has a$"),
        ({"a": bag()}, {"layout": "fp16"}, "'fp16' cannot be protected: use int8, int4, int2, fp32, bf16"),
        ({"a": bag()}, {"layout": "int8-tbe"}, "bring the rows into ATen's layout"),
        ({"a": bag()}, {"layout": "fp32:4"}, "cannot be protected"),
        ({"a": bag()}, {"layout": None}, "layout None cannot be protected"),
        ({"a": bag()}, {"on_error": "mend"}, "'mend' is no policy"),
        ({"a": bag()}, {"threads": 0}, "threads"),
    ],
)
def test_bad_input_leaves_the_model_as_it_is(model, arguments, message):
    model = torch.nn.ModuleDict(model) if isinstance(model, dict) else model
    before = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    with pytest.raises(UsageError, match=message):
        protect_bags(model, **arguments)
    assert not before or list(model.modules()) == before


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
