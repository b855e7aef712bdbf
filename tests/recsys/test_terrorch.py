"""The recommendation study: its specs, the workload with quantised tables, and the page made from stores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("scipy")

import ckptflip  # noqa: E402
from ckptflip import torch_h5  # noqa: E402
from ckptflip.campaign import loading  # noqa: E402
from ckptflip.campaign.cells import expand  # noqa: E402
from ckptflip.campaign.statistics.intervals import Interval  # noqa: E402
from ckptflip.campaign.store.rows import Cell  # noqa: E402
from ckptflip.errors import UsageError, WorkloadError  # noqa: E402
from ckptflip.recsys import recipes  # noqa: E402
from ckptflip.recsys.tables import dequantise, quantise  # noqa: E402
from ckptflip.recsys.workloads import served  # noqa: E402
from ckptflip.report.campaign.rates import rates  # noqa: E402
from ckptflip.training import find  # noqa: E402

ROOT = Path(__file__).parents[2]
SPECS = sorted((ROOT / "campaigns" / "terrorch").glob("*.toml"))
TINY = {"samples": 600, "test": 300, "per_epoch": 200, "rows": 20, "batch_size": 64}
SERVED = {"trained": 2, **TINY}
TABLE = "emb_l.3.weight"


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.stem)
def test_specs_load_and_their_workloads_exist(path):
    spec = loading.load(path)
    assert spec.name == f"terrorch-{path.stem}"
    assert path.read_text("utf-8").startswith("#:schema ../campaign.schema.json\n")
    assert [line.partition(":")[0] for line in spec.about.strip().splitlines()] == [
        *("Asked", "Claimed", "Varied")
    ]
    assert spec.metric.name == "auc" and spec.metric.chance == 0.5
    cells = expand(spec)
    assert sum(cell.policy is not None for cell in cells) >= 6
    for workload in spec.workload[:6]:
        assert find(workload.name, **workload.options).epoch == 0
    small = path.stem.endswith("-small")
    assert len(spec.clean.seeds) == (3 if small else 10)
    assert ("data" not in spec.workload[0].options) == (small or path.stem == "T3")
    # Every study is there at both sizes.
    assert small or any(p.stem == f"{path.stem.partition('-')[0]}-small" for p in SPECS)


@pytest.mark.parametrize("tables", ["fp32", "fp16", "bf16", "int8", "int4", "int2", "int4-tbe"])
def test_served_tables_give_what_the_dequantised_model_gives(tables):
    workload = served(tables=tables, **SERVED)
    workload.start(3)
    trained = find("dlrm", **TINY)
    trained.start(3)
    for _ in range(2):
        trained.train_epoch()
    with torch.no_grad():
        for table in trained.model.emb_l:
            if tables.startswith("int"):
                values = torch.from_numpy(dequantise(quantise(table.weight.numpy(), tables), tables))
            else:
                forms = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
                values = table.weight.to(forms[tables]).float()
            table.weight.copy_(values)
    assert workload.evaluate() == trained.evaluate()
    assert torch.equal(workload.outputs()[0], trained.outputs()[0])


def test_int8_tables_are_read_as_aten_s_operators_read_them():
    workload = served(tables="int8", **SERVED)
    workload.start(0)
    for place, table in enumerate(workload.model.emb_l):
        stored = workload.stored[f"emb_l.{place}.weight"]
        assert torch.equal(table.weight, torch.ops.quantized.embedding_bag_byte_unpack(stored))


@pytest.mark.parametrize("tables", ["bf16", "int8", "int4"])
def test_a_served_model_is_saved_and_loaded_exactly(tmp_path, tables):
    workload = served(tables=tables, **SERVED)
    workload.start(1)
    workload.save(tmp_path / "0.h5")
    other = served(tables=tables, **SERVED)
    other.load(tmp_path / "0.h5")
    assert other.digest() == workload.digest()
    assert other.evaluate() == workload.evaluate()
    other.save(tmp_path / "again.h5")
    assert (tmp_path / "again.h5").read_bytes() == (tmp_path / "0.h5").read_bytes()
    assert other.train_epoch() == {} and other.epoch == 1
    assert other.evaluate() == workload.evaluate()
    other.start(2)
    assert (other.epoch, other.digest() == workload.digest()) == (0, False)
    code = (
        "import sys; from ckptflip.recsys.workloads import served\n"
        f"w = served(tables={tables!r}, **{SERVED}); w.start(1); print(w.digest())"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == workload.digest()


@pytest.mark.parametrize(("layout", "dimension"), [("int8", 16), ("int4", 16), ("int4", 15)])
@pytest.mark.parametrize("field", ["code", "scale", "bias"])
def test_a_flip_in_a_field_changes_what_it_should(tmp_path, layout, dimension, field):
    options = SERVED | {"embedding": dimension}
    workload = served(tables=layout, **options)
    workload.start(1)
    workload.save(tmp_path / "0.h5")
    before = workload.model.emb_l[3].weight.detach().clone()
    clean, _ = workload.outputs()
    rowwise = f"{layout}:{dimension}"
    record = ckptflip.inject(
        tmp_path / "0.h5", out=tmp_path / "bad.h5", tensors=f"model/{TABLE}", rowwise=rowwise, fields=field,
        rows="0", bits="all" if field == "code" else "exponent", count=1, seed=2,
    )  # fmt: skip
    workload.load(tmp_path / "bad.h5")
    after = workload.model.emb_l[3].weight.detach()
    differs = (before != after).numpy()
    word = int(record.plan.word[0])
    wanted = np.zeros_like(differs)
    if field == "code":
        wanted[word // dimension, word % dimension] = True
    else:
        wanted[word] = True
    if field == "scale":
        # scale · 0 is 0, whatever the scale.
        wanted &= (before != before.min(dim=1, keepdim=True).values).numpy()
    assert record.header.tensors[0].name == f"model/{TABLE}.{field}"
    assert np.array_equal(differs, wanted) and differs.any()
    reads = recipes.made("dlrm", {k: v for k, v in options.items() if k != "trained"}).logs[1].ids[:, 3] == 0
    faulty, _ = workload.outputs()
    changed = (faulty != clean).numpy() | torch.isnan(faulty).numpy()
    assert changed.any() and not (changed & ~reads).any()


def test_what_cannot_be_served_is_refused(tmp_path):
    with pytest.raises(UsageError, match="fp32, fp16, bf16, int8"):
        served(tables="fp8")
    with pytest.raises(UsageError, match="not a layout"):
        served(tables="int7")
    with pytest.raises(UsageError, match="served model is one of"):
        served(model="resnet18")
    with pytest.raises(UsageError, match="trained is a whole number"):
        served(trained=-1)
    with pytest.raises(UsageError, match="did you mean samples"):
        served(sample=3)
    workload = served(tables="int8", **SERVED)
    with pytest.raises(WorkloadError, match="no state yet"):
        workload.evaluate()
    workload.start(0)
    workload.save(tmp_path / "0.h5")
    kept = workload.digest()
    with pytest.raises(WorkloadError, match=r"tables=int8.*tables=int4"):
        served(tables="int4", **SERVED).load(tmp_path / "0.h5")
    state = torch_h5.load(tmp_path / "0.h5")
    state["model"][TABLE] = state["model"][TABLE][:, :-1].clone()
    torch_h5.save(state, tmp_path / "narrow.h5")
    with pytest.raises(WorkloadError, match=r"emb_l\.3\.weight is torch\.uint8 \(20, 23\).*\(20, 24\)"):
        workload.load(tmp_path / "narrow.h5")
    del state["model"][TABLE]
    torch_h5.save(state, tmp_path / "less.h5")
    with pytest.raises(WorkloadError, match="another architecture"):
        workload.load(tmp_path / "less.h5")
    assert workload.digest() == kept


@pytest.fixture(scope="module")
def study():
    """The script, imported."""
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(ROOT / "campaigns"))
    try:
        import terrorch

        yield terrorch
    finally:
        sys.path.remove(str(ROOT / "campaigns"))


def tiny(campaign):
    """A spec with tiny models, few cells and trials."""
    made = tuple(
        msgspec.structs.replace(each, options=each.options | TINY) for each in campaign.workload[-1:]
    )
    policies = tuple(
        msgspec.structs.replace(each, sweep=msgspec.structs.replace(each.sweep, count=(1, 200)))
        for each in campaign.policy
    )
    return msgspec.structs.replace(
        campaign, workload=made, policy=policies,
        trials=msgspec.structs.replace(campaign.trials, per_cell=2),
        clean=msgspec.structs.replace(campaign.clean, seeds=(0,)),
    )  # fmt: skip


def test_two_studies_run_and_are_written_up(tmp_path, monkeypatch, study):
    load = loading.load
    monkeypatch.setattr(study.loading, "load", lambda path: tiny(load(path)))
    assert study.run(tmp_path, ["T4", "T5-int8"], None, 1) == 0
    counts = np.load(tmp_path / "access.npz")
    assert len(counts.files) == 26 and all(counts[name].sum() == TINY["samples"] for name in counts.files)
    page = study.write(tmp_path, tmp_path / "docs" / "page.md").read_text("utf-8")
    assert (tmp_path / "docs" / "images" / "results-recsys" / "T4.png").stat().st_size > 0
    assert "The log is generated and small." in page
    assert "not run: T1, T2, T3, T5, T5-int4, T6" in page
    assert "hot 1 %, 200 faults | 2 | 200 |" in page
    assert "fields scale, 200 faults | 2 | 200 |" in page
    assert "Of the rows with a fault, the evaluation read 100 % (hot 1 %)" in page
    assert "failed" not in page
    with pytest.raises(ckptflip.errors.CkptflipError, match="no study T9"):
        study.specs(["T9"])


def line(study, workload, group, ber, events):
    """A cell in numbers, of 12 trials."""
    cell = Cell(
        key="", position=0, label=f"{group}, BER {ber:g}", workload=workload, epoch=0, until=0, wanted=12,
        swept={"ber": ber},
    )  # fmt: skip
    rate = rates(np.array([events]), 12)[0]
    return study.Line(cell, 12, 0, 1.0, 0.0, rate, rate, events / 100, Interval(0.0, 0.5, 0.95, ""), 0)


def test_a_row_of_the_dummy_model_says_each_part_and_rate(study):
    lines = [
        line(study.tables, model, group, ber, events)
        for model in ("embedding 64, MLP 64, sparsity 0.1", "embedding 512, MLP 64, sparsity 0.1")
        for group, many in (("all", (0, 3)), ("tables", (1, 12)))
        for ber, events in zip((1e-7, 1e-6), many, strict=True)
    ]
    head, first, second = study.tables.table(study.Study("T3", None, None, lines))
    assert head[1:3] == ["all hit: lost AUC at BER 1e-07/1e-06", "all hit: loss at 1e-06, mean, 95 %"]
    assert first == [
        "embedding 64, MLP 64, sparsity 0.1", "0 of 12, 3 of 12", "0.0300 (0 to 0.5000)",
        "1 of 12, 12 of 12", "0.1200 (0 to 0.5000)",
    ]  # fmt: skip
    assert second[1:] == first[1:]


def test_what_is_compared_is_named_and_adjusted(study):
    from terrorch_findings import AFTERWARDS, USELESS, compared

    many, few = rates(np.array([11, 2]), 12)
    (said,) = compared(
        [("BER 1", many, few), ("BER 2", few, few)], f"{AFTERWARDS} a against b", ("a", "b"), USELESS
    )
    assert said == (
        "Afterwards, a against b: the rates of evaluations that were useless differ in 1 of 2 comparisons: "
        "BER 1 (92 % a, 17 % b)."
    )
