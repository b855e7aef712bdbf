"""One process of a distributed run, started by test_ddp.py: trains, is hit, and stores what it holds.

python ddp_process.py FOLDER RANK
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from ckptflip import torch_h5
from ckptflip.callbacks import InjectionSchedule, Injector
from ckptflip.faults import Policy

WORLD = 2
HIT, STEPS = 3, 6
# Name: the ranks that are hit, the tensors and the bits.
CASES = {
    "one": (1, "model/*.weight", "mantissa"),
    "all": (None, "model/*.weight", "mantissa"),
    "buffer": (1, "model/shift", "mantissa"),
    "gradients": (0, "gradients/second.bias", "29"),
}


class Net(torch.nn.Module):
    """Two layers with a constant buffer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)
        self.register_buffer("shift", torch.linspace(-1, 1, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x) + self.shift))


def run(folder: Path, rank: int, ranks: int | None, tensors: str, bits: str) -> None:
    """Store the state after the step that is hit and at the end, one file each for every rank."""
    torch.manual_seed(0)
    model = Net()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    policy = Policy(tensors=(tensors,), bits=bits, count=3)
    schedule = InjectionSchedule(policy, seed=5, steps=HIT, ranks=ranks)
    draws = torch.Generator().manual_seed(rank)
    gradients = tensors.startswith("gradients")
    with Injector(schedule, parallel, optimizer, gradients=gradients, records=folder / "records") as injector:
        for step in range(STEPS):
            optimizer.zero_grad()
            parallel(torch.randn(5, 4, generator=draws)).square().mean().backward()
            optimizer.step()
            if step in (HIT, STEPS - 1):
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch_h5.save(state | {"injector": injector.state_dict()}, folder / f"{step}_{rank}.h5")


def main(folder: Path, rank: int) -> None:
    """Run every case."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD
    )
    for name, case in CASES.items():
        (folder / name).mkdir(exist_ok=True)
        run(folder / name, rank, *case)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
