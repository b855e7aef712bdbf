"""zarr folders that zarr and TensorStore wrote: words, layouts, checksums, and damaged or hostile ones."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
import struct
import warnings
import zlib
from pathlib import Path
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckptflip
from ckptflip.bits import as_words
from ckptflip.checkpoints.crc import checksum
from ckptflip.checkpoints.zarr import codecs, open_checkpoint, recognises
from ckptflip.checkpoints.zarr.metadata import Compressor
from ckptflip.errors import CheckpointError, MissingExtraError
from ckptflip.testing import CheckpointContract

zarr = pytest.importorskip("zarr")
from zarr.codecs import (  # noqa: E402
    BloscCodec,
    BytesCodec,
    Crc32cCodec,
    GzipCodec,
    ShardingCodec,
    TransposeCodec,
    ZstdCodec,
)

RANDOM = np.random.default_rng(0)
# Odd lengths, so that the chunks at the edges are padded.
ARRAYS = {
    "conv1/kernel": RANDOM.standard_normal((5, 3, 7)).astype("float32"),
    "conv1/bias": RANDOM.standard_normal(9).astype("float64"),
    "norm/moving_mean": RANDOM.standard_normal(40).astype("float16"),
    "step": np.array(5, "int64"),
}
NUMPY_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
ML_DTYPES = (
    *("bfloat16", "float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"),
    *("float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn", "int4", "int2"),
)


def bits(array) -> np.ndarray:
    return as_words(np.ascontiguousarray(array))


def random_array(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Any bits that are a value of the dtype."""
    made = np.dtype(getattr(ml_dtypes, dtype, dtype))
    raw = np.random.default_rng(1).integers(0, 256, (*shape, made.itemsize), np.uint8)
    if dtype in ("bool", "int4", "int2", "float4_e2m1fn"):
        raw &= {"bool": 1, "int2": 3}.get(dtype, 15)
    return raw.view(made)[..., 0]


def words_of(path: Path) -> dict[str, np.ndarray]:
    with ckptflip.opened(path) as target:
        return {
            t.name: np.concatenate([np.empty(0, t.number.word_dtype), *target.blocks(i)])
            for i, t in enumerate(target.tensors)
        }


