"""safetensors files: every dtype as the library has it, and headers that lie."""

import json
import struct

import numpy as np
import pytest
from hostile import all_words, check, check_truncated, damaged
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import ckptflip
from ckptflip.checkpoints.safetensors import open_checkpoint
from ckptflip.errors import CheckpointError

safetensors = pytest.importorskip("safetensors")

# Two tensors, made by hand from the specification: a scalar and a matrix in bfloat16.
HEADER = (
    b'{"s":{"dtype":"I64","shape":[],"data_offsets":[0,8]},'
    b'"m.weight":{"dtype":"BF16","shape":[1,3],"data_offsets":[8,14]}}'
)
GOLDEN = struct.pack("<Q", len(HEADER)) + HEADER + struct.pack("<q3H", -2, 0x3F80, 0xC000, 0x7FC1)
BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "BF16": 16}
DTYPES = (
    *("BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ"),
    *("F8_E5M2FNUZ", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"),
)


def made(header, data=b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(shape, first, last, dtype="U8"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def bits_of(dtype):
    return BITS.get(dtype) or int(dtype.split("_")[0].lstrip("UIFC"))


@pytest.fixture
def opened(tmp_path):
    def make(data):
        path = tmp_path / "model.safetensors"
        path.write_bytes(data)
        return open_checkpoint(path)

    return make


def test_golden_bytes(opened):
    found = opened(GOLDEN)
    assert [(t.name, t.shape, t.dtype, t.offset) for t in found.tensors] == [
        ("s", (), "int64", len(GOLDEN) - 14),
        ("m.weight", (1, 3), "bfloat16", len(GOLDEN) - 6),
    ]
    assert (found.tensors[1].layer, found.tensors[1].role) == ("m", "weight")
    assert {n: w.tolist() for n, w in all_words(found).items()} == {
        "s": [(1 << 64) - 2],
        "m.weight": [0x3F80, 0xC000, 0x7FC1],
    }


def test_this_package_knows_every_dtype_that_the_library_knows():
    with pytest.raises(safetensors.SafetensorError, match="unknown variant") as why:
        safetensors.deserialize(made({"a": entry([1], 0, 1, "X")}, b"\0"))
    named = str(why.value).partition("expected one of ")[2].partition(" at line")[0]
    assert {n.strip("` ") for n in named.split(",")} == set(DTYPES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_words_are_those_that_the_library_gives(opened, dtype):
    bits = bits_of(dtype)
    data = np.random.default_rng(1).bytes(24 * bits // 8)
    file = made({"w": entry([2, 0, 3], 0, 0, dtype), "v": entry([2, 12], 0, len(data), dtype)}, data)
    found = all_words(opened(file))
    (stored,) = (v["data"] for name, v in safetensors.deserialize(file) if name == "v")
    stored = np.frombuffer(stored, np.uint8)
    if bits < 8:
        # The first element has the lowest bits.
        every = np.unpackbits(stored, bitorder="little").reshape(24, bits)
        expected = (every << np.arange(bits)).sum(axis=1)
    else:
        expected = stored.view(f"u{4 if dtype == 'C64' else bits // 8}")
    assert found["v"].tolist() == expected.tolist()
    assert found["w"].size == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_loads_exactly_the_planned_words(tmp_path, dtype):
    bits = bits_of(dtype)
    path, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    data = np.random.default_rng(2).bytes(40 * bits // 8)
    path.write_bytes(made({"v": entry([40], 0, len(data), dtype)}, data))
    record = ckptflip.inject(path, out=out, count=9, seed=1)
    number = record.header.tensors[0].dtype
    assert number == all_dtypes(path)["v"]
    ((_, loaded),) = safetensors.deserialize(out.read_bytes())
    differing = np.frombuffer(loaded["data"], np.uint8) ^ np.frombuffer(data, np.uint8)
    hit = np.flatnonzero(np.unpackbits(differing, bitorder="little"))
    width = 32 if dtype == "C64" else bits
    expected = [
        word * width + bit
        for word, mask in zip(
            record.plan.word.tolist(), (record.plan.before ^ record.plan.after).tolist(), strict=True
        )
        for bit in range(width)
        if mask >> bit & 1
    ]
    assert hit.tolist() == sorted(expected) and len(expected) == 9


def all_dtypes(path):
    with ckptflip.opened(path) as target:
        return {t.name: t.dtype for t in target.tensors}


def test_torch_sees_the_second_float4_of_a_byte_flipped_in_the_high_bits(tmp_path):
    torch = pytest.importorskip("torch")
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no float4")
    from safetensors.torch import load_file, save_file

    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(2, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, path)
    with ckptflip.opened(path) as target:
        assert (target.tensors[0].shape, target.tensors[0].dtype) == ((2, 8), "float4_e2m1fn")
    record = ckptflip.inject(path, in_place=True, count=1, bits="sign", seed=3)
    (word,) = record.plan.word.tolist()
    loaded = load_file(path)["w"].view(torch.uint8).reshape(-1)
    assert loaded.nonzero().tolist() == [[word // 2]]
    assert loaded[word // 2] == (0x80 if word % 2 else 0x08)


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        ({"a": entry([4], 0, 4)}, bytes(5), "has 5 bytes"),
        ({"a": entry([4], 0, 4)}, bytes(3), "has 3 bytes"),
        ({}, b"x", "has 1 bytes"),
        ({"a": entry([4], 0, 4), "b": entry([4], 5, 9)}, bytes(9), "'b'.*unused"),
        ({"a": entry([4], 0, 4), "b": entry([4], 2, 6)}, bytes(6), "'b'.*overlaps"),
        ({"a": entry([4], 4, 0)}, bytes(4), "begin at byte 4 and end at byte 0"),
        ({"a": entry([5], 0, 4)}, bytes(4), "needs 5 bytes, not 4"),
        ({"a": entry([3], 0, 2, "F4")}, bytes(2), "whole bytes"),
        ({"a": entry([-4], 0, 4)}, bytes(4), ">= 0"),
        ({"a": entry([4], -4, 0)}, bytes(4), ">= 0"),
        ({"a": entry([1 << 40, 1 << 40, 0], 0, 0)}, b"", "more elements"),
        ({"a": entry([1] * 70, 0, 1)}, bytes(1), "70 axes"),
        ({"a": entry([10**30], 0, 4)}, bytes(4), "more elements"),
        ({"a": {"dtype": "U8", "shape": [4]}}, bytes(4), "missing"),
        ({"a": {"shape": [4], "data_offsets": [0, 4]}}, bytes(4), "missing"),
        ({"a": None}, b"", "missing"),
        ({"a": "text"}, b"", "not as it should be"),
        (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4,4]}}', bytes(4), "not as it should be"),
        (b'{"\xff":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', bytes(4), "not as it should be"),
        (b'{"a":' + b"[" * 100_000, b"", "not as it should be"),
        (b'{"a":{"x":' + b"[" * 100_000, b"", "not as it should be"),
        (b"", b"", "not as it should be"),
        (
            b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
            b'"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}}',
            bytes(4),
            "'a' twice",
        ),
    ],
)
def test_headers_that_lie(opened, header, data, why):
    with pytest.raises(CheckpointError, match=why):
        opened(made(header, data))


def test_a_header_longer_than_the_file_or_than_the_library_allows(opened):
    for length in (100, 100_000_001, (1 << 64) - 1):
        with pytest.raises(CheckpointError, match=f"claims {length} bytes"):
            opened(struct.pack("<Q", length) + b"{}")


def test_truncated_at_every_byte(tmp_path):
    check_truncated(open_checkpoint, tmp_path / "a.safetensors", GOLDEN, len(GOLDEN))


def test_an_unknown_dtype_is_left_out_and_said(opened):
    found = opened(made({"a": entry([2], 0, 5, "F20"), "b": entry([1], 5, 6)}, bytes(6)))
    assert [t.name for t in found.tensors] == ["b"]
    assert [(s.name, s.reason) for s in found.skipped] == [("a", "the dtype 'F20' is not known")]


@pytest.mark.parametrize(
    "metadata", [None, {}, {"format": "pt", "shape": "x", "dtype": "y", "data_offsets": "z"}]
)
def test_metadata_are_no_tensor(opened, metadata):
    found = opened(made({"__metadata__": metadata, "a": entry([1], 0, 1)}, b"\7"))
    assert [t.name for t in found.tensors] == ["a"] and not found.skipped


numbers = st.integers(-2, 6) | st.sampled_from([1 << 31, 1 << 62, 1 << 64])


@settings(max_examples=400)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b.weight", "", "é", "__metadata__x"]),
        st.builds(
            lambda dtype, shape, offsets: {"dtype": dtype, "shape": shape, "data_offsets": offsets},
            st.sampled_from(["U8", "U8", "U8", "F4", "F16", "C64"]),
            st.lists(numbers, max_size=2),
            st.lists(numbers, min_size=2, max_size=2),
        ),
        max_size=3,
    ),
    st.integers(0, 12),
)
def test_it_opens_what_the_library_opens_and_nothing_else(tmp_path_factory, header, size):
    # Here alone is it stricter: a length of 0 must not hide what the others claim.
    assume(not any(0 in e["shape"] and max(e["shape"]) > 6 for e in header.values()))
    path = tmp_path_factory.getbasetemp() / "differential.safetensors"
    path.write_bytes(made(header, bytes(size)))
    try:
        expected = {name: tuple(v["shape"]) for name, v in safetensors.deserialize(path.read_bytes())}
    except safetensors.SafetensorError:
        expected = None
    try:
        found = {t.name: t.shape for t in open_checkpoint(path).tensors}
    except CheckpointError:
        found = None
    assert found == expected


@settings(max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
@given(damaged([GOLDEN, made({"__metadata__": {"a": "b"}, "w": entry([2, 3], 0, 3, "F4")}, bytes(3))]))
def test_damaged_files(tmp_path_factory, data):
    check(open_checkpoint, tmp_path_factory.getbasetemp() / "damaged.safetensors", data)


def test_a_hundred_thousand_tensors(opened, soon):
    header = {
        f"model.layers.{i}.mlp.weight": entry([2, 2], 16 * i, 16 * i + 16, "F32") for i in range(100_000)
    }
    data = made(header, bytes(1_600_000))
    found = opened(data)
    assert len(found.tensors) == 100_000
