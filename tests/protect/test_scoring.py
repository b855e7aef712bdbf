"""Every contender against the same faulty model: verdicts follow from the faults, nothing stays behind."""

import pytest
import torch

import ckptflip
from ckptflip.errors import CheckpointError, UsageError, WorkloadError
from ckptflip.protect.scoring import scored
from ckptflip.protect.scoring.contenders import CONTENDERS


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    path = tmp_path_factory.mktemp("scoring") / "clean.h5"
    workload = scored(model="digits-mlp", trained=1)
    workload.start(1)
    workload.save(path)
    return path


def measured(path):
    workload = scored(model="digits-mlp", trained=1)
    workload.load(path)
    return workload.evaluate()


def faulty(clean, tmp_path, **policy):
    out = tmp_path / "faulty.h5"
    record = ckptflip.inject(clean, out=out, **{"roles": "model", "seed": 1} | policy)
    assert record.bits_effective
    return measured(out)


def test_nobody_notices_anything_in_a_clean_model(clean):
    found = measured(clean)
    assert found["changed"] == 0
    assert {name: value for name, value in found.items() if name.startswith("found/") and value} == {}
    for contender in CONTENDERS:
        assert any(name.endswith(f"/{contender.name}") for name in found)


def test_the_digest_notices_every_flip_and_scans_only_what_stands_out(clean, tmp_path):
    found = faulty(clean, tmp_path, tensors="*fc1.weight", bits="0", count=1)
    noticed = {name: found[f"found/{name}"] for name in ("seal", "nan", "extreme", "range")}
    assert noticed == {"seal": 1, "nan": 0, "extreme": 0, "range": 0}


def test_a_flip_of_the_critical_bit_is_noticed_by_scans_and_by_products(clean, tmp_path):
    found = faulty(clean, tmp_path, tensors="*fc1.weight", bits="critical", count=20)
    assert found["changed"] > 0
    noticed = {name: found[f"found/{name}"] for name in ("seal", "range", "extreme", "abft-row")}
    assert set(noticed.values()) == {1.0}


def test_what_is_measured_bare_is_what_the_recipe_itself_measures(clean, tmp_path):
    out = tmp_path / "faulty.h5"
    ckptflip.inject(clean, out=out, roles="model", ber=1e-4, seed=3)
    workload = scored(model="digits-mlp", trained=1)
    workload.load(out)
    found = workload.evaluate()
    assert found["accuracy"] == workload._trained.evaluate()["accuracy"]


def test_an_evaluation_leaves_the_model_as_it_was(clean, tmp_path):
    out = tmp_path / "faulty.h5"
    ckptflip.inject(clean, out=out, roles="model", ber=1e-3, seed=3)
    workload = scored(model="digits-mlp", trained=1)
    workload.load(out)
    before = workload.digest()
    weights = {name: value.clone() for name, value in workload._state["model"].items()}
    first = workload.evaluate()
    assert workload.digest() == before
    held = workload.model.state_dict()
    assert all(torch.equal(held[n].view(torch.int32), w.view(torch.int32)) for n, w in weights.items())
    assert str(workload.evaluate()) == str(first)


def test_a_model_that_is_started_anew_is_prepared_anew(clean, tmp_path):
    """A worker starts several clean runs before it measures trials."""
    out = tmp_path / "faulty.h5"
    ckptflip.inject(clean, out=out, roles="model", bits="critical", count=10, seed=3)
    workload = scored(model="digits-mlp", trained=1)
    for seed in (1, 2):
        workload.start(seed)
        workload.evaluate()
    workload.load(out)
    found = workload.evaluate()
    assert found["corrected/secded"] == found["corrected/tmr"] == 10
    assert found == measured(out)


def test_no_trial_leaves_anything_for_the_next(clean, tmp_path):
    out = tmp_path / "faulty.h5"
    ckptflip.inject(clean, out=out, roles="model", ber=1e-2, seed=3)
    workload = scored(model="digits-mlp", trained=1)
    workload.load(out)
    first = workload.evaluate()
    assert first["uncorrectable/secded"] > 0
    workload.load(clean)
    assert workload.evaluate() == measured(clean)
    workload.load(out)
    assert str(workload.evaluate()) == str(first)


def test_a_hit_clean_copy_is_refused(clean, tmp_path):
    out = tmp_path / "faulty.h5"
    ckptflip.inject(clean, out=out, tensors="clean", count=1, seed=1)
    with pytest.raises(CheckpointError, match="faults belong into the model"):
        measured(out)


def test_checkpoints_of_others_are_refused(clean, tmp_path):
    workload = scored(model="digits-mlp", trained=2)
    with pytest.raises(WorkloadError, match="belongs to the workload"):
        workload.load(clean)


def test_options_are_checked():
    with pytest.raises(UsageError, match="trained is a whole number"):
        scored(model="digits-mlp", trained=-1)
    with pytest.raises(UsageError, match="option"):
        scored(model="digits-mlp", colour=1)
    with pytest.raises(UsageError, match="PyTorch workloads"):
        scored(model="ckptflip.recsys.workloads:served")
