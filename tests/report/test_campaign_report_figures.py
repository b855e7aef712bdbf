"""The figures of a report, looked up in the figures themselves."""

from __future__ import annotations

import math

import campaign_stores as stores
import msgspec
import numpy as np
import pytest
from campaign_stores import ATTEMPT, CLEAN
from matplotlib import rcParams
from matplotlib.patches import Rectangle

from ckptflip.campaign.store.writing import writing
from ckptflip.report.campaign import bands, curves, hits, measured, recovery, shares, spread, write
from ckptflip.report.campaign.drawing import drawing
from ckptflip.report.campaign.gathering import axes, gather
from ckptflip.report.campaign.rates import cell_rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "runs.db"
    stores.tiny(path)
    return gather(path)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """60 cells in six groups."""
    path = tmp_path_factory.mktemp("store") / "runs.db"
    stores.drawn(
        path,
        workloads=("PyTorch", "Keras"),
        epochs=(2, 5, 8),
        counts_swept=range(1, 11),
        trials=3,
        spread=(),
        until=10,
        label="{} flips in a condition whose name is much longer than what any figure has room for",
    )
    return gather(path)


class TestBands:
    def test_collapsed_rank_last_and_identical_follow_the_clean_run(self, tiny):
        cell = next(cell for cell in tiny.cells if cell.label == "1 flip")
        found = curves.band(tiny, cell)
        clean = np.array([CLEAN[epoch] for epoch in range(5, 16)])
        assert found.epochs.tolist() == list(range(5, 16))
        assert np.allclose(found.values[0], clean)  # stored for three epochs, then the clean run's
        assert np.allclose(found.values[1], clean - 0.002)
        assert found.values[3, 0] == 0.1 and np.isneginf(found.values[3, 1:]).all()
        assert found.collapsed == 1
        # Of four values the median is the second lowest: the degraded one's.
        assert np.allclose(found.quantiles[2], clean - 0.05)
        assert np.isneginf(found.quantiles[1][1:]).all()
        assert np.allclose(found.quantiles[4], clean)

    def test_where_less_is_better_collapsed_ones_rank_highest(self, tmp_path):
        with writing(tmp_path / "runs.db") as writer:
            stores.begin(writer, stores.spec(metric={"name": "loss", "better": "lower"}))
            writer.put_cells([stores.cell("a", 0, "1 flip", until=6)])
            stores.clean_runs(writer)
            for number, loss in enumerate([(0.1, 0.2), (0.3, 0.4), (0.5, math.nan)]):
                outcome = "collapsed" if number == 2 else "masked"
                one = stores.trial(number, outcome, loss, ended="horizon")
                values = ((5, 6), {"loss": loss})
                writer.put_trial(msgspec.structs.replace(one, values=values), ATTEMPT)
        gathered = gather(tmp_path / "runs.db")
        found = curves.band(gathered, gathered.cells[0])
        assert found.values[:, 0].tolist() == [0.1, 0.3, 0.5]
        assert found.values[2, 1] == np.inf
        assert found.quantiles[2].tolist() == [0.3, 0.4]
        assert found.quantiles[0].tolist() == [0.5, np.inf]
        assert found.quantiles[4].tolist() == [0.1, 0.2]

    def test_a_wide_range_gets_a_picture_of_the_clean_runs_surroundings(self, tiny):
        with drawing():
            (drawn,) = bands.figures(tiny)
        near, whole = drawn.figure.axes
        assert near.get_ylim()[0] > 0.8 and whole.get_ylim()[0] < 0.1
        labels = [text.get_text() for text in drawn.figure.legends[0].get_texts()]
        assert labels == ["clean (3 runs)", "1 flip (4 runs, 1 collapsed)", "10 flips (1 run)"]
        assert whole.get_xlabel() == "epoch" and whole.get_ylabel() == "accuracy on the test set"

    def test_losses_that_are_far_apart_are_drawn_on_a_logarithmic_scale(self, tmp_path):
        with writing(tmp_path / "runs.db") as writer:
            stores.begin(writer, stores.spec(metric={"name": "loss", "better": "lower"}))
            writer.put_cells([stores.cell("a", 0, "1 flip", until=6)])
            stores.clean_runs(writer)
            for number, loss in enumerate([(0.1, 0.2), (1e12, 1e30)]):
                one = stores.trial(number, "masked", loss)
                values = ((5, 6), {"loss": loss})
                writer.put_trial(msgspec.structs.replace(one, values=values), ATTEMPT)
        with drawing():
            (drawn,) = bands.figures(gather(tmp_path / "runs.db"))
            drawn.figure.draw_without_rendering()
            labels = [label.get_text() for label in drawn.figure.axes[0].get_yticklabels()]
        assert drawn.figure.axes[0].get_yscale() == "log"
        assert all(label == "1" or label.startswith("10") for label in labels)
        assert "$" not in "".join(labels)

    def test_many_conditions_have_a_panel_each(self, many):
        with drawing():
            drawn = list(bands.figures(many))
        assert {one.title for one in drawn} == {
            f"{w}, restarted from epoch {e}" for w in ("PyTorch", "Keras") for e in (2, 5, 8)
        }
        assert all(len([a for a in one.figure.axes if a.get_visible()]) == 10 for one in drawn)


