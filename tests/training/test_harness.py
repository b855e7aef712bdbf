"""Running workloads: what is saved where, what is refused, how workloads are found."""

import json
import re

import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

from ckptflip.cli import plot as cli_plot
from ckptflip.cli import resume as cli_resume
from ckptflip.cli import train as cli_train
from ckptflip.errors import CheckpointError, UsageError, WorkloadError
from ckptflip.training import Workload, find, harness, track
from ckptflip.training.track import Flips
from ckptflip.training.workload import BUILT_IN


class Counting:
    """A workload that only counts; its file holds its epoch."""

    name = "counting"

    def __init__(self):
        self.epoch = 0

    def start(self, seed):
        self.epoch = 0

    def train_epoch(self):
        self.epoch += 1
        return {"loss": 1 / self.epoch, "grad_norm": 2.0, "steps": 7}

    def evaluate(self):
        return {"accuracy": self.epoch / 10, "loss": 0.5, "nan": 0.0, "auc": 0.75}

    def save(self, path):
        path.write_text(str(self.epoch))

    def load(self, path):
        self.epoch = int(path.read_text())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def run(tmp_path):
    harness.train(Counting(), 3, tmp_path / "run")
    return tmp_path / "run"


def test_train_keeps_every_epoch_and_a_track(tmp_path):
    seen = []
    made = harness.train(Counting(), 2, tmp_path / "a" / "b", seed=4, label="x", progress=seen.append)
    assert names(tmp_path / "a" / "b") == ["epoch_000.h5", "epoch_001.h5", "epoch_002.h5", "track.jsonl"]
    assert (tmp_path / "a" / "b" / "epoch_001.h5").read_text() == "1"
    assert made == track.read(tmp_path / "a" / "b")
    assert seen == list(made.rows)
    header = made.header
    assert (header.workload, header.seed, header.label, header.start_epoch, header.until) == (
        "counting",
        4,
        "x",
        0,
        2,
    )
    assert made.clean
    first, second, _ = made.rows
    assert (first.epoch, first.train_loss, first.accuracy) == (0, None, 0.0)
    assert (second.epoch, second.train_loss, second.grad_norm, second.loss, second.nan) == (
        1,
        1.0,
        2.0,
        0.5,
        0,
    )
    assert (second.value("auc"), second.value("train_steps"), second.value("nothing")) == (0.75, 7.0, None)


def test_a_run_is_not_overwritten_unasked(run):
    (run / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="overwrite"):
        harness.train(Counting(), 1, run)
    assert (run / "epoch_003.h5").exists()
    (run / "epoch_001.h5.flips.jsonl").write_text("{}")  # of the file that is replaced
    harness.train(Counting(), 1, run, overwrite=True)
    assert names(run) == ["epoch_000.h5", "epoch_001.h5", "notes.txt", "track.jsonl"]


def test_resume_measures_the_checkpoint_before_it_trains(run):
    made = harness.resume(Counting(), run / "epoch_001.h5", 3)
    assert made == track.read(run / "epoch_001.track.jsonl")
    assert [row.epoch for row in made.rows] == [1, 2, 3]
    assert (made.rows[0].accuracy, made.rows[0].train_loss) == (0.1, None)
    assert (made.header.start_epoch, made.header.checkpoint) == (1, str(run / "epoch_001.h5"))
    assert made.clean
    assert "epoch_004.h5" not in names(run)
    with pytest.raises(UsageError, match="overwrite"):
        harness.resume(Counting(), run / "epoch_001.h5", 3)
    harness.resume(Counting(), run / "epoch_001.h5", 2, overwrite=True)


def test_resume_saves_where_it_is_told(run, tmp_path):
    harness.resume(Counting(), run / "epoch_002.h5", 4, save=tmp_path / "on")
    assert names(tmp_path / "on") == ["epoch_002.h5", "epoch_003.h5", "epoch_004.h5", "track.jsonl"]
    harness.resume(Counting(), run / "epoch_002.h5", 4, save=tmp_path / "two", track=tmp_path / "t.jsonl")
    assert "track.jsonl" not in names(tmp_path / "two")
    assert len(track.read(tmp_path / "t.jsonl").rows) == 3
    with pytest.raises(UsageError, match="holds the checkpoint itself"):
        harness.resume(Counting(), run / "epoch_002.h5", 4, save=run, overwrite=True)
    assert (run / "epoch_002.h5").exists()


