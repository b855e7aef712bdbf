"""Quantising and dequantising tables, bit for bit against ATen's operators."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptflip.errors import SelectionError, UsageError
from ckptflip.faults.rowwise import parse
from ckptflip.recsys.tables import dequantise, quantise

torch = pytest.importorskip("torch")

WIDTHS = {"int8": "byte", "int4": "4bit", "int2": "2bit"}
SCALES = (1e-30, 1e-9, 1e-5, 1e-3, 1, 1, 1, 100, 1e4, 1e6, 1e30)


def operator(layout, verb):
    return getattr(torch.ops.quantized, f"embedding_bag_{WIDTHS[layout]}_{verb}")


def table_of(seed, layout, scale, kind):
    """A random table whose dimension ATen accepts: any for 8 bits, whole bytes for fewer."""
    random = np.random.default_rng(seed)
    together = 8 // parse(layout).bits
    shape = int(random.integers(1, 6)), int(random.integers(1, 70 // together + 1)) * together
    values = random.standard_normal(shape) * scale
    if kind == "constant":
        values[:] = values[0, 0]
    elif kind == "grid":
        values = random.integers(0, 4, shape) * scale
    elif kind == "shifted":
        values += 1000 * scale
    return values.astype(np.float32)


def same_bits(found, expected):
    """Equal words, NaN for NaN."""
    nan = np.isnan(found) & np.isnan(expected)
    return found.shape == expected.shape and np.array_equal(found.view("u4")[~nan], expected.view("u4")[~nan])


@pytest.mark.parametrize("layout", WIDTHS)
@given(
    st.integers(0, 2**32),
    st.sampled_from(SCALES),
    st.sampled_from(["plain", "constant", "grid", "shifted"]),
)
@settings(max_examples=300, deadline=None)
def test_quantised_as_by_aten(layout, seed, scale, kind):
    table = table_of(seed, layout, scale, kind)
    assert np.array_equal(
        quantise(table, layout), operator(layout, "prepack")(torch.from_numpy(table)).numpy()
    )


@pytest.mark.parametrize("layout", WIDTHS)
@given(st.integers(0, 2**32), st.sampled_from([0.05, 0.5, 1.0]))
@settings(max_examples=300, deadline=None)
def test_tables_with_nan_and_infinities_are_quantised_as_by_aten(layout, seed, share):
    """As a table is stored whose training has collapsed."""
    random = np.random.default_rng(seed)
    table = table_of(seed, layout, 1.0, "plain")
    odd = random.choice(np.array([np.nan, np.inf, -np.inf, 3e38, -3e38], np.float32), table.shape)
    table = np.where(random.random(table.shape) < share, odd, table)
    table[0], table[-1] = np.nan, random.choice(odd.ravel())
    assert np.array_equal(
        quantise(table, layout), operator(layout, "prepack")(torch.from_numpy(table)).numpy()
    )


@pytest.mark.parametrize("layout", WIDTHS)
@given(st.integers(0, 2**32), st.sampled_from(SCALES))
@settings(max_examples=300, deadline=None)
def test_dequantised_as_by_aten(layout, seed, scale):
    stored = quantise(table_of(seed, layout, scale, "plain"), layout)
    expected = operator(layout, "unpack")(torch.from_numpy(stored)).numpy()
    assert same_bits(dequantise(stored, layout), expected)


@pytest.mark.parametrize("layout", WIDTHS)
@given(st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_any_bytes_dequantised_as_by_aten(layout, seed):
    """Every scale and bias that faults could make, infinities and subnormal numbers among them."""
    random = np.random.default_rng(seed)
    width = parse(layout).overhead + int(random.integers(1, 40))
    stored = random.integers(0, 256, (8, width)).astype(np.uint8)
    expected = operator(layout, "unpack")(torch.from_numpy(stored)).numpy()
    assert same_bits(dequantise(stored, layout), expected)


@pytest.mark.parametrize(
    "values", [[np.inf, 1, 2, 3], [-np.inf, 1, 2, 3], [3e38, -3e38, 0, 0], [7e4, 0, 1, 2]]
)
def test_values_beyond_all_scales_are_no_error(values):
    for layout in WIDTHS:
        stored = quantise([values], layout)
        assert stored.shape == (1, parse(layout).packed(4))
        dequantise(stored, layout)


@pytest.mark.parametrize("values", [[["a"]], [[1.0], [1.0, 2.0]], [[{}]]])
def test_what_holds_no_numbers_is_refused(values):
    with pytest.raises(UsageError, match="a table for 'int8' holds floats"):
        quantise(np.array(values, object) if len(values) > 1 else np.array(values), "int8")


# Rows of 4-bit codes whose last byte is half used, which ATen has no operator for: by the definition.
@pytest.mark.parametrize(("layout", "dim"), [("int4", 5), ("int2", 7), ("int4-tbe", 5), ("int2-tbe", 3)])
def test_odd_dimensions(layout, dim):
    table = np.random.default_rng(dim).standard_normal((4, dim)).astype(np.float32)
    stored = quantise(table, layout)
    together = 8 // parse(layout).bits
    padded = np.pad(table, ((0, 0), (0, -dim % together)), mode="edge")
    whole = quantise(padded, layout)
    assert stored.shape == whole.shape == (4, -(-dim // together) + 4)
    named = f"{layout}:{dim}"
    assert np.array_equal(dequantise(stored, named), dequantise(whole, layout)[:, :dim])
    # What is left of the last byte is empty.
    last = {"int4": -5, "int2": -5}.get(layout, -1)
    assert not (stored[:, last] >> dim % together * parse(layout).bits).any()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_table_batched_rows_are_atens_with_scale_and_bias_first(bits):
    table = np.random.default_rng(bits).standard_normal((6, 16)).astype(np.float32)
    plain, batched = quantise(table, f"int{bits}"), quantise(table, f"int{bits}-tbe")
    codes = 16 * bits // 8
    kind = "<f4" if bits == 8 else "<f2"
    numbers = np.ascontiguousarray(plain[:, codes:]).view(kind).astype("<f2")
    assert np.array_equal(batched, np.hstack([numbers.view(np.uint8), plain[:, :codes]]))


def test_a_table_batched_row_by_hand():
    # scale 0.5, bias -1, codes 3, 0, 15, 1
    row = np.array([[0x00, 0x38, 0x00, 0xBC, 0x03, 0x1F]], np.uint8)
    assert dequantise(row, "int4-tbe").tolist() == [[0.5, -1.0, 6.5, -0.5]]
    padded = np.hstack([row, np.full((1, 10), 0xFF, np.uint8)])
    assert dequantise(padded, "int4-tbe:4").tolist() == [[0.5, -1.0, 6.5, -0.5]]


@pytest.mark.parametrize("layout", [*WIDTHS, "int8-tbe", "int4-tbe", "int2-tbe"])
def test_no_rows(layout):
    assert quantise(np.empty((0, 4)), layout).shape[0] == 0
    assert dequantise(quantise(np.empty((0, 4)), layout), layout).shape == (0, 4)


@pytest.mark.parametrize("layout", ["int3", "int8-", "int16", "", "int4:0", "int8:x", "tbe", "int8:-4"])
def test_no_such_layout(layout):
    with pytest.raises(UsageError, match="is not a layout of quantised tables: use int8, int4"):
        parse(layout)


@pytest.mark.parametrize(
    ("stored", "layout", "text"),
    [(np.zeros((3, 8), np.uint8), "int8", "rows have 8 bytes, of which scale and bias take 8"),
     (np.zeros((3, 20), np.uint8), "int8:16", "rows have 20 bytes, and 16 columns take 24"),
     (np.zeros((3, 20), np.uint8), "int4:33", "33 columns take 21"),
     (np.zeros((3, 20), np.uint8), "int8-tbe:9", "rounded up to a multiple of 2"),
     (np.zeros((3, 20), np.int8), "int8", "is int8"),
     (np.zeros((3, 20, 2), np.uint8), "int8", "and a table is uint8 .rows, bytes of a row"),
     (np.zeros(20, np.uint8), "int8", "and a table is uint8")],
)  # fmt: skip
def test_what_is_no_such_table(stored, layout, text):
    with pytest.raises(SelectionError, match=text):
        dequantise(stored, layout)


@pytest.mark.parametrize(("shape", "layout"), [((4,), "int8"), ((4, 0), "int8"), ((4, 3), "int4:4")])
def test_what_cannot_be_quantised(shape, layout):
    with pytest.raises(UsageError, match="has two axes, rows and columns"):
        quantise(np.zeros(shape), layout)
