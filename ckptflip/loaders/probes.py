"""The loaders that are asked, by format, and the modules that know how to call each."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any, Protocol, cast

from msgspec import Struct
from numpy.typing import NDArray

Words = Mapping[str, "NDArray[Any]"]


class Calls(Protocol):
    """What a probe's module offers: a class with two functions."""

    def write(self, folder: Path) -> Path:
        """Write a small checkpoint into an empty folder; returns it as its library names it."""
        ...

    def load(self, path: Path) -> Words:
        """Read it with the loader: the words of every tensor, by name, as the catalogue calls it."""
        ...


class Probe(Struct, frozen=True):
    """One loader of one format.

    Attributes:
        name: short, and unique.
        format: as users call it.
        loader: the function that reads.
        package: the library's name among installed packages.
        needs: other packages that must be there.
        calls: module and class that write and read.
        covered: what stored checksum covers tensor data, if any.
        exact: whether an alteration that is taken back gives the same bytes.
        patched: whether words lie in the file as they are.
    """

    name: str
    format: str
    loader: str
    package: str
    calls: str
    needs: tuple[str, ...] = ()
    covered: str = "none"
    exact: bool = True
    patched: bool = True

    def missing(self) -> str | None:
        """The package that is not installed; None if all are."""
        for package in (self.package, *self.needs):
            if util.find_spec(_MODULES.get(package, package)) is None:
                return package
        return None

    def version(self) -> str:
        """The library's version."""
        return metadata.version(self.package)

    def load_calls(self) -> Calls:
        """The functions, imported with their library."""
        module, _, name = self.calls.partition(":")
        return cast("Calls", getattr(import_module(f"ckptflip.loaders.{module}"), name)())


_MODULES = {"orbax-checkpoint": "orbax", "scikit-learn": "sklearn"}
_ZIP = "CRC-32 of the zip member"
_BUNDLE = "CRC-32C of the tensor and of the index block"
_CHUNK = "CRC-32C of the chunk"
_TORCH = ("torch",)
_JAX = ("jax", "tensorstore")
# Stored compressed: other bytes may decode to the same words.
_CODED: Any = {"patched": False, "exact": False}

PROBES = (
    Probe("h5py", "HDF5", "h5py.File", "h5py", "arrays:HDF5"),
    Probe(
        "h5py-fletcher", "HDF5, Fletcher-32", "h5py.File", "h5py", "arrays:HDF5Fletcher", (), "Fletcher-32"
    ),
    Probe("keras", "Keras .keras", "keras.saving.load_model", "keras", "keras:Archive", _TORCH, _ZIP),
    Probe("keras-weights", "Keras .weights.h5", "Model.load_weights", "keras", "keras:Weights", _TORCH),
    Probe("keras-shards", "Keras .weights.json", "Model.load_weights", "keras", "keras:Shards", _TORCH),
    Probe("keras-legacy", "Keras legacy .h5", "keras.saving.load_model", "keras", "keras:Legacy", _TORCH),
    Probe("torch", "PyTorch zip", "torch.load", "torch", "pytorch:Zip", (), _ZIP),
    Probe("torch-mmap", "PyTorch zip", "torch.load(mmap=True)", "torch", "pytorch:MappedZip", (), _ZIP),
    Probe("torchscript", "TorchScript", "torch.jit.load", "torch", "pytorch:Script", (), _ZIP),
    Probe("lightning", "Lightning", "load_from_checkpoint", "lightning", "pytorch:Lightning", _TORCH, _ZIP),
    Probe("dcp", "torch distributed", "dcp.load", "torch", "pytorch:Distributed", (), _ZIP),
    Probe("safetensors", "safetensors", "safetensors.numpy", "safetensors", "arrays:Safetensors"),
    Probe(
        "safetensors-torch", "safetensors", "safetensors.torch", "safetensors", "pytorch:Safetensors", _TORCH
    ),
    Probe(
        "transformers", "safetensors, shards", "from_pretrained", "transformers", "pytorch:Pretrained", _TORCH
    ),
    Probe(
        "tf-reader",
        "TensorBundle",
        "tf.train.load_checkpoint",
        "tensorflow",
        "tensorflow:Reader",
        (),
        _BUNDLE,
    ),
    Probe(
        "tf-restore", "TensorBundle", "Checkpoint.restore", "tensorflow", "tensorflow:Restore", (), _BUNDLE
    ),
    Probe(
        "saved-model", "SavedModel", "tf.saved_model.load", "tensorflow", "tensorflow:SavedModel", (), _BUNDLE
    ),
    Probe("npz", "npz", "numpy.load", "numpy", "arrays:Npz", (), _ZIP),
    Probe("npz-deflated", "npz, deflated", "numpy.load", "numpy", "arrays:NpzDeflated", (), _ZIP, **_CODED),
    Probe("npy", "npy", "numpy.load", "numpy", "arrays:Npy"),
    Probe("zarr", "zarr v3, zstd", "zarr.open_group", "zarr", "arrays:Zarr", **_CODED),
    Probe("zarr-plain", "zarr v3, raw", "zarr.open_group", "zarr", "arrays:ZarrPlain"),
    Probe("zarr-crc32c", "zarr v3, crc32c", "zarr.open_group", "zarr", "arrays:ZarrChecked", (), _CHUNK),
    Probe("zarr-shards", "zarr v3, sharded", "zarr.open_group", "zarr", "arrays:ZarrSharded", (), _CHUNK),
    Probe("orbax", "Orbax, zstd", "StandardCheckpointer", "orbax-checkpoint", "orbax:Ocdbt", _JAX, **_CODED),
    Probe(
        "orbax-plain", "Orbax, raw", "PyTreeCheckpointer", "orbax-checkpoint", "orbax:Plain", _JAX, **_CODED
    ),
    Probe("gguf", "GGUF", "gguf.GGUFReader", "gguf", "models:Gguf"),
    Probe("onnx", "ONNX", "onnx.load", "onnx", "models:Onnx"),
    Probe("onnx-external", "ONNX, external data", "onnx.load", "onnx", "models:OnnxExternal"),
)
