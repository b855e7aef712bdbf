"""Hugging Face `Trainer`: checkpoints that are sealed as they are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ckptflip.errors import MissingExtraError
from ckptflip.protect.seals import seal
from ckptflip.protect.seals.sidecar import SUFFIX

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingExtraError("transformers", "callbacks", "Sealing the Trainer's checkpoints") from error


class TrainerSealer(TrainerCallback):  # type: ignore[misc]
    """Seals each folder ``checkpoint-N`` that the `Trainer` saves, with all that is in it.

    The seal lies beside the folder, and goes when the folder does (``save_total_limit``). To go on from one:
    ``trainer.train(resume_from_checkpoint=str(verified("out/checkpoint-500")))``.

    Args:
        repair: the share of a checkpoint's size for an erasure code; None: digests alone.
    """

    def __init__(self, *, repair: float | None = None) -> None:
        self._repair = repair

    def on_save(self, args: Any, state: Any, control: Any, **run: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        seal(folder / f"checkpoint-{state.global_step}", repair=self._repair, overwrite=True)
        for left in folder.glob(f"checkpoint-*{SUFFIX}"):
            if not left.with_name(left.name.removesuffix(SUFFIX)).exists():
                left.unlink()
