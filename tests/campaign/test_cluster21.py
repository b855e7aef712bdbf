"""The specs of the published study: all of them load and say what they ask; some run, and become a page."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from ckptflip.campaign import loading
from ckptflip.campaign.cells import CONTROL, expand
from ckptflip.training.workload import BUILT_IN

ROOT = Path(__file__).parent.parent.parent
SPECS = sorted((ROOT / "campaigns" / "cluster21").glob("*.toml"))
EXPERIMENTS = [f"E{number}" for number in range(14)]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "campaigns" / "cluster21.py"
    spec = importlib.util.spec_from_file_location("campaigns_cluster21", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_a_spec_is_whole(path: Path) -> None:
    assert path.read_text("utf-8").startswith("#:schema ../campaign.schema.json\n")
    campaign = loading.load(path)
    assert campaign.name == f"cluster21-{path.stem}"
    assert campaign.title
    assert [line.partition(":")[0] for line in campaign.about.strip().splitlines()] == [
        "Asked", "Claimed", "Varied",
    ]  # fmt: skip
    assert {loading.registered(workload) for workload in campaign.workload} <= set(BUILT_IN)
    labels = [cell.label for cell in expand(campaign)]
    assert CONTROL in labels
    assert len(set(labels)) > 1 or path.stem.startswith("E0")
    small = path.stem.endswith("-digits")
    names = {str(workload.options.get("workload", workload.name)) for workload in campaign.workload}
    assert names == {"digits-cnn"} if small else names <= {"alexnet", "vgg16", "resnet50"}
    assert campaign.restart.end(max(campaign.restart.epochs)) <= (15 if small else 100)


def test_every_experiment_is_there_in_both_sizes(script: ModuleType) -> None:
    stems = [path.stem for path in SPECS]
    for name in EXPERIMENTS:
        assert f"{name}-digits" in stems
        assert any(re.fullmatch(rf"{name}(-alexnet)?", stem) for stem in stems)
    assert [name for name in script.specs() if name in EXPERIMENTS] == EXPERIMENTS
    assert set(script.specs()) == set(script.FINDINGS)


@pytest.mark.slow
def test_small_variants_run_and_become_a_page(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(script.loading, "load", _smaller(script.loading.load))
    only = ["E0", "E3-strata", "E12"]
    assert script.run(tmp_path, only, 1, 2) == 0
    assert script.run(tmp_path, only, 1, 2) == 0  # nothing is left to do
    page = script.write(tmp_path, tmp_path / "results.md", only).read_text("utf-8")
    assert [line.split(":")[0] for line in re.findall(r"^## (.*)$", page, re.MULTILINE)] == [
        *only, "Uniform or stratified sampling",
    ]  # fmt: skip
    assert "all 3 restarts ended with the whole training state" in page
    assert "not run: E1, E2, E3, E4" in page
    assert re.search(r"The claim is .* here: the model is the more sensitive in \d of 3", page)
    figures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", page)
    assert figures
    assert all((tmp_path / figure).stat().st_size < 60_000 for figure in figures)


def _smaller(load: Any) -> Any:
    """Campaigns of one clean run, without Keras, which starts slowly: what is tested is the same for both."""

    def loaded(path: Path) -> Any:
        campaign = load(path)
        kept = tuple(workload for workload in campaign.workload if workload.framework != "keras")
        clean = msgspec.structs.replace(campaign.clean, seeds=(0,))
        return msgspec.structs.replace(campaign, workload=kept, keras_backend=None, clean=clean)

    return loaded


def test_an_experiment_that_does_not_exist(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(script.CkptflipError, match="no experiment E99; there are E0, E1"):
        script.specs(["E99"])
    with pytest.raises(script.CkptflipError, match="holds no store"):
        script.write(tmp_path, tmp_path / "results.md")
