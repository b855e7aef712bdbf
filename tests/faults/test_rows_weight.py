"""Rows by how often they were read: which ones, against a plain sort; and what is refused."""

import numpy as np
import pytest
from catalogues import bits_hit, drawn, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptflip.errors import SelectionError, UsageError
from ckptflip.faults import Policy, row_counts
from ckptflip.faults.policy import load
from ckptflip.faults.row_counts import RowCounts


def ranked(counts):
    """All rows, the most read first, the lower number first among equals."""
    return sorted(range(len(counts)), key=lambda row: (-counts[row], row))


def saved(folder, counts, name="access.npy"):
    path = folder / name
    np.savez(path, **counts) if isinstance(counts, dict) else np.save(path, counts)
    return path


def extreme(path, rows, kind, count, name="table"):
    return RowCounts(path).extreme(tensor(name, (rows, 2)), kind, count).tolist()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(row_counts, "_PIECE", 8)


@given(st.data())
@settings(max_examples=150)
def test_hot_and_cold_equal_a_plain_sort(tmp_path_factory, data):
    dtype = data.draw(st.sampled_from(["<i8", ">i8", "<u1", "<i4", "<u8", "<f8", "<f4", "<f2"]))
    most = data.draw(st.sampled_from([1, 5, 100]))
    counts = np.array(data.draw(st.lists(st.integers(0, most), min_size=1, max_size=60)), dtype)
    path = saved(tmp_path_factory.mktemp("counts"), counts)
    count = data.draw(st.integers(1, counts.size))
    order = ranked(counts.tolist())
    assert extreme(path, counts.size, "hot", count) == sorted(order[:count])
    assert extreme(path, counts.size, "cold", count) == sorted(order[-count:])


@pytest.mark.parametrize("compressed", [False, True])
def test_an_array_for_each_table(tmp_path, compressed):
    counts = {"model/a": np.arange(30), "emb.1.weight": np.arange(20)[::-1].copy()}
    path = tmp_path / "access.npz"
    (np.savez_compressed if compressed else np.savez)(path, **counts)
    assert extreme(path, 30, "hot", 2, "model/a") == [28, 29]
    assert extreme(path, 20, "hot", 2, "emb.1.weight") == [0, 1]
    # Without the model's container, and as a field of a row-wise table.
    assert extreme(path, 20, "cold", 1, "model/emb.1.weight.scale") == [19]


def test_pieces_are_read_to_the_end_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(row_counts, "_PIECE", 1 << 18)
    counts = np.random.default_rng(0).integers(0, 50, 700_001)
    path = saved(tmp_path, counts)
    order = np.lexsort((np.arange(counts.size), -counts))
    assert extreme(path, counts.size, "hot", 7000) == sorted(order[:7000].tolist())
    assert extreme(path, counts.size, "cold", 350_000) == sorted(order[-350_000:].tolist())


TABLES = (tensor("a", (10, 3)), tensor("b", (4, 3)), tensor("b.bias", (4,)))


