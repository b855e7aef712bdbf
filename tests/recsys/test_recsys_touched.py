"""Which faulty rows an evaluation reads, on checkpoints that were really altered."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import ckptflip  # noqa: E402
from ckptflip import torch_h5  # noqa: E402
from ckptflip.errors import UsageError  # noqa: E402
from ckptflip.recsys.models.dlrm import Dlrm  # noqa: E402
from ckptflip.recsys.tables import quantise  # noqa: E402
from ckptflip.recsys.touched import touched  # noqa: E402


@pytest.fixture
def checkpoint(tmp_path):
    """A DLRM of two tables, 8 and 5 rows of 4 columns, in a file."""
    torch_h5.save({"model": Dlrm((8, 5), 3, 4, (4,), (1,)).state_dict()}, tmp_path / "c.h5")
    return tmp_path / "c.h5"


def altered(checkpoint, **policy):
    return ckptflip.inject(checkpoint, out=checkpoint.with_name("bad.h5"), seed=1, overwrite=True, **policy)


def test_rows_that_are_read_are_told_from_those_that_are_not(checkpoint):
    record = altered(checkpoint, tensors="*emb_l.0.weight", bits="sign", fraction=1.0)
    ids = np.array([[1, 0], [3, 0], [1, 4]])
    found = touched(record, ids)
    assert (found.rows, found.read, found.share) == (8, 2, 0.25)
    assert (found.faults, found.read_faults) == (32, 8)
    assert (found.samples, found.of) == (3, 3)
    nowhere = touched(record, ids + np.array([[4, 0]]))
    assert (nowhere.read, nowhere.samples) == (2, 3)


def test_bags_are_read_whole(checkpoint):
    record = altered(checkpoint, tensors="*emb_l.1.weight", bits="critical", fraction=1.0)
    ids = np.zeros((4, 2, 3), np.int64)
    ids[2, 1] = [0, 2, 4]
    found = touched(record, ids)
    assert (found.rows, found.read, found.samples) == (5, 3, 4)


def test_faults_elsewhere_and_without_effect_do_not_count(checkpoint):
    ids = np.zeros((4, 2), np.int64)
    elsewhere = touched(altered(checkpoint, tensors="*top_l*", count=5), ids)
    assert (elsewhere.rows, elsewhere.share, elsewhere.samples) == (0, None, 0)
    state = torch_h5.load(checkpoint)
    state["model"]["emb_l.0.weight"].zero_()
    torch_h5.save(state, checkpoint)
    record = altered(checkpoint, tensors="*emb_l.0.weight", fault="set0", count=7)
    assert record.bits_effective == 0
    assert touched(record, ids).rows == 0


def test_other_names_are_told_by_a_table_or_a_function(checkpoint):
    record = altered(checkpoint, tensors="*emb_l.1.weight", bits="sign", fraction=1.0)
    ids = np.array([[0], [3]])
    assert touched(record, ids, {"model/emb_l.1.weight": 0}).read == 2
    assert touched(record, ids, lambda name: None).rows == 0


def test_ids_that_do_not_fit_are_named(checkpoint):
    record = altered(checkpoint, tensors="*emb_l.1.weight", count=1)
    with pytest.raises(UsageError, match=r"emb_l\.1\.weight is table 1, but the ids have 1 columns"):
        touched(record, np.zeros((3, 1), np.int64))
    with pytest.raises(UsageError, match=r"shape .* not \(3,\)"):
        touched(record, np.zeros(3, np.int64))
    biased = altered(checkpoint, tensors="*bot_l.0.bias", count=1)
    with pytest.raises(UsageError, match="a table has rows and columns"):
        touched(biased, np.zeros((3, 1), np.int64), lambda name: 0)
    with pytest.raises(UsageError, match=r"id 5 is beyond model/emb_l\.1\.weight, which has 5 rows"):
        touched(record, np.array([[0, 5]]))
    with pytest.raises(UsageError, match="whole numbers, not float64"):
        touched(record, np.zeros((3, 2)))


def test_a_record_may_be_named_by_its_file_and_an_evaluation_be_empty(checkpoint):
    record = altered(checkpoint, tensors="*emb_l.1.weight", bits="sign", fraction=1.0)
    assert touched(record.path, np.array([[0, 3]])) == touched(record, np.array([[0, 3]]))
    nothing = touched(record, np.zeros((0, 2), np.int64))
    assert (nothing.rows, nothing.read, nothing.of) == (5, 0, 0)


def test_fields_of_a_quantised_row_are_one_row(tmp_path):
    stored = quantise(np.arange(40.0).reshape(10, 4), "int4")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["model/emb_l.0.weight"] = stored
    record = altered(tmp_path / "c.h5", tensors="emb_l.0", rowwise="int4", rows="2-4", fraction=1.0)
    assert {entry.name.rpartition(".")[2] for entry in record.header.tensors} == {"code", "scale", "bias"}
    found = touched(record, np.array([[1], [3], [3], [9]]))
    assert (found.rows, found.read, found.samples) == (3, 1, 2)
    assert (found.faults, found.read_faults) == (3 * 6, 6)
    scales = altered(tmp_path / "c.h5", tensors="emb_l.0", rowwise="int4", fields="scale", rows="7", count=1)
    assert touched(scales, np.array([[7]]), {"model/emb_l.0.weight": 0}).read == 1
