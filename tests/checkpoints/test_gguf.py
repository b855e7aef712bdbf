"""GGUF files: every type that gguf writes, each block as its own dequantisation sees it; headers that lie."""

import struct

import numpy as np
import pytest
from hostile import all_words, check, check_truncated, damaged
from hypothesis import given, settings

import ckptflip
from ckptflip.bits import as_words, lookup
from ckptflip.checkpoints.gguf.blocks import BLOCKS, PLAIN, UNUSED
from ckptflip.checkpoints.gguf.opening import open_checkpoint
from ckptflip.errors import CheckpointError

gguf = pytest.importorskip("gguf")

TYPES = gguf.GGMLQuantizationType
ROWS = 3


def text(value):
    return struct.pack("<Q", len(value)) + value


def file(tensors=(), metadata=(), data=b"", version=3, order="<", count=None, entries=None):
    """A file made by hand: infos are (name, dims innermost first, type, offset)."""
    number = struct.Struct(f"{order}Q")
    raw = b"GGUF" + struct.pack(f"{order}I2Q", version, count or len(tensors), entries or len(metadata))
    raw += b"".join(metadata)
    for name, dims, kind, offset in tensors:
        raw += number.pack(len(name)) + name + struct.pack(f"{order}I", len(dims))
        raw += b"".join(number.pack(n) for n in dims) + struct.pack(f"{order}IQ", kind, offset)
    return raw + bytes(-len(raw) % 32) + data


