"""The stand-in for EmbeddingBag: what it gives, and what it does where something is found."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from ckptflip import live
from ckptflip.errors import DetectedError, UsageError
from ckptflip.faults import Policy
from ckptflip.live.torch_tensors import TorchTarget
from ckptflip.protect.embeddings.module import ProtectedEmbeddingBag
from ckptflip.recsys.tables.views import TableTarget

IDS = torch.tensor([[1, 2, 2], [3, 4, 5], [6, 7, 8]])
TABLE = torch.rand(12, 8, generator=torch.Generator().manual_seed(1)) - 0.5


@pytest.mark.parametrize("mode", ("sum", "mean"))
@pytest.mark.parametrize("padding", (None, 2, -1))
def test_a_float_table_gives_what_the_module_of_torch_gives(mode, padding):
    theirs = torch.nn.EmbeddingBag.from_pretrained(TABLE, mode=mode, padding_idx=padding)
    ours = ProtectedEmbeddingBag.from_float(TABLE, "fp32", mode=mode, padding_idx=padding)
    torch.testing.assert_close(ours(IDS), theirs(IDS), rtol=1e-6, atol=1e-6)
    flat, offsets = IDS.reshape(-1), torch.tensor([0, 0, 4])
    torch.testing.assert_close(ours(flat, offsets), theirs(flat, offsets), rtol=1e-6, atol=1e-6)


def test_last_offset_and_weights():
    ours = ProtectedEmbeddingBag.from_float(TABLE, "fp32", include_last_offset=True)
    theirs = torch.nn.EmbeddingBag.from_pretrained(TABLE, mode="sum", include_last_offset=True)
    flat, offsets, weights = IDS.reshape(-1), torch.tensor([0, 2, 2, 9]), torch.rand(9)
    torch.testing.assert_close(ours(flat, offsets, weights), theirs(flat, offsets, weights))


def test_a_fault_of_the_engine_is_found_in_the_bags_that_read_its_row():
    bag = ProtectedEmbeddingBag.from_float(TABLE, "int8", on_error="count")
    clean = bag(IDS)
    for field in ("code", "scale", "bias"):
        policy = Policy(tensors=("weight",), rowwise="int8", fields=(field,), rows="4")
        target = TableTarget(TorchTarget(bag), policy)
        record = live.inject(target, policy, seed=1)
        bag(IDS)
        assert (bag.verdict != 0).tolist() == [False, True, False]
        live.undo(target, record)
    assert torch.equal(bag(IDS), clean)
    assert bag.counts.unsound == 3
    assert bag.counts.bags == 15


def damaged(**options):
    bag = ProtectedEmbeddingBag.from_float(TABLE, "int8", **options)
    clean = bag(IDS)
    bag.weight[4, 2] ^= 128
    return bag, clean


def test_raise_names_table_bag_and_row():
    bag, _ = damaged(name="emb_l.0")
    with pytest.raises(DetectedError, match=r"table emb_l\.0: bag 1: .* damaged rows: 4\."):
        bag(IDS)


def test_recompute_raises_where_the_table_is_damaged():
    bag, _ = damaged(on_error="recompute")
    with pytest.raises(DetectedError):
        bag(IDS)


def test_recompute_mends_what_does_not_last(monkeypatch):
    bag, clean = damaged(on_error="recompute")
    react = bag._react

    def heal(*arguments):
        bag.weight[4, 2] ^= 128
        return react(*arguments)

    monkeypatch.setattr(bag, "_react", heal)
    assert torch.equal(bag(IDS), clean)
    assert bag.counts.recomputed == 1
    assert bag.verdict[1] != 0


def test_restore_brings_the_rows_back():
    master = ProtectedEmbeddingBag.from_float(TABLE, "int8").unprotected()
    bag, clean = damaged(on_error="restore", restore=lambda rows: master[rows])
    assert torch.equal(bag(IDS), clean)
    assert bag.counts.restored == 1
    assert bag.scrub() == []


def test_zero_leaves_the_row_out():
    bag, clean = damaged(on_error="zero")
    found = bag(IDS)
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    torch.testing.assert_close(found[1], bag(torch.tensor([[3, 5]]))[0])
    assert bag.counts.zeroed == 1


def test_a_state_dict_carries_the_protection():
    bag, _ = damaged(on_error="count")
    other = ProtectedEmbeddingBag.from_float(torch.zeros(12, 8), "int8", on_error="count")
    other.load_state_dict(bag.state_dict())
    assert other.scrub() == [4]


def test_other_arguments_are_refused():
    with pytest.raises(UsageError, match="mode is sum or mean"):
        ProtectedEmbeddingBag.from_float(TABLE, "int8", mode="max")
    with pytest.raises(UsageError, match="restore=FUNCTION"):
        ProtectedEmbeddingBag.from_float(TABLE, "int8", on_error="restore")
    bag = ProtectedEmbeddingBag.from_float(TABLE, "int8", mode="mean")
    with pytest.raises(UsageError, match="per_sample_weights"):
        bag(IDS, per_sample_weights=torch.ones(3, 3))
    with pytest.raises(UsageError, match="table without a name: ids have two axes"):
        bag(IDS[0])
    with pytest.raises(UsageError, match="offsets, a tensor of int32 or int64"):
        bag(IDS[0], [0, 1])
    for ids in ([[1, 2]], None, np.array([[1]])):
        with pytest.raises(UsageError, match="ids are a tensor"):
            bag(ids)
    for options in ({"padding_idx": 99}, {"padding_idx": -13}, {"threads": 0}, {"threads": "2"}):
        with pytest.raises(UsageError, match=r"padding_idx|threads"):
            ProtectedEmbeddingBag.from_float(TABLE, "int8", **options)
    with pytest.raises(UsageError, match="per_sample_weights are numbers"):
        ProtectedEmbeddingBag.from_float(TABLE, "int8")(IDS, None, torch.ones(3, 3, dtype=torch.complex64))
    with pytest.raises(UsageError, match="per_sample_weights are numbers, not list"):
        ProtectedEmbeddingBag.from_float(TABLE, "int8")(IDS, None, [[1.0]])
    with pytest.raises(UsageError, match="layout 'fp16' cannot be protected"):
        ProtectedEmbeddingBag.from_float(TABLE, "fp16")
    with pytest.raises(UsageError, match=r"not torch\.float32"):
        bag(IDS.float())


def test_weights_with_a_sign_of_their_own_are_read_as_they_are_meant():
    bag = ProtectedEmbeddingBag.from_float(TABLE, "fp32")
    weights = torch.complex(torch.rand(3, 3), torch.rand(3, 3)).conj().imag
    assert weights.is_neg()
    assert torch.equal(bag(IDS, None, weights), bag(IDS, None, weights.resolve_neg()))


def test_without_the_extension_the_verdicts_are_the_same():
    program = (
        "import torch; from ckptflip.protect.native import kernels; assert kernels() is None\n"
        "from ckptflip.protect.embeddings.module import ProtectedEmbeddingBag\n"
        "bag = ProtectedEmbeddingBag.from_float(torch.rand(9, 8), 'int8', on_error='count', mode='mean')\n"
        "bag.weight[4, 2] ^= 1\n"
        "bag(torch.tensor([[1, 2], [3, 4]])); print(bag.verdict.tolist())"
    )
    environment = {**os.environ, "CKPTFLIP_NATIVE": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "[0, 3]"