class TestShares:
    def test_bars_hold_the_shares(self, tiny):
        bars = shares.by_cell(tiny)
        assert [bar.name for bar in bars] == ["1 flip", "10 flips"]
        assert bars[0].counts.tolist() == [1, 1, 0, 1, 1]
        assert bars[0].shares.tolist() == [0.25, 0.25, 0, 0.25, 0.25]
        assert (bars[1].counts.tolist(), bars[1].failed) == ([0, 0, 1, 0, 0], 1)

    def test_what_differs_is_an_axis_and_numbers_are_in_order(self, many):
        found = axes(many.cells)
        assert [axis.field for axis in found] == ["workload", "epoch", "count"]
        assert found[2].order == [str(count) for count in range(1, 11)]

    def test_what_does_not_differ_is_no_axis(self, tiny):
        with drawing():
            stems = [drawn.stem for drawn in shares.figures(tiny, hits.hits(tiny))]
        assert stems == ["outcomes-count", "outcomes-hit-field", "outcomes-hit-layer"]

    @pytest.mark.parametrize("labels", [("signs", "conv1"), ("", "")])
    def test_fields_that_divide_the_cells_alike_are_one_figure(self, tmp_path, labels):
        policies = [{"bits": "sign", "count": 2}, {"bits": "mantissa", "layers": ["conv1"]}]
        places = [(at, epoch) for epoch in (5, 6) for at in (0, 1)]
        with writing(tmp_path / "runs.db") as writer:
            stores.begin(writer, stores.spec())
            stores.clean_runs(writer)
            writer.put_cells(
                [
                    stores.cell(f"{at}-{epoch}", place, labels[at], policy=policies[at], epoch=epoch)
                    for place, (at, epoch) in enumerate(places)
                ]
            )
            for at, epoch in places:
                lasting = [0.9] * (16 - epoch)
                one = stores.trial(0, "masked", lasting, key=f"{at}-{epoch}", start=epoch, recovered=0)
                writer.put_trial(one, ATTEMPT)
        gathered = gather(tmp_path / "runs.db")
        with drawing():
            found = {drawn.title: drawn for drawn in shares.figures(gathered, hits.hits(gathered))}
        name = "policy" if all(labels) else "bits, flips and layers"
        assert list(found) == [
            "Outcomes of each cell", "Outcomes by epoch of the altered checkpoint", f"Outcomes by {name}",
        ]  # fmt: skip
        bars = found[f"Outcomes by {name}"].figure.axes[0].get_yticklabels()
        assert [bar.get_text() for bar in bars] == (
            list(labels) if all(labels)
            else ["bits sign, flips 2, layers not set", "bits mantissa, flips 1, layers conv1"]
        )  # fmt: skip

    def test_pooled_cells_count_by_their_trials(self, many):
        cells = shares.by_cell(many)
        axis = axes(many.cells)[0]
        pooled = shares.by_axis(many, axis.values, axis.order)
        assert sum(int(bar.counts.sum()) for bar in pooled) == sum(int(bar.counts.sum()) for bar in cells)
        assert all(np.allclose(bar.shares, bar.counts / bar.counts.sum()) for bar in pooled)

    def test_sixty_cells_are_drawn_group_by_group(self, many):
        with drawing():
            drawn = [d for d in shares.figures(many, hits.hits(many)) if d.stem.startswith("outcomes-cells")]
        assert len(drawn) == 6
        longest = max(len(t.get_text()) for t in drawn[0].figure.axes[0].get_yticklabels())
        assert longest <= 40