def hit_rows(policy, tensors=TABLES):
    plan = drawn(policy, tensors)
    widths = [t.size // t.shape[0] for t in tensors]
    return {(t, w // widths[t]) for t, w, _ in bits_hit(plan)}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [("hot:10%", {9}), ("hot:1", {9}), ("hot:25%", {8, 9}), ("hot:0.001%", {9}), ("cold:2", {0, 1}),
     ("hot:1,0-1", {0, 1, 9}), ("cold:1,hot:1", {0, 9}), ("hot:100%", set(range(10))), ("hot:.5%", {9})],
)  # fmt: skip
def test_only_the_chosen_rows_are_hit(tmp_path, rows, expected):
    path = saved(tmp_path, np.arange(10))
    policy = Policy(tensors=("a",), rows=rows, rows_weight=str(path), ber=0.9)
    assert hit_rows(policy) == {(0, row) for row in expected}


def test_tables_of_different_sizes(tmp_path):
    path = saved(tmp_path, {"a": np.arange(10), "b": np.array([9, 1, 1, 1])}, "access.npz")
    policy = Policy(tensors=("a", "b"), rows="hot:25%", rows_weight=str(path), ber=0.9)
    assert hit_rows(policy) == {(0, 8), (0, 9), (1, 0), (2, 0)}


def test_from_toml(tmp_path):
    path = saved(tmp_path, np.arange(10))
    text = f'tensors = ["a"]\nrows = "cold:1"\nrows_weight = "{path}"\nber = 0.9\n'
    (tmp_path / "p.toml").write_text(text)
    (policy,), _ = load(tmp_path / "p.toml")
    assert hit_rows(policy) == {(0, 0)}
    assert "rows cold:1 and rows_weight" in policy.selection


@pytest.mark.parametrize(
    ("rows", "text"),
    [("hot:0%", "above 0 and at most 100 %"), ("hot:101%", "and at most 100 %"), ("cold:0", "above 0"),
     ("hot:-1%", "are hot:1%, cold:50% or hot:1000"), ("hot:1.5", "are hot:1%"), ("hot", "are hot:1%"),
     ("hot:nan%", "are hot:1%"), ("cold:1%%", "are hot:1%"), ("hottest:1%", "are hot:1%")],
)  # fmt: skip
def test_what_cannot_be_read(rows, text):
    with pytest.raises(UsageError, match=text):
        Policy(rows=rows, rows_weight="access.npy")


def test_one_without_the_other():
    with pytest.raises(UsageError, match=r"counts with rows_weight \(on the command line --rows-weight\)"):
        Policy(rows="hot:1%")
    for rows in ("0-9", None):
        with pytest.raises(UsageError, match="rows asks for no hot"):
            Policy(rows=rows, rows_weight="access.npy")


BAD_COUNTS = [
    (np.arange(9), "a has 10 rows, and access counts .* 9; for several tables, an npz"),
    (np.array([1, -2] * 5), "a count is -2"),
    (np.array([1, np.nan] * 5), "a count is nan"),
    (np.array([1, np.inf] * 5), "a count is inf"),
    (np.zeros((10, 2)), "of one axis"),
    (np.zeros(10, bool), "integers or floats"),
    (np.zeros(10, complex), "integers or floats"),
    ({"b": np.arange(10)}, r"have no array for a; there are b\. Select these tensors alone, as -t 'b\*'$"),
    (
        {f"emb_l.{i}.weight": np.arange(10) for i in range(5)},
        r"emb_l\.2\.weight, emb_l\.3\.weight …\. Select these tensors alone, as -t 'emb_l\*'$",
    ),
    ({"b": np.arange(10), "c": np.arange(10)}, r"there are b, c\. Select these tensors alone$"),
    ({"a": np.arange(4)}, "a has 10 rows, and access counts .* 4 for 'a'"),
]


@pytest.mark.parametrize(("counts", "text"), BAD_COUNTS)
def test_counts_that_do_not_fit(tmp_path, counts, text):
    path = saved(tmp_path, counts, "access.npz" if isinstance(counts, dict) else "access.npy")
    with pytest.raises(UsageError, match=text):
        drawn(Policy(tensors=("a",), rows="hot:1%", rows_weight=str(path)), TABLES)


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"", "no array of numpy's"), (b"1,2,3\n", "no array of numpy's"), (b"PK\x03\x04junk", "cannot be read"),
     (b"\x93NUMPY\x01\x00\x05\x00{'a':", "no array of numpy's")],
)  # fmt: skip
def test_files_that_hold_no_counts(tmp_path, data, text):
    path = tmp_path / "access.npy"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=text):
        drawn(Policy(tensors=("a",), rows="hot:1%", rows_weight=str(path)), TABLES)


def test_a_file_that_is_cut(tmp_path):
    path = saved(tmp_path, np.arange(10))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UsageError, match="ends before its last count"):
        drawn(Policy(tensors=("a",), rows="hot:1%", rows_weight=str(path)), TABLES)


def test_a_damaged_member(tmp_path):
    path = saved(tmp_path, {"a": np.arange(10)}, "access.npz")
    data = bytearray(path.read_bytes())
    data[data.index(b"NUMPY") + 130] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError, match="Bad CRC"):
        drawn(Policy(tensors=("a",), rows="hot:1%", rows_weight=str(path)), TABLES)


def test_no_such_file(tmp_path):
    with pytest.raises(UsageError, match="there is no such file"):
        drawn(Policy(rows="hot:1%", rows_weight=str(tmp_path / "none.npy")), TABLES)


def test_more_rows_than_there_are(tmp_path):
    path = saved(tmp_path, np.arange(10))
    with pytest.raises(SelectionError, match="there are only 10 rows"):
        drawn(Policy(tensors=("a",), rows="hot:11", rows_weight=str(path)), TABLES)


def test_a_table_without_rows(tmp_path):
    path = saved(tmp_path, np.empty(0, np.int64))
    with pytest.raises(SelectionError, match="selected tensors are empty"):
        drawn(Policy(rows="hot:1%", rows_weight=str(path)), (tensor("empty", (0, 4)),))
