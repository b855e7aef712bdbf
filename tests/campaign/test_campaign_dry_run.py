"""What a dry run looks for: workloads, and, on the clean checkpoints that are there, what would be hit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from test_campaign_run import HERE, ckptflip, run, written

from ckptflip.campaign import clean, loading
from ckptflip.campaign.cells import expand
from ckptflip.campaign.dry_run import Looked, look

SPEC = """
name = "toy"
[[workload]]
name = "campaign_toy:make"
label = "toy"
[clean]
seeds = [0, 1]
[restart]
epochs = [3, 4]
until = 8
[[policy]]
tensors = "*"
sweep = { bits = ["all", "critical"] }
[trials]
per_cell = 1
"""


def looked(folder: Path | None, *changes: tuple[str, str]) -> Looked:
    text = SPEC
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = (folder or Path("nowhere")).with_suffix(".toml")
    path.write_text(text)
    spec = loading.load(path)
    return look(spec, expand(spec), folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the clean runs of a campaign that was run."""
    folder = tmp_path_factory.mktemp("trained")
    run(written(folder, trials="per_cell = 1"), folder / "runs.db")
    return folder / "runs.db.clean"


@pytest.fixture(autouse=True)
def beside_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


def test_without_clean_runs_only_workloads_are_looked_for(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", None):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            assert looked(folder) == Looked(workloads=1, tried=0, untried=4)
    assert not (tmp_path / "none").exists()


def test_with_clean_runs_every_policy_is_drawn_once(trained: Path) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert looked(trained) == Looked(workloads=1, tried=4, untried=0)
    strata = ("[trials]", '[trials]\nstrata = ["layer", "field"]'), ('["all", "critical"]', '["all"]')
    assert looked(trained, *strata) == Looked(workloads=1, tried=2, untried=0)
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_cells_whose_checkpoint_is_not_whole_are_not_tried(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "runs.db.clean")
    for path in folder.rglob("epoch_*3.h5"):
        path.write_bytes(path.read_bytes()[:100])
    assert looked(folder) == Looked(workloads=1, tried=2, untried=2)
    assert looked(folder, ("epochs = [3, 4]", "epochs = [2]")) == Looked(workloads=1, tried=0, untried=2)
    for path in folder.rglob(clean.PROGRESS):
        path.write_bytes(b"no longer a result")
    assert looked(folder) == Looked(workloads=1, tried=0, untried=4)


def test_a_restart_without_change_has_nothing_to_look_for(trained: Path) -> None:
    policy = '[[policy]]\ntensors = "*"\nsweep = { bits = ["all", "critical"] }\n', ""
    assert looked(trained, policy) == Looked(workloads=1, tried=0, untried=0)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (('tensors = "*"', 'tensors = "conv*"'), 2, "is impossible: tensors 'conv*' matches nothing"),
        (("count = [1, 5]", "count = [1, 500000]"), 2, "is impossible"),
        (("campaign_toy:make", "campaign_toy:mak"), 1, "has no 'mak'; did you mean 'make'?"),
        (("campaign_toy:make", "campaign_tpy:make"), 1, "importing 'campaign_tpy' failed"),
        (("campaign_toy:make", "campaign_toy:broken"), 1, "no such data"),
        (("campaign_toy:make", "digits-mpl"), 1, "Did you mean 'digits-mlp'?"),
        (("options = {  }", "options = { wide = 7 }"), 1, "has no option wide; it takes none"),
    ],
)
def test_a_dry_run_finds_what_a_run_would(
    trained: Path, tmp_path: Path, change: tuple[str, str], code: int, message: str
) -> None:
    spec, store = written(tmp_path, trials="per_cell = 1"), tmp_path / "runs.db"
    shutil.copytree(trained, f"{store}.clean")
    assert change[0] in spec.read_text()
    # `broken` takes no options; it is refused before it is called.
    name = "campaign_toy:broken" if "wide" in change[1] else "campaign_toy:make"
    spec.write_text(spec.read_text().replace(*change).replace("campaign_toy:make", name))
    found = _errors("run", spec, "--store", store, "--dry-run", code=code)
    assert message in found
    assert not store.exists()
    if code == 2:
        assert found == _errors("run", spec, "--store", store, "-q", code=code)


def _errors(*arguments: Any, code: int) -> str:
    done = ckptflip(*arguments)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return next(line for line in done.stderr.splitlines() if line.startswith("Error: "))


def test_a_dry_run_says_what_it_did_not_look_for(trained: Path) -> None:
    spec = trained.parent / "spec.toml"
    said = ckptflip("run", spec, "--dry-run").stderr
    assert "found 1 workload; not started" in said
    assert "metric not checked: that a workload gives 'accuracy' shows in its clean run" in said
    assert "no tensor was looked for of 8 altered cells: no --store is named" in said
    said = ckptflip("run", spec, "--dry-run", "--store", trained.parent / "other.db").stderr
    assert "altered cells: their checkpoints are not yet in" in said and "other.db.clean" in said
    said = ckptflip("run", spec, "--dry-run", "--store", trained.parent / "runs.db").stderr
    assert "drew once for 8 altered cells on the clean checkpoints: possible" in said
    assert "not looked for" not in said and "no tensor" not in said
