"""Loaders of PyTorch and of what is built on it: Lightning, transformers, distributed checkpoints."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ckptflip.loaders.probes import Words

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def words(found: Mapping[str, torch.Tensor]) -> Words:
    """Tensors as unsigned words, whatever their dtype."""
    return {name: _words(t.detach()) for name, t in found.items()}


def _words(tensor: torch.Tensor) -> Any:
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    size = plain.itemsize
    # Copies are made of integers: no float instruction can quieten a signalling NaN.
    return plain.view(_SAME_SIZE[size]).contiguous().reshape(-1).numpy().view(np.dtype(f"u{size}"))


def model() -> torch.nn.Sequential:
    """A small model with a statistic and a counter."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))


def _leaves(state: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of nested containers, parts of a name joined by /."""
    if isinstance(state, torch.Tensor):
        yield name, state
    pairs = (
        state.items() if isinstance(state, Mapping) else enumerate(state) if isinstance(state, list) else ()
    )
    for key, value in pairs:
        yield from _leaves(value, f"{name}/{key}" if name else str(key))


class Zip:
    """A training state of a model and Adam."""

    mmap = False

    def write(self, folder: Path) -> Path:
        """Write with `torch.save`."""
        network = model()
        optimizer = torch.optim.Adam(network.parameters())
        network(torch.ones(2, 5)).sum().backward()
        optimizer.step()
        torch.save({"model": network.state_dict(), "optimizer": optimizer.state_dict()}, folder / "state.pt")
        return folder / "state.pt"

    def load(self, path: Path) -> Words:
        """Read with `torch.load`."""
        return words(dict(_leaves(torch.load(path, weights_only=True, mmap=self.mmap))))


class MappedZip(Zip):
    """The same, mapped into memory."""

    mmap = True


class Script:
    """A traced model."""

    def write(self, folder: Path) -> Path:
        """Write with `torch.jit.save`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript says that it is deprecated; its files live on
            torch.jit.save(torch.jit.trace(model().eval(), torch.ones(2, 5)), folder / "traced.pt")
        return folder / "traced.pt"

    def load(self, path: Path) -> Words:
        """Read with `torch.jit.load`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return words(torch.jit.load(path).state_dict())


class Safetensors:
    """safetensors as PyTorch tensors."""

    def write(self, folder: Path) -> Path:
        """Write with safetensors."""
        from safetensors.torch import save_file

        save_file(model().state_dict(), folder / "model.safetensors")
        return folder / "model.safetensors"

    def load(self, path: Path) -> Words:
        """Read with safetensors."""
        from safetensors.torch import load_file

        return words(load_file(path))


class Lightning:
    """A checkpoint of Lightning's trainer."""

    def write(self, folder: Path) -> Path:
        """Write with a Trainer, after one step of training."""
        import logging

        import lightning

        for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = lightning.Trainer(
                max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            )  # fmt: skip
            trainer.fit(_module(), torch.utils.data.DataLoader(torch.ones(2, 5), batch_size=2))
            trainer.save_checkpoint(folder / "last.ckpt")
        return folder / "last.ckpt"

    def load(self, path: Path) -> Words:
        """Read with `load_from_checkpoint`, and the optimizer's state beside it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = type(_module()).load_from_checkpoint(path, map_location="cpu", weights_only=True)
        rest = torch.load(path, weights_only=True)
        found = {f"state_dict/{k}": v for k, v in network.state_dict().items()}
        return words(found | {k: v for k, v in _leaves(rest) if not k.startswith("state_dict/")})


def _module() -> Any:
    import lightning

    class Network(lightning.LightningModule):  # type: ignore[misc]
        """The small model, trained to give nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.network = model()

        def training_step(self, batch: Any, _: int) -> Any:
            return self.network(batch).square().sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    return Network()


class Pretrained:
    """A tiny transformer in several shards."""

    name = "model.safetensors.index.json"

    def write(self, folder: Path) -> Path:
        """Write with `save_pretrained`."""
        _tiny().save_pretrained(folder, max_shard_size="2KB")
        (folder / "config.json").unlink()  # a setting, and no part of the checkpoint
        return folder / self.name

    def load(self, path: Path) -> Words:
        """Read with `from_pretrained`."""
        tiny = _tiny()
        with tempfile.TemporaryDirectory() as name:
            # The loader wants the index under the name that it gave it.
            folder = shutil.copytree(path.parent, Path(name) / "model")
            (folder / path.name).replace(folder / self.name)
            return words(dict(type(tiny).from_pretrained(folder, config=tiny.config).state_dict()))


def _tiny() -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=12,
        )
    )  # fmt: skip


class Distributed:
    """A distributed checkpoint, written by one process."""

    def write(self, folder: Path) -> Path:
        """Write with `torch.distributed.checkpoint`."""
        import torch.distributed.checkpoint as dcp

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({"model": model().state_dict()}, checkpoint_id=folder / "step-1")
        return folder / "step-1"

    def load(self, path: Path) -> Words:
        """Read with `torch.distributed.checkpoint`."""
        import torch.distributed.checkpoint as dcp

        state = {k: torch.zeros_like(v) for k, v in model().state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load({"model": state}, checkpoint_id=path)
        return words({f"model/{k}": v for k, v in state.items()})