def chunked(array: np.ndarray) -> tuple[int, ...]:
    return tuple(max(1, n // 2) for n in array.shape)


class _Zarr(CheckpointContract):
    options: ClassVar[dict] = {"compressors": None}
    version = 3
    suffix = ""

    def write(self, folder: Path) -> Path:
        group = zarr.open_group(folder / "model.zarr", mode="w", zarr_format=self.version)
        for name, array in ARRAYS.items():
            group.create_array(name, data=array, chunks=chunked(array), **self.options)
        return folder / "model.zarr"

    def load(self, path: Path):
        group = zarr.open_group(path, mode="r")
        return {name: bits(group[name][...]) for name in ARRAYS}


class TestPlain(_Zarr):
    pass


class TestVersion2(_Zarr):
    version = 2


class TestSealed(_Zarr):
    options: ClassVar[dict] = {"compressors": [Crc32cCodec(), Crc32cCodec()]}
    leave_error = ValueError


class TestShardsOfPlainChunks(_Zarr):
    def write(self, folder: Path) -> Path:
        group = zarr.open_group(folder / "model.zarr", mode="w")
        for name, array in ARRAYS.items():
            inner = chunked(array)
            # zarr cannot write a shard of a scalar.
            shards = tuple(2 * n for n in inner) or None
            group.create_array(name, data=array, chunks=inner, shards=shards, compressors=[Crc32cCodec()])
        return folder / "model.zarr"

    leave_error = ValueError


class TestCompressed(_Zarr):
    options: ClassVar[dict] = {"compressors": [ZstdCodec(level=3)]}
    patched = False
    exact = False


class TestCompressedAndSealedInside(_Zarr):
    options: ClassVar[dict] = {"compressors": [Crc32cCodec(), BloscCodec(cname="zstd", typesize=4)]}
    leave_error = ValueError
    patched = False
    exact = False


class TestCompressedAndSealedOutside(_Zarr):
    options: ClassVar[dict] = {"compressors": [GzipCodec(level=5), Crc32cCodec()]}
    leave_error = ValueError
    patched = False
    exact = False


class TestShardsOfCompressedChunks(TestShardsOfPlainChunks):
    def write(self, folder: Path) -> Path:
        group = zarr.open_group(folder / "model.zarr", mode="w")
        for name, array in ARRAYS.items():
            inner = chunked(array)
            # zarr cannot write a shard of a scalar.
            shards = tuple(2 * n for n in inner) or None
            group.create_array(name, data=array, chunks=inner, shards=shards, compressors=[ZstdCodec()])
        return folder / "model.zarr"

    leave_error = None
    patched = False
    exact = False


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("compressors", [None, "auto"])
def test_every_dtype_of_zarr(tmp_path, version, compressors):
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=version)
    expected = {}
    for dtype in NUMPY_DTYPES:
        for order in "<>":
            kind = np.dtype(dtype).newbyteorder(order)
            if version == 3 and order == ">":
                continue  # a codec's, not a dtype's: see below
            array = random_array(dtype, (5, 7)).astype(kind)
            name = f"{dtype}{'be' if order == '>' else ''}"
            with np.errstate(invalid="ignore"):  # signalling NaN, which zarr compares with the fill value
                group.create_array(name, data=array, chunks=(2, 3), compressors=compressors)
            expected[name] = bits(array)
    assert_words(tmp_path / "a.zarr", expected)


@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
@pytest.mark.parametrize("dtype", ML_DTYPES)
def test_every_dtype_of_tensorstore(tmp_path, driver, dtype):
    tensorstore = pytest.importorskip("tensorstore")
    array = random_array(dtype, (5, 7))
    chunk = {"chunk_layout": tensorstore.ChunkLayout(chunk_shape=[2, 3])}
    plain = {"metadata": {"compressor": None}} if driver == "zarr" else {}
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{tmp_path}/w/"}, **plain}
    stored = tensorstore.open(
        spec, dtype=tensorstore.dtype(dtype), shape=(5, 7), create=True, **chunk
    ).result()
    stored.write(array).result()
    assert_words(tmp_path / "w", {"array": bits(array)})
    record = ckptflip.inject(tmp_path / "w", out=tmp_path / "x", count=5, seed=1)
    spec["kvstore"]["path"] = f"{tmp_path}/x/"
    altered = bits(tensorstore.open(spec).result().read().result())
    changed = np.flatnonzero(altered != bits(array))
    np.testing.assert_array_equal(changed, np.unique(record.plan.word))
    np.testing.assert_array_equal(altered[record.plan.word], record.plan.after)


def assert_words(path: Path, expected: dict[str, np.ndarray]) -> None:
    found = words_of(path)
    assert set(found) == set(expected)
    for name, words in expected.items():
        np.testing.assert_array_equal(found[name], words, name)


@pytest.mark.filterwarnings("ignore:Combining a `sharding_indexed` codec")
def test_orders_of_axes_and_bytes(tmp_path):
    array = RANDOM.standard_normal((4, 6, 5)).astype("float32")
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    turned = TransposeCodec(order=(2, 0, 1))
    group.create_array(
        "turned",
        data=array,
        chunks=(3, 2, 4),
        filters=[turned],
        serializer=BytesCodec(endian="big"),
        compressors=None,
    )
    group.create_array("twice", data=array, chunks=(3, 2, 4), filters=[turned, turned], compressors=None)
    for location in ("start", "end"):
        shards = ShardingCodec(
            chunk_shape=(2, 2, 2),
            codecs=[TransposeCodec(order=(1, 2, 0)), BytesCodec(endian="big"), Crc32cCodec()],
            index_codecs=[BytesCodec(endian="big"), Crc32cCodec()],
            index_location=location,
        )
        group.create_array(location, data=array, chunks=(2, 4, 4), serializer=shards, compressors=None)
    # The chunks of a shard are given along the axes as they are after the transposition.
    inside = ShardingCodec(chunk_shape=(1, 2, 3), codecs=[TransposeCodec(order=(2, 1, 0)), BytesCodec()])
    outside = [TransposeCodec(order=(1, 0, 2))]
    group.create_array(
        "both", data=array, chunks=(4, 2, 3), filters=outside, serializer=inside, compressors=None
    )
    old = zarr.open_group(tmp_path / "b.zarr", mode="w", zarr_format=2)
    old.create_array("columns", data=array, chunks=(3, 2, 4), order="F", compressors=None)
    old.create_array(
        "folders",
        data=array,
        chunks=(3, 2, 4),
        chunk_key_encoding={"name": "v2", "separator": "/"},
        compressors=None,
    )
    assert_words(tmp_path / "a.zarr", {n: bits(array) for n in ("turned", "twice", "start", "end", "both")})
    assert_words(tmp_path / "b.zarr", {n: bits(array) for n in ("columns", "folders")})


def test_chunk_keys_of_version_3(tmp_path):
    array = RANDOM.standard_normal((4, 6)).astype("float32")
    group = zarr.open_group(tmp_path / "a.zarr", mode="w")
    forms = [(n, s) for n in ("default", "v2") for s in ("/", ".")]
    for name, separator in forms:
        encoding = {"name": name, "separator": separator}
        for data in (array, np.float32(2)):
            chunks = tuple(3 for _ in np.shape(data))
            key = f"{name}{'dot' if separator == '.' else 'slash'}{np.ndim(data)}"
            group.create_array(
                key, data=np.asarray(data), chunks=chunks, chunk_key_encoding=encoding, compressors=None
            )
    found = words_of(tmp_path / "a.zarr")
    assert len(found) == 8
    for name, words in found.items():
        np.testing.assert_array_equal(words, bits(array if name.endswith("2") else np.float32(2)), name)
    with ckptflip.opened(tmp_path / "a.zarr") as target:
        assert target.by_patching(range(8))  # no chunk was overlooked and taken for one never written


@pytest.mark.filterwarnings("ignore:The data type", "ignore:Consolidated metadata")
@pytest.mark.parametrize("version", [2, 3])
def test_a_nested_hierarchy(tmp_path, version):
    root = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=version)
    root.create_array("opt/state/0/mu", data=np.ones((3, 4), "f4"))
    root.create_array("empty", shape=(0, 3), dtype="f4", chunks=(1, 3))
    root.create_array("text", data=np.array(["a", "bc"], "U2"))
    zarr.consolidate_metadata(root.store)
    with ckptflip.opened(tmp_path / "a.zarr") as target:
        named = {t.name: (t.shape, t.role, t.layout) for t in target.tensors}
        skipped = {s.name for s in target.skipped}
    assert named == {
        "opt/state/0/mu": (
            (3, 4),
            "optimizer",
            "chunked, zstd" if version == 3 else named["opt/state/0/mu"][2],
        ),
        "empty": ((0, 3), "other", named["empty"][2]),
    }
    assert skipped == {"text"}


