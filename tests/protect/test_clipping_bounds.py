"""Bounds: rules, percentiles of streams, files, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ckptflip.errors import CheckpointError, UsageError
from ckptflip.protect.clipping import Bound, Bounds, load
from ckptflip.protect.clipping.rules import parse
from ckptflip.protect.clipping.spread import Spread

FLOATS = arrays(
    np.float32, st.integers(1, 200), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
)


@given(st.lists(FLOATS, min_size=1, max_size=4), st.sampled_from([0.5, 0.9, 0.99, 0.9999, 1.0]))
def test_percentiles_hold_the_share_and_lie_within_the_extremes(blocks, share):
    spread = Spread()
    for block in blocks:
        spread.add(block)
    values = np.concatenate(blocks)
    low, high = spread.between(share)
    assert spread.low <= low <= high <= spread.high
    assert ((values >= low) & (values <= high)).sum() >= share * values.size - 1e-9
    assert (spread.low, spread.high, spread.count) == (values.min(), values.max(), values.size)


@given(FLOATS)
def test_blocks_of_a_stream_do_not_matter(values):
    whole, parts = Spread(), Spread()
    whole.add(values)
    for part in np.array_split(values, 3):
        parts.add(part)
    assert whole.between(0.8) == parts.between(0.8)


def test_percentiles_are_close():
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    spread = Spread()
    spread.add(values)
    low, high = spread.between(0.99)
    wanted = np.quantile(values, [0.005, 0.995])
    assert wanted == pytest.approx([low, high], rel=1 / 128)
    assert low <= wanted[0] and high >= wanted[1]


def test_nan_and_infinities_are_counted_apart():
    spread = Spread()
    spread.add(np.array([1.0, np.nan, np.inf, -np.inf], np.float32))
    assert (spread.count, spread.odd, spread.low, spread.high) == (1, 3, 1.0, 1.0)


@pytest.mark.parametrize(
    ("text", "kind", "number"),
    [("range", "range", 0), ("percentile", "percentile", 99.99), ("percentile:95", "percentile", 95),
     ("fixed", "fixed", 100), ("fixed:6", "fixed", 6)],
)  # fmt: skip
def test_rules(text, kind, number):
    rule = parse(text)
    assert (rule.kind, rule.number) == (kind, number)
    assert parse(str(rule)) == rule


@pytest.mark.parametrize(
    ("text", "said"),
    [("rang", "did you mean 'range'"), ("xyz", "use range"), ("range:3", "takes no number"),
     ("fixed:0", "more than 0"), ("fixed:inf", "finite"),
     ("percentile:101", "at most 100"), ("percentile:x", "no number")],
)  # fmt: skip
def test_rules_that_make_no_sense(text, said):
    with pytest.raises(UsageError, match=said):
        parse(text)


@pytest.mark.parametrize("margin", [-0.1, float("nan"), float("inf")])
def test_margins_that_make_no_sense(margin):
    with pytest.raises(UsageError, match="margin"):
        parse("range", margin)


@pytest.mark.parametrize(
    ("outside", "nan", "wanted"),
    [("bound", "bound", (1.0, 3.0, 3.0)), ("zero", "zero", (1.0, 1.0, 1.0)),
     ("mean", "zero", (2.0, 2.0, 1.0)), ("bound", "mean", (1.0, 3.0, 2.0))],
)  # fmt: skip
def test_replacements_lie_within_the_bounds(outside, nan, wanted):
    bounds = Bounds((Bound("a", "Linear", 1.0, 3.0, 2.0),), "range", outside=outside, nan=nan)
    assert bounds.replacements(bounds["a"]) == wanted


def test_files(tmp_path):
    bounds = Bounds(
        (Bound("fc", "Linear", -1.5, 2.25, 0.1), Bound("e", "Embedding", 0.0, 1.0)),
        "range",
        0.1,
        missed=("x",),
    )
    bounds.save(tmp_path / "bounds.json")
    assert load(tmp_path / "bounds.json") == bounds


def written(**changes):
    made = {"layers": [{"layer": "a", "kind": "Linear", "low": 0.0, "high": 1.0}], "rule": "range"}
    return json.dumps(made | changes)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", written(rule=3), written(layers=[{"layer": "a"}]), written(schema=2),
     written(outside="x"),
     written(layers=[{"layer": "a", "kind": "L", "low": 2.0, "high": 1.0}]), "\udcff"],
)  # fmt: skip
def test_damaged_files_are_refused(text, tmp_path):
    path = tmp_path / "bounds.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises((CheckpointError, UsageError), match=r"bounds"):
        load(path)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        load(tmp_path / "none.json")


def test_a_handling_that_does_not_exist():
    with pytest.raises(UsageError, match="did you mean 'zero'"):
        Bounds((), "range").handling(nan="zer")


def test_a_file_that_nests_without_end_is_refused(tmp_path):
    path = tmp_path / "bounds.json"
    path.write_bytes(b'{"layers":[],"rule":"range","more":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    with pytest.raises(CheckpointError, match="no file of bounds"):
        load(path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "missing/bounds.json"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            Bounds((Bound("fc", "Linear", -1.0, 2.0),), rule="range").save(path)
