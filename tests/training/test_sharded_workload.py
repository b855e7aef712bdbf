"""Workloads with distributed checkpoints: an exact resume, rows shared out as FSDP does, no pickle read."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")

import ckptflip  # noqa: E402
from ckptflip.errors import CheckpointError, CkptflipError, UsageError, WorkloadError  # noqa: E402
from ckptflip.training import find  # noqa: E402
from ckptflip.training.sharded import read, write  # noqa: E402


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs; the digest after a third stands beside its checkpoint."""
    folder = tmp_path_factory.mktemp("sharded")
    workload = find("sharded", workload="digits-cnn", ranks=8)
    workload.start(5)
    for _ in range(2):
        workload.train_epoch()
    workload.save(folder / "epoch_002.dcp")
    workload.train_epoch()
    (folder / "digest").write_text(workload.digest())
    return folder / "epoch_002.dcp"


def test_a_resume_is_exact_and_what_is_trained_is_the_inner_workload(trained: Path) -> None:
    again = find("sharded", workload="digits-cnn", ranks=8)
    again.load(trained)
    assert again.epoch == 2
    again.train_epoch()
    plain = find("digits-cnn")
    plain.start(5)
    for _ in range(3):
        plain.train_epoch()
    assert again.digest() == plain.digest() == trained.with_name("digest").read_text()
    assert again.evaluate() == plain.evaluate()


def test_ranks_own_rows(trained: Path) -> None:
    with ckptflip.opened(trained) as target:
        tensors = {tensor.name: tensor for tensor in target.tensors}
    for name, rows in (("model/conv1.weight", 16), ("model/fc2.weight", 10), ("model/fc2.bias", 10)):
        each = math.ceil(rows / 8)
        found = sorted((s.rank, s.start[0], s.shape[0]) for s in tensors[name].shards)
        wanted = [(r, r * each, min(each, rows - r * each)) for r in range(8) if r * each < rows]
        assert found == wanted
    momentum = tensors["optimizer/state/conv1.weight/momentum_buffer"]
    assert (momentum.role, momentum.layer, len(momentum.shards)) == ("optimizer", "conv1", 8)
    assert [shard.rank for shard in tensors["rng/cpu"].shards] == [0]
    # The files are the ranks'.
    assert sorted(path.name for path in trained.iterdir()) == [
        ".metadata", *(f"__{rank}_0.distcp" for rank in range(8)),
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_pytorch_reads_it(trained: Path) -> None:
    wanted = read(trained)["model"]
    found = {"model": {name: torch.zeros_like(value) for name, value in wanted.items()}}
    dcp.load(found, checkpoint_id=trained, no_dist=True)
    assert all(torch.equal(found["model"][name], value) for name, value in wanted.items())


def test_faults_in_two_of_eight_ranks_train_on(trained: Path, tmp_path: Path) -> None:
    record = ckptflip.inject(
        trained, out=tmp_path / "bad.dcp", roles="model", bits="all,!critical", ranks="2 of 8", count=20,
        seed=3,
    )  # fmt: skip
    assert record.bits_effective == 20
    hit = record.header.ranks
    assert len(hit) == 2
    changed = [
        path.name
        for path in sorted(trained.iterdir())
        if path.read_bytes() != (tmp_path / "bad.dcp" / path.name).read_bytes()
    ]
    assert changed == [f"__{rank}_0.distcp" for rank in hit]
    workload = find("sharded", workload="digits-cnn", ranks=8)
    workload.load(tmp_path / "bad.dcp")
    assert workload.epoch == 2
    workload.train_epoch()
    assert workload.digest() != trained.with_name("digest").read_text()


def test_what_is_no_tensor_comes_back(tmp_path: Path) -> None:
    state = {
        "model": {"w": torch.arange(7.0), "scalar": torch.tensor(3.5), "none": torch.zeros(0, 2)},
        "optimizer": {"state": {0: {"step": 2, "m": torch.ones(7)}}, "param_groups": [
            {"params": [0], "param_names": ["w"], "betas": (0.9, float("inf"))},
        ]},
        "odd": torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32),
    }  # fmt: skip
    write(state, tmp_path / "step", 3)
    found = read(tmp_path / "step")
    assert found["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    assert found["optimizer"]["state"][0]["step"] == 2
    assert found["model"]["none"].shape == (0, 2)
    assert found["model"]["scalar"].item() == 3.5
    assert found["odd"].view(torch.int32).item() == 0x7F800001
    with ckptflip.opened(tmp_path / "step") as target:
        assert "optimizer/state/w/m" in {tensor.name for tensor in target.tensors}


def test_saving_replaces_what_is_there(trained: Path, tmp_path: Path) -> None:
    workload = find("sharded", workload="digits-cnn", ranks=8)
    workload.load(trained)
    fewer = find("sharded", workload="digits-cnn", ranks=2)
    fewer.start(0)
    workload.save(tmp_path / "one.dcp")
    fewer.save(tmp_path / "one.dcp")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.dcp"]
    assert len(list((tmp_path / "one.dcp").iterdir())) == 3
    with pytest.raises(WorkloadError, match=r"'digits-cnn\[ranks=2\]', not to 'digits-cnn\[ranks=8\]'"):
        workload.load(tmp_path / "one.dcp")


def test_damaged_checkpoints_are_named(trained: Path, tmp_path: Path) -> None:
    workload = find("sharded", workload="digits-cnn", ranks=8)
    workload.load(trained)
    before = workload.digest()
    shutil.copytree(trained, tmp_path / "cut.dcp")
    rank = tmp_path / "cut.dcp" / "__3_0.distcp"
    rank.write_bytes(rank.read_bytes()[:-200])
    ckptflip.inject(trained, out=tmp_path / "said.dcp", tensors="description", count=400, seed=1)
    for name in ("cut.dcp", "said.dcp", "missing.dcp"):
        with pytest.raises(CkptflipError):
            workload.load(tmp_path / name)
    assert workload.digest() == before
    torch.save({"w": 1}, tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match="no checkpoint of a sharded workload"):
        read(tmp_path / "plain.pt")


def test_what_cannot_be_sharded() -> None:
    with pytest.raises(UsageError, match="1 to 4096, not 0"):
        find("sharded", workload="digits-cnn", ranks=0)
    with pytest.raises(WorkloadError, match="there is no workload 'digits-cnm'"):
        find("sharded", workload="digits-cnm")
    made = find("sharded", workload="digits-cnn", ranks=4, precision="bf16")
    assert made.name == "digits-cnn[precision=bf16,ranks=4]"
