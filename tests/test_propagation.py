"""Relative differences by layer against plain numpy, exact quantiles in bounded memory, and the figure."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import ckptflip
from ckptflip.cli import main
from ckptflip.errors import CheckpointError, SelectionError, UsageError
from ckptflip.propagation import BOX, propagation
from ckptflip.quantiles import Quantiles
from ckptflip.report.propagation import plot

FINITE = st.floats(-1e9, 1e9, width=32)
ANY = st.one_of(FINITE, st.sampled_from([0.0, -0.0, 1e-40, 1e20, np.inf, -np.inf, np.nan]))


def write(path, **tensors):
    with h5py.File(path, "w") as file:
        for name, data in tensors.items():
            file[name.replace("__", "/")] = data
    return path


def truth(a, b, threshold=1e10):
    """What `propagation` must say of one layer, the plain way."""
    x, y = (v.reshape(-1).astype(float) for v in (a, b))
    strange = ~np.isfinite(x) | ~np.isfinite(y)
    with np.errstate(invalid="ignore"):
        strange |= (np.abs(x) > threshold) | (np.abs(y) > threshold)
    rest = ~strange & ~((x == 0) & (y != 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(x[rest] == 0, 0, (y[rest] - x[rest]) / np.abs(x[rest]))
    words = [v.reshape(-1).view(f"u{v.dtype.itemsize}") for v in (a, b)]
    return {
        "elements": x.size,
        "changed": int((words[0] != words[1]).sum()),
        "from_zero": int((~strange & (x == 0) & (y != 0)).sum()),
        "nev": int(strange.sum()),
        "differences": found,
    }


def check(row, want):
    found = want.pop("differences")
    assert {name: getattr(row, name) for name in want} == want
    said = [row.minimum, row.lower, row.median, row.upper, row.maximum]
    if not found.size:
        assert np.isnan([*said, row.mean]).all() and row.changes == ()
        return
    np.testing.assert_allclose(said, np.quantile(found, BOX), rtol=1e-12)
    np.testing.assert_allclose(row.mean, found.mean(), rtol=1e-9, atol=1e-12 * np.abs(found).max())
    moved = np.abs(found[found != 0])
    assert len(row.changes) == (5 if moved.size else 0)
    if moved.size:
        np.testing.assert_allclose(row.changes, np.quantile(moved, BOX), rtol=1e-12)


@given(st.data())
def test_differences_are_those_of_numpy(tmp_path_factory, data):
    kind = data.draw(st.sampled_from(["f4", "f8", "f2"]))
    shape = data.draw(hnp.array_shapes(max_dims=2, max_side=8))
    with np.errstate(over="ignore"):
        a = data.draw(hnp.arrays("f4", shape, elements=ANY)).astype(kind)
        b = np.where(
            data.draw(hnp.arrays(bool, shape)),
            data.draw(hnp.arrays("f4", shape, elements=ANY)).astype(kind),
            a,
        )
    folder = tmp_path_factory.mktemp("p")
    clean, faulty = write(folder / "a.h5", fc__kernel=a), write(folder / "b.h5", fc__kernel=b)
    [row] = propagation(clean, faulty)
    check(row, truth(a, b))


@given(
    hnp.arrays("f8", st.integers(0, 60), elements=st.floats(allow_nan=False)),
    st.integers(0, 20),
    st.lists(st.floats(0, 1), min_size=1, max_size=4),
    st.integers(1, 7),
)
def test_quantiles_are_exact_however_little_is_kept(numbers, zeros, shares, step):
    def read():
        return iter([numbers[i : i + step] for i in range(0, numbers.size, step)])

    with np.errstate(all="ignore"):
        kept, read_again = Quantiles(read), Quantiles(read, most_kept=1)
        for found in (kept.with_zeros, read_again.with_zeros):
            want = np.concatenate([numbers, np.zeros(zeros)])
            compare(found(zeros, shares), want, shares)
        for found in (kept.magnitudes, read_again.magnitudes):
            compare(found(shares), np.abs(numbers), shares)


def compare(found, numbers, shares):
    """Between two ranks a quantile is interpolated; at a rank it is the number itself."""
    ordered = np.sort(numbers)
    if not ordered.size:
        assert np.isnan(found).all()
        return
    for value, share in zip(found, shares, strict=True):
        place = share * (ordered.size - 1)
        low, high = ordered[int(place)], ordered[min(int(place) + 1, ordered.size - 1)]
        assert low <= value <= high or np.isclose(value, low) or np.isinf(high - low)
        if place == int(place):
            assert value == low


def test_large_layers_are_read_in_blocks(tmp_path, monkeypatch):
    """More changes than are kept: the numbers are the same as with all of them in memory."""
    rng = np.random.default_rng(3)
    a = rng.normal(size=200_000).astype("f4")
    b = a * (1 + rng.normal(size=a.size) * 1e-3).astype("f4")
    clean, faulty = write(tmp_path / "a.h5", fc__kernel=a), write(tmp_path / "b.h5", fc__kernel=b)
    [whole] = propagation(clean, faulty)
    from ckptflip import propagation as module

    monkeypatch.setattr(module, "Quantiles", lambda read: Quantiles(read, most_kept=1000))
    assert propagation(clean, faulty) == [whole]
    check(whole, truth(a, b))


def test_layers_come_in_the_order_of_the_network(tmp_path):
    shapes = {"layer10__kernel": (2, 2), "layer2__kernel": (2, 2), "head__kernel": (2, 2)}
    tensors = {name: np.ones(shape, "f4") for name, shape in shapes.items()}
    clean = write(tmp_path / "a.h5", **tensors)
    assert [r.layer for r in propagation(clean, clean)] == ["head", "layer2", "layer10"]
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential()
    for name in ("stem", "body", "an_end"):
        net.add_module(name, torch.nn.Linear(2, 2))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    rows = propagation(tmp_path / "net.pt", tmp_path / "net.pt")
    assert [r.layer for r in rows] == ["stem", "body", "an_end"]
    assert [r.elements for r in rows] == [6, 6, 6]
    from ckptflip import torch_h5

    optimizer = torch.optim.Adam(net.named_parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch_h5.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "net.h5")
    rows = propagation(tmp_path / "net.h5", tmp_path / "net.h5")
    assert [r.layer for r in rows] == ["stem", "body", "an_end"]


def test_selections_limit_what_is_compared(tmp_path):
    ones = np.ones(4, "f4")
    clean = write(
        tmp_path / "a.h5",
        conv1__kernel=ones,
        conv1__bias=ones,
        fc__kernel=ones,
        optimizer__m=ones,
        step=np.int64(1),
    )
    assert {r.layer: r.elements for r in propagation(clean, clean)} == {"conv1": 8, "fc": 4}
    assert [r.elements for r in propagation(clean, clean, layers="conv1", roles="bias")] == [4]
    assert len(propagation(clean, clean, tensors="optimizer")) == 1
    with pytest.raises(SelectionError, match="floating-point"):
        propagation(clean, clean, tensors="step")
    with pytest.raises(SelectionError, match="matches nothing"):
        propagation(clean, clean, layers="conv2")
    with pytest.raises(UsageError, match="above 0"):
        propagation(clean, clean, threshold=0)


def test_checkpoints_of_two_networks_are_refused(tmp_path):
    one = write(tmp_path / "a.h5", fc__kernel=np.ones((2, 3), "f4"), fc__bias=np.ones(3, "f4"))
    other = write(tmp_path / "b.h5", fc__kernel=np.ones((3, 2), "f4"), fc__bias=np.ones(3, "f4"))
    with pytest.raises(CheckpointError, match=r"fc/kernel is float32 \(2, 3\).*float32 \(3, 2\)"):
        propagation(one, other)
    less = write(tmp_path / "c.h5", fc__kernel=np.ones((2, 3), "f4"))
    with pytest.raises(CheckpointError, match="has no tensor 'fc/bias'"):
        propagation(one, less)


@pytest.fixture
def pair(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    a = rng.normal(size=(20, 10)).astype("f4")
    b = a.copy()
    b[0] *= 1.25
    b[1, 0], b[2, 0] = np.nan, 1e30
    a[3, 0], b[3, 0] = 0, 1
    write("a.h5", conv1__kernel=a, conv2__kernel=a, fc__kernel=np.zeros(3, "f4"))
    write("b.h5", conv1__kernel=b, conv2__kernel=a, fc__kernel=np.zeros(3, "f4"))
    return tmp_path


def test_the_command_lists_layers_and_ends_well(pair, capsys):
    assert main.run(["propagation", "a.h5", "b.h5", "--format", "json"]) == 0
    said = capsys.readouterr()
    rows = {row["layer"]: row for row in json.loads(said.out)}
    first = rows["conv1"]
    assert (first["elements"], first["changed"], first["nev"], first["from_zero"]) == (200, 13, 2, 1)
    assert first["maximum"] == pytest.approx(0.25, rel=1e-6) and first["median"] == 0
    assert rows["conv2"]["share"] == 0
    assert "13 of 403 elements differ, in 1 of 3 layers" in said.err
    for form in ("table", "csv", "ndjson"):
        assert main.run(["propagation", "a.h5", "b.h5", "--layers", "conv1", "--format", form]) == 0
        assert "conv1" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_figure_is_written_and_the_same_each_time(pair, suffix, capsys):
    for name in ("one", "two"):
        assert main.run(["propagation", "a.h5", "b.h5", "-o", f"{name}{suffix}", "--title", "t"]) == 0
    one, two = ((pair / f"{n}{suffix}").read_bytes() for n in ("one", "two"))
    assert len(one) > 2000
    assert one == two
    capsys.readouterr()


def test_the_figure_shows_each_layer_and_what_no_box_shows(pair):
    from ckptflip.report.propagation import _figure

    figure = _figure(propagation("a.h5", "b.h5"), "flips")
    [axes] = figure.axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["conv1", "conv2", "fc"]
    assert axes.get_xscale() == "log" and axes.get_ylabel() == "layer" and "|A1|" in axes.get_xlabel()
    texts = [t.get_text() for t in axes.texts]
    assert texts == ["unchanged", "93.50 %", "100 %", "100 %", "from 0", "1", "–", "–", "N-EV", "2", "–", "–"]
    # One box alone: nothing changed in the other layers.
    assert len(axes.patches) == 1
    first = axes.get_ylim()
    assert first[0] > first[1], "the first layer is on top"


def test_figures_that_cannot_be_drawn_are_refused(pair, capsys):
    assert main.run(["propagation", "a.h5", "b.h5", "-o", "x.jpg"]) == 2
    assert "a figure's name ends in .png, .svg, .pdf" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no layers"):
        plot([], "x.png")
    with pytest.raises(UsageError, match="ends in"):
        plot(propagation("a.h5", "a.h5"), "x.gif")
    plot(propagation("a.h5", "a.h5"), pair / "deeper" / "x.png")
    assert (pair / "deeper" / "x.png").stat().st_size > 1000


def test_a_flip_spreads_from_its_layer(tmp_path):
    """E7 on numbers that stand for training: the faulty layer differs most."""
    rng = np.random.default_rng(0)
    layers = {f"conv{i}__kernel": rng.normal(size=(50, 4)).astype("f4") for i in (1, 2, 3)}
    clean = write(tmp_path / "a.h5", **layers)
    ckptflip.inject(
        clean, out=tmp_path / "bad.h5", layers="conv2", bits="exponent,!critical", count=40, seed=1
    )
    rows = {r.layer: r for r in propagation(clean, tmp_path / "bad.h5")}
    assert [r.changed > 0 for r in rows.values()] == [False, True, False]
    assert rows["conv2"].changes[2] >= 0.5
