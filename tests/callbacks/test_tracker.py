"""A live run beside its baseline: differences, collapse, and a track that `ckptflip plot` draws."""

import math

import pytest

from ckptflip.callbacks.tracker import ConvergenceTracker, row_of
from ckptflip.errors import RecordError, UsageError
from ckptflip.report.convergence import plot
from ckptflip.training import track
from ckptflip.training.track import Header, Row, Track

CLEAN = Track(
    Header(workload="w", seed=1, start_epoch=0, until=3),
    tuple(Row(epoch=e, train_loss=1 / e, loss=1.2 / e, accuracy=0.3 * e) for e in (1, 2, 3)),
)


def test_epochs_are_compared_with_those_of_the_baseline():
    with ConvergenceTracker(CLEAN) as tracker:
        first = tracker.epoch(Row(epoch=1, accuracy=0.25))
        second = tracker.epoch(Row(epoch=2, accuracy=0.2))
    assert (first.baseline, first.difference, first.collapsed) == (0.3, pytest.approx(-0.05), False)
    assert second.collapsed and tracker.collapsed
    assert str(second) == "epoch 2: accuracy 0.2, baseline 0.6 (-0.4), collapsed"


def test_a_loss_that_is_not_finite_is_a_collapse_without_any_accuracy():
    bare = Track(CLEAN.header, tuple(Row(epoch=e, loss=1 / e) for e in (1, 2)))
    with ConvergenceTracker(bare) as tracker:
        assert not tracker.epoch(Row(epoch=1, loss=9.0)).collapsed
        found = tracker.epoch(Row(epoch=2, loss=math.nan))
    assert found.metric == "loss" and found.collapsed and math.isnan(found.difference)


def test_epochs_that_the_baseline_does_not_have_are_recorded_without_a_difference():
    with ConvergenceTracker(CLEAN) as tracker:
        found = tracker.epoch(Row(epoch=9, accuracy=0.1))
    assert (found.baseline, found.difference, found.collapsed) == (None, None, False)
    assert tracker.track.rows == (Row(epoch=9, accuracy=0.1),)


def test_the_live_track_is_on_disk_as_it_grows_and_is_drawn_beside_the_baseline(tmp_path):
    out = tmp_path / "live" / "track.jsonl"
    with ConvergenceTracker(CLEAN, out, label="flipped", altered="run.flips.jsonl") as tracker:
        tracker.logged(1, {"loss": 0.9, "val_loss": 1.0, "val_accuracy": 0.28, "lr": 0.1})
        found = track.read(out)
        assert found.rows == tracker.track.rows
        assert (found.rows[0].train_loss, found.rows[0].loss, found.rows[0].accuracy) == (0.9, 1.0, 0.28)
        assert found.rows[0].extra == {"lr": 0.1}
        tracker.logged(2, {"loss": math.inf, "val_accuracy": 0.1})
    assert not track.read(out.parent).clean
    assert track.read(out).header.until == 3
    plot([CLEAN, out], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_resumed_run_keeps_the_rows_before_it_and_only_those(tmp_path):
    out = tmp_path / "t.jsonl"
    with ConvergenceTracker(CLEAN, out) as tracker:
        for epoch in (1, 2, 3):
            tracker.epoch(Row(epoch=epoch, accuracy=0.1 * epoch))
    resumed = ConvergenceTracker(CLEAN, out)
    resumed.begin(start=2)
    resumed.epoch(Row(epoch=3, accuracy=0.8))
    resumed.end()
    assert [(r.epoch, r.accuracy) for r in track.read(out).rows] == [(1, 0.1), (2, 0.2), (3, 0.8)]
    assert [c.epoch for c in resumed.comparisons] == [1, 2, 3]


def test_another_runs_track_is_not_replaced_unasked(tmp_path):
    out = tmp_path / "t.jsonl"
    out.write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        ConvergenceTracker(CLEAN, out).begin()
    with pytest.raises(RecordError):
        ConvergenceTracker(CLEAN, out).begin(start=1)
    assert out.read_text() == "precious"
    with ConvergenceTracker(CLEAN, out, overwrite=True):
        pass
    assert track.read(out).rows == ()


def test_names_of_frameworks_and_users_are_understood():
    row = row_of(4, {"eval_loss": 2.0, "top1": 0.5, "eval_runtime": "x", "ok": True}, {"accuracy": "top1"})
    assert (row.epoch, row.loss, row.accuracy, row.extra) == (4, 2.0, 0.5, {})


def test_every_comparison_is_reported():
    told = []
    with ConvergenceTracker(CLEAN, metric="train_loss", report=told.append) as tracker:
        tracker.epoch(Row(epoch=2, train_loss=0.75))
    assert [(c.metric, c.difference) for c in told] == [("train_loss", 0.25)]


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match="no 'auc'; it holds accuracy, loss, train_loss"):
        ConvergenceTracker(CLEAN, tmp_path / "t", metric="auc")
    with pytest.raises(UsageError, match="nothing measured"):
        ConvergenceTracker(Track(CLEAN.header, ()), tmp_path / "t")
    with pytest.raises(RecordError, match="no track"):
        ConvergenceTracker(tmp_path / "none.jsonl", tmp_path / "t")
    with pytest.raises(UsageError, match="is a folder"):
        ConvergenceTracker(CLEAN, tmp_path)
    assert list(tmp_path.iterdir()) == []
