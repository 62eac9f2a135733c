"""Fills parameters from sources: compares first, then copies piece by piece."""

import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from model.checkpoint.errors import CheckpointError
from model.checkpoint.progress import LoadingProgress
from model.checkpoint.slices import rank_region
from model.checkpoint.source import Region, TensorSource

logger = logging.getLogger(__name__)

PIECE_ELEMENTS = 1 << 20
"""A tensor is copied in pieces of about this size, so that dequantizing needs little memory beside the model's."""

_MOST_NAMES = 20


def load_parameters(
    parameters: Mapping[str, Tensor],
    sources: Mapping[str, TensorSource],
    location: str,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Copies the slices of `rank` from `sources` into `parameters`, converting to their dtypes.

    Raises CheckpointError that lists all missing, extra and mis-shaped tensors, before any copy.
    """
    regions = _matched(parameters, sources, location, rank, world_size)
    begin = time.monotonic()
    num_bytes = sum(parameter.nbytes for parameter in parameters.values())
    pieces = (
        (parameter.detach()[part], sources[name], region)
        for name, parameter in parameters.items()
        for part, region in _pieces(regions[name])
    )
    with LoadingProgress(num_bytes, visible=rank == 0) as progress, _threads() as threads:
        for copied in threads.map(lambda piece: _copy(*piece), pieces):
            progress.advance(copied)
    seconds = time.monotonic() - begin
    logger.info("Loaded %d tensors, %.2f GB, in %.1f s from %s", len(parameters), num_bytes / 1e9, seconds, location)


def _copy(target: Tensor, source: TensorSource, region: Region) -> int:
    """Fills `target`; the number of its bytes."""
    with torch.no_grad():
        target.copy_(source.read(region))
    return target.nbytes


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch has, each for whole pieces.

    Torch's own threads meet after every small operation, and wait for the one that a busy machine
    holds up: ten times slower there.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(num_threads, thread_name_prefix="checkpoint") as threads:
            yield threads
    finally:
        torch.set_num_threads(num_threads)


def _matched(
    parameters: Mapping[str, Tensor],
    sources: Mapping[str, TensorSource],
    location: str,
    rank: int,
    world_size: int,
) -> dict[str, Region]:
    """Parameter name -> what to read for it."""
    faults = [
        *_listed("missing", [name for name in parameters if name not in sources]),
        *_listed("extra", [name for name in sources if name not in parameters]),
    ]
    regions: dict[str, Region] = {}
    misshapen = []
    for name, parameter in parameters.items():
        if name not in sources:
            continue
        shape, wanted = sources[name].shape, tuple(parameter.shape)
        try:
            regions[name] = rank_region(name, shape, rank, world_size) if len(shape) == len(wanted) else ()
        except CheckpointError as error:
            misshapen.append(str(error))
            continue
        held = tuple(part.stop - part.start for part in regions[name])
        if held != wanted:
            share = f", {list(held)} of it for each of {world_size} ranks" if world_size > 1 and held else ""
            misshapen.append(f"{name} ({list(shape)}{share}; the model has {list(wanted)})")
    faults += _listed("mis-shaped", misshapen)
    if faults:
        raise CheckpointError(f"{location} does not fit the model: {'; '.join(faults)}")
    return regions


def _listed(fault: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return [f"{len(names)} {fault}: {', '.join(names[:_MOST_NAMES])}{more}"]


def _pieces(region: Region) -> Iterator[tuple[Region, Region]]:
    """Cuts `region` along its first dimensions: parts of the parameter, and the region of the source for each."""
    rows, *rest = region
    row_elements = max(1, torch.Size(part.stop - part.start for part in rest).numel())
    if row_elements > PIECE_ELEMENTS:
        for row in range(rows.start, rows.stop):
            for part, inner in _pieces(tuple(rest)):
                yield (slice(row - rows.start, row - rows.start + 1), *part), (slice(row, row + 1), *inner)
        return
    step = max(1, PIECE_ELEMENTS // row_elements)
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        whole = [slice(0, part.stop - part.start) for part in rest]
        yield (slice(start - rows.start, stop - rows.start), *whole), (slice(start, stop), *rest)
