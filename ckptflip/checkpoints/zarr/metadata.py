"""What the metadata of a zarr array says: shape, dtype, chunks, and how a chunk becomes bytes.

Sources: the Zarr v3 core specification and the pages of its codecs (bytes, transpose, crc32c,
sharding_indexed, gzip, zstd, blosc); the Zarr v2 specification; the dtype names that TensorStore adds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from msgspec import Struct

from ckptflip.bits import NumberFormat, lookup
from ckptflip.bits.formats import ML_FLOATS, ML_INTEGERS
from ckptflip.checkpoints.listing import DamagedError, bits_of

# A root's metadata may hold that of every array below it.
LONGEST = 1 << 25
_LONGEST_CHUNK_AXIS = 1 << 40
_MOST_AXES = 32
# Decoded by ckptflip.checkpoints.zarr.codecs; zarr-python writes the ones of numcodecs with a prefix.
COMPRESSORS = frozenset(("gzip", "zlib", "bz2", "lzma", "zstd", "blosc", "lz4"))
_NUMPY_NAMES = frozenset(
    (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
)
_ML_NAMES = frozenset((*ML_FLOATS, *ML_INTEGERS))
_V2_DTYPE = re.compile(r"([<>|])([biufc])(\d{1,2})")
_V2_KINDS = {"b": "bool", "i": "int", "u": "uint", "f": "float", "c": "complex"}
_ENDIAN = {"little": "<", "big": ">"}


class UnsupportedError(Exception):
    """An array of a kind that cannot be altered here: it is left out, with this reason."""


class Compressor(Struct, frozen=True):
    """A codec that makes bytes smaller: its name, one of `COMPRESSORS`, and what the metadata say of it."""

    name: str
    configuration: Mapping[str, Any]


class Chain(Struct, frozen=True):
    """How a chunk becomes bytes.

    Attributes:
        axes: the stored axes in C order, each as an axis of the array.
        order: byte order of the words.
        inner: how many CRC-32C follow the words before they are compressed (or where nothing is).
        compressor: None where the words lie as they are.
        outer: how many CRC-32C follow the compressed bytes.
    """

    axes: tuple[int, ...]
    order: str
    inner: int = 0
    compressor: Compressor | None = None
    outer: int = 0


class Sharding(Struct, frozen=True):
    """How the chunks in a shard are found.

    Attributes:
        axes: the axes of the shard's index in C order, each as an axis of the array.
        chunk: shape of a chunk in the shard.
        order: byte order of the index.
        sealed: whether a CRC-32C follows the index.
        at_end: whether the index lies at the end of the shard, and not at its start.
    """

    axes: tuple[int, ...]
    chunk: tuple[int, ...]
    order: str
    sealed: bool
    at_end: bool


class ArrayHeader(Struct, frozen=True):
    """The metadata of an array.

    Attributes:
        shape: elements along each axis.
        number: the format of an element.
        grid: elements of a chunk, or of a shard, along each axis.
        prefix: what the keys of chunks start with: ``c`` or nothing.
        separator: what stands between the numbers of a key.
        chain: how a chunk becomes bytes.
        sharding: how a shard is divided, or None.
        fill: the value of elements that were never written, as JSON has it.
    """

    shape: tuple[int, ...]
    number: NumberFormat
    grid: tuple[int, ...]
    prefix: str
    separator: str
    chain: Chain
    sharding: Sharding | None = None
    fill: Any = None

    @property
    def chunk(self) -> tuple[int, ...]:
        """Elements along each axis of what is coded as one: a chunk, in a shard if there are shards."""
        return self.sharding.chunk if self.sharding else self.grid

    @property
    def item_bytes(self) -> int:
        """Bytes of an element."""
        return self.number.parts * self.number.word_size

    @property
    def chunk_bytes(self) -> int:
        """Bytes of all words of a chunk."""
        return prod(self.chunk) * self.item_bytes


def json_object(raw: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DamagedError: something else.
    """
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as why:
        raise DamagedError(f"it is not JSON ({type(why).__name__}: {str(why)[:100]})") from None
    if not isinstance(found, dict):
        raise DamagedError("it is JSON, but no object")
    return found


