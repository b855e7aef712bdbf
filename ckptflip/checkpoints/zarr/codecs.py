"""Compressed chunks: decoding to a size that is known before, and encoding.

gzip, zlib, bz2 and lzma come with Python. zstd, blosc and lz4 come with numcodecs, which zarr needs; where
that is missing, TensorStore does zstd and blosc.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np

from ckptflip.checkpoints import crc
from ckptflip.checkpoints.listing import DamagedError
from ckptflip.checkpoints.zarr.metadata import Compressor
from ckptflip.errors import MissingExtraError

_BLOSC_SHUFFLES = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}
_BLOSC_HEADER = 16
_BLOSC_NAMES = frozenset(("blosclz", "lz4", "lz4hc", "snappy", "zlib", "zstd"))
_LEVELS = {"gzip": (0, 9), "zlib": (0, 9), "bz2": (1, 9), "blosc": (0, 9), "zstd": (-131072, 22)}
_DEFAULT_LEVELS = {"gzip": 5, "zlib": 1, "bz2": 1, "blosc": 5, "zstd": 0}
_LZMA_DEFAULT_FORMAT = lzma.FORMAT_XZ


def decompress(compressor: Compressor, data: bytes, size: int) -> bytes:
    """Decode a chunk.

    Args:
        compressor: how it is coded.
        data: the coded bytes.
        size: bytes that it must decode to. No more than one byte beyond them is ever decoded.

    Raises:
        DamagedError: it cannot be decoded, or to another size.
        MissingExtraError: a library is missing.
    """
    try:
        found = _DECODERS[compressor.name](compressor, data, size)
    except (MissingExtraError, DamagedError):
        raise
    except Exception as why:
        # Every codec has errors of its own.
        raise DamagedError(f"{compressor.name} cannot decode it ({str(why)[:200]})") from None
    if len(found) != size:
        raise DamagedError(f"{compressor.name} decodes it to another size than {size} bytes")
    return found


def compress(compressor: Compressor, data: bytes) -> bytes:
    """Encode a chunk as the metadata say.

    Raises:
        DamagedError: the metadata ask for what the codec cannot do.
        MissingExtraError: a library is missing.
    """
    try:
        return _ENCODERS[compressor.name](compressor.configuration, data)
    except (MissingExtraError, DamagedError):
        raise
    except Exception as why:
        raise DamagedError(f"{compressor.name} cannot encode it ({str(why)[:200]})") from None


def crc32c(data: bytes) -> int:
    """The CRC-32C of any amount of bytes, by the library that zarr itself uses where there is one."""
    try:
        return int(import_module("google_crc32c").value(data))
    except ImportError:
        return crc.checksum("crc32c", data)


def _level(name: str, configuration: Mapping[str, Any], key: str = "level") -> int:
    low, high = _LEVELS[name]
    level = configuration.get(key)
    if level is None:
        return _DEFAULT_LEVELS[name]
    if type(level) is not int or not low <= level <= high:
        raise DamagedError(f"{name} has no level {str(level)[:20]}")
    return level


def _inflate(wbits: int) -> Callable[[Compressor, bytes, int], bytes]:
    def decode(_: Compressor, data: bytes, size: int) -> bytes:
        machine = zlib.decompressobj(wbits)
        found = machine.decompress(data, size + 1)
        # A second member may follow, as gzip allows.
        while machine.eof and machine.unused_data and len(found) <= size:
            machine, data = zlib.decompressobj(wbits), machine.unused_data
            found += machine.decompress(data, size + 1 - len(found))
        if len(found) <= size and not machine.eof:
            raise DamagedError("it ends early")
        return found

    return decode


def _bounded(machine: Any, data: bytes, size: int) -> bytes:
    found: bytes = machine.decompress(data, size + 1)
    # Up to the limit each call may give less than there is.
    while len(found) <= size and not machine.eof:
        more = machine.decompress(b"", size + 1 - len(found))
        if not more:
            raise DamagedError("it ends early")
        found += more
    return found


def _from_lzma(compressor: Compressor, data: bytes, size: int) -> bytes:
    form, filters = _lzma_form(compressor.configuration)
    raw = filters if form == lzma.FORMAT_RAW else None
    return _bounded(lzma.LZMADecompressor(format=form, filters=raw), data, size)


def _lzma_form(configuration: Mapping[str, Any]) -> tuple[int, Any]:
    return configuration.get("format", _LZMA_DEFAULT_FORMAT), configuration.get("filters")


def _to_lzma(configuration: Mapping[str, Any], data: bytes) -> bytes:
    form, filters = _lzma_form(configuration)
    check, preset = configuration.get("check", -1), configuration.get("preset")
    return lzma.compress(data, format=form, check=check, preset=preset, filters=filters)


def _numcodecs(name: str) -> Any:
    """A module of numcodecs, or None."""
    try:
        return import_module(f"numcodecs.{name}")
    except ImportError:
        return None


def _from_zstd(compressor: Compressor, data: bytes, size: int) -> bytes:
    zstd = _numcodecs("zstd")
    if zstd is None:
        return _by_tensorstore(compressor, data, size)
    found = _decoded(zstd.decompress, data, size)
    # It fitted, so that decoding without a limit is safe; less than fits would have gone unnoticed.
    return found if _zstd_claim(data) in (None, size) else bytes(zstd.decompress(data))


def _zstd_claim(data: bytes) -> int | None:
    """The size that a first zstd frame claims to decode to, if it does (RFC 8878, section 3.1.1.1)."""
    flags = data[4]
    single = flags >> 5 & 1
    length = (single, 2, 4, 8)[flags >> 6]
    at = 6 - single + (0, 1, 2, 4)[flags & 3]
    return int.from_bytes(data[at : at + length], "little") + 256 * (length == 2) if length else None


def _from_blosc(compressor: Compressor, data: bytes, size: int) -> bytes:
    claimed = int.from_bytes(data[4:8], "little")
    coded = int.from_bytes(data[12:16], "little")
    if len(data) < _BLOSC_HEADER or claimed != size or coded != len(data):
        raise DamagedError(
            f"its blosc header speaks of {claimed} bytes in {coded}, and there are {size} in {len(data)}"
        )
    blosc = _numcodecs("blosc")
    return _decoded(blosc.decompress, data, size) if blosc else _by_tensorstore(compressor, data, size)


def _from_lz4(_: Compressor, data: bytes, size: int) -> bytes:
    claimed = int.from_bytes(data[:4], "little")
    if len(data) < 4 or claimed != size:
        raise DamagedError(f"its lz4 header speaks of {claimed} bytes, and there are {size}")
    lz4 = _numcodecs("lz4")
    if lz4 is None:
        raise _missing("lz4")
    return _decoded(lz4.decompress, data, size)


def _decoded(decoder: Callable[[bytes, Any], Any], data: bytes, size: int) -> bytes:
    """Decode into a buffer of the right size, beyond which the library never writes."""
    space = np.empty(size, np.uint8)
    decoder(data, space)
    return space.tobytes()


def _to_zstd(configuration: Mapping[str, Any], data: bytes) -> bytes:
    level, sealed = _level("zstd", configuration), bool(configuration.get("checksum", False))
    zstd = _numcodecs("zstd")
    if zstd is None:
        return _tensorstore_coded(Compressor("zstd", {"level": level}), data)
    return bytes(zstd.compress(data, level=level, checksum=sealed))


def _to_blosc(configuration: Mapping[str, Any], data: bytes) -> bytes:
    name, shuffle = configuration.get("cname", "lz4"), configuration.get("shuffle", 1)
    shuffle = _BLOSC_SHUFFLES.get(shuffle, shuffle)
    size, block = configuration.get("typesize", 1), configuration.get("blocksize", 0)
    if name not in _BLOSC_NAMES or shuffle not in (-1, 0, 1, 2):
        raise DamagedError("blosc has no such compressor or no such way to shuffle")
    if type(size) is not int or not 1 <= size <= 255 or type(block) is not int or not 0 <= block < 1 << 31:
        raise DamagedError("blosc has no such element size or no such block size")
    level = _level("blosc", configuration, "clevel")
    blosc = _numcodecs("blosc")
    if blosc is None:
        wanted = {"cname": name, "clevel": level, "shuffle": shuffle, "typesize": size, "blocksize": block}
        wanted["shuffle"] = next((k for k, v in _BLOSC_SHUFFLES.items() if v == shuffle), "shuffle")
        return _tensorstore_coded(Compressor("blosc", wanted), data)
    return bytes(blosc.compress(data, name.encode(), level, shuffle=shuffle, blocksize=block, typesize=size))


def _to_lz4(configuration: Mapping[str, Any], data: bytes) -> bytes:
    lz4 = _numcodecs("lz4")
    if lz4 is None:
        raise _missing("lz4")
    acceleration = configuration.get("acceleration", 1)
    if type(acceleration) is not int or not 0 <= acceleration <= 65537:
        raise DamagedError(f"lz4 has no acceleration {str(acceleration)[:20]}")
    return bytes(lz4.compress(data, acceleration=acceleration))


def _missing(name: str) -> MissingExtraError:
    return MissingExtraError("numcodecs", "zarr", f"a chunk compressed by {name}")


def _tensorstore_array(compressor: Compressor, size: int) -> Any:
    """An array in memory of one chunk of bytes, whose only codec is this one."""
    try:
        tensorstore = import_module("tensorstore")
    except ImportError:
        raise _missing(compressor.name) from None
    codecs = [{"name": "bytes"}, {"name": compressor.name, "configuration": dict(compressor.configuration)}]
    grid = {"name": "regular", "configuration": {"chunk_shape": [size]}}
    metadata = {"data_type": "uint8", "shape": [size], "chunk_grid": grid, "codecs": codecs}
    spec = {"driver": "zarr3", "kvstore": "memory://", "metadata": metadata, "create": True}
    return tensorstore.open({**spec, "store_data_equal_to_fill_value": True}).result()


def _by_tensorstore(compressor: Compressor, data: bytes, size: int) -> bytes:
    # What decoding needs to know is in the data; version 2 writes the rest in another form.
    array = _tensorstore_array(Compressor(compressor.name, {}), size)
    array.kvstore["c/0"] = data
    return bytes(array.read().result().tobytes())


def _tensorstore_coded(compressor: Compressor, data: bytes) -> bytes:
    array = _tensorstore_array(compressor, len(data))
    array.write(np.frombuffer(data, np.uint8)).result()
    return bytes(array.kvstore["c/0"])


_DECODERS: dict[str, Callable[[Compressor, bytes, int], bytes]] = {
    "gzip": _inflate(31),
    "zlib": _inflate(15),
    "bz2": lambda _, data, size: _bounded(bz2.BZ2Decompressor(), data, size),
    "lzma": _from_lzma,
    "zstd": _from_zstd,
    "blosc": _from_blosc,
    "lz4": _from_lz4,
}
_ENCODERS: dict[str, Callable[[Mapping[str, Any], bytes], bytes]] = {
    # No time of day in the header: the same words give the same bytes.
    "gzip": lambda c, data: gzip.compress(data, _level("gzip", c), mtime=0),
    "zlib": lambda c, data: zlib.compress(data, _level("zlib", c)),
    "bz2": lambda c, data: bz2.compress(data, _level("bz2", c)),
    "lzma": _to_lzma,
    "zstd": _to_zstd,
    "blosc": _to_blosc,
    "lz4": _to_lz4,
}