def test_a_median_that_is_lost_after_its_first_point_is_a_dot(tmp_path):
    with writing(tmp_path / "runs.db") as writer:
        stores.begin(writer, stores.spec())
        writer.put_cells([stores.cell("a", 0, "critical")])
        stores.clean_runs(writer)
        for number in range(6):
            writer.put_trial(stores.trial(number, "collapsed", [0.1, math.nan], ended="collapsed"), ATTEMPT)
    with drawing():
        (drawn,) = bands.figures(gather(tmp_path / "runs.db"))
    for panel in drawn.figure.axes:
        (dot,) = [line for line in panel.lines if line.get_marker() == "o"]
        shown = np.isfinite(dot.get_ydata().astype(float))
        assert dot.get_xdata()[shown].tolist() == [5] and dot.get_ydata()[shown].tolist() == [0.1]


class TestHeatMap:
    def test_single_flips_are_counted_by_bit_and_layer(self, tiny):
        found = hits.hits(tiny)
        pairs = {(int(b), found.layers[layer]) for b, layer in zip(found.bit, found.layer, strict=True)}
        assert pairs == {(3, "conv1"), (22, "conv1"), (29, "fc1"), (30, "conv1")}
        with drawing():
            (drawn,) = hits.figures(tiny, found)
        panel = drawn.figure.axes[0]
        said = {(round(t.get_position()[0]), round(t.get_position()[1])): t.get_text() for t in panel.texts}
        rows = [label.get_text() for label in panel.get_yticklabels()]
        assert [rows[row] for _, row in said] == ["critical  30", "exponent  29", "mantissa  22", "3"]
        assert list(said.values()) == ["1/1", "1/1", "0/1", "0/1"]

    def test_trials_with_more_flips_are_left_out(self, tmp_path):
        stores.drawn(tmp_path / "runs.db", counts_swept=(10,), trials=5, spread=())
        gathered = gather(tmp_path / "runs.db")
        found = hits.hits(gathered)
        assert len(found.trial) == 0
        with drawing():
            assert list(hits.figures(gathered, found)) == []

    def test_many_layers_go_on_in_further_figures_in_order(self, tmp_path):
        layers = [f"block.{n}.a_layer_with_a_long_name" for n in range(25)]
        stores.drawn(tmp_path / "runs.db", counts_swept=(1,), trials=300, spread=(), layers=layers, until=6)
        gathered = gather(tmp_path / "runs.db")
        found = hits.hits(gathered)
        assert found.layers == layers
        with drawing():
            drawn = list(hits.figures(gathered, found))
        assert [one.stem for one in drawn] == ["heatmap-1", "heatmap-2", "heatmap-3"]
        cells = sum(isinstance(p, Rectangle) for one in drawn for p in one.figure.axes[0].patches)
        assert cells == len(set(zip(found.bit.tolist(), found.layer.tolist(), strict=True)))


def test_recovery_starts_with_those_that_never_left(tiny):
    with drawing():
        (drawn,) = recovery.figures(tiny, cell_rows(tiny))
    one, ten = (line for line in drawn.figure.axes[0].lines if len(line.get_xdata()) > 1)
    # One flip: two of four were never outside, two never came back. Ten flips: back after three epochs.
    assert (one.get_xdata().tolist(), one.get_ydata().tolist()) == ([0, 0, 10], [1, 0.5, 0.5])
    assert (ten.get_xdata().tolist(), ten.get_ydata().tolist()) == ([0, 3, 10], [1, 0, 0])


