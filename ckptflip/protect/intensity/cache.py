"""Measured times on disk, in the user's cache folder: one JSON file for each device, versions and threads."""

from __future__ import annotations

import hashlib
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
import torch

from ckptflip import __version__
from ckptflip.checkpoints.files import temporary_beside
from ckptflip.processor import processor
from ckptflip.protect.intensity.roofline import Balance
from ckptflip.protect.native import kernels

SCHEMA = 1
_MOST = 16 << 20

Seconds = Annotated[float, msgspec.Meta(gt=0, lt=1e6)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Rate = Annotated[float, msgspec.Meta(gt=0)]


class CacheWarning(UserWarning):
    """A cache that cannot be used: measuring is done anew."""


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the times hold for: processor or GPU, versions, the compiled kernels' instructions, threads."""

    name: str
    torch: str
    ckptflip: str
    kernels: str
    threads: int
    dtype: str


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Times of one shape: seconds per call, by scheme."""

    rows: Count
    outputs: Count
    inputs: Count
    bias: bool
    seconds: dict[str, Seconds]


class Stored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file."""

    schema: int
    device: Device
    flops: Rate
    bandwidth: Rate
    entries: list[Entry]


Key = tuple[int, int, int, bool]


def this_device(device: torch.device, dtype: torch.dtype) -> Device:
    """The device as it is now.

    Args:
        device: CPU or GPU.
        dtype: of the weights.

    Example:
        >>> this_device(torch.device("cpu"), torch.float32).dtype
        'float32'
    """
    cuda = device.type == "cuda"
    compiled = kernels()
    return Device(
        name=torch.cuda.get_device_name(device) if cuda else processor(),
        torch=str(torch.__version__),
        ckptflip=__version__,
        kernels="none" if compiled is None else compiled.isa(),
        threads=0 if cuda else torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
    )


def path_of(device: Device, folder: Path | None = None) -> Path:
    """Where times of a device are kept: in a folder, by default under ``XDG_CACHE_HOME`` or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: relative paths are to be ignored.
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    digest = hashlib.sha256(msgspec.json.encode(device)).hexdigest()[:16]
    return (folder or root / "ckptflip" / "intensity") / f"{digest}.json"


def load(device: Device, folder: Path | None = None) -> tuple[Balance | None, dict[Key, dict[str, float]]]:
    """The balance and the times known of a device; nothing where there is no file, or none that can be used.

    Warns:
        CacheWarning: the file is damaged or not ours.
    """
    path = path_of(device, folder)
    try:
        if path.stat().st_size > _MOST:
            raise ValueError(f"larger than {_MOST >> 20} MiB")
        stored = msgspec.json.decode(path.read_bytes(), type=Stored)
        if stored.schema != SCHEMA or stored.device != device:
            raise ValueError("of another version or device")
        if not all("none" in entry.seconds for entry in stored.entries):
            raise ValueError("an entry has no time of the unchecked layer")
    except FileNotFoundError:
        return None, {}
    except (OSError, ValueError, RecursionError) as why:
        message = f"measured times in {path} cannot be used and are measured anew: {why}"
        warnings.warn(message, CacheWarning, stacklevel=2)
        return None, {}
    times = {(e.rows, e.outputs, e.inputs, e.bias): dict(e.seconds) for e in stored.entries}
    return Balance(stored.flops, stored.bandwidth), times


def store(
    device: Device, balance: Balance, times: dict[Key, dict[str, float]], folder: Path | None = None
) -> None:
    """Write what is known of a device; the file appears whole or not at all.

    Warns:
        CacheWarning: the folder cannot be written; the next process measures again.
    """
    path = path_of(device, folder)
    entries = [Entry(*key, seconds=times[key]) for key in sorted(times)]
    encoded = msgspec.json.encode(Stored(SCHEMA, device, balance.flops, balance.bandwidth, entries))
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(msgspec.json.format(encoded, indent=1))
        temporary.replace(path)
    except OSError as why:
        with suppress(OSError):
            temporary.unlink()
        message = f"measured times cannot be kept in {path.parent}: {why.strerror}"
        warnings.warn(message, CacheWarning, stacklevel=2)
