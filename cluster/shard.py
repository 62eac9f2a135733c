"""One rank: its slice of the model, its KV blocks, its sampler.

Which slice follows from fairscale's groups (model/parallel.py), which are of one rank unless
cluster/parallel.py has made larger ones. Every rank of a group does the same calls in the same order.
"""

import logging
import os
import time
from collections.abc import Callable

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import LLM, ModelArgs
from model.checkpoint import open_checkpoint
from model.checkpoint.slices import check_world_size
from model.datatypes import PagedBatch
from model.kernels import cpu
from model.kv_cache import PagedCache
from model.kv_groups import BlockNeeds, kv_groups, layers_of_all_stages, layers_per_block
from model.model import ExpertsOfLayer
from model.packed import PackedCache, can_pack, pack
from model.parallel import ensure_model_parallel, least, model_parallel_rank, model_parallel_size, stage
from model.sampling import SampledTokens, SamplingBatch, sample

logger = logging.getLogger(__name__)

PROBE_SECONDS = 1.0
"""For an expert to answer a probe. A step waits for longer."""


class Shard:
    """Loads a checkpoint, sizes the KV cache, runs steps.

    path: as `open_checkpoint` takes it. dtype: "bfloat16" or "float32".
    kv_cache_memory: bytes for keys and values, over all ranks together; None takes `kv_cache_memory_share`
    of the memory that is free once the weights are loaded, and no more than `max_num_seqs` whole
    sequences need.
    max_num_batched_tokens: most tokens of a step, which chunked layers keep beside a chunk; None is a whole sequence.
    num_threads: torch's; None takes this rank's share of the CPUs that this process may run on.
    ranks_on_host: how many share the memory and the CPUs.
    experts: called once, in the process that computes: who computes the routed experts of each layer;
    None for this process.

    Raises ValueError when the sizes do not fit the checkpoint or the memory.
    """

    def __init__(
        self,
        *,
        path: str,
        dtype: str,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int | None = None,
        max_num_batched_tokens: int | None = None,
        kv_cache_memory: int | None = None,
        kv_cache_memory_share: float = 0.25,
        num_threads: int | None = None,
        ranks_on_host: int = 1,
        experts: Callable[[], ExpertsOfLayer] | None = None,
    ) -> None:
        # Ray gives actors one OpenMP thread; the model wants all its CPUs.
        cpu.set_num_threads(num_threads or max(1, len(os.sched_getaffinity(0)) // ranks_on_host))
        ensure_model_parallel()
        started = time.monotonic()
        logger.info("loading %s", path)
        checkpoint = open_checkpoint(path)
        check_world_size(checkpoint.args, model_parallel_rank(), model_parallel_size())
        self.max_model_len = _model_len(max_model_len, checkpoint.args.max_seq_len)
        # Rotary tables are as long as what is served, not as Llama 4's ten million positions.
        self.args = checkpoint.args.model_copy(update={"max_seq_len": self.max_model_len})
        self.dtype: torch.dtype = getattr(torch, dtype)
        model = _empty_model(self.args, self.dtype, None if experts is None else experts())
        rank, world_size = model_parallel_rank(), model_parallel_size()
        checkpoint.load_into(model, rank, world_size, experts=experts is None, stage=stage())
        packed = can_pack(self.args, self.dtype, block_size)
        self._model = pack(model) if packed else model
        logger.info(
            "loaded %s as %s in %.1f s (%s, %d threads)", path, dtype, time.monotonic() - started,
            "AVX512-BF16 kernels" if packed else "plain torch", torch.get_num_threads(),
        )  # fmt: skip

        self.block_size, self._groups = block_size, kv_groups(self.args)
        self.kv_chunks = tuple(group.chunk for group in self._groups)
        needs = BlockNeeds(self.kv_chunks, block_size, max_num_batched_tokens or self.max_model_len)
        self.num_blocks = self._count_blocks(needs, max_num_seqs, kv_cache_memory, kv_cache_memory_share, ranks_on_host)
        self.num_kv_tokens = needs.fitting(self.num_blocks)
        kind = PackedCache if packed else PagedCache
        self._cache = kind(self.args, self._kv_heads, self.num_blocks, block_size, self.dtype, self._layers)
        logger.info(
            "KV cache: %d tokens in %d blocks, %.1f sequences of max_model_len (%d), %.0f MiB of them here",
            self.num_kv_tokens, self.num_blocks, self.num_blocks / needs.held(self.max_model_len), self.max_model_len,
            self.num_blocks * self._block_bytes(own=True) / 2**20,
        )  # fmt: skip
        logger.info("warming up")
        self._warm_up()

    def step(self, batch: PagedBatch, sampling: SamplingBatch) -> SampledTokens:
        """Runs the tokens of `batch` and samples one token for each of its logit rows."""
        return sample(self.logits(batch), sampling)

    def logits(self, batch: PagedBatch) -> Tensor:
        """float [num_rows, vocab_size] of the rows that `batch` asks for; on rank 0, elsewhere a part."""
        return self._model.step(batch, self._cache)

    def encode_image(self, tiles: NDArray[np.uint8]) -> Tensor:
        """The embeddings of one image, for `PagedBatch.image_embeddings`; the same in any company.

        Of a pipeline, the first stage does it.

        tiles: uint8 [num_tiles, 3, height, width], as the front cuts them -> [num_tiles * tokens_per_tile, dim].
        """
        return self._model.embed_tiles(torch.tensor(tiles)).flatten(0, 1)

    def probe(self) -> None:
        """Has every routed expert on a server compute one row. Raises ExpertsUnavailable, which names those that did
        not answer within PROBE_SECONDS."""
        if self.args.moe_args is None:
            return
        every_k = torch.arange(self.args.moe_args.num_experts)
        x_kD = torch.zeros(len(every_k), self.args.dim, dtype=self.dtype)
        for block in self._model.blocks():
            experts = getattr(block.feed_forward, "experts", None)
            if experts is not None and experts.is_whole:
                experts.submit(x_kD, every_k, every_k).wait(PROBE_SECONDS)

    @property
    def sees(self) -> bool:
        """Whether `encode_image` is for this rank."""
        return self.args.vision_args is not None and stage().is_first

    @property
    def _kv_heads(self) -> int:
        return self.args.kv_heads // model_parallel_size()

    @property
    def _layers(self) -> range:
        return stage().layers(self.args.n_layers)

    def _count_blocks(
        self, needs: BlockNeeds, max_num_seqs: int, memory: int | None, share: float, ranks_on_host: int
    ) -> int:
        whole = needs.held(self.max_model_len)
        if memory is None:
            budget = int(psutil.virtual_memory().available * share) // ranks_on_host
            held = min(budget // self._block_bytes(own=True), max_num_seqs * whole)
        else:
            held = memory // self._block_bytes(own=False)
        held = least(held)
        if held < whole:
            raise ValueError(
                f"kv_cache_memory holds {needs.longest(held)} tokens of one sequence, fewer than "
                f"max_model_len ({self.max_model_len}): give it at least "
                f"{whole * self._block_bytes(own=False) / 2**20:.0f} MiB, or lower max_model_len"
            )
        return held

    def _block_bytes(self, *, own: bool) -> int:
        """Memory of a block on this rank, or on all together."""
        if own:
            kv_heads, depth = self._kv_heads, layers_per_block(self._groups, self._layers)
        else:
            kv_heads, depth = self.args.kv_heads, layers_of_all_stages(self.args, stage().count)
        return PagedCache.bytes_per_block(self.args, kv_heads, self.block_size, self.dtype, depth)

    def _warm_up(self) -> None:
        """Touches every weight once, so that the first request does not pay for it; experts on servers answer once."""
        if self.args.vision_args is not None and self.sees:
            size = self.args.vision_args.image_size
            self.encode_image(np.zeros((1, 3, size.height, size.width), np.uint8))
        length = min(self.block_size, self.max_model_len)
        self.logits(
            PagedBatch(
                tokens=torch.zeros(length, dtype=torch.int64),
                positions=torch.arange(length),
                query_starts=torch.tensor([0, length], dtype=torch.int32),
                context_lens=torch.tensor([length], dtype=torch.int32),
                block_tables=torch.zeros(len(self.kv_chunks), 1, 1, dtype=torch.int32),
                logit_rows=torch.tensor([length - 1]),
                num_decodes=0,
            )
        )
        self.probe()


def _model_len(wanted: int | None, limit: int) -> int:
    if wanted is not None and wanted > limit:
        raise ValueError(f"max_model_len ({wanted}) is above the checkpoint's context length ({limit})")
    return wanted or limit


def _empty_model(args: ModelArgs, dtype: torch.dtype, experts: ExpertsOfLayer | None) -> LLM:
    """A model whose parameters have memory but no values."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LLM(args, initialize=False, experts=experts).requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
