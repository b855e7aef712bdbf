"""One of several processes that save a distributed checkpoint: RANK WORLD PORT FOLDER."""

import os
import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

warnings.simplefilter("ignore")


def main(rank: int, world: int, port: str, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 3))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(4, 5)).sum().backward()
    optimizer.step()
    model_state, optimizer_state = get_state_dict(model, optimizer)
    # Both ranks have all of it, and share out the writing.
    plain = torch.nn.Sequential()
    for name, given, made in (("conv1", 2, 3), ("conv2", 3, 4), ("head", 4, 2)):
        plain.add_module(name, torch.nn.Linear(given, made))
    plain_optimizer = torch.optim.Adam(plain.parameters())
    plain(torch.ones(4, 2)).sum().backward()
    plain_optimizer.step()

    def split(tensor, *placement):
        return distribute_tensor(tensor, mesh, placement)

    state = {
        "plain": {"model": plain.state_dict(), "optimizer": plain_optimizer.state_dict()},
        "model": model_state,
        "optim": optimizer_state,
        "columns": split(torch.arange(24.0).reshape(4, 6), Shard(1)),
        "replica": split(torch.arange(4.0), Replicate()),
        "half": split(torch.arange(10, dtype=torch.bfloat16).reshape(5, 2), Shard(0)),
        "complex": split(torch.arange(6.0).to(torch.complex64).reshape(3, 2), Shard(0)),
        "few": split(torch.arange(1.0), Shard(0)),  # the second rank gets nothing
        "epoch": 3,
    }
    dcp.save(state, checkpoint_id=folder)
    dist.barrier()
    # Threads of gloo may abort an interpreter that shuts down.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