def read_v3(raw: bytes) -> ArrayHeader | None:
    """What a ``zarr.json`` says; None for a group.

    Raises:
        DamagedError: claims that cannot be true.
        UnsupportedError: an array that cannot be altered.
    """
    said = json_object(raw)
    if said.get("zarr_format") != 3 or said.get("node_type") not in ("array", "group"):
        raise DamagedError("it describes neither an array nor a group of zarr version 3")
    if said["node_type"] == "group":
        return None
    shape = _whole(said.get("shape"), "shape", 0)
    if said.get("storage_transformers"):
        raise UnsupportedError("a storage transformer")
    name, grid_form = _named(said.get("chunk_grid"), "chunk grid")
    if name != "regular":
        raise UnsupportedError(f"a chunk grid of the kind {name!r}")
    grid = _chunk(grid_form.get("chunk_shape"), shape)
    prefix, separator = _key_form(said.get("chunk_key_encoding"))
    number = _number(_named(said.get("data_type"), "data type")[0])
    _check_size(shape, grid, number)
    chain, sharding = _codecs(said.get("codecs"), grid)
    if sharding:
        _check_size(shape, sharding.chunk, number)
    return ArrayHeader(shape, number, grid, prefix, separator, chain, sharding, said.get("fill_value"))


def read_v2(raw: bytes) -> ArrayHeader:
    """What a ``.zarray`` says.

    Raises:
        DamagedError, UnsupportedError: as for `read_v3`.
    """
    said = json_object(raw)
    if said.get("zarr_format") != 2:
        raise DamagedError("it does not describe an array of zarr version 2")
    shape = _whole(said.get("shape"), "shape", 0)
    grid = _chunk(said.get("chunks"), shape)
    number, order = _v2_number(said.get("dtype"))
    _check_size(shape, grid, number)
    if said.get("filters"):
        raise UnsupportedError(f"filters ({', '.join(_ids(said['filters']))})")
    axes = tuple(range(len(shape)))
    if said.get("order", "C") not in ("C", "F"):
        raise DamagedError(f"its order is {said['order']!r}, neither C nor F")
    chain = Chain(axes if said.get("order", "C") == "C" else axes[::-1], order)
    if said.get("compressor") is not None:
        (name,) = _ids([said["compressor"]])
        chain = Chain(chain.axes, order, 0, _compressor(name, said["compressor"]))
    separator = said.get("dimension_separator", ".")
    if separator not in (".", "/"):
        raise DamagedError(f"its dimension separator is {separator!r}")
    # In version 2 no fill value means that nobody cares; readers give zeros.
    fill = 0 if said.get("fill_value") is None else said["fill_value"]
    return ArrayHeader(shape, number, grid, "", separator, chain, None, fill)


def _ids(given: Any) -> list[str]:
    """The names of codecs of version 2."""
    if isinstance(given, list) and all(isinstance(g, dict) and isinstance(g.get("id"), str) for g in given):
        return [g["id"] for g in given]
    raise DamagedError("its filters or its compressor have no names")


def _named(given: Any, what: str) -> tuple[str, dict[str, Any]]:
    """The name and the configuration of something that extensions may add to."""
    if isinstance(given, str):
        return given, {}
    if isinstance(given, dict) and isinstance(given.get("name"), str):
        configuration = given.get("configuration")
        if configuration is None:
            return given["name"], {}
        if isinstance(configuration, dict):
            return given["name"], configuration
    raise DamagedError(f"its {what} has no name")


def _whole(given: Any, what: str, least: int) -> tuple[int, ...]:
    """A list of whole numbers."""
    if not isinstance(given, list) or any(type(n) is not int for n in given):
        raise DamagedError(f"its {what} is not a list of whole numbers")
    if len(given) > _MOST_AXES:
        raise DamagedError(f"its {what} has {len(given)} axes; at most {_MOST_AXES} are possible")
    if any(n < least for n in given):
        raise DamagedError(f"its {what} {given} has a length below {least}")
    return tuple(given)


