"""Lightning with two processes on gloo: writes what each rank holds after the third step, and what it fired.

python lightning_ddp.py OUT RANKS
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from torch_runs import X, Y, recorded, small_model, words_of  # noqa: E402

from ckptflip.callbacks import InjectionSchedule, LightningInjector  # noqa: E402
from ckptflip.faults import Policy  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = small_model()

    def training_step(self, batch, index):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Look(pl.Callback):
    def on_train_batch_end(self, trainer, module, *rest):
        if trainer.global_step != 3:
            return
        injector = trainer.callbacks[0]
        weights = {n: w.tolist() for n, w in words_of(module).items() if n.endswith(("weight", "bias"))}
        words = [[*key, *values] for record in injector.records for key, values in recorded(record).items()]
        found = [None, None]
        mine = {"weights": weights, "words": words, "state": injector.state_dict()}
        torch.distributed.all_gather_object(found, mine)
        if trainer.global_rank == 0:
            Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    policy = Policy(roles=("weight",), tensors=("model/*",), count=4)
    injector = LightningInjector(InjectionSchedule(policy, seed=1, steps=2, ranks=sys.argv[2]))
    trainer = pl.Trainer(
        max_steps=3, accelerator="cpu", devices=2, strategy="ddp_spawn", callbacks=[injector, Look()],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = torch.utils.data.TensorDataset(X, Y)
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=4))
