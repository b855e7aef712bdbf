"""Recommendation workloads: exact resume, what they record, their data, and options that make no sense."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from pathlib import Path

import click.testing
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import ckptflip  # noqa: E402
from ckptflip import torch_h5  # noqa: E402
from ckptflip.cli import resume as cli_resume  # noqa: E402
from ckptflip.cli import train as cli_train  # noqa: E402
from ckptflip.errors import UsageError, WorkloadError  # noqa: E402
from ckptflip.recsys import measures, recipes  # noqa: E402
from ckptflip.recsys.data import clicks, tsv  # noqa: E402
from ckptflip.recsys.touched import touched  # noqa: E402
from ckptflip.recsys.workloads import probabilities  # noqa: E402
from ckptflip.report import convergence  # noqa: E402
from ckptflip.training import find, harness, pytorch  # noqa: E402
from ckptflip.training.track import Flips, Header, Row, Track, collapsed  # noqa: E402

NAMES = ["dlrm", "fm", "deepfm", "wide-deep", "dcn", "dcn-v2", "afm"]
SMALL = {"samples": 600, "test": 300, "per_epoch": 200, "rows": 20, "batch_size": 64}
DUMMY = {"samples": 200, "rows": 64, "mlp": 8, "embedding": 8, "sparsity": 0.1}
RECORDED = {
    *("loss", "auc", "auc_se", "ne", "calibration", "ece", "positives", "unscored"),
    *("nan", "inf", "extreme"),
}


def go_on(workload, epochs):
    return [(workload.train_epoch(), workload.evaluate()) for _ in range(epochs)]


def resumes_exactly(make, folder):
    """An epoch, save, load into a fresh workload, three more: the bits of the uninterrupted run."""
    straight, resumed = make(), make()
    straight.start(3)
    go_on(straight, 1)
    straight.save(folder / "1.h5")
    measured = go_on(straight, 3)
    straight.save(folder / "4.h5")
    resumed.load(folder / "1.h5")
    assert go_on(resumed, 3) == measured
    resumed.save(folder / "again.h5")
    assert resumed.digest() == straight.digest()
    return (folder / "4.h5").read_bytes() == (folder / "again.h5").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_every_model_resumes_exactly(tmp_path, name):
    assert resumes_exactly(lambda: find(name, **SMALL), tmp_path)
    state = torch_h5.load(tmp_path / "4.h5")
    assert {"emb_l.0.weight", "emb_l.25.weight"} <= state["model"].keys()
    slots = state["optimizer"]["state"].values()
    wanted = "sum" if name == "dlrm" else "exp_avg_sq"
    assert len(slots) == len(state["model"])
    assert sum(bool(one[wanted].abs().sum() > 0) for one in slots) > 20


@pytest.mark.parametrize("config", ["kaggle", "terabyte"])
def test_sparse_gradients_resume_exactly_in_a_fresh_process(tmp_path, config):
    options = SMALL | {"config": config, "rows": 10}
    straight = find("dlrm", **options)
    straight.start(1)
    go_on(straight, 1)
    assert straight.model.emb_l[0].weight.grad.is_sparse
    straight.save(tmp_path / "1.h5")
    go_on(straight, 1)
    straight.save(tmp_path / "2.h5")
    code = (
        "import sys; from ckptflip.training import find\n"
        f"workload = find('dlrm', **{options})\n"
        "workload.load(sys.argv[1]); workload.train_epoch(); workload.save(sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "1.h5"), str(tmp_path / "again.h5")]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "again.h5").read_bytes() == (tmp_path / "2.h5").read_bytes()


def test_dlrm_learns_the_generated_log():
    workload = find("dlrm", samples=20_000, test=5000, per_epoch=10_000, scale=1e-5, batch_size=128)
    workload.start(0)
    before = workload.evaluate()["auc"]
    after = go_on(workload, 2)[-1][1]
    assert abs(before - 0.5) < 0.1
    assert after["auc"] > 0.68
    assert after["ne"] < 0.95
    assert 0.8 < after["calibration"] < 1.2


def test_what_is_recorded_is_what_the_measures_say():
    workload = find("deepfm", **SMALL)
    workload.start(0)
    found = workload.evaluate()
    assert found.keys() == RECORDED
    outputs, labels = workload.outputs()
    said = measures.evaluate(labels.numpy(), probabilities(outputs))
    assert {name: found[name] for name in RECORDED - {"nan", "inf", "extreme"}} == {
        name: getattr(said, name) for name in RECORDED - {"nan", "inf", "extreme"}
    }
    assert said.rows == 300


def test_the_auc_of_a_faulty_model_is_that_of_its_probabilities_not_of_its_logits():
    workload = find("dlrm", **SMALL)
    workload.start(0)
    with torch.no_grad():
        workload.model.top_l[-1].weight.mul_(1e4)
    outputs, labels = workload.outputs()
    scores = probabilities(outputs)
    assert (scores == 1).sum() > 10
    assert measures.delong(labels, scores).value == workload.evaluate()["auc"]
    assert measures.delong(labels, outputs).value != workload.evaluate()["auc"]
    assert measures.compare(labels, scores, scores).first == workload.evaluate()["auc"]


def test_a_class_that_is_missing_is_said_and_no_crash(tmp_path):
    with pytest.warns(UserWarning, match="all 1 labels are [01]: there is no AUC"):
        track = harness.train(find("fm", **SMALL | {"test": 1}), 1, tmp_path)
    assert [row.value("auc") for row in track.rows] == [None, None]
    assert all(row.loss > 0 for row in track.rows)
    assert track.rows[-1].value("positives") in (0, 1)
    with pytest.raises(UsageError, match="no track holds the metric 'auc'"):
        convergence.plot([track], tmp_path / "c.png", "auc")


def test_altered_tables_are_trained_on_measured_and_drawn(tmp_path):
    make = lambda: find("dlrm", **SMALL)  # noqa: E731
    clean = harness.train(make(), 2, tmp_path / "clean")
    assert clean.rows[-1].accuracy is None
    source = tmp_path / "clean" / "epoch_001.h5"
    record = ckptflip.inject(
        source, out=tmp_path / "bad.h5", roles="embedding", bits="critical", count=200, seed=1
    )
    assert all("emb_l" in tensor.name for tensor in record.header.tensors)
    workload = make()
    bad = harness.resume(workload, tmp_path / "bad.h5", 2)
    assert bad.rows[0].value("auc") != clean.rows[1].value("auc")
    assert bad.rows[0].extreme == 200
    assert 0 < bad.rows[0].value("unscored") < 300
    seen = touched(record, workload_ids())
    assert 0 < seen.read <= seen.rows <= 200
    convergence.plot([clean, bad], tmp_path / "c.png", "auc")
    assert (tmp_path / "c.png").stat().st_size > 0


def workload_ids():
    """What the test rows of the small workloads look up."""
    return recipes.made("dlrm", SMALL).logs[1].ids


def test_nan_in_a_table_makes_the_rows_that_read_it_unscored(tmp_path):
    workload = find("dlrm", **SMALL)
    workload.start(0)
    workload.save(tmp_path / "c.h5")
    state = torch_h5.load(tmp_path / "c.h5")
    state["model"]["emb_l.3.weight"][5, 0] = math.nan
    torch_h5.save(state, tmp_path / "c.h5")
    workload.load(tmp_path / "c.h5")
    found = workload.evaluate()
    assert found["unscored"] == (workload_ids()[:, 3] == 5).sum() > 0
    assert math.isnan(found["loss"])
    assert 0 < found["auc"] < 1
    assert found["nan"] == 1


def test_epochs_go_through_the_log_round_and_round():
    orders = [pytorch._order(7, epoch, 10, 4) for epoch in range(5)]
    assert [sorted(order.tolist()) for order in orders[:3]] == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 8, 9]]
    assert orders[0].tolist() != orders[2].tolist()
    whole = np.random.default_rng(np.random.SeedSequence((7, 3))).permutation(10)
    assert np.array_equal(pytorch._order(7, 3, 10, 10), whole)


def test_names_tell_what_a_checkpoint_depends_on(tmp_path):
    assert find("dlrm").name == "dlrm[data=clicks,config=small]"
    assert find("dlrm", config="terabyte").name == "dlrm[data=clicks,config=terabyte,rows=10000000]"
    assert find("served").name == "served[tables=int8,trained=3,model=dlrm[data=clicks,config=small]]"
    made = find("dcn-v2", rate=0.01, dropout=0.5, **SMALL)
    assert made.name == (
        "dcn-v2[data=clicks,samples=600,test=300,per_epoch=200,rows=20,batch_size=64,rate=0.01,dropout=0.5]"
    )
    made.start(0)
    made.save(tmp_path / "0.h5")
    with pytest.raises(WorkloadError, match=r"rate=0\.01.*rate=0\.02"):
        find("dcn-v2", rate=0.02, dropout=0.5, **SMALL).load(tmp_path / "0.h5")


def test_training_rows_do_not_depend_on_how_many_are_tested():
    few, many = (recipes.made("fm", {"samples": 50, "test": test}) for test in (20, 40))
    assert np.array_equal(few.logs[0].ids, many.logs[0].ids)
    assert np.array_equal(few.logs[1].ids, many.logs[1].ids[:20])
    other = recipes.made("fm", {"samples": 50, "test": 20, "data_seed": 1})
    assert not np.array_equal(few.logs[0].ids, other.logs[0].ids)
    assert few.form == (few.logs[0].sizes, few.logs[0].dense.shape[1])


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("dlrm", {"config": "large"}, "small, kaggle, terabyte"),
        ("dlrm", {"sample": 5}, "no option sample; did you mean samples"),
        ("dlrm", {"confg": "small"}, r"dlrm has no option confg; did you mean config\?"),
        ("dlrm", {"x": 1}, "no option x; it takes config, data, samples, .*, rate, device, threads$"),
        ("dlrm", {"dropout": 0.1}, "dlrm has no option dropout; it takes"),
        ("fm", {"dropout": 0.1}, "fm has no option dropout; it takes"),
        ("afm", {"devise": "cpu"}, r"no option devise; did you mean device\?"),
        ("served", {"trainde": 1}, r"served has no option trainde; did you mean trained\?"),
        ("served", {"model": "fm", "x": 1}, "no option x; it takes model, tables, trained, data"),
        ("dummy-dlrm", {"x": 1}, "it takes samples, data_seed, embedding, .*, device, threads$"),
        ("dlrm", {"device": "zz"}, "device is cpu, cuda, cuda:1 or another of PyTorch's, not 'zz'"),
        ("dlrm", {"threads": 1e3}, "threads is a whole number from 1 to 4096, not 1000.0"),
        ("dlrm", {"threads": 10**11}, "threads is a whole number from 1 to 4096, not 100000000000"),
        ("dummy-dlrm", {"device": ["cpu"]}, "device is cpu"),
        ("afm", {"dropout": 1.0}, "below 1"),
        ("fm", {"samples": 0}, "samples is a whole number of 1 or more, not 0"),
        ("fm", {"rows": 2.5}, "rows is a whole number"),
        ("fm", {"rate": math.nan}, "learning rate"),
        ("fm", {"rate": "nan"}, "rate 'nan' is of the wrong kind: Expected `float"),
        ("fm", {"data": 5}, "data 5 is of the wrong kind: Expected `str`"),
        ("dummy-dlrm", {"sparsity": "much"}, "sparsity 'much' is of the wrong kind"),
        ("fm", {"data": "criteo"}, "criteo:FILE"),
        ("fm", {"data": "movielens:"}, "movielens:DIR"),
        ("fm", {"data": "criteo:train.txt", "scale": 0.1}, "scale is an option of the generated log"),
        ("dummy-dlrm", {"sparsity": 2.0}, "sparsity"),
        ("dummy-dlrm", {"embeding": 64}, "did you mean embedding"),
        ("dummy-dlrm", {"samples": 0}, "samples"),
    ],
)
def test_options_that_make_no_sense_are_refused(name, options, said):
    with pytest.raises(UsageError, match=said):
        find(name, **options)


def test_a_device_that_is_not_there_is_named_when_it_is_needed(tmp_path):
    workload = find("dlrm", device="cuda:99", **SMALL)
    with pytest.raises(UsageError, match=r"there is no device cuda:99; CUDA devices here: \d"):
        harness.train(workload, 1, tmp_path)


def test_commands_say_that_the_log_is_made_and_the_library_says_nothing(tmp_path, capfd):
    shape = [word for name, value in SMALL.items() for word in ("-O", f"{name}={value}")]
    runner = click.testing.CliRunner()
    shown = runner.invoke(cli_train.command, ["fm", "--epochs", "1", "--save", str(tmp_path / "a"), *shape])
    assert shown.exit_code == 0
    assert shown.stderr.splitlines()[0] == "making the click log: 600 samples, 300 of the test"
    assert shown.stderr.count("click log") == 1
    again = ["fm", str(tmp_path / "a" / "epoch_001.h5"), "--until", "1", *shape]
    assert "making the click log" in runner.invoke(cli_resume.command, again).stderr
    harness.train(find("fm", **SMALL), 1, tmp_path / "b")
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def criteo_file(tmp_path):
    """1000 rows in Criteo's layout, and two malformed lines."""
    spec = clicks.ClickSpec(3, sizes=(40,) * 26)
    tsv.write(tmp_path / "train.txt", [clicks.generate(spec, 0, 1000)])
    with (tmp_path / "train.txt").open("ab") as file:
        file.write(b"1\t2\t3\nnonsense\n")
    return tmp_path / "train.txt"


