"""One of two processes that save sharded tables with TorchRec's names: RANK WORLD PORT FOLDER."""

import os
import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

warnings.simplefilter("ignore")
TABLE = "model.sparse_arch.embedding_bag_collection.embedding_bags.t_{}.weight"


def main(rank: int, world: int, port: str, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    table = torch.arange(40.0).reshape(10, 4)
    stored = torch.ops.quantized.embedding_bag_byte_prepack(table)
    state = {
        TABLE.format("rows"): distribute_tensor(table, mesh, (Shard(0),)),
        TABLE.format("columns"): distribute_tensor(table, mesh, (Shard(1),)),
        TABLE.format("int8"): distribute_tensor(stored, mesh, (Shard(0),)),
        TABLE.format("int8_columns"): distribute_tensor(stored, mesh, (Shard(1),)),
        # Table-wise: each rank has whole tables of its own.
        TABLE.format(f"of_rank_{rank}"): table + rank,
    }
    dcp.save(state, checkpoint_id=folder)
    dist.barrier()
    # Threads of gloo may abort an interpreter that shuts down.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
