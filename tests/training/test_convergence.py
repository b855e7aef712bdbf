"""The convergence figure: what is drawn, looked up in the figure itself."""

import math
import re

import pytest

from ckptflip.errors import RecordError, UsageError
from ckptflip.report import convergence
from ckptflip.report.convergence import plot
from ckptflip.training.track import Flips, Header, Row, Track


def made(values, *, label=None, flips=True, start=0, checkpoint=None):
    flipped = Flips(record="r.jsonl") if flips else None
    header = Header(
        workload="w", start_epoch=start, until=9, label=label, flips=flipped, checkpoint=checkpoint
    )
    rows = (Row(epoch=start + i, accuracy=v, loss=v) for i, v in enumerate(values))
    return Track(header, tuple(rows))


CLEAN = made([0.5, 0.8, 0.9, 0.95], flips=False)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw, and hand back the figure itself."""
    figures = []
    save = convergence._save
    monkeypatch.setattr(convergence, "_save", lambda figure, out: (figures.append(figure), save(figure, out)))

    def draw(tracks, **options):
        plot(tracks, tmp_path / "c.png", **options)
        assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
        return figures[-1]

    return draw


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_suffixes(tmp_path):
    for suffix, begin in {".png": b"\x89PNG", ".svg": b"<?xml", ".PDF": b"%PDF"}.items():
        plot([CLEAN], tmp_path / "new" / f"c{suffix}")
        assert (tmp_path / "new" / f"c{suffix}").read_bytes().startswith(begin)
    for name in ("c.jpg", "c"):
        with pytest.raises(UsageError, match=r"\.png, \.svg, \.pdf"):
            plot([CLEAN], tmp_path / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        plot([CLEAN], tmp_path / "file" / "c.png")


def test_same_label_same_colour_and_a_median(drawn):
    tracks = [
        CLEAN,
        *(made([v, v], label="ten", start=2) for v in (0.7, 0.8, 0.9)),
        made([0.6], label="one", start=2),
    ]
    figure = drawn(tracks, title="T")
    assert legend(figure) == ["clean", "ten (3 runs)", "one", "single runs (bold: median)"]
    axes = figure.axes[-1]
    ten = [line for line in axes.lines if line.get_color() == convergence.COLOURS[0]]
    assert len(ten) == 4
    bold = max(ten, key=lambda line: line.get_linewidth())
    assert list(bold.get_ydata()) == [0.8, 0.8]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_color() == "0.45"] == [2]
    assert axes.get_xlabel() == "epoch"


def test_collapsed_runs_are_counted_and_get_a_second_panel(drawn):
    figure = drawn([CLEAN, made([0.1, 0.1], label="bad", start=2), made([0.95, 0.94], label="bad", start=2)])
    assert "bad (2 runs, 1 collapsed)" in legend(figure)
    near, whole = figure.axes
    assert near.get_ylim()[0] > 0.5
    assert whole.get_ylim()[0] < 0


def test_runs_that_hardly_differ_get_the_panel_that_shows_them(drawn):
    tracks = [
        Track(header, tuple(Row(epoch=2 + i, extra={"auc": value}) for i, value in enumerate(values)))
        for header, values in ((CLEAN.header, (0.764, 0.770)), (made([0.5], start=2).header, (0.760, 0.765)))
    ]
    near, whole = drawn(tracks, metric="auc").axes
    low, high = near.get_ylim()
    assert low < 0.760 and high > 0.770 and high - low < 0.05
    assert whole.get_ylim() == (-0.02, 1.02)
    (alone,) = drawn([CLEAN]).axes
    assert alone.get_ylim() == (-0.02, 1.02)


def test_values_that_are_not_finite_leave_a_cross_and_a_gap(drawn):
    figure = drawn([CLEAN, made([0.5, 1e30, math.nan, math.inf], label="bad")], metric="loss")
    assert "no longer finite" in legend(figure)
    (axes,) = figure.axes
    (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
    assert list(cross.get_xdata()) == [2]
    assert axes.get_yscale() == "log"
    curve = next(
        line for line in axes.lines if line.get_color() == convergence.COLOURS[0] and line.get_marker() != "x"
    )
    assert [math.isnan(value) for value in curve.get_ydata()] == [False, False, True, True]


def test_a_median_counts_what_is_not_finite_as_worst(drawn):
    runs = [made([value], label="x") for value in (1.0, 2.0, math.nan)]
    figure = drawn([CLEAN, *runs], metric="loss")
    medians = [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_linewidth() == 2.0]
    assert medians == [2.0]


def test_fifty_tracks_keep_a_short_legend(drawn):
    crowd = drawn([CLEAN, *(made([0.9, 0.9]) for _ in range(50))])
    assert legend(crowd)[:2] == ["clean", "altered (50 runs)"]
    labels = drawn([CLEAN, *(made([0.9, 0.9], label=str(i)) for i in range(50))])
    assert len(legend(labels)) == 14
    assert "39 further labels (39 runs)" in legend(labels)


def test_the_clean_run_can_be_named(drawn):
    other = made([0.9, 0.9], checkpoint="runs/bad.h5")
    figure = drawn([CLEAN, other], clean=other)
    assert legend(figure) == ["clean", "w"]
    assert [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_color() == "#000000"] == [0.9]


def test_no_pyplot_and_no_changed_settings(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot([CLEAN], tmp_path / "c.svg")
    assert dict(matplotlib.rcParams) == before
    pyplot = __import__("sys").modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_what_cannot_be_drawn_is_named(tmp_path):
    with pytest.raises(UsageError, match="'auc'; held are: accuracy, loss"):
        plot([CLEAN], tmp_path / "c.png", "auc")
    with pytest.raises(UsageError, match="held are: none"):
        plot([], tmp_path / "c.png")
    with pytest.raises(RecordError, match=re.escape(str(tmp_path / "t.jsonl"))):
        plot([tmp_path / "t.jsonl"], tmp_path / "c.png")
