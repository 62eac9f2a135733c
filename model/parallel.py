"""Parallelism as the model sees it: fairscale's groups, of one rank unless someone set up more.

Ranks of a tensor-parallel group share each layer; stages of a pipeline follow each other
(stage.py). Whoever made the groups may have put process groups there that are `Direct`;
serving calls those without torch.distributed's dispatch, which costs more than the sum itself.
"""

import contextlib
import io
from typing import Any, Protocol

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize, mappings
from torch import Tensor

from model.stage import Stage


class Direct(Protocol):
    """What a process group may offer beside c10d's operations. Tensors are contiguous."""

    def sum_in_place(self, x: Tensor) -> Tensor:
        """x, become the sum over ranks."""

    def gather_columns(self, x: Tensor) -> Tensor:
        """On the group's first rank [rows, size * columns], the ranks' x [rows, columns] side by side; elsewhere x."""

    def hand_over(self, x: Tensor, source: int, target: int) -> None:
        """x of rank `source` into x of rank `target` (ranks of the group). Every rank of the group takes part."""


def ensure_model_parallel() -> None:
    """Makes fairscale's groups, for this process alone, where nobody has made them yet."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not initialize.model_parallel_is_initialized():
        initialize_model_parallel(dist.get_world_size())


def initialize_model_parallel(tensor: int, stages: int = 1, **backends: str) -> None:
    """fairscale's, without the lines that it prints. backends: names of torch.distributed, by fairscale's keywords."""
    with contextlib.redirect_stdout(io.StringIO()):
        initialize.initialize_model_parallel(tensor, stages, **backends)


def model_parallel_size() -> int:
    """Ranks that share each layer."""
    return initialize.get_model_parallel_world_size()


def model_parallel_rank() -> int:
    """This process's place among them."""
    return initialize.get_model_parallel_rank()


def stage() -> Stage:
    """This process's pipeline stage."""
    ranks = initialize.get_pipeline_parallel_ranks()
    return Stage(ranks.index(dist.get_rank()), len(ranks))


def split(count: int, what: str) -> int:
    """This rank's part of `count`; ValueError when it does not divide, with the sizes that do."""
    size = model_parallel_size()
    if count % size:
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        raise ValueError(f"{what} ({count}) does not divide over {size} tensor-parallel ranks; these do: {divisors}")
    return count // size


def reduce(x: Tensor) -> Tensor:
    """Sum of x over the tensor-parallel ranks, in place; x itself where there is one. For serving: no gradients."""
    group = initialize.get_model_parallel_group()
    if group.size() == 1:
        return x
    direct = _direct(group)
    return mappings.reduce_from_model_parallel_region(x) if direct is None else direct.sum_in_place(x)


def gather_columns(x: Tensor) -> Tensor:
    """[rows, columns of all tensor-parallel ranks] of x [rows, columns], on the first rank at least. For serving."""
    group = initialize.get_model_parallel_group()
    if group.size() == 1:
        return x
    direct = _direct(group)
    if direct is None:
        return mappings.gather_from_model_parallel_region(x)
    return direct.gather_columns(x.contiguous())


def hand_over(x: Tensor, source: int, target: int) -> None:
    """x of pipeline stage `source` into x of stage `target`. Every stage takes part."""
    group = initialize.get_pipeline_parallel_group()
    direct = _direct(group)
    if direct is None:
        dist.broadcast(x, initialize.get_pipeline_parallel_ranks()[source], group)
    else:
        direct.hand_over(x, source, target)


def least(number: int) -> int:
    """The smallest `number` of all ranks."""
    smallest = torch.tensor(number)
    if dist.get_world_size() > 1:
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return int(smallest)


def _direct(group: Any) -> Direct | None:
    return group if hasattr(group, "sum_in_place") else None