def test_criteo_s_file_is_trained_on_and_resumed(tmp_path, criteo_file):
    options = {"data": f"criteo:{criteo_file}", "rows": 30, "batch_size": 64}
    with pytest.warns(UserWarning, match="2 of 1002 lines are malformed and were set aside"):
        train, test = recipes.made("dlrm", options).logs
    assert (len(train), len(test)) == (800, 100)
    assert max(train.sizes) == 30
    assert not (set(map(tuple, train.ids)) & set(map(tuple, test.ids)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert resumes_exactly(lambda: find("dlrm", **options), tmp_path)


def test_a_file_s_ids_are_those_of_its_training_rows(criteo_file):
    options = {"data": f"criteo:{criteo_file}", "samples": 100, "test": 60}
    with pytest.warns(UserWarning, match="malformed"):
        train, test = recipes.made("fm", options).logs
    assert (len(train), len(test)) == (100, 60)
    for column in range(26):
        used = np.unique(train.ids[:, column])
        assert used.max() < train.sizes[column]
        # Rows 0 and 1 stand for unknown and missing values; every other one occurs.
        assert {*range(2, train.sizes[column])} <= {*used.tolist()}
    assert (test.ids == 0).any()
    with (
        pytest.warns(UserWarning, match="malformed"),
        pytest.raises(WorkloadError, match="has 800 training rows, not the 5000"),
    ):
        _ = recipes.made("fm", options | {"samples": 5000}).logs


def test_movielens_is_trained_on_by_models_with_and_without_dense_features(tmp_path):
    draws = np.random.default_rng(0)
    rated = (
        f"{draws.integers(1, 30)}::{draws.integers(1, 50)}::{draws.integers(1, 6)}::9" for _ in range(400)
    )
    (tmp_path / "ratings.dat").write_text("\n".join(rated) + "\n")
    for name in ("dlrm", "deepfm"):
        workload = find(name, data=f"movielens:{tmp_path}", batch_size=64)
        workload.start(0)
        ((trained, found),) = go_on(workload, 1)
        assert math.isfinite(trained["loss"])
        assert 0 < found["auc"] < 1
        assert len(workload.model.emb_l) == 2


def test_the_dummy_model_is_judged_by_its_clean_self(tmp_path):
    make = lambda: find("dummy-dlrm", **DUMMY)  # noqa: E731
    assert resumes_exactly(make, tmp_path)
    workload = make()
    workload.load(tmp_path / "4.h5")
    clean = workload.evaluate()
    assert (clean["auc"], clean["deviation"], clean["max_deviation"], clean["changed"]) == (1, 0, 0, 0)
    other = make()
    other.start(4)
    other.save(tmp_path / "other.h5")
    first, second = (torch_h5.load(tmp_path / name)["model"] for name in ("4.h5", "other.h5"))
    assert not torch.equal(first["emb_l.0.weight"], second["emb_l.0.weight"])
    ckptflip.inject(
        tmp_path / "4.h5", out=tmp_path / "bad.h5", roles="model", bits="exponent", ber=1e-3, seed=1
    )
    workload.load(tmp_path / "bad.h5")
    faulty = workload.evaluate()
    assert faulty["auc"] < 1
    assert faulty["changed"] > 0
    assert faulty["max_deviation"] >= faulty["deviation"] > 0
    workload.train_epoch()
    assert workload.evaluate() == faulty


def test_an_auc_collapses_halfway_to_chance():
    header = Header(workload="w", start_epoch=1, until=1)
    track = lambda auc, loss=0.5: Track(header, (Row(epoch=1, loss=loss, extra={"auc": auc}),))  # noqa: E731
    assert [collapsed(track(auc), 0.8, "auc") for auc in (0.8, 0.66, 0.64, 0.5, 0.3)] == [
        *(False, False), *(True, True, True)
    ]  # fmt: skip
    assert collapsed(track(0.8, math.nan), 0.8, "auc")
    assert collapsed(track(math.nan), 0.8, "auc")
    by_accuracy = [Track(header, (Row(epoch=1, accuracy=value),)) for value in (0.41, 0.39)]
    assert [collapsed(one, 0.8) for one in by_accuracy] == [False, True]
    assert collapsed(track(0.8), 0.8)


def test_figures_count_runs_whose_auc_collapsed(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(convergence, "_save", lambda figure, out: figures.append(figure))
    made = lambda values, **more: Track(  # noqa: E731
        Header(workload="w", start_epoch=0, until=2, **more),
        tuple(Row(epoch=epoch, extra={"auc": value}) for epoch, value in enumerate(values)),
    )
    tracks = [made([0.5, 0.7, 0.8]), made([0.5, 0.6, 0.6], label="bad", flips=Flips(record="r"))]
    convergence.plot(tracks, tmp_path / "c.png", "auc")
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["clean", "bad (collapsed)"]
    assert figures[0].axes[-1].get_ylim() == (-0.02, 1.02)


def test_several_inputs_and_named_metrics_are_anyone_s():
    x = torch.linspace(-1, 1, 40).reshape(20, 2)
    workload = pytorch.TorchWorkload(
        "two",
        model=lambda: torch.nn.Bilinear(1, 1, 1),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        loss=lambda outputs, targets: (outputs[:, 0] - targets).square().mean(),
        data=(((x[:, :1], x[:, 1:]), x[:, 0]), ((x[:, :1], x[:, 1:]), x[:, 0])),
        batch_size=5,
        metric=lambda outputs, targets: {"worst": float((outputs[:, 0] - targets).abs().max())},
    )
    workload.start(0)
    ((trained, found),) = go_on(workload, 1)
    assert trained["loss"] > 0
    assert found.keys() == {"worst", "loss", "nan", "inf", "extreme"}
    short = pytorch.TorchWorkload(
        "two", model=lambda: None, optimizer=lambda p: None, loss=lambda o, t: None, batch_size=5,
        data=(((x, x[:3]), x), (x, x)),
    )  # fmt: skip
    with pytest.raises(WorkloadError, match="3 inputs and 20 targets"):
        short._data()


def test_no_framework_is_loaded_by_data_and_measures():
    code = (
        "import sys, ckptflip.recsys.recipes, ckptflip.recsys.measures, ckptflip.recsys.touched\n"
        "import ckptflip.recsys.workloads, ckptflip.recsys.files\n"
        "assert not {'torch', 'scipy', 'keras'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
