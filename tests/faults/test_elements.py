"""Rows and slices, against numpy's own indexing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptflip.errors import UsageError
from ckptflip.faults import elements

SHAPES = st.lists(st.integers(0, 6), min_size=1, max_size=4).map(tuple)
ENDS = st.one_of(st.none(), st.integers(-8, 8))


def flat(chosen):
    return chosen.flat(np.arange(chosen.size)).tolist()


@given(SHAPES, st.data())
def test_slices_equal_numpys(shape, data):
    n = data.draw(st.integers(1, len(shape)))
    slices = [
        slice(data.draw(ENDS), data.draw(ENDS), data.draw(st.sampled_from([None, 1, 2, 3]))) for _ in range(n)
    ]
    spec = ",".join(
        f"{'' if s.start is None else s.start}:{'' if s.stop is None else s.stop}:{s.step or ''}"
        for s in slices
    )
    table = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    assert flat(elements.choose(shape, None, spec)) == table[tuple(slices)].ravel().tolist()


@given(SHAPES, st.data())
def test_positions_in_slices_equal_numpys(shape, data):
    at = [data.draw(st.integers(-7, 7)) for _ in range(data.draw(st.integers(1, len(shape))))]
    table = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    inside = all(-n <= i < n for i, n in zip(at, shape, strict=False))
    expected = table[tuple(at)].ravel().tolist() if inside else []
    assert flat(elements.choose(shape, None, ",".join(map(str, at)))) == expected


@given(SHAPES, st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted), min_size=1, max_size=3))
def test_rows_are_a_union_without_repeats(shape, ranges):
    spec = ",".join(f"{a}-{b}" for a, b in ranges)
    rows = sorted({i for a, b in ranges for i in range(a, b + 1) if i < shape[0]})
    table = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    assert flat(elements.choose(shape, spec, None)) == table[rows].ravel().tolist()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [("2", [2]), ("-1", [9]), ("0:10:4", [0, 4, 8]), (":3", [0, 1, 2]), ("8-20", [8, 9]), ("50", []),
     ("-20", []),
     ("1, 1-2 ,0:2", [0, 1, 2]), ("::5", [0, 5]), ("99999999999999999999", [])],
)  # fmt: skip
def test_rows(rows, expected):
    assert flat(elements.choose((10,), rows, None)) == expected


def test_without_either_all_elements():
    assert flat(elements.choose((2, 2), None, None)) == [0, 1, 2, 3]
    assert flat(elements.choose((), None, None)) == [0]


@pytest.mark.parametrize(("rows", "slices"), [("0", None), (None, "0"), (None, "0,0,0")])
def test_a_scalar_has_no_rows(rows, slices):
    assert elements.choose((), rows, slices).size == 0


def test_a_slice_of_more_axes_than_the_tensor_has():
    assert elements.choose((4,), None, ":,0").size == 0


@pytest.mark.parametrize(
    "spec", ["", "a", "1-", "-1-2", "1:2:0", "1:2:-1", "1:2:3:4", "5-3", "1.0", "1,,2", "1;2"]
)
def test_what_cannot_be_read(spec):
    for rows, slices in ((spec, None), (None, spec)):
        with pytest.raises(UsageError) as caught:
            elements.check(rows, slices)
        assert repr(spec) in str(caught.value)


def test_rows_and_slice_together():
    with pytest.raises(UsageError, match="rows and slice were both given"):
        elements.check("1", "1")