@pytest.mark.parametrize("compressors", [None, [ZstdCodec()], [Crc32cCodec()]])
@pytest.mark.parametrize("shards", [None, (4, 6)])
@pytest.mark.parametrize("mode", ["repair", "leave"])
def test_chunks_that_were_never_written(tmp_path, compressors, shards, mode):
    path, out = tmp_path / "a.zarr", tmp_path / "b.zarr"
    made = zarr.create_array(
        path, shape=(6, 9), dtype="f4", chunks=(2, 3), shards=shards, compressors=compressors, fill_value=1.5
    )
    made[0, 0] = 3
    before = bits(made[...])
    assert_words(path, {"array": before})
    record = ckptflip.inject(path, out=out, count=12, seed=5, checksum=mode)
    if mode == "leave" and compressors == [Crc32cCodec()]:
        with pytest.raises(ValueError, match="checksum"):
            zarr.open_array(out, mode="r")[...]
        return
    expected = before.copy()
    np.bitwise_xor.at(expected, record.plan.word, (record.plan.before ^ record.plan.after).astype("u4"))
    np.testing.assert_array_equal(bits(zarr.open_array(out, mode="r")[...]), expected)


FILLS = {
    "float32": [0, -1.5, "NaN", "-Infinity", "0x7fc00001"],
    "float16": [65504.0, "Infinity"],
    "int8": [-3, 127],
    "uint64": [2**64 - 1],
    "bool": [True, False],
    "complex64": [[1.0, "NaN"]],
}