@pytest.mark.parametrize(
    "content", ['{"counts": {"hit": 3}}\n{"tensor": "w"}\n', "", "nonsense\n", "[1]\n", '{"other": 3}\n']
)
def test_an_odd_record_beside_a_checkpoint_is_named(run, content):
    (run / "epoch_001.h5.flips.jsonl").write_text(content)
    made = harness.resume(Counting(), run / "epoch_001.h5", 2)
    assert made.header.flips == Flips(record="epoch_001.h5.flips.jsonl")


@pytest.mark.parametrize("until", [0, 1])
def test_until_must_not_lie_before_the_checkpoint(run, until):
    with pytest.raises(UsageError, match=rf"at epoch 2: .*2 or more, not {until}"):
        harness.resume(Counting(), run / "epoch_002.h5", until)
    assert "epoch_002.track.jsonl" not in names(run)


def test_a_checkpoint_can_be_measured_without_training(run):
    whole = track.read(run)
    made = harness.resume(Counting(), run / "epoch_002.h5", 2)
    assert [(row.epoch, row.accuracy, row.train_loss) for row in made.rows] == [
        (2, whole.rows[2].accuracy, None)
    ]
    assert track.read(run / "epoch_002.track.jsonl") == made


def test_numbers_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(UsageError, match="epochs"):
        harness.train(Counting(), 0, tmp_path)
    with pytest.raises(UsageError, match="seed"):
        harness.train(Counting(), 1, tmp_path, seed=-1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        harness.train(Counting(), 1, tmp_path / "file")
    assert names(tmp_path) == ["file"]


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.h5 does not exist"):
        harness.resume("digits-mlp", tmp_path / "none.h5", 3)
    assert names(tmp_path) == []


def test_workloads_are_found_by_name_and_by_path(tmp_path, monkeypatch):
    assert isinstance(find("digits-cnn"), Workload)
    (tmp_path / "mine_found_here.py").write_text(
        "import ckptflip.training as t\n"
        "def make(): return t.find('digits-mlp')\n"
        "made = make()\n"
        "number = 3\n"
        "def wrong(): return 3\n"
        "def broken(): return 1 / 0\n"
    )
    (tmp_path / "mine_fails.py").write_text("import not_there_at_all\n")
    monkeypatch.chdir(tmp_path)
    assert find("mine_found_here:make").name == "digits-mlp"
    assert find("mine_found_here:made").name == "digits-mlp"
    for name, said in {
        "digits-cn": "Did you mean 'digits-cnn'",
        "nothing-like-it": "Built in: afm, alexnet, .*digits-cnn, .*digits-mlp",
        "no_such_module:make": "there is no such module",
        "mine_fails:make": "ModuleNotFoundError: No module named 'not_there_at_all'",
        "mine_found_here:mak": "did you mean 'make'",
        "mine_found_here:number": "is a int, neither",
        "mine_found_here:wrong": "lacks name",
        "mine_found_here:broken": "ZeroDivisionError",
    }.items():
        with pytest.raises(WorkloadError, match=said):
            find(name)


def test_the_help_of_train_names_every_workload_that_is_built_in():
    shown = CliRunner().invoke(cli_train.command, ["--help"]).stdout.replace("\n", " ")
    names = {name.removesuffix("-keras") for name in BUILT_IN}
    assert [name for name in sorted(names) if not re.search(rf"[ (]{name}[ ,)]", shown)] == []


def test_the_commands_train_resume_and_plot(tmp_path):
    invoke = CliRunner().invoke
    run = tmp_path / "run"
    trained = invoke(cli_train.command, ["digits-mlp", "--epochs", "2", "--save", str(run)])
    assert trained.exit_code == 0, trained.output
    assert trained.stdout == f"{run / 'track.jsonl'}\n"
    assert "epoch   2" in trained.stderr
    resumed = invoke(
        cli_resume.command, ["digits-mlp", str(run / "epoch_001.h5"), "--until", "2", "--label", "again"]
    )
    assert resumed.exit_code == 0, resumed.output
    again = run / "epoch_001.track.jsonl"
    assert resumed.stdout == f"{again}\n"
    assert json.loads(again.read_text().splitlines()[0])["label"] == "again"
    assert track.read(again).rows[-1].accuracy == track.read(run).rows[-1].accuracy
    figure = tmp_path / "c.svg"
    drawn = invoke(
        cli_plot.command, [str(run), str(again), "-o", str(figure), "--metric", "loss", "--clean", str(run)]
    )
    assert drawn.exit_code == 0, drawn.output
    assert drawn.stdout == f"{figure}\n"
    assert figure.read_text().startswith("<?xml")
