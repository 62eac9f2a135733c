"""Runs a function on real tensor-parallel ranks, processes that talk through gloo."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Tensor], arguments: tuple) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    torch.save(function(rank, world_size, *arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(folder: Path, world_size: int, function: Callable[..., Tensor], *arguments: object) -> list[Tensor]:
    """What `function(rank, world_size, *arguments)` returns on each rank; `folder` is for the processes' own use."""
    folder.mkdir()
    arguments_of_rank = (world_size, str(folder), function, arguments)
    mp.start_processes(_rank, arguments_of_rank, world_size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]