def _chunk(given: Any, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of chunks; where the array is empty it does not matter."""
    chunk = _whole(given, "chunk shape", 0)
    if len(chunk) != len(shape):
        raise DamagedError(f"its chunks have {len(chunk)} axes and the array {len(shape)}")
    if any(n > _LONGEST_CHUNK_AXIS or (n < 1 and prod(shape)) for n in chunk):
        raise DamagedError(f"its chunk shape {list(chunk)} is impossible")
    return chunk


def _check_size(shape: Sequence[int], chunk: Sequence[int], number: NumberFormat) -> None:
    width = number.parts * number.word_size * 8
    bits_of(shape, width)
    try:
        bits_of(chunk, width)
    except DamagedError:
        raise DamagedError(f"its chunk shape {list(chunk)} is larger than any file") from None


def _number(name: str) -> NumberFormat:
    if name in _NUMPY_NAMES or name in _ML_NAMES:
        return lookup(name)
    raise UnsupportedError(f"elements of the type {name[:60]!r}")


def _v2_number(given: Any) -> tuple[NumberFormat, str]:
    if not isinstance(given, str):
        raise UnsupportedError("elements of several fields")
    if given in _ML_NAMES:
        return lookup(given), "<"
    form = _V2_DTYPE.fullmatch(given)
    if not form:
        raise UnsupportedError(f"elements of the type {given[:60]!r}")
    order, kind, size = form.groups()
    name = "bool" if (kind, size) == ("b", "1") else f"{_V2_KINDS[kind]}{int(size) * 8}"
    return _number(name), ">" if order == ">" else "<"


def _key_form(given: Any) -> tuple[str, str]:
    name, configuration = _named(given, "chunk key encoding")
    if name not in ("default", "v2"):
        raise UnsupportedError(f"chunk keys of the kind {name!r}")
    separator = configuration.get("separator", "/" if name == "default" else ".")
    if separator not in (".", "/"):
        raise DamagedError(f"the separator of its chunk keys is {separator!r}")
    return "c" if name == "default" else "", separator


def _codecs(given: Any, grid: tuple[int, ...]) -> tuple[Chain, Sharding | None]:
    """The codecs of an array."""
    axes, (name, configuration), rest = _parted(given, tuple(range(len(grid))))
    if name != "sharding_indexed":
        return _chain(axes, name, configuration, rest), None
    if rest:
        raise UnsupportedError(f"{rest[0][0]!r} over whole shards")
    chunk = _whole(configuration.get("chunk_shape"), "shape of chunks in a shard", 1)
    if len(chunk) != len(grid) or any(grid[a] % n for a, n in zip(axes, chunk, strict=True)):
        raise DamagedError(f"chunks of {list(chunk)} do not fill its shards of {list(grid)}")
    inside = [chunk[axes.index(a)] for a in range(len(grid))]
    _, (index_name, index_form), index_rest = _parted(configuration.get("index_codecs"), ())
    if index_name != "bytes" or [n for n, _ in index_rest] not in ([], ["crc32c"]):
        raise UnsupportedError("a shard index that is coded in another way than as bytes and a CRC-32C")
    location = configuration.get("index_location", "end")
    if location not in ("start", "end"):
        raise DamagedError(f"the index of its shards lies at {location!r}, neither start nor end")
    order = _endian(index_form)
    sharding = Sharding(axes, tuple(inside), order, bool(index_rest), location == "end")
    inner_axes, (name, form), rest = _parted(configuration.get("codecs"), axes)
    return _chain(inner_axes, name, form, rest), sharding


_Codec = tuple[str, dict[str, Any]]


def _parted(given: Any, axes: tuple[int, ...]) -> tuple[tuple[int, ...], _Codec, list[_Codec]]:
    """A list of codecs: the axes after all transpositions, what makes bytes of numbers, and what follows."""
    if not isinstance(given, list) or not given or len(given) > _MOST_AXES:
        raise DamagedError("it has no list of codecs")
    codecs = [_named(c, "codec") for c in given]
    while codecs and codecs[0][0] == "transpose":
        order = codecs.pop(0)[1].get("order")
        order = {"C": list(range(len(axes))), "F": list(range(len(axes)))[::-1]}.get(str(order), order)
        if not isinstance(order, list) or sorted(map(str, order)) != sorted(map(str, range(len(axes)))):
            raise DamagedError(f"{str(order)[:60]} is no order of {len(axes)} axes")
        axes = tuple(axes[int(i)] for i in order)
    if not codecs:
        raise DamagedError("none of its codecs makes bytes of numbers")
    return axes, codecs[0], codecs[1:]


def _endian(configuration: Mapping[str, Any]) -> str:
    """The byte order of a `bytes` codec, which may be missing where elements have one byte."""
    order = _ENDIAN.get(str(configuration.get("endian", "little")))
    if order is None:
        raise DamagedError(f"its byte order is {str(configuration['endian'])[:60]!r}")
    return order


def _chain(axes: tuple[int, ...], name: str, configuration: dict[str, Any], rest: list[_Codec]) -> Chain:
    if name != "bytes":
        raise UnsupportedError(f"the codec {name[:60]!r}")
    counts, compressor = [0, 0], None
    for each, form in rest:
        if each == "crc32c":
            counts[compressor is not None] += 1
        elif compressor is not None:
            raise UnsupportedError(f"the codec {each[:60]!r} after {compressor.name!r}")
        else:
            compressor = _compressor(each.removeprefix("numcodecs."), form)
    return Chain(axes, _endian(configuration), counts[0], compressor, counts[1])


def _compressor(name: str, configuration: Mapping[str, Any]) -> Compressor:
    if name not in COMPRESSORS:
        raise UnsupportedError(f"the codec {name[:60]!r}")
    return Compressor(name, configuration)
