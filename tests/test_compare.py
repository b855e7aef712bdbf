"""diff and scan against plain numpy."""

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import ckptflip
from ckptflip.compare import has_difference
from ckptflip.errors import CheckpointError, SelectionError, UsageError

WORDS = {"f2": "u2", "f4": "u4", "f8": "u8"}


def write(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, data in datasets.items():
            file[name] = data
    return path


def by_name(rows):
    return {r.tensor: r for r in rows}


def truth(a, b, threshold=1e10):
    """What `diff` must say of two float arrays, the plain way."""
    kind = WORDS[a.dtype.str[1:]]
    x, y = a.reshape(-1).view(kind), b.reshape(-1).view(kind)
    wide, other = a.reshape(-1).astype(np.longdouble), b.reshape(-1).astype(np.longdouble)
    finite = np.isfinite(wide) & np.isfinite(other)
    delta = (other - wide)[finite]
    own, moved = np.sqrt((wide[finite] ** 2).sum()), np.sqrt((delta**2).sum())
    top = 1 << (a.dtype.itemsize * 8 - 1)
    number = [[int(w) if w < top else top - int(w) for w in words.tolist()] for words in (x, y)]
    numbers = ~np.isnan(wide) & ~np.isnan(other)
    return {
        "words": int((x != y).sum()),
        "bits": int(np.bitwise_count(x ^ y).sum()),
        "max_abs": float(np.abs(delta).max(initial=0)),
        "relative_l2": float(moved / own) if own else (np.inf if moved else 0.0),
        "max_ulp": max((abs(p - q) for p, q, n in zip(*number, numbers, strict=True) if n), default=0),
        "nev_a": int((~np.isfinite(wide) | (np.abs(wide) > threshold)).sum()),
        "nev_b": int((~np.isfinite(other) | (np.abs(other) > threshold)).sum()),
    }


@given(st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_diff_says_what_numpy_says(tmp_path_factory, data):
    kind = data.draw(st.sampled_from(sorted(WORDS)))
    shape = data.draw(hnp.array_shapes(max_dims=3, max_side=6))
    words = hnp.arrays(WORDS[kind], shape, elements=st.integers(0, 2 ** (8 * int(kind[1])) - 1))
    a = data.draw(words).view(kind)
    b = data.draw(words).view(kind) if data.draw(st.booleans()) else a.copy()
    if data.draw(st.booleans()):
        b = np.where(data.draw(hnp.arrays(bool, shape)), a.view(WORDS[kind]), b.view(WORDS[kind])).view(kind)
    folder = tmp_path_factory.mktemp("diff")
    chunks = tuple(data.draw(st.integers(1, n)) for n in shape)
    write(folder / "a.h5", x=a)
    with h5py.File(folder / "b.h5", "w") as file:
        words = np.ascontiguousarray(b).view(WORDS[kind]).astype(f">{WORDS[kind]}")
        made = file.create_dataset("x", shape=shape, dtype=f">{kind}", chunks=chunks, shuffle=True)
        made.id.write(h5py.h5s.ALL, h5py.h5s.ALL, words.view(f"V{a.itemsize}"), made.id.get_type())
    (row,) = ckptflip.diff(folder / "a.h5", folder / "b.h5")
    with np.errstate(all="ignore"):
        wanted = truth(a, b)
    found = {k: getattr(row, k) for k in ("words", "bits", "max_ulp", "nev_a", "nev_b")}
    assert found == {k: wanted[k] for k in found}
    assert row.status == ("differs" if wanted["words"] else "same")
    assert row.max_abs == pytest.approx(wanted["max_abs"], rel=1e-12)
    assert row.relative_l2 == pytest.approx(wanted["relative_l2"], rel=1e-6)


def test_examples_by_hand(tmp_path):
    one = np.array([1.0, -2.0, np.nan, 0.0, np.inf], "f4")
    two = np.array([1.0, 2.0, np.nan, -0.0, 3e38], "f4")
    write(tmp_path / "a.h5", x=one, n=np.array([1, -128], "i1"), u=np.uint64(2**63), c=np.array([1 + 1j, 2j]))
    write(tmp_path / "b.h5", x=two, n=np.array([1, 127], "i1"), u=np.uint64(0), c=np.array([1 + 1j, 2 + 2j]))
    rows = by_name(ckptflip.diff(tmp_path / "a.h5", tmp_path / "b.h5"))
    x = rows["x"]
    assert (x.words, x.bits, x.max_abs, x.nev_a, x.nev_b) == (
        3,
        1 + 1 + int(two[4:].view("u4")[0] ^ 0x7F800000).bit_count(),
        4.0,
        2,
        2,
    )
    assert x.relative_l2 == pytest.approx(4 / np.sqrt(5))
    assert rows["n"].relative_l2 == pytest.approx(255 / np.sqrt(1 + 128**2))
    assert x.max_ulp == 2 * 0x40000000
    assert (rows["n"].words, rows["n"].bits, rows["n"].max_abs, rows["n"].max_ulp) == (1, 8, 255.0, 0)
    assert (rows["u"].bits, rows["u"].max_abs) == (1, 2.0**63)
    assert (rows["c"].words, rows["c"].max_abs) == (1, 2.0)


def test_ints_of_64_bits_and_bools(tmp_path):
    write(tmp_path / "a.h5", i=np.array([-(2**63), 5]), b=np.array([True, False]))
    write(tmp_path / "b.h5", i=np.array([2**63 - 1, 5]), b=np.array([True, True]))
    rows = by_name(ckptflip.diff(tmp_path / "a.h5", tmp_path / "b.h5"))
    assert (rows["i"].words, rows["i"].bits, rows["i"].max_abs) == (1, 64, 2.0**64)
    assert (rows["b"].words, rows["b"].bits, rows["b"].max_abs) == (1, 1, 1.0)


def test_bfloat16_and_float8(tmp_path):
    for name, flip in (("a.h5", 0), ("b.h5", 1)):
        with h5py.File(tmp_path / name, "w") as file:
            file["bf"] = np.array([0x3F80 ^ flip, 0x7F80], "u2")
            file["bf"].attrs["dtype"] = "bfloat16"
            file["f8"] = np.array([0x38 ^ flip, 0x7F], "u1")
            file["f8"].attrs["dtype"] = "float8_e4m3fn"
    rows = by_name(ckptflip.diff(tmp_path / "a.h5", tmp_path / "b.h5"))
    assert (rows["bf"].bits, rows["bf"].max_ulp, rows["bf"].max_abs, rows["bf"].nev_a) == (1, 1, 2.0**-7, 1)
    assert (rows["f8"].bits, rows["f8"].max_ulp, rows["f8"].max_abs, rows["f8"].nev_b) == (1, 1, 2.0**-3, 1)


def test_what_is_in_one_alone_or_of_another_shape(tmp_path):
    write(tmp_path / "a.h5", same=np.ones(3), gone=np.ones(2), shape=np.ones((2, 3)), kind=np.ones(2, "f4"))
    write(tmp_path / "b.h5", same=np.ones(3), new=np.ones(2), shape=np.ones((3, 2)), kind=np.ones(2, "f8"))
    rows = by_name(ckptflip.diff(tmp_path / "a.h5", tmp_path / "b.h5"))
    assert {n: r.status for n, r in rows.items()} == {
        "same": "same",
        "gone": "only in A",
        "new": "only in B",
        "shape": "shape or dtype differs",
        "kind": "shape or dtype differs",
    }
    assert "(2, 3)" in rows["shape"].note and "float64" in rows["kind"].note
    assert has_difference(list(rows.values())) and not has_difference([rows["same"]])


def test_globs_limit_the_comparison(tmp_path):
    write(tmp_path / "a.h5", **{"conv1/w": np.ones(3), "conv10/w": np.ones(3), "old": np.ones(1)})
    write(tmp_path / "b.h5", **{"conv1/w": np.ones(3), "conv10/w": np.zeros(3), "new": np.ones(1)})
    a, b = tmp_path / "a.h5", tmp_path / "b.h5"
    assert list(by_name(ckptflip.diff(a, b, tensors=("conv1",)))) == ["conv1/w"]
    assert by_name(ckptflip.diff(a, b, tensors=("new",)))["new"].status == "only in B"
    assert by_name(ckptflip.diff(a, b, tensors=("old",)))["old"].status == "only in A"
    assert set(by_name(ckptflip.diff(a, b, tensors=("!conv*",)))) == {"old", "new"}
    with pytest.raises(SelectionError, match="did you mean"):
        ckptflip.diff(a, b, tensors=("cnv1",))


def test_aliases_match_across_files(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a"] = np.ones(3)
        file["b"] = file["a"]
    write(tmp_path / "b.h5", b=np.ones(3))
    rows = ckptflip.diff(tmp_path / "a.h5", tmp_path / "b.h5")
    assert [(r.tensor, r.status) for r in rows] == [("a", "same")]


def test_a_file_and_itself(tmp_path):
    path = write(tmp_path / "a.h5", x=np.array([np.nan, 1]), e=np.zeros((0, 3)), s=np.float32(1))
    rows = ckptflip.diff(path, path)
    assert {r.status for r in rows} == {"same"} and by_name(rows)["x"].nev_b == 1


def test_compound_fields_are_compared_one_by_one(tmp_path):
    data = np.zeros(4, [("a", "f4"), ("b", "i2", (2,))])
    write(tmp_path / "a.h5", c=data)
    data["b"][2, 1] = 3
    write(tmp_path / "b.h5", c=data)
    rows = by_name(ckptflip.diff(tmp_path / "a.h5", tmp_path / "b.h5"))
    assert (rows["c.a"].status, rows["c.b"].words, rows["c.b"].bits) == ("same", 1, 2)


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", ">f4"])
def test_scan_counts_what_stands_out(tmp_path, kind):
    data = np.ones(1000, kind)
    data[:5] = [0, -3, np.nan, np.inf, -np.inf]
    data[17] = 2048
    if kind != "f2":
        data[20] = -1e12
    (row,) = ckptflip.scan(write(tmp_path / "a.h5", x=data))
    extreme = int(kind != "f2")
    assert (row.nan, row.inf, row.extreme, row.nev) == (1, 2, extreme, 3 + extreme)
    assert (row.elements, row.outliers, row.first) == (1000, 1, 2)
    assert (row.minimum, row.maximum) == (float(data[np.isfinite(data)].min()), 2048.0)


def test_scan_of_complex_empty_and_integer_tensors(tmp_path):
    path = write(
        tmp_path / "a.h5",
        c=np.array([1, 2 + 1j, complex(0, np.nan)]),
        e=np.zeros(0),
        i=np.arange(3),
        z=np.zeros(4),
    )
    rows = by_name(ckptflip.scan(path))
    assert set(rows) == {"c", "e", "z"}
    assert (rows["c"].nan, rows["c"].first, rows["c"].elements) == (1, 2, 3)
    assert (rows["e"].elements, rows["e"].nev, rows["e"].first) == (0, 0, -1)
    assert (rows["z"].outliers, rows["z"].minimum, rows["z"].maximum) == (0, 0.0, 0.0)


def test_scan_finds_the_first_one_in_any_block(tmp_path, monkeypatch):
    monkeypatch.setattr("ckptflip.checkpoints.hdf5.target._BLOCK_BYTES", 256)
    data = np.ones((300, 3), "f4")
    data[250, 2] = np.nan
    data[251, 0] = np.inf
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["flat"] = data
        file.create_dataset("chunked", data=data, chunks=(7, 2), compression="gzip")
    for row in ckptflip.scan(tmp_path / "a.h5"):
        assert (row.first, row.nan, row.inf) == (752, 1, 1)


def test_scan_of_the_smallest_and_largest_numbers(tmp_path):
    tiny = np.array([np.finfo("f8").smallest_subnormal] * 3 + [1.0], "f8")
    rows = by_name(ckptflip.scan(write(tmp_path / "a.h5", t=tiny, h=np.array([np.finfo("f8").max]))))
    assert (rows["t"].outliers, rows["h"].extreme, rows["h"].outliers) == (1, 1, 0)


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_a_threshold_that_makes_no_sense(tmp_path, threshold):
    path = write(tmp_path / "a.h5", x=np.ones(3))
    with pytest.raises(UsageError, match="threshold"):
        ckptflip.scan(path, threshold=threshold)
    with pytest.raises(UsageError, match="threshold"):
        ckptflip.diff(path, path, threshold=threshold)


def test_thresholds_count(tmp_path):
    path = write(tmp_path / "a.h5", x=np.array([1.0, 50.0, 1e11]))
    assert [ckptflip.scan(path, threshold=t)[0].extreme for t in (10, 100, 1e12)] == [2, 1, 0]
    assert ckptflip.diff(path, path, threshold=10)[0].nev_a == 2


def test_nothing_is_altered_and_errors_are_ours(tmp_path):
    path = write(tmp_path / "a.h5", x=np.ones(3))
    before = path.read_bytes()
    ckptflip.scan(path)
    ckptflip.diff(path, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(CheckpointError):
        ckptflip.diff(path, tmp_path / "b.h5")
    with pytest.raises(SelectionError):
        ckptflip.scan(path, tensors=("y",))


def test_a_model_is_known_without_its_container(tmp_path):
    """A training state against the bare state dict of its model, the commonest pair of all."""
    weight = np.arange(6, dtype="f4").reshape(2, 3)
    np.savez(tmp_path / "state.npz", **{"model/fc.weight": weight, "optimizer/state/0/exp_avg": weight})
    np.savez(tmp_path / "model.npz", **{"fc.weight": weight})
    rows = {r.tensor: r.status for r in ckptflip.diff(tmp_path / "state.npz", tmp_path / "model.npz")}
    assert rows == {"model/fc.weight": "same", "optimizer/state/0/exp_avg": "only in A"}
    record = ckptflip.inject(tmp_path / "state.npz", tensors="fc.weight", seed=1)
    replayed = ckptflip.replay(record, tmp_path / "model.npz")
    assert [t.name for t in replayed.header.tensors] == ["fc.weight"]
    np.savez(tmp_path / "two.npz", **{"model/fc.weight": weight, "params/fc.weight": weight})
    rows = {r.tensor: r.status for r in ckptflip.diff(tmp_path / "two.npz", tmp_path / "model.npz")}
    assert rows["model/fc.weight"] == rows["params/fc.weight"] == "same"
    assert {r.status for r in ckptflip.diff(tmp_path / "model.npz", tmp_path / "two.npz")} == {
        "only in A",
        "only in B",
    }
