"""Loaders that give plain arrays: h5py, numpy, safetensors, zarr."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptflip.bits import as_words
from ckptflip.loaders.probes import Words


def arrays() -> dict[str, NDArray[Any]]:
    """A small model's tensors: several dtypes, a scalar, enough words for some flips."""
    random = np.random.default_rng(0)
    return {
        "conv.weight": random.standard_normal((4, 3, 3)).astype("float32"),
        "conv.bias": random.standard_normal(4).astype("float64"),
        "norm.running_mean": random.standard_normal(40).astype("float16"),
        "step": np.array(5, "int64"),
    }


def words(found: Mapping[str, Any]) -> Words:
    """Arrays as unsigned words."""
    return {name: as_words(np.ascontiguousarray(a)) for name, a in found.items()}


class HDF5:
    """h5py, contiguous datasets."""

    options: Mapping[str, Any] = {}

    def write(self, folder: Path) -> Path:
        """Write with h5py."""
        import h5py

        with h5py.File(folder / "model.h5", "w") as file:
            for name, array in arrays().items():
                file.create_dataset(name, data=array, **(self.options if array.shape else {}))
        return folder / "model.h5"

    def load(self, path: Path) -> Words:
        """Read with h5py."""
        import h5py

        with h5py.File(path) as file:
            return words({name: file[name][()] for name in file})


class HDF5Fletcher(HDF5):
    """h5py, chunks with a Fletcher-32."""

    options: Mapping[str, Any] = {"fletcher32": True}


class Safetensors:
    """safetensors, as numpy arrays."""

    def write(self, folder: Path) -> Path:
        """Write with safetensors."""
        from safetensors.numpy import save_file

        save_file(arrays(), folder / "model.safetensors", metadata={"format": "np"})
        return folder / "model.safetensors"

    def load(self, path: Path) -> Words:
        """Read with safetensors."""
        from safetensors.numpy import load_file

        return words(load_file(path))


class Npz:
    """numpy's archive."""

    def write(self, folder: Path) -> Path:
        """Write with numpy."""
        np.savez(folder / "model.npz", **arrays())  # type: ignore[arg-type]
        return folder / "model.npz"

    def load(self, path: Path) -> Words:
        """Read with numpy."""
        with np.load(path) as found:
            return words({name: found[name] for name in found.files})


class NpzDeflated(Npz):
    """numpy's archive, deflated."""

    def write(self, folder: Path) -> Path:
        """Write with numpy."""
        np.savez_compressed(folder / "model.npz", **arrays())  # type: ignore[arg-type]
        return folder / "model.npz"


class Npy:
    """One array of numpy's, in Fortran order."""

    def write(self, folder: Path) -> Path:
        """Write with numpy."""
        np.save(folder / "embedding.npy", np.asfortranarray(arrays()["conv.weight"].reshape(6, 6)))
        return folder / "embedding.npy"

    def load(self, path: Path) -> Words:
        """Read with numpy."""
        return words({"array": np.load(path)})


class Zarr:
    """zarr v3 as it writes unless told otherwise: zstd, no checksum."""

    options: Mapping[str, Any] = {}

    def write(self, folder: Path) -> Path:
        """Write with zarr."""
        import zarr

        root = zarr.open_group(folder / "model.zarr", mode="w", zarr_format=3)
        for name, array in arrays().items():
            made = root.create_array(
                name.replace(".", "/"),
                shape=array.shape,
                dtype=array.dtype,
                chunks=tuple(max(1, n // 2) for n in array.shape),
                **self.more(array),
            )
            made[...] = array
        return folder / "model.zarr"

    def more(self, array: NDArray[Any]) -> Mapping[str, Any]:
        """Further options of one array."""
        return self.options

    def load(self, path: Path) -> Words:
        """Read with zarr."""
        import zarr

        root = zarr.open_group(path, mode="r")
        return words({n: root[n][...] for n in (name.replace(".", "/") for name in arrays())})


class ZarrPlain(Zarr):
    """zarr v3 without compression."""

    options: Mapping[str, Any] = {"compressors": None}


class ZarrChecked(Zarr):
    """zarr v3 without compression, a CRC-32C behind every chunk."""

    def more(self, array: NDArray[Any]) -> Mapping[str, Any]:
        """A checksum behind each chunk."""
        import zarr

        return {"compressors": [zarr.codecs.Crc32cCodec()]}


class ZarrSharded(ZarrChecked):
    """The same chunks, several in one file."""

    def more(self, array: NDArray[Any]) -> Mapping[str, Any]:
        """Two chunks a shard along every axis."""
        shards = {"shards": tuple(2 * max(1, n // 2) for n in array.shape)} if array.shape else {}
        return {**super().more(array), **shards}
