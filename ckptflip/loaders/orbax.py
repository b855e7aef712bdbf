"""Loaders of Orbax, for checkpoints of JAX programs."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from ckptflip.loaders.arrays import arrays, words
from ckptflip.loaders.probes import Words

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _tree() -> dict[str, Any]:
    import jax.numpy as jnp

    found = arrays()
    logging.getLogger("absl").setLevel(logging.ERROR)
    return {
        "params": {
            "kernel": jnp.asarray(found["conv.weight"]),
            "bias": jnp.asarray(found["norm.running_mean"]),
        },
        "step": jnp.asarray(found["step"].astype("int32")),
    }


class Ocdbt:
    """As Orbax writes unless told otherwise: one key-value store, zstd."""

    def write(self, folder: Path) -> Path:
        """Write with `StandardCheckpointer`."""
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as writer:
            writer.save(folder.resolve() / "step-1", _tree())
        return folder / "step-1"

    def load(self, path: Path) -> Words:
        """Read with `StandardCheckpointer`."""
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as reader:
            return _flat(reader.restore(path.resolve(), _tree()))


class Plain:
    """One key-value store without compression."""

    def write(self, folder: Path) -> Path:
        """Write with `PyTreeCheckpointer`."""
        import orbax.checkpoint as ocp

        handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        with ocp.Checkpointer(handler) as writer:
            writer.save(folder.resolve() / "step-1", _tree())
        return folder / "step-1"

    def load(self, path: Path) -> Words:
        """Read with `PyTreeCheckpointer`."""
        import orbax.checkpoint as ocp

        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return _flat(reader.restore(path.resolve(), item=_tree()))


def _flat(tree: dict[str, Any]) -> Words:
    found = {f"params/{k}": v for k, v in tree["params"].items()} | {"step": tree["step"]}
    return words(found)