@pytest.mark.parametrize(("dtype", "fill"), [(d, f) for d, several in FILLS.items() for f in several])
def test_fill_values(tmp_path, dtype, fill):
    zarr.create_array(tmp_path / "a.zarr", shape=(3,), dtype=dtype, chunks=(2,))
    metadata = tmp_path / "a.zarr" / "zarr.json"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "fill_value": fill}))
    assert_words(tmp_path / "a.zarr", {"array": bits(zarr.open_array(tmp_path / "a.zarr", mode="r")[...])})


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [("int8", 200), ("float32", "0x1ffffffff"), ("float32", [1]), ("bool", 2), ("int32", None)],
)
def test_impossible_fill_values_are_left_out(tmp_path, dtype, fill):
    zarr.create_array(tmp_path / "a.zarr", shape=(3,), dtype=dtype, chunks=(2,))
    metadata = tmp_path / "a.zarr" / "zarr.json"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "fill_value": fill}))
    with ckptflip.opened(tmp_path / "a.zarr") as target:
        assert not target.tensors and "fill value" in target.skipped[0].reason


def test_only_the_chunk_that_is_hit_is_rewritten(tmp_path):
    path, out = tmp_path / "a.zarr", tmp_path / "b.zarr"
    data = RANDOM.standard_normal((8, 8)).astype("f4")
    zarr.create_array(path, data=data, chunks=(2, 2), compressors=[GzipCodec()])
    ckptflip.inject(path, out=out, count=1, seed=1)
    names = [p.relative_to(path) for p in path.rglob("*") if p.is_file()]
    assert sum((path / n).read_bytes() != (out / n).read_bytes() for n in names) == 1


def test_a_shard_keeps_its_other_chunks_where_they_are(tmp_path):
    path, out = tmp_path / "a.zarr", tmp_path / "b.zarr"
    zarr.create_array(
        path, data=np.ones((4, 64), "f4"), chunks=(1, 64), shards=(4, 64), compressors=[ZstdCodec()]
    )
    # Ones are short when compressed: the altered chunk does not fit in its old place.
    ckptflip.inject(path, out=out, count=40, rows="1", seed=1)
    before, after = ((p / "c" / "0" / "0").read_bytes() for p in (path, out))
    index = [np.frombuffer(d[-68:-4], "<u8").reshape(4, 2) for d in (before, after)]
    assert (index[0] == index[1]).all(axis=1).tolist() == [True, False, True, True]
    assert int(index[1][1, 0]) == len(before) - 68


@pytest.mark.parametrize("name", ["gzip", "zlib", "bz2", "lzma", "zstd", "blosc", "lz4"])
def test_compressors_of_version_2(tmp_path, name):
    numcodecs = pytest.importorskip("numcodecs")
    compressor = numcodecs.get_codec({"id": name})
    data = RANDOM.integers(0, 9, (40, 7)).astype("int32")
    path, out = tmp_path / "a.zarr", tmp_path / "b.zarr"
    zarr.create_array(path, data=data, chunks=(16, 4), compressors=compressor, zarr_format=2)
    assert_words(path, {"array": bits(data)})
    record = ckptflip.inject(path, out=out, count=30, seed=2)
    found = bits(zarr.open_array(out, mode="r")[...])
    assert int((found != bits(data)).sum()) == np.unique(record.plan.word).size
    np.testing.assert_array_equal(words_of(out)["array"], found)


# How numcodecs names the same in version 3.
@pytest.mark.parametrize("name", ["zlib", "bz2", "lz4", "zstd"])
def test_compressors_of_numcodecs_in_version_3(tmp_path, name):
    from zarr.codecs import numcodecs as wrapped

    codec = {"zlib": wrapped.Zlib, "bz2": wrapped.BZ2, "lz4": wrapped.LZ4, "zstd": wrapped.Zstd}[name]
    data = RANDOM.integers(0, 9, (40, 7)).astype("int32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # up to zarr 3.1: not in the specification
        zarr.create_array(tmp_path / "a.zarr", data=data, chunks=(16, 4), compressors=[codec()])
    assert_words(tmp_path / "a.zarr", {"array": bits(data)})


GOLDEN = {
    "zarr.json": json.dumps(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [3],
            "data_type": "int16",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2]}},
            "chunk_key_encoding": {"name": "default"},
            "fill_value": -1,
            "codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, "crc32c"],
        }
    ).encode(),
    "c/0": bytes.fromhex("0001 0002") + checksum("crc32c", bytes.fromhex("0001 0002")).to_bytes(4, "little"),
}