def entry(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


# Two floats, and one block of four-bit codes.
HALF = struct.pack("<e", 0.5)
GOLDEN = file(
    [(b"norm", (2,), 0, 0), (b"blk.0.ffn.weight", (32, 1), 2, 32)],
    [entry(b"general.architecture", 8, text(b"llama")), entry(b"n", 9, struct.pack("<IQ3H", 2, 3, 1, 2, 3))],
    struct.pack("<2f", 1.0, -2.0) + bytes(24) + HALF + bytes(range(16)),
)


def write(path, tensors, endianess=gguf.GGUFEndian.LITTLE, **strings):
    writer = gguf.GGUFWriter(path, "llama", endianess=endianess)
    for key, value in strings.items():
        writer.add_array(key, value)
    for name, (raw, kind) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(kind, blocks=2):
    """Rows of blocks of random bits, as gguf takes them; scales are finite, so that flips show."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(int(kind)).integers(0, 256, (ROWS, blocks, size), dtype=np.uint8)
    for part in BLOCKS[int(kind)].parts if int(kind) in BLOCKS else ():
        if part.dtype == "float16":
            raw[..., part.offset + 1] = raw[..., part.offset + 1] & 0xBF | 1
        if part.dtype == "float8_e8m0fnu":
            raw[..., part.offset] = 120
        if kind == TYPES.NVFP4 and part.suffix == "scale":
            raw[..., :4] = raw[..., :4] & 0x3F | 8
    if kind == TYPES.IQ1_M:
        raw[..., 55] &= 0xBF  # its scale is spread over four words
    return raw.reshape(ROWS, blocks * size), elements * blocks


@pytest.fixture
def opened(tmp_path):
    def make(data):
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        return open_checkpoint(path)

    return make


def test_golden_bytes(opened):
    found = opened(GOLDEN)
    start = len(GOLDEN) - 50
    assert [(t.name, t.shape, t.dtype, t.offset, t.layout) for t in found.tensors] == [
        ("norm", (2,), "float32", start, "contiguous"),
        ("blk.0.ffn.weight.scale", (1, 1), "float16", start + 32, "Q4_0 blocks"),
        ("blk.0.ffn.weight.codes", (1, 32), "uint4", start + 34, "Q4_0 blocks"),
    ]
    assert {t.layer for t in found.tensors[1:]} == {"blk.0.ffn"} and found.tensors[2].role == "weight"
    words = all_words(found)
    assert words["blk.0.ffn.weight.scale"].tolist() == [0x3800]
    assert words["blk.0.ffn.weight.codes"].tolist() == [*range(16), *[0] * 16]


def test_this_package_knows_every_type_that_gguf_knows():
    known = BLOCKS.keys() | PLAIN.keys() | UNUSED.keys()
    assert {int(t) for t in TYPES} <= known
    for number, block in BLOCKS.items():
        assert (block.elements, block.size) == gguf.GGML_QUANT_SIZES[TYPES(number)]
        assert block.name == TYPES(number).name


@pytest.mark.parametrize("block", BLOCKS.values(), ids=lambda b: b.name)
def test_the_fields_of_a_block_are_all_of_its_bits_once(block):
    seen = np.zeros(block.size * 8, int)
    for part in block.parts:
        width = part.bits or lookup(part.dtype).width
        for at in np.ndindex(part.dims):
            first = part.offset * 8 + sum(i * s for i, s in zip(at, part.strides, strict=True))
            seen[first : first + width] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("kind", sorted(PLAIN))
@pytest.mark.parametrize("endianess", list(gguf.GGUFEndian), ids=lambda e: e.name)
def test_plain_types(tmp_path, kind, endianess):
    number = lookup(PLAIN[kind])
    if number.name == "bfloat16" and endianess is gguf.GGUFEndian.BIG:
        pytest.skip("gguf 0.19 takes bfloat16 as bytes, and does not swap them")
    raw = np.random.default_rng(kind).integers(0, 256, (2, 3 * number.word_size), dtype=np.uint8)
    array = raw if number.name == "bfloat16" else raw.view(number.name)
    before = raw.copy().view(number.word_dtype).reshape(-1).tolist()
    path = write(tmp_path / "a.gguf", {"w": (array, TYPES(kind))}, endianess)
    found = open_checkpoint(path)
    (tensor,) = found.tensors
    assert (tensor.shape, tensor.number.name) == ((2, 3), number.name)
    big = endianess is gguf.GGUFEndian.BIG and number.word_size > 1
    assert tensor.order == (">" if big else "<")
    assert all_words(found)["w"].tolist() == before
    (read,) = gguf.GGUFReader(path).tensors
    assert (read.data_offset, read.n_elements) == (tensor.offset, tensor.size)


QUANTISED = [TYPES(number) for number in BLOCKS]


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda k: k.name)
def test_words_are_the_bits_of_the_blocks(tmp_path, kind):
    raw, elements = random_blocks(kind)
    path = write(tmp_path / "a.gguf", {"w": (raw, kind)})
    found = open_checkpoint(path)
    words = all_words(found)
    block = BLOCKS[int(kind)]
    rebuilt = np.zeros(raw.size * 8, np.uint8)
    for part in block.parts:
        width = part.bits or lookup(part.dtype).width
        several = words[f"w.{part.suffix}"].reshape(-1, *part.dims)
        for at in np.ndindex(several.shape):
            first = at[0] * block.size * 8 + part.offset * 8
            first += sum(i * s for i, s in zip(at[1:], part.strides, strict=True))
            for bit in range(width):
                rebuilt[first + bit] = int(several[at]) >> bit & 1
    (read,) = gguf.GGUFReader(path).tensors
    assert np.packbits(rebuilt, bitorder="little").tobytes() == read.data.tobytes() == raw.tobytes()
    shapes = {t.name: t.shape for t in found.tensors}
    for part in block.parts:
        if part.words == block.elements:
            assert shapes[f"w.{part.suffix}"] == (ROWS, elements)


DEQUANTISED = [k for k in QUANTISED if k not in (TYPES.Q8_K, TYPES.Q1_0)]


@pytest.mark.parametrize("kind", DEQUANTISED, ids=lambda k: k.name)
@pytest.mark.parametrize("seed", range(3))
def test_a_flip_changes_just_the_elements_that_it_stands_for(tmp_path, kind, seed):
    raw, _ = random_blocks(kind)
    path = write(tmp_path / "a.gguf", {"w": (raw, kind)})
    before = gguf.quants.dequantize(raw, kind).reshape(-1)
    block = BLOCKS[int(kind)]
    for part in block.parts:
        out = tmp_path / f"{part.suffix}.gguf"
        record = ckptflip.inject(path, out=out, tensors=f"w.{part.suffix}", count=1, seed=seed)
        (read,) = gguf.GGUFReader(out).tensors
        after = gguf.quants.dequantize(np.array(read.data), kind).reshape(-1)
        hit = np.flatnonzero(before.view("u4") != after.view("u4"))
        (word,) = record.plan.word.tolist()
        owner = word // part.words
        assert (hit // block.elements == owner).all(), part.suffix
        if part.words == block.elements:
            # One word for one element: codes come in the order of the elements.
            assert hit.tolist() == [word], part.suffix


@pytest.mark.parametrize(
    "kind", [TYPES.Q4_0, TYPES.Q5_1, TYPES.Q8_0, TYPES.Q4_K, TYPES.Q6_K, TYPES.TQ2_0, TYPES.MXFP4]
)
def test_codes_are_in_the_order_of_the_elements(tmp_path, kind):
    """Every element's own code, and no other, decides it."""
    raw, _ = random_blocks(kind, 1)
    path = write(tmp_path / "a.gguf", {"w": (raw, kind)})
    words = all_words(open_checkpoint(path))
    codes = words["w.codes"].astype(int)
    if "w.codes_high" in words:
        codes += words["w.codes_high"].astype(int) << 4
    values = gguf.quants.dequantize(raw, kind).reshape(-1)
    groups = {TYPES.Q4_K: 32, TYPES.Q6_K: 16}.get(kind, BLOCKS[int(kind)].elements)
    for group in range(values.size // groups):
        here = slice(group * groups, (group + 1) * groups)
        by_code = {}
        for code, value in zip(codes[here].tolist(), values[here].tolist(), strict=True):
            by_code.setdefault(code, set()).add(value)
        assert all(len(v) == 1 for v in by_code.values())


def test_a_hit_scale_changes_its_block_alone(tmp_path):
    raw, _ = random_blocks(TYPES.Q4_0)
    path = write(tmp_path / "a.gguf", {"w": (raw, TYPES.Q4_0)})
    record = ckptflip.inject(path, in_place=True, tensors="w.scale", bits="critical", count=1, seed=2)
    after = gguf.quants.dequantize(np.array(gguf.GGUFReader(path).tensors[0].data), TYPES.Q4_0).reshape(
        -1, 32
    )
    before = gguf.quants.dequantize(raw, TYPES.Q4_0).reshape(-1, 32)
    assert np.flatnonzero((as_words(before) != as_words(after)).reshape(-1, 32).any(axis=1)).tolist() == [
        int(record.plan.word[0])
    ]


def test_a_vocabulary_is_skipped_fast(tmp_path, soon):
    words = [f"token{i}" for i in range(120_000)]
    path = write(tmp_path / "a.gguf", {"w": (np.ones((2, 2), "f4"), None)}, tokens=words)
    found = open_checkpoint(path)
    assert all_words(found)["w"].tolist() == [0x3F800000] * 4


def test_big_endian_scales_are_big_endian(opened):
    raw = file([(b"w", (32,), 2, 0)], data=struct.pack(">e", 0.5) + bytes(16), order=">")
    found = opened(raw)
    assert [t.dtype for t in found.tensors] == [">float16", "uint4"]
    assert all_words(found)["w.scale"].tolist() == [0x3800]


def test_version_2_and_another_alignment(opened):
    metadata = [entry(b"general.alignment", 4, struct.pack("<I", 64))]
    raw = file([(b"w", (2,), 24, 0)], metadata, version=2)
    raw += bytes(-len(raw) % 64) + b"\1\2"
    assert all_words(opened(raw))["w"].tolist() == [1, 2]


def test_types_that_are_left_out(opened):
    found = opened(file([(b"a", (32,), 9, 0), (b"b", (32,), 4, 0), (b"c", (32,), 77, 0)], data=bytes(64)))
    assert not found.tensors
    assert [s.name for s in found.skipped] == ["a", "b", "c"]
    assert "Q8_1" in found.skipped[0].reason and "given up" in found.skipped[1].reason
    assert found.skipped[2].reason == "of the type 77, which is not known"


def test_a_field_whose_name_is_taken_is_left_out(opened):
    found = opened(file([(b"w.scale", (2,), 24, 0), (b"w", (32,), 2, 32)], data=bytes(64)))
    assert [t.name for t in found.tensors] == ["w.scale", "w.codes"]
    assert [s.name for s in found.skipped] == ["w.scale"]


NEST = struct.pack("<IQ", 9, 1)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"GGML" + bytes(40), "magic"),
        (file(version=1), "version is 1"),
        (file(version=4), "version is 4"),
        (file(count=1 << 40), "claims 1099511627776 tensors"),
        (file(entries=1 << 63), "and 9223372036854775808 metadata"),
        (file([(b"w", (3,), 0, 0)], data=bytes(8)), "'w' would lie at bytes 64 to 76"),
        (file([(b"w", (3,), 0, 1 << 63)], data=bytes(16)), "'w' would lie"),
        (file([(b"w", (1 << 60, 1 << 60), 0, 0)]), "more elements"),
        (file([(b"w", (1 << 60, 0), 0, 0)]), "more elements"),
        (file([(b"w", (31,), 2, 0)], data=bytes(64)), "Q4_0 blocks of 32"),
        (file([(b"w", (), 2, 0)], data=bytes(64)), "Q4_0 blocks of 32"),
        (file([(b"w", (1,) * 64, 0, 0)], data=bytes(64)), "64 axes"),
        (file([(b"w", (2,), 0, 0), (b"w", (2,), 0, 32)], data=bytes(64)), "two tensors named 'w'"),
        (file([(b"v", (2,), 0, 0), (b"w", (2,), 0, 4)], data=bytes(64)), "'v' and 'w' overlap"),
        (file([(b"\xff", (2,), 0, 0)], data=bytes(64)), "not UTF-8"),
        (file(metadata=[entry(b"a", 4, bytes(4)), entry(b"a", 4, bytes(4))]), "'a' twice"),
        (file(metadata=[entry(b"a", 13, b"")]), "type 13"),
        (file(metadata=[entry(b"a", 9, struct.pack("<IQ", 4, 1 << 61))]), "claims 9223372036854775808 bytes"),
        (file(metadata=[entry(b"a", 9, struct.pack("<IQ", 8, 1 << 61))]), "claim more than"),
        (file(metadata=[entry(b"a", 9, struct.pack("<IQ", 9, 1 << 61))]), "claim more than"),
        (file(metadata=[entry(b"a", 8, struct.pack("<Q", (1 << 64) - 1))]), "beyond the end"),
        (file(metadata=[entry(b"a", 9, NEST * 20)]), "lists in lists"),
        (file(metadata=[entry(b"general.alignment", 4, bytes(4))]), "power of two"),
        (file(metadata=[entry(b"general.alignment", 4, struct.pack("<I", 48))]), "power of two"),
        (file(metadata=[entry(b"general.alignment", 10, struct.pack("<Q", 32))]), "power of two"),
        (file(metadata=[struct.pack("<Q", 1 << 40) + b"a"]), "claims 1099511627776 bytes"),
    ],
)
def test_headers_that_lie(opened, data, why):
    with pytest.raises(CheckpointError, match=why):
        opened(data)


def test_truncated_at_every_byte(tmp_path):
    check_truncated(open_checkpoint, tmp_path / "a.gguf", GOLDEN, len(GOLDEN))


@settings(max_examples=2000)
@given(
    damaged(
        [
            GOLDEN,
            file([(b"w", (256, 2), 12, 0), (b"v", (), 28, 288)], data=bytes(300)),
            file([(b"w", (2, 2), 1, 0)], data=bytes(8), order=">"),
            file(
                metadata=[entry(b"a", 9, struct.pack("<IQ", 8, 3) + text(b"x") * 3), entry(b"b", 9, NEST * 3)]
            ),
        ]
    )
)
def test_damaged_files(tmp_path_factory, data):
    check(open_checkpoint, tmp_path_factory.getbasetemp() / "damaged.gguf", data)
