"""Tensor parallelism as the model sees it: fairscale's model-parallel group, of one unless someone set up more."""

import contextlib
import io

import torch.distributed as dist
from fairscale.nn.model_parallel import initialize, mappings
from torch import Tensor


def ensure_model_parallel() -> None:
    """Makes fairscale's groups, for this process alone, where nobody has made them yet."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not initialize.model_parallel_is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):  # fairscale announces its groups with print
            initialize.initialize_model_parallel(dist.get_world_size())


def model_parallel_size() -> int:
    """Ranks that share each layer."""
    return initialize.get_model_parallel_world_size()


def split(count: int, what: str) -> int:
    """This rank's part of `count`; ValueError when it does not divide, with the sizes that do."""
    size = model_parallel_size()
    if count % size:
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        raise ValueError(f"{what} ({count}) does not divide over {size} tensor-parallel ranks; these do: {divisors}")
    return count // size


def reduce(x: Tensor) -> Tensor:
    """Sum of x over the tensor-parallel ranks; x itself where there is one, without fairscale's dispatch."""
    return x if model_parallel_size() == 1 else mappings.reduce_from_model_parallel_region(x)