def golden(folder: Path, **changes: object) -> Path:
    """A hand-made array of two chunks, of which one is there; with other metadata."""
    for name, data in GOLDEN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    said = {**json.loads(GOLDEN["zarr.json"]), **changes}
    (folder / "zarr.json").write_text(json.dumps({k: v for k, v in said.items() if v is not ...}))
    return folder


def test_golden_bytes(tmp_path):
    path = golden(tmp_path / "g")
    assert words_of(path)["array"].tolist() == [1, 2, 0xFFFF]
    record = ckptflip.inject(path, out=tmp_path / "h", bits="0", count=3, seed=1)
    assert record.bits_effective == 3
    chunks = {0: bytes.fromhex("0000 0003"), 1: bytes.fromhex("fffe ffff")}
    for i, chunk in chunks.items():
        found = (tmp_path / "h" / "c" / str(i)).read_bytes()
        assert found == chunk + checksum("crc32c", chunk).to_bytes(4, "little")


def shard(entries: list[tuple[int, int]], data: bytes, *, crc: int | None = None) -> bytes:
    index = b"".join(struct.pack("<QQ", *e) for e in entries)
    return data + index + (checksum("crc32c", index) if crc is None else crc).to_bytes(4, "little")


NEVER = (2**64 - 1, 2**64 - 1)
SHARDING = [
    {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [2],
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        },
    }
]
GRID_4 = {"name": "regular", "configuration": {"chunk_shape": [4]}}


def sharded(folder: Path, content: bytes) -> Path:
    path = golden(folder, shape=[4], chunk_grid=GRID_4, codecs=SHARDING)
    (path / "c" / "0").write_bytes(content)
    return path


def test_golden_shard(tmp_path):
    path = sharded(tmp_path / "s", shard([(4, 4), NEVER], b"junk" + bytes.fromhex("01000200")))
    assert words_of(path)["array"].tolist() == [1, 2, 0xFFFF, 0xFFFF]
    ckptflip.inject(path, out=tmp_path / "t", bits="0", count=4, seed=1)
    altered = b"junk" + bytes.fromhex("00000300 feff feff")
    assert (tmp_path / "t" / "c" / "0").read_bytes() == shard([(4, 4), (8, 4)], altered)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (shard([(0, 4), (2, 4)], bytes(8)), "overlap"),
        (shard([(0, 4), (8, 4)], bytes(8)), "outside"),
        (shard([(0, 4), (2**63, 4)], bytes(8)), "outside"),
        (shard([(0, 4), (4, 2**64 - 2)], bytes(8)), "outside"),
        (shard([(0, 4), (2**64 - 1, 4)], bytes(8)), "half an entry"),
        (shard([(0, 3), NEVER], bytes(8)), "3 bytes"),
        (shard([(0, 4), NEVER], bytes(8), crc=1), "CRC-32C"),
        (b"short", "index alone"),
    ],
)
def test_damaged_shards_are_refused(tmp_path, content, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(sharded(tmp_path / "s", content))


def grid(*chunk: object) -> dict:
    return {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}}}


DEEP = "[" * 200_000
HOSTILE = {
    "no shape": ({"shape": ...}, "shape"),
    "a negative length": ({"shape": [-1]}, "below 0"),
    "a length that is a text": ({"shape": ["3"]}, "whole numbers"),
    "a length that is true": ({"shape": [True]}, "whole numbers"),
    "more elements than any file": ({"shape": [2**40, 2**40], **grid(1, 1)}, "more elements"),
    "many axes": ({"shape": [1] * 33, **grid(*[1] * 33)}, "33 axes"),
    "an empty chunk": (grid(0), "impossible"),
    "a negative chunk": (grid(-2), "below 0"),
    "a huge chunk": (grid(2**41), "impossible"),
    "chunks beyond any file": ({"shape": [9, 9, 9], **grid(*[2**39] * 3)}, "larger than any file"),
    "chunks of other axes": (grid(2, 2), "axes"),
    "no codecs": ({"codecs": []}, "codecs"),
    "codecs without names": ({"codecs": [{}]}, "no name"),
    "only a transposition": (
        {"codecs": [{"name": "transpose", "configuration": {"order": [0]}}]},
        "makes bytes",
    ),
    "an order that is none": (
        {"codecs": [{"name": "transpose", "configuration": {"order": [1]}}, {"name": "bytes"}]},
        "no order",
    ),
    "a byte order that is none": (
        {"codecs": [{"name": "bytes", "configuration": {"endian": "m"}}]},
        "byte order",
    ),
    "another version": ({"zarr_format": 4}, "version 3"),
    "another node": ({"node_type": "thing"}, "neither"),
    "a separator that climbs": (
        {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "/../"}}},
        "separator",
    ),
}