class TestMeasured:
    """Trials that are not trained on: a curve of one epoch says nothing."""

    @pytest.fixture
    def gathered(self, tmp_path):
        path = tmp_path / "runs.db"
        with writing(path) as writer:
            stores.begin(writer, stores.spec())
            cells = [
                stores.cell("a", 0, "1 flip", until=5, wanted=3),
                stores.cell("b", 1, "10 flips", until=5),
            ]
            writer.put_cells(cells)
            stores.clean_runs(writer)
            for number, (outcome, value) in enumerate([("masked", 0.9), ("degraded", 0.5), ("masked", 0.8)]):
                writer.put_trial(stores.trial(number, outcome, [value], recovered=0), ATTEMPT)
            writer.put_trial(stores.trial(0, "collapsed", [math.nan], key="b", ended="collapsed"), ATTEMPT)
            writer.put_trial(stores.trial(1, "collapsed", [0.3], key="b", ended="collapsed"), ATTEMPT)
            writer.put_trial(stores.trial(2, "masked", [0.9], key="b", recovered=0), ATTEMPT)
        return gather(path)

    def test_neither_convergence_nor_recovery(self, gathered):
        with drawing():
            assert list(bands.figures(gathered)) == []
            assert list(recovery.figures(gathered, cell_rows(gathered))) == []

    def test_every_trial_is_a_mark_and_the_median_one_of_them(self, gathered):
        with drawing():
            (drawn,) = measured.figures(gathered)
        panel = drawn.figure.axes[0]
        assert [label.get_text() for label in panel.get_yticklabels()] == [
            "1 flip (n = 3)",
            "10 flips (n = 3)",
        ]
        marks = [line for line in panel.lines if line.get_marker() == "o"]
        assert [line.get_xdata().tolist() for line in marks] == [[0.9, 0.5, 0.8], [0.9]]
        # A cross is a collapsed trial: where it was measured, and at the edge where it could not be.
        crosses = [line.get_xdata().tolist() for line in panel.lines if line.get_marker() == "x"]
        assert crosses == [[], [panel.get_xlim()[0], 0.3]]
        medians = [list(line.get_xdata()) for line in panel.lines if line.get_linewidth() == 2]
        assert medians == [[0.8, 0.8], [0.3, 0.3]]
        clean = [line.get_xdata()[0] for line in panel.lines if line.get_linewidth() == 1.2]
        assert clean == pytest.approx([stores.CLEAN[5] + 0.002 * (seed - 1) for seed in range(3)])

    def test_where_trials_are_trained_on_there_is_none(self, tiny):
        assert list(measured.figures(tiny)) == []


def test_propagation_boxes_are_medians_over_trials(tmp_path):
    with writing(tmp_path / "runs.db") as writer:
        stores.begin(writer, stores.spec())
        writer.put_cells([stores.cell("a", 0, "1 flip")])
        stores.clean_runs(writer)
        boxes = [(1e-6, 1e-5, 1e-4, 1e-3, 1e-2), (1e-4, 1e-3, 1e-2, 1e-1, 1.0), ()]
        for number, changes in enumerate(boxes):
            row = {
                "layer": "conv1", "elements": 9, "changed": len(changes), "from_zero": 0,
                "nev": int(number == 1), "changes": changes,
                **dict.fromkeys(("minimum", "lower", "median", "upper", "maximum", "mean"), 0.0),
            }  # fmt: skip
            measured = (stores.Spread(epoch=6, layers=(row,)),)
            writer.put_trial(
                stores.trial(number, "masked", [0.9] * 11, recovered=0, spread=measured), ATTEMPT
            )
    with drawing():
        (drawn,) = spread.figures(gather(tmp_path / "runs.db"))
    panel = drawn.figure.axes[0]
    said = [text.get_text() for text in panel.texts]
    assert said[-2:] == ["changed", "N-EV"] and said[:2] == ["2/3", "1/3"]
    median = next(line for line in panel.lines if line.get_linewidth() == 2)
    assert median.get_xdata()[0] == pytest.approx((1e-4 + 1e-2) / 2)
    assert [text.get_text() for text in drawn.figure.legends[0].get_texts()] == ["1 epoch after the restart"]


def test_files_are_the_same_each_time_whatever_the_users_settings(tmp_path):
    stores.tiny(tmp_path / "runs.db")
    write(tmp_path / "runs.db", tmp_path / "one")
    before = dict(rcParams)
    rcParams.update({"text.usetex": True, "font.size": 30})
    try:
        write(tmp_path / "runs.db", tmp_path / "two")
    finally:
        rcParams.update({name: before[name] for name in ("text.usetex", "font.size")})
    assert dict(rcParams) == before
    names = sorted(path.name for path in (tmp_path / "one" / "figures").iterdir())
    assert {name.rsplit(".", 1)[1] for name in names} == {"svg", "png", "pdf"}
    for name in [*(f"figures/{name}" for name in names), "index.html"]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
