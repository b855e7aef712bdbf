"""A model in int8 faces the checks in operators and cheap scans: verdicts follow from the faults."""

import pytest
import torch

import ckptflip
from ckptflip.errors import CheckpointError, UsageError, WorkloadError
from ckptflip.protect.gemm.processor import saturates
from ckptflip.protect.scoring import scored
from ckptflip.protect.scoring.int8_contenders import INT8_CONTENDERS

pytestmark = pytest.mark.skipif(saturates(), reason="checksum columns do not fit this processor")

OPTIONS = {"samples": 600, "test": 200, "per_epoch": 300, "rows": 300, "batch_size": 100}


def workload(**options):
    return scored(**{"model": "dlrm", "trained": 1, "calibration": 200, "form": "int8"} | OPTIONS | options)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "clean.h5"
    started = workload()
    started.start(1)
    started.save(path)
    return path


def loaded(path):
    found = workload()
    found.load(path)
    return found


def hit(clean, tmp_path, seed=1, **policy):
    out = tmp_path / f"faulty{seed}.h5"
    record = ckptflip.inject(clean, out=out, seed=seed, **policy)
    assert record.bits_effective
    return out


def noticed(found):
    return {name.removeprefix("found/"): bool(value) for name, value in found.items() if "found/" in name}


def test_nobody_notices_anything_in_a_clean_model(clean):
    found = loaded(clean).evaluate()
    assert found["changed"] == found["changed/restore"] == 0
    assert noticed(found) == dict.fromkeys((each.name for each in INT8_CONTENDERS), False)


def test_a_policy_for_models_finds_all_that_lies_in_memory(clean):
    with ckptflip.opened(clean) as target:
        found = {tensor.name: tensor for tensor in target.tensors}
    held = loaded(clean)._state["model"]
    roles = {name.removeprefix("model/"): each.role for name, each in found.items() if "model/" in name}
    assert roles.keys() == held.keys()
    assert set(roles.values()) == {"weight", "bias", "embedding"}
    assert {held[name].dtype for name, role in roles.items() if role == "embedding"} == {torch.uint8}


@pytest.mark.parametrize("seed", range(8))
def test_a_flip_in_a_matrix_is_found_by_its_exact_checksum_where_it_changes_outputs(clean, tmp_path, seed):
    found = loaded(
        hit(clean, tmp_path, seed, tensors="model/*_l.?.weight", roles="weight", count=1)
    ).evaluate()
    heard = noticed(found)
    assert heard["seal"] and not heard["nan"] and not heard["abft-bags"]
    assert found["changed"] == 0 or heard["abft-exact"]
    assert heard["restore"] == heard["abft-exact"]
    assert found["changed/restore"] == 0


def test_some_of_these_flips_change_outputs_and_modulo_127_finds_them_too(clean, tmp_path):
    found = loaded(hit(clean, tmp_path, tensors="model/top_l.?.weight", bits="6", count=5)).evaluate()
    assert found["changed"] > 0
    assert noticed(found)["abft-exact"] and noticed(found)["abft-mod127"]


def test_a_flip_in_columns_of_the_checksum_harms_nothing_and_is_found_where_they_are_hit(clean, tmp_path):
    model = loaded(clean)
    weight = model._state["model"]["top_l.0.weight"]
    weight[model._trained.model.top_l[0].out_features] ^= 1
    found = model.evaluate()
    assert found["changed"] == 0
    assert noticed(found)["abft-exact"] and not noticed(found)["abft-mod127"]


@pytest.mark.parametrize("seed", range(4))
def test_flips_in_rows_that_are_read_are_found_by_their_check_bytes(clean, tmp_path, seed):
    found = loaded(hit(clean, tmp_path, seed, tensors="model/emb_l.*", count=200)).evaluate()
    heard = noticed(found)
    assert heard["seal"] and not heard["abft-exact"] and not heard["abft-mod127"]
    assert found["changed"] > 0 and heard["abft-bags"]
    assert found["changed/restore"] == 0
    assert found["rows/abft-bags"] == found["rows/restore"] > 0


def test_a_row_that_nobody_reads_is_nothing_to_the_check_of_bags(clean):
    model = loaded(clean)
    ids = model._trained.inputs(train=False)[1][:, 0]
    rows = model._state["model"]["emb_l.0.weight"]
    unread = sorted(set(range(len(rows))) - set(ids.flatten().tolist()))
    if not unread:
        pytest.fail("every row of the first table is read: make the test set smaller")
    rows[unread[0], 0] ^= 64
    found = model.evaluate()
    assert found["changed"] == 0
    assert noticed(found)["seal"] and not noticed(found)["abft-bags"]


def test_scans_know_the_floats_in_rows(clean):
    model = loaded(clean)
    model._state["model"]["emb_l.1.weight"][0, -8:-4].view(torch.float32).fill_(float("inf"))
    heard = noticed(model.evaluate())
    assert heard["nan"] and heard["extreme"] and heard["range"]


def test_a_scale_of_a_layer_is_no_part_of_its_product(clean, tmp_path):
    out = hit(clean, tmp_path, tensors="model/top_l.0.weight_scale", bits="critical", count=3)
    found = loaded(out).evaluate()
    heard = noticed(found)
    assert found["changed"] > 0
    assert heard["range"] and not heard["abft-exact"] and not heard["restore"]


def test_an_evaluation_leaves_the_model_as_it_was(clean, tmp_path):
    model = loaded(hit(clean, tmp_path, roles="model", ber=1e-3))
    before = model.digest()
    first = model.evaluate()
    assert model.digest() == before
    held = model.model.state_dict()
    for name, value in model._state["model"].items():
        assert torch.equal(held[name].view(torch.uint8), value.view(torch.uint8))
    assert str(model.evaluate()) == str(first)


def test_a_trained_worker_and_a_fresh_one_measure_the_same(clean, tmp_path):
    out = hit(clean, tmp_path, roles="model", ber=1e-4)
    started = workload()
    started.start(2)
    started.evaluate()
    started.load(out)
    assert str(started.evaluate()) == str(loaded(out).evaluate())


def test_outputs_are_those_of_the_float_model_but_for_rounding(clean):
    plain = workload(form="fp32")
    plain.start(1)
    found, wanted = loaded(clean).evaluate(), plain.evaluate()
    assert abs(found["loss"] - wanted["loss"]) < 0.02
    assert found["loss"] != wanted["loss"]


def test_a_hit_clean_copy_is_refused(clean, tmp_path):
    with pytest.raises(CheckpointError, match="faults belong into the model"):
        loaded(hit(clean, tmp_path, tensors="clean", count=1))


def test_a_checkpoint_of_another_form_is_refused(clean):
    with pytest.raises(WorkloadError, match="belongs to the workload"):
        workload(form="fp32").load(clean)


def test_forms_are_checked():
    with pytest.raises(UsageError, match="one of the forms fp32, int8"):
        workload(form="int3")
    with pytest.raises(UsageError, match="linear layers and summed tables"):
        scored(model="digits-cnn", trained=0, form="int8").start(1)