@pytest.mark.parametrize(("changes", "complaint"), HOSTILE.values(), ids=HOSTILE)
def test_impossible_metadata_is_refused(tmp_path, changes, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(golden(tmp_path / "h", **changes))


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"\xff\xfe", DEEP.encode(), b'{"a": ' + b"9" * 5000 + b"}"]
)
@pytest.mark.parametrize("name", ["zarr.json", ".zarray"])
def test_what_is_no_metadata_is_refused(tmp_path, raw, name):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(tmp_path)


def test_huge_metadata_is_not_read(tmp_path):
    with (tmp_path / "zarr.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="longer than"):
        open_checkpoint(tmp_path)


LEFT_OUT = {
    "a transformer": {"storage_transformers": [{"name": "x"}]},
    "an irregular grid": {"chunk_grid": {"name": "rectilinear", "configuration": {}}},
    "texts": {"data_type": "string"},
    "raw bits": {"data_type": "r24"},
    "times": {"data_type": {"name": "numpy.datetime64", "configuration": {"unit": "s"}}},
    "an unknown codec": {"codecs": [{"name": "bytes"}, {"name": "zfp"}]},
    "two compressions": {"codecs": [{"name": "bytes"}, {"name": "zstd"}, {"name": "gzip"}]},
    "packed bits": {"codecs": [{"name": "packbits"}]},
    "unknown keys": {"chunk_key_encoding": {"name": "hilbert"}},
    "many chunks that are not there": {"shape": [10_000_000], **grid(1)},
    "a whole shard compressed": {"codecs": [*SHARDING, {"name": "zstd"}], "shape": [4], "chunk_grid": GRID_4},
    "chunks too large to decode": {
        "shape": [2**33],
        **grid(2**33),
        "codecs": [{"name": "bytes"}, {"name": "gzip"}],
    },
}


@pytest.mark.parametrize("changes", LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_cannot_be_altered_is_left_out_with_a_reason(tmp_path, changes):
    path = golden(tmp_path / "h", **changes)
    (path / "c" / "0").unlink()
    with ckptflip.opened(path) as target:
        assert not target.tensors
        assert [s.name for s in target.skipped] == ["array"] and target.skipped[0].reason


def test_claims_cost_nothing_together(tmp_path):
    zarr.open_group(tmp_path, mode="w")
    for i in range(40):
        golden(tmp_path / str(i), shape=[60_000], **grid(1))
        (tmp_path / str(i) / "c" / "0").unlink()
    with ckptflip.opened(tmp_path) as target:
        assert len(target.tensors) == 1 and len(target.skipped) == 39


@pytest.mark.parametrize(
    ("size", "complaint"), [(3, "3 bytes, where 8"), (9, "9 bytes, where 8"), (0, "0 bytes, where 8")]
)
def test_chunks_of_a_wrong_size_are_refused(tmp_path, size, complaint):
    path = golden(tmp_path / "h")
    (path / "c" / "0").write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match=complaint):
        open_checkpoint(path)


def bombs() -> dict[str, tuple[str, bytes]]:
    """Ten mebibytes or a gibibyte where eight bytes should be."""
    many = bytes(10 << 20)
    block = ((128 << 10 << 3) | 2).to_bytes(3, "little") + b"\0"
    frame = b"\x28\xb5\x2f\xfd\x00\x58" + block * 8000 + b"\x01\0\0"
    claimed = b"\x28\xb5\x2f\xfd\xe0" + (1 << 60).to_bytes(8, "little") + block * 8 + b"\x01\0\0"
    return {
        "gzip": ("gzip", gzip.compress(many)),
        "zlib": ("zlib", zlib.compress(many)),
        "bz2": ("bz2", bz2.compress(many)),
        "lzma": ("lzma", lzma.compress(many)),
        "zstd without a size": ("zstd", frame),
        "zstd of a huge size": ("zstd", claimed),
        "blosc": ("blosc", struct.pack("<4B3I", 2, 1, 0x21, 4, 1 << 30, 1 << 18, 20) + b"\0" * 4),
        "lz4": ("lz4", struct.pack("<I", 1 << 30) + bytes(10)),
    }


@pytest.mark.parametrize("bomb", (BOMBS := bombs()))
def test_what_decodes_to_more_is_refused(tmp_path, bomb):
    name, data = BOMBS[bomb]
    path = golden(tmp_path / "h", codecs=[{"name": "bytes"}, {"name": f"numcodecs.{name}"}])
    (path / "c" / "0").write_bytes(data)
    # So much is refused by its length alone; the decoder itself must refuse it too.
    with pytest.raises(codecs.DamagedError):
        codecs.decompress(Compressor(name, {}), data, 8)
    with pytest.raises(CheckpointError):
        words_of(path)


@pytest.mark.parametrize("name", ["gzip", "zlib", "bz2", "lzma", "zstd", "blosc", "lz4"])
def test_what_decodes_to_less_or_is_cut_short_is_refused(name):
    coded = codecs.compress(Compressor(name, {}), b"12345678")
    assert codecs.decompress(Compressor(name, {}), coded, 8) == b"12345678"
    for size in (0, 7, 9, 100):
        with pytest.raises(codecs.DamagedError):
            codecs.decompress(Compressor(name, {}), coded, size)
    for length in range(len(coded)):
        with pytest.raises(codecs.DamagedError):
            codecs.decompress(Compressor(name, {}), coded[:length], 8)


@pytest.mark.parametrize(
    ("name", "configuration"),
    [
        ("zstd", {"level": 1000}),
        ("gzip", {"level": "x"}),
        ("blosc", {"cname": "x"}),
        ("blosc", {"typesize": 1 << 70}),
        ("lz4", {"acceleration": -1}),
        ("lzma", {"format": 77}),
    ],
)
def test_settings_no_codec_has_are_refused(name, configuration):
    with pytest.raises(codecs.DamagedError):
        codecs.compress(Compressor(name, configuration), b"12345678")


@pytest.mark.parametrize("name", ["zstd", "blosc"])
def test_tensorstore_stands_in_for_numcodecs(monkeypatch, name):
    pytest.importorskip("tensorstore")
    compressor = Compressor(name, {"typesize": 4} if name == "blosc" else {})
    data = RANDOM.integers(0, 4, 400, np.uint8).tobytes()
    coded = codecs.compress(compressor, data)
    monkeypatch.setattr(codecs, "_numcodecs", lambda _: None)
    assert codecs.decompress(compressor, coded, 400) == data
    again = codecs.compress(compressor, data)
    with pytest.raises(codecs.DamagedError):
        codecs.decompress(compressor, again, 401)
    monkeypatch.undo()
    assert codecs.decompress(compressor, again, 400) == data


def test_a_missing_library_is_named(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(codecs, "import_module", absent)
    coded = struct.pack("<I", 8) + bytes(12)
    for name in ("zstd", "lz4"):
        with pytest.raises(MissingExtraError, match=r"ckptflip\[zarr\]"):
            codecs.decompress(Compressor(name, {}), coded, 8)
        with pytest.raises(MissingExtraError, match=r"ckptflip\[zarr\]"):
            codecs.compress(Compressor(name, {}), coded)
    assert codecs.crc32c(b"123456789") == 0xE3069283


def test_links_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    golden(outside)
    root = tmp_path / "root"
    zarr.open_group(root, mode="w").create_array("a", data=np.ones(4, "f4"), chunks=(2,), compressors=None)
    (root / "out").symlink_to(outside)
    (root / "round").symlink_to(root)
    golden(root / "chunk")
    (root / "chunk" / "c" / "0").unlink()
    (root / "chunk" / "c" / "0").symlink_to(outside / "c" / "0")
    golden(root / "folder")
    shutil.rmtree(root / "folder" / "c")
    (root / "folder" / "c").symlink_to(outside / "c")
    golden(root / "said")
    (root / "said" / "zarr.json").unlink()
    (root / "said" / "zarr.json").symlink_to(outside / "zarr.json")
    golden(root / "pipe")
    (root / "pipe" / "c" / "0").unlink()
    os.mkfifo(root / "pipe" / "c" / "0")
    with ckptflip.opened(root) as target:
        assert [t.name for t in target.tensors] == ["a"]
        assert {s.name for s in target.skipped} == {"out", "round", "chunk", "folder", "said", "pipe"}


def test_deep_folders_are_refused(tmp_path):
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    (tmp_path / "/".join(["a"] * 150)).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="folders deep"):
        open_checkpoint(tmp_path)


def test_files_that_are_no_chunks_are_passed_over(tmp_path):
    path = golden(tmp_path / "h")
    for name in (
        "c/00",
        "c/+1",
        "c/-1",
        "c/7",
        "c/1.0",
        "c/x",
        "c/1/0",
        "0",
        "notes.txt",
        "c/\u0661",
        "c/" + "9" * 60,
    ):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"no chunk") if name != "c/1/0" else None
    assert words_of(path)["array"].tolist() == [1, 2, 0xFFFF]


