"""Distributed data parallel, two processes and gloo: the ranks that are chosen are hit, and no others."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

import ckptflip
from ckptflip import record_files, torch_h5

if not torch.distributed.is_available():
    pytest.skip("this PyTorch cannot run distributed", allow_module_level=True)

PROCESS = Path(__file__).with_name("ddp_process.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What both processes left, side by side to their ends: a folder for each case."""
    folder = tmp_path_factory.mktemp("ddp")
    commands = [[sys.executable, str(PROCESS), str(folder), str(rank)] for rank in (0, 1)]
    processes = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return folder


def differing(folder, step):
    """The tensors in which the two ranks differ after a step."""
    rows = ckptflip.diff(folder / f"{step}_0.h5", folder / f"{step}_1.h5")
    return {row.tensor for row in rows if row.bits}


def records(folder):
    return {path.name: record_files.read(path) for path in sorted((folder / "records").iterdir())}


def test_one_rank_alone(trained):
    folder = trained / "one"
    (name, record), *rest = records(folder).items()
    assert name == "step_000003_rank1.flips.jsonl" and not rest
    # Right after the step, the ranks differ by the record and by nothing else.
    hit = {t.name for t in record.header.tensors}
    assert differing(folder, 3) == hit
    ckptflip.undo(folder / "3_1.h5", record)
    assert not differing(folder, 3)
    # Gradients are averaged, weights are not: the ranks stay apart.
    assert differing(folder, 5) >= hit
    # Either rank's checkpoint knows what has fired.
    states = [torch_h5.load(folder / f"5_{rank}.h5")["injector"] for rank in (0, 1)]
    assert states[0] == states[1] and len(states[0]["schedule"]["fired"]) == 1


def test_all_ranks_are_hit_alike(trained):
    folder = trained / "all"
    names, (one, other) = zip(*records(folder).items(), strict=True)
    assert names == ("step_000003_rank0.flips.jsonl", "step_000003_rank1.flips.jsonl")
    assert (one.plan.word == other.plan.word).all() and (one.plan.after == other.plan.after).all()
    assert not differing(folder, 3) and not differing(folder, 5)
    ckptflip.undo(folder / "3_0.h5", one)
    assert differing(folder, 3) == {t.name for t in one.header.tensors}


def test_gradients_are_hit_after_they_were_averaged(trained):
    folder = trained / "gradients"
    (record,) = records(folder).values()
    assert [t.name for t in record.header.tensors] == ["gradients/second.bias"]
    # The weight that was updated with it, and its momentum: no other rank sees the fault.
    assert differing(folder, 3) == {"model/second.bias", "optimizer/state/3/momentum_buffer"}


def test_buffers_of_rank_0_are_sent_to_all(trained):
    """What DistributedDataParallel does before every forward pass; the docstring of `Injector` says so."""
    folder = trained / "buffer"
    assert differing(folder, 3) == {"model/shift"}
    assert not differing(folder, 5)
