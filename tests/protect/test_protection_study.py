"""The score of protections as a study: its specs, and the page made from stores."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("scipy")

from ckptflip.campaign import loading
from ckptflip.campaign.cells import expand
from ckptflip.training import find

ROOT = Path(__file__).parents[2]
SPECS = sorted((ROOT / "campaigns" / "protection").glob("*.toml"))


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.stem)
def test_specs_load_and_their_workloads_exist(path):
    spec = loading.load(path)
    assert spec.name == f"protection-{path.stem}"
    assert path.read_text("utf-8").startswith("#:schema ../campaign.schema.json\n")
    assert [line.partition(":")[0] for line in spec.about.strip().splitlines()] == [
        *("Asked", "Claimed", "Varied")
    ]
    assert len(spec.clean.seeds) == 3 and spec.trials.control >= 20
    assert sum(cell.policy is not None for cell in expand(spec)) >= 4
    for workload in spec.workload:
        assert find(workload.name, **workload.options).epoch == 0


@pytest.fixture(scope="module")
def scripts():
    """The study's script and its tables, imported."""
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(ROOT / "campaigns"))
    try:
        import protection
        import protection_tables

        yield protection, protection_tables
    finally:
        sys.path.remove(str(ROOT / "campaigns"))


@pytest.fixture(scope="module")
def stores(tmp_path_factory, scripts):
    """S3 on the smallest model there is."""
    study, _ = scripts
    folder = tmp_path_factory.mktemp("stores")
    spec = loading.load(ROOT / "campaigns" / "protection" / "S3-small.toml")
    model = {"model": "digits-mlp", "trained": 1}
    sweep = msgspec.structs.replace(spec.policy[0].sweep, ber=(3e-4, 1e-3, 3e-3, 1e-2))
    tiny = msgspec.structs.replace(
        spec,
        policy=(msgspec.structs.replace(spec.policy[0], sweep=sweep),),
        workload=(msgspec.structs.replace(spec.workload[0], options=model),),
        clean=msgspec.structs.replace(spec.clean, seeds=(0,)),
        trials=msgspec.structs.replace(spec.trials, per_cell=2, control=2),
        executor=msgspec.structs.replace(spec.executor, workers=1),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ckptflip.campaign.loading.load", lambda _: tiny)
        assert study.run_all(study.specs(["S3"]), folder, None, 1) == 0
    return folder


def test_the_page_tells_who_noticed_and_what_was_left(tmp_path, scripts, stores):
    study, _ = scripts
    page = study.write(stores, tmp_path / "page.md").read_text("utf-8")
    assert "10 trials in 1 campaign." in page
    assert "Where nothing was altered (2 restarts), no contender raised a false alarm." in page
    assert "| `seal` | 8/8: 100 %" in page
    assert "| `clip-100` | the published clipping" in page
    assert "Loss of accuracy that is left, mean and 95 %:" in page


def test_numbers_are_those_of_the_store(scripts, stores):
    _, tables = scripts
    study = tables.Study.of("S3", stores / "S3.db")
    assert [line.trials for line in study.lines] == [2, 2, 2, 2]
    assert study.survivors[0] == "bare" and {"clip-100", "clip-range", "secded", "tmr"} <= set(
        study.survivors
    )
    assert study.pooled("seal", effective=False).events == 8
    assert study.false_alarms("seal").trials == 2
    for line in study.lines:
        # Triplication gives back sign and exponent: what is left are mantissas.
        assert np.all(line.lost("tmr", study.chance) <= 0.02)
        assert np.all(line.found["seal"] >= line.found["parity"])
    bare, ideal = (sum(float(line.lost(name, 0.1).sum()) for line in study.lines) for name in ("bare", "tmr"))
    kept, share = study.recovered("tmr")
    assert kept == pytest.approx(bare - ideal) and share == pytest.approx((bare - ideal) / bare)


def study_of(tables, gains):
    """A study of one cell for each array of what calibrated clipping leaves more than published clipping."""
    gathered = SimpleNamespace(judged=SimpleNamespace(name="auc"), several_workloads=False)
    lines = [
        tables.Line(
            cell=SimpleNamespace(label=f"{place} faults"), flips=1.0, effective=np.ones(len(gain), bool),
            clean=np.full(len(gain), 0.75), found={},
            left={"bare": 0 * gain + 0.6, "clip-100": 0 * gain + 0.6, "clip-range": 0.6 + gain},
        )
        for place, gain in enumerate(gains, 1)
    ]  # fmt: skip
    return tables.Study("S", gathered, lines, [], 0.5, {})


def test_more_or_less_and_its_interval_have_one_sign(scripts):
    _, tables = scripts
    import protection_findings

    steps = np.linspace(0.0, 0.01, 30)
    said = protection_findings.findings(study_of(tables, [0.03 + steps, -0.02 - steps, -0.05 - steps]))
    clipping = next(each for each in said if "Holm" in each)
    number = r"(\d\.\d{4})"
    told = re.findall(
        rf"(more|less) AUC is left in (\d), at most {number} \({number} to {number}; (.)", clipping
    )
    assert [(word, cells, cell) for word, cells, *_, cell in told] == [("more", "1", "1"), ("less", "2", "3")]
    for (*_, mean, low, high, _), true in zip(told, (0.035, 0.055), strict=True):
        assert float(low) < float(mean) == true < float(high)


def test_a_study_that_is_not_there_is_named(tmp_path, scripts):
    study, _ = scripts
    from ckptflip.errors import CkptflipError

    with pytest.raises(CkptflipError, match="there is no study S9; there are S1"):
        study.specs(["S9"])
    with pytest.raises(CkptflipError, match="holds no store"):
        study.write(tmp_path, tmp_path / "page.md")