def test_recognising(tmp_path):
    assert not recognises(tmp_path)
    for name in ("zarr.json", ".zarray", ".zgroup"):
        (tmp_path / name).touch()
        assert recognises(tmp_path)
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match="no zarr folder"):
        open_checkpoint(tmp_path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["bytes", "c", "regular", "/", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "order", "level"]), inner)
    ),
    max_leaves=6,
)
FIELDS = (*json.loads(GOLDEN["zarr.json"]), "storage_transformers", "attributes")


def paths_in(value: object, here: tuple = ()) -> list[tuple]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(p for key, each in inner for p in paths_in(each, (*here, key)))]


SHARDED_SAID = {**json.loads(GOLDEN["zarr.json"]), "shape": [4], "chunk_grid": GRID_4, "codecs": SHARDING}
PLACES = [p for p in paths_in(SHARDED_SAID) if p]


def attempt(path: Path) -> None:
    """Open, read and alter: nothing but a CheckpointError may come of it."""
    try:
        with ckptflip.opened(path) as target:
            for i, _ in enumerate(target.tensors):
                if target.tensors[i].words < 1 << 20:
                    for _ in target.blocks(i):
                        pass
            if not sum(t.words for t in target.tensors):
                return
        ckptflip.inject(path, out=path.with_name("out"), overwrite=True, count=1, seed=1)
    except CheckpointError:
        pass


@settings(max_examples=1200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(PLACES), JSON), min_size=1, max_size=3))
def test_altered_metadata_gives_clear_errors_only(tmp_path, changes):
    said = json.loads(json.dumps(SHARDED_SAID))
    for place, value in changes:
        target = said
        try:
            for key in place[:-1]:
                target = target[key]
            target[place[-1]] = value
        except (LookupError, TypeError):
            pass  # an earlier change took this place away
    path = sharded(tmp_path / "s", shard([(0, 4), (4, 4)], bytes(8)))
    (path / "zarr.json").write_text(json.dumps(said))
    attempt(path)


@settings(max_examples=800, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 43), st.integers(0, 255)), max_size=6),
    st.integers(0, 44),
    st.booleans(),
    st.sampled_from(["zstd", "gzip", None]),
)
def test_altered_shards_give_clear_errors_only(tmp_path, changes, length, sealed, name):
    compressor = [] if name is None else [{"name": name}]
    inside = {**SHARDING[0]["configuration"], "codecs": [{"name": "bytes"}, *compressor]}
    inside["index_codecs"] = [{"name": "bytes"}, *([{"name": "crc32c"}] if sealed else [])]
    content = bytearray(shard([(0, 4), (4, 4)], bytes(8)))
    for at, value in changes:
        content[at] = value
    if not sealed:
        del content[-4:]
    path = sharded(tmp_path / "s", bytes(content[: length if length % 3 == 0 else 44]))
    said = {**SHARDED_SAID, "codecs": [{"name": "sharding_indexed", "configuration": inside}]}
    (path / "zarr.json").write_text(json.dumps(said))
    attempt(path)
